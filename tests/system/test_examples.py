"""Examples, as a user starts them."""

import sys

from launcher import ROOT, mpiexec


def test_the_script_learns_its_line():
    code, output = mpiexec(3, sys.executable, ROOT / "examples/delayed_nesterov.py")
    assert code == 0, output
    assert "y = 3.0" in output
    assert " x + 1.0" in output or " x + 0.9" in output
