"""A script with a loop of its own, interrupted by a signal and started again."""

import signal
import sys

import numpy as np
import pytest
from launcher import ROOT, mpiexec, started


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
import signal
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


@pytest.mark.long
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whatever_ends_it_at_any_moment_the_result_is_that_of_an_undisturbed_run(tmp_path, n, seed):
    """Disturbed in four ways, one after the other, with one worker it ends with the same bits."""
    command = [sys.executable, ROOT / "tests/support/own_loop_resumes.py"]
    code, output = mpiexec(n, *command, tmp_path, "nothing", 0, timeout=60)
    assert code == 0, output
    expected = [line for line in output.splitlines() if line.startswith("ends at 400")]
    random = np.random.default_rng(seed)
    for how in random.permutation(["USR1", "Ctrl-C", "exception", "full"]):
        turn = str(random.integers(1, 80 // n))
        if how == "Ctrl-C":
            job = started((tmp_path / "now").exists, n, *command, tmp_path, how, turn)
            job.process.send_signal(signal.SIGINT)
            code, output = job.finish(60)
        else:
            code, output = mpiexec(n, *command, tmp_path, how, turn, timeout=60)
        assert code == 75 if how == "USR1" else code != 0, output
        assert "ends at" not in output, "it was disturbed"
        assert how != "full" or "could not be written" in output
        print(how, turn, output.splitlines()[0])
    code, output = mpiexec(n, *command, tmp_path, "again", 0, timeout=60)
    assert code == 0, output
    assert "begins at 0" not in output, "it was resumed"
    found = [line for line in output.splitlines() if line.startswith("ends at 400")]
    assert found, output
    assert n > 2 or found == expected
