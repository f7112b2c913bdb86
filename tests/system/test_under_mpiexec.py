"""Starts the tests under tests/mpi with mpiexec, at several world sizes."""

import json
import os
import sys

import pytest
from launcher import ROOT, mpiexec

# Hundreds of tests. Where any MPI may be tried, it may be MPICH 4.0 of Debian, whose one-sided calls wait until their
# target enters MPI.
LIMIT = 1800 if os.environ.get("AGNMPI_LONG") else 900
pytestmark = pytest.mark.timeout(LIMIT + 100)


def under_mpiexec(tmp_path, size, least, *selected):
    file = tmp_path / "counts.json"
    code, output = mpiexec(
        size, sys.executable, "-m", "pytest", "--with-mpi", "-q", "-p", "no:cacheprovider", ROOT / "tests/mpi",
        *selected, timeout=LIMIT, cwd=ROOT, env={"AGNMPI_TEST_COUNTS": str(file)},
    )  # fmt: skip
    assert code == 0, output[-8000:]
    counts = json.loads(file.read_text())
    assert len(counts) == size
    assert len(set(counts)) == 1, f"ranks ran different numbers of tests: {counts}"
    assert counts[0] >= least


@pytest.mark.parametrize("size", [2, 3, 5, pytest.param(9, marks=pytest.mark.long)])
def test_under_mpiexec(tmp_path, size):
    under_mpiexec(tmp_path, size, 300, "-m", "not long")


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_long_ones_under_mpiexec(tmp_path, size):
    under_mpiexec(tmp_path, size, 3, "-m", "long")
