"""What all ranks must hold alike: the model and its options."""

from collections.abc import Mapping

from mpi4py import MPI

from ..core.params import Layout
from ..transport.agreement import agree
from ..version import __version__


def agree_on_model(comm: MPI.Comm, layout: Layout, facts: Mapping[str, str]) -> None:
    """Refuse, on all ranks, parameters or `facts` that differ between them."""
    shapes = {f"parameter {name!r}": f"shape {shape}" for name, shape in zip(layout.names, layout.shapes)}
    agree(comm, {"agnmpi version": __version__, **facts, "dtype": layout.dtype, **shapes})
    agree(comm, {"order of parameters": ", ".join(layout.names)})
