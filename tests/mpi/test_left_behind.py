"""A rank that does not respond is left behind by the others."""

from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from agnmpi.cluster.roles import CenterRole, WorkerRole
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.membership import Membership
from agnmpi.recovery import silent_workers

pytestmark = pytest.mark.mpi(min_size=2)


def no_create_from_group(*_):
    raise NotImplementedError("MPI_Comm_create_from_group is of MPI 4.0")


@pytest.mark.parametrize("standard", ["3.1", "4.0"])
def test_the_others_go_on(comm, standard, monkeypatch):
    if standard == "3.1":
        intracomm = SimpleNamespace(Create_from_group=no_create_from_group)
        monkeypatch.setattr(silent_workers, "MPI", SimpleNamespace(Intracomm=intracomm, Exception=MPI.Exception))
    workers, members = comm.size - 1, Membership(comm.size)
    center = Center(rules.agn(), np.zeros(1), workers)
    role = WorkerRole(center, [], workers)
    if comm.rank == 0:
        role = CenterRole(
            center, workers, SimpleNamespace(silent={workers - 1}, lost=set(), spares=[], progress=0), True
        )  # the last rank
    if comm.rank < comm.size - 1:
        living = silent_workers.leave_behind(comm, role, members, outlives_loss=False)
        assert (living.rank, living.size) == (comm.rank, comm.size - 1)
        assert living.allreduce(1) == comm.size - 1
        assert (members.hung, members.ranks) == ([comm.size - 1], [*range(comm.size - 1)])
        living.Free()
    comm.Barrier()
