import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parent / "support"), str(Path(__file__).parent.parent / "examples")]

# Some containers set it, and each of the thousands of ranks that tests start would compile the package anew: 0.3 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

collect_ignore = ["support"]  # what tests share, and scripts that they start: some do something when imported

settings.register_profile("agnmpi", deadline=None)  # machines are noisy
settings.load_profile("agnmpi")


def pytest_ignore_collect(collection_path, config):
    """Tests that need ranks are collected under mpiexec alone; system/test_under_mpiexec.py starts it."""
    return True if collection_path.name == "mpi" and not config.getoption("--with-mpi", default=False) else None


def pytest_collection_modifyitems(config, items):
    from agnmpi.arrays.backend import device_count

    if os.environ.get("AGNMPI_LONG") != "1":
        skip = pytest.mark.skip(reason="takes minutes: AGNMPI_LONG=1")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skip)
    if not device_count():
        skip = pytest.mark.skip(reason="no CUDA device that CuPy can use")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
