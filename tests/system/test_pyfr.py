"""PyFR, as its users start it, with the plugin of the examples that trains an autoencoder of its solution."""

import re

import pytest
from pyfr_runs import make_mesh, run

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
RANKS, END = 2, 2.0


@pytest.fixture(scope="module", autouse=True)
def _pyfr():
    xsmm = pytest.importorskip("pyfr.backends.openmp.xsmm", reason="no PyFR here: pip install pyfr")
    try:
        xsmm.XSMMWrappers()
    except OSError as error:
        pytest.skip(f"PyFR finds no libxsmm (PYFR_XSMM_LIBRARY_PATH): {error}")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    return make_mesh(tmp_path_factory.mktemp("mesh"), 12, RANKS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, mesh):
    """What PyFR computes by itself."""
    return run(tmp_path_factory.mktemp("alone"), mesh, RANKS, END, None)[1]


@pytest.mark.parametrize("mode", ["asynchronous", "synchronous"])
def test_it_trains_and_computes_the_same_bits(tmp_path, mesh, alone, mode):
    output, solution, _ = run(tmp_path, mesh, RANKS, END, {"mode": mode, "budget": 0.5, "nsteps": 5, "rate": 0.005})
    assert solution == alone
    assert int(re.search(rf"autoencoder \({mode}\): (\d+) steps", output)[1]) > 100
    assert float(re.search(r"what it loses of the solution: ([\d.]+)", output)[1]) < 0.5
    assert (tmp_path / "autoencoder.npz").exists()
