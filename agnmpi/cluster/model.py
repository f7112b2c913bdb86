"""What must be equal on all ranks: the model and its options."""

from collections.abc import Mapping

from mpi4py import MPI

from ..core.params import Layout
from ..transport.agreement import require_equal
from ..version import __version__


def require_equal_model(comm: MPI.Comm, layout: Layout, facts: Mapping[str, str]) -> None:
    """Refuse, on all ranks, parameters or `facts` that differ between them."""
    shapes = {f"parameter {name!r}": f"shape {shape}" for name, shape in zip(layout.names, layout.shapes)}
    require_equal(comm, {"agnmpi version": __version__, **facts, "dtype": layout.dtype, **shapes})
    require_equal(comm, {"order of parameters": ", ".join(layout.names)})
