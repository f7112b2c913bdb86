"""PyTorch runs under mpiexec; what is checked is in support/torch_runs.py."""

import importlib.util
import sys

import pytest
from launcher import ROOT, mpiexec

SCRIPT = ROOT / "tests/support/torch_runs.py"


def holds(*checks, n=3, needs=("torch",), timeout=280):
    """Start the script once with these checks."""
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    code, output = mpiexec(n, sys.executable, SCRIPT, *checks, timeout=timeout)
    assert code == 0, output[-8000:]
    assert [f"{check} holds" for check in checks] == [x for x in output.splitlines() if x.endswith(" holds")], output


def test_numbers_buffers_refusals_schedules():
    holds("same_numbers", "batch_norm", "bad_gradient", "schedule", "few_digits", "own_data", "evaluation", "dealt")


def test_loaders_with_processes():
    holds("fork", "spawn", n=2)


@pytest.mark.long
def test_loaders_with_a_fork_server():
    holds("forkserver", n=3)


@pytest.mark.long
def test_torch_compile():
    holds("compiled")


@pytest.mark.parametrize("package", ["accelerate"])
def test_beside(package):
    holds(package, needs=("torch", package))
