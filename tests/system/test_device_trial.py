"""The trial of device pointers, in the mpiexec of two ranks that doctor starts."""

from launcher import mpiexec_path

from agnmpi.arrays.backend import device_count
from agnmpi.cluster import probe


def test_the_real_trial_runs_and_answers():
    assert mpiexec_path()
    assert ("tried on" if device_count() else "no CUDA device") in probe.run().why
