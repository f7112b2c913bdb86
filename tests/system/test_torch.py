"""PyTorch runs under mpiexec; what is checked is in support/torch_runs.py."""

import importlib.util
import sys

import pytest
from launcher import ROOT, mpiexec

SCRIPT = ROOT / "tests/support/torch_runs.py"
RESUMES = ROOT / "tests/support/torch_resumes.py"


def holds(*checks, n=3, needs=("torch",), timeout=280):
    """Start the script once with these checks."""
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    code, output = mpiexec(n, sys.executable, SCRIPT, *checks, timeout=timeout)
    assert code == 0, output[-8000:]
    assert [f"{check} holds" for check in checks] == [x for x in output.splitlines() if x.endswith(" holds")], output


def test_numbers_buffers_refusals_schedules():
    checks = ["same_numbers", "same_numbers_with_a_center_optimizer", "batch_norm", "bad_gradient", "schedule"]
    holds(*checks, "few_digits", "own_data", "evaluation", "dealt", "left", "late_evaluation")


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


@pytest.mark.parametrize(
    ("how", "n"),
    [
        (["kill"], 2),
        pytest.param(["kill"], 4, marks=pytest.mark.long),
        pytest.param(["raise"], 2, marks=pytest.mark.long),
        pytest.param(["INT"], 2, marks=pytest.mark.long),
        pytest.param(["USR1"], 3, marks=pytest.mark.long),
        pytest.param(["kill", "compile"], 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run_that_ends_goes_on_as_if_it_had_not(tmp_path, how, n):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    code, output = mpiexec(n, sys.executable, RESUMES, tmp_path, *how, timeout=280)
    assert code == 75 if how[0] in ("INT", "USR1") else code != 0, output[-8000:]
    assert "AssertionError" not in output, output[-8000:]
    code, output = mpiexec(n, sys.executable, RESUMES, tmp_path, *how, timeout=280)
    assert code == 0, output[-8000:]
    assert "resumed at" in output
