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
