"""Windows that are no shared memory, with all ranks on one host: doctor and train say so, and nothing is lost."""

import json

import pytest
from launcher import QUADRATIC, agnmpi, mpi_kind, result_of

# MPICH 5 as over a network: Debian's MPICH 4.0 is so by itself. Open MPI 5 has a thread for it.
TCP = {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp"}
pytestmark = pytest.mark.skipif(mpi_kind() != "mpich", reason="Open MPI has a thread that serves windows over TCP")


def test_doctor_says_so():
    code, output = agnmpi(3, "doctor", "--json", env=TCP)
    assert code == 0, output
    (hint,) = [hint for hint in json.loads(output[output.index("{") :])["hints"] if "windows" in hint]
    assert "are no shared memory on this host" in hint
    assert "transport p2p is faster here" in hint


@pytest.mark.parametrize("transport", ["rma", "accumulate", "p2p"])
def test_a_run_says_so(tmp_path, transport):
    run = tmp_path / "run"
    code, output = agnmpi(
        3, "train", QUADRATIC, "--batch", "16", "--rate", "0.05", "--period", "4", "--steps", "48", "--run", run,
        "--transport", transport, env=TCP,
    )  # fmt: skip
    assert code == 0, output
    assert output.count("are no shared memory on this host") == (transport != "p2p")
    assert result_of(run)["samples"] == 48 * 16


def test_bench_says_so():
    """Beside the times of the transports that use them."""
    small = ["--sizes", 1000, "--rounds", 20, "--quiet", 0]
    code, output = agnmpi(2, "bench", "--transports", "rma", "accumulate", *small, env=TCP)
    assert code == 0, output
    assert output.count("WARNING: windows of") == 1
    assert "transport p2p is faster here" in " ".join(output.split())
