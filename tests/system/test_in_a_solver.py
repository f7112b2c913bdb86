"""In a program that starts MPI itself, after agnmpi was imported, and has a hook for its exceptions."""

import re
import sys

import pytest
from launcher import ROOT, ULFM, has_ulfm, mpiexec

SOLVER = """
import sys
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
from agnmpi import AGNOptimizer, insitu, sgd, train

def hook(kind, error, tb):
    sys.stderr.write(f"the solver keeps what rank {MPI.COMM_WORLD.rank} has: {error}\\n")
    raise OSError("and fails")

assert not MPI.Is_initialized()
MPI.Init_thread(MPI.THREAD_FUNNELED)
sys.excepthook = hook
import numpy as np
first = AGNOptimizer(sgd(0.1), np.zeros(3), MPI.COMM_WORLD)
second = AGNOptimizer(sgd(0.1), np.zeros(3), MPI.COMM_WORLD)
for step in second.steps(10**9):
    second.minimize(lambda p: (0.0, p["0"] - 1))
    if MPI.COMM_WORLD.rank == 1 and step > 50:
        raise KeyError("lost")
"""


def test_it_starts_mpi_and_its_hook_is_called(tmp_path):
    """Before the job is ended for all, whatever the hook does."""
    script = tmp_path / "solver.py"
    script.write_text(SOLVER)
    code, output = mpiexec(3, sys.executable, script)
    assert code == 1, output
    assert "rank 1 on" in output
    assert output.count("the solver keeps what rank 1 has: 'lost'") == 1, output
    assert "OSError: and fails" in output


WAITING = """
import os, threading, warnings
import numpy as np
from mpi4py import MPI
import agnmpi.loops.warner
from agnmpi import AGNOptimizer, sgd

agnmpi.loops.warner.WAIT = 1.0  # seconds
warn = warnings.warn

def told(message, *given, **options):  # it ends when it has said so
    warn(message, *given, **options)
    if "no worker has committed" in str(message):
        threading.Timer(0.5, os._exit, [3]).start()

warnings.warn = told
comm = MPI.COMM_WORLD
opt = AGNOptimizer(sgd(0.1), np.zeros(3), comm)
for step in opt.steps(60):
    comm.allreduce(1)  # the solver's: rank 0 serves, and never comes
"""


def test_workers_that_wait_for_rank_0_are_no_silent_deadlock(tmp_path):
    script = tmp_path / "solver.py"
    script.write_text(WAITING)
    code, output = mpiexec(3, sys.executable, script)
    assert code != 0, output
    assert output.count("no worker has committed anything in the first 1 s") == 1, output
    assert "agnmpi.insitu" in output


@pytest.mark.long
@pytest.mark.skipif(
    not has_ulfm(), reason="this MPI ends the whole job when a rank dies: no ULFM, which Open MPI 5 has"
)
@pytest.mark.parametrize("does", ["feed", "train"])
def test_one_of_two_simulations_dies_and_the_other_and_the_training_go_on(does):
    code, output = mpiexec(6, sys.executable, ROOT / "tests/support/insitu_losses.py", does, launcher=ULFM, timeout=120)
    assert "Traceback" not in output, output
    ends = re.findall(r"rank (\d) ends: clock (\d+), w ([\d.]+)", output)
    assert sorted(rank for rank, _, _ in ends) == ["0", "1", "2", "3"], output
    assert len({clock for _, clock, _ in ends}) == 1, output
    assert int(ends[0][1]) > 30  # long after the death, in time step 40 of 400
    assert {float(w) for _, _, w in ends} == {1.0}
    assert sorted(re.findall(r"rank (\d): 400 time steps", output)) == ["2", "3"] or does == "train", output
    assert code in (0, 137), output
