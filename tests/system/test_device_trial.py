"""The trial of device pointers, in the mpiexec of two ranks that doctor starts."""

import sys

from launcher import mpiexec, mpiexec_path

from agnmpi.arrays.backend import device_count
from agnmpi.cluster import probe


def test_the_real_trial_runs_and_answers():
    assert mpiexec_path()
    assert ("tried on" if device_count() else "no CUDA device") in probe.run().why


def test_ranks_find_what_doctor_has_found_alone():
    """Whatever mpiexec does to the environment: Open MPI's adds to LD_LIBRARY_PATH, and keeps PRTE_MCA_… to itself."""
    code = "from agnmpi.cluster import probe; print(probe.cache_file())"
    env = {
        "LD_LIBRARY_PATH": "/nowhere",
        "UCX_TLS": "tcp,self",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    alone = mpiexec(1, "-c", code, start=[sys.executable], env=env)
    assert alone == mpiexec(1, sys.executable, "-c", code, env=env)
    assert "/agnmpi/direct-" in alone[1]
