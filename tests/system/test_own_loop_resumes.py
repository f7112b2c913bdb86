"""A script with a loop of its own, interrupted by a signal and started again."""

import sys

from launcher import ROOT, mpiexec


def test_it_ends_with_75_and_goes_on_when_it_is_started_again(tmp_path):
    command = [sys.executable, ROOT / "tests/support/own_loop_with_signal.py", tmp_path / "ckpt"]
    code, output = mpiexec(3, *command, timeout=60)
    assert code == 75, output
    assert "interrupted, and can be resumed" in output
    assert "Traceback" not in output
    code, output = mpiexec(3, *command, timeout=60)
    assert code == 0, output
    assert "rank 0: 400 steps" in output


NOT_CLOSED = """
import sys
import numpy as np
from mpi4py import MPI
from agnmpi import AGNOptimizer, sgd

opt = AGNOptimizer(sgd(0.1), {"w": np.zeros(3)}, MPI.COMM_WORLD, 5, checkpoint=sys.argv[1], resume="auto")
for step in opt.steps(60):
    print("takes", step)
    opt.minimize(lambda p: (0.0, {"w": np.ones(3)}))
"""


def test_a_script_that_does_not_close_has_its_checkpoint(tmp_path):
    for steps in (60, 0):  # the second time all of it is done
        code, output = mpiexec(3, sys.executable, "-c", NOT_CLOSED, tmp_path / "ckpt", timeout=60)
        assert code == 0, output
        assert "Traceback" not in output
        assert output.count("takes") == steps
