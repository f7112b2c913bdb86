"""JAX runs under mpiexec; what is checked there is in support/jax_runs.py."""

import sys

import numpy as np
import pytest
from launcher import ROOT, mpiexec

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")


def test_numbers_and_refusals():
    checks = ["same_numbers", "same_numbers_with_a_center_optimizer", "learns", "bad_gradient"]
    code, output = mpiexec(3, sys.executable, ROOT / "tests/support/jax_runs.py", *checks, timeout=150)
    assert code == 0, output[-8000:]
    assert [f"{check} holds" for check in checks] == [x for x in output.splitlines() if x.endswith(" holds")], output


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "no parameters"),
        ({"w": np.zeros(2, int)}, r"leaf \['w'\] is int64: give arrays of floating numbers"),
        ({"w": 1.0}, "float"),
    ],
)
def test_what_cannot_be_trained_is_refused(params, says):
    from mpi4py import MPI

    import agnmpi.jax

    with pytest.raises(ValueError, match=says):
        agnmpi.jax.Run(params, None, MPI.COMM_SELF, transport="local")
