"""A whole vector from one rank to all, however long."""

from mpi4py import MPI

from ..arrays.backend import Array
from ..core.backoff import wait_until
from .staging import MOST, cut


def bcast_in_pieces(comm: MPI.Comm, x: Array, root: int = 0, most: int = MOST) -> None:
    """Copy `x` (n,) of rank `root`, in host memory, into `x` of all ranks of `comm`; collective.

    `most`: bytes of one call; the same on all ranks. Whoever waits yields the core.
    """
    for piece in cut(x, most):
        wait_until(comm.Ibcast(piece, root).Test)
