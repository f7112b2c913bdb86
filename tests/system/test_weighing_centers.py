"""Centers that weigh commits, over MPI."""

import tomllib

import pytest
from in_process import config
from launcher import QUADRATIC, agnmpi, result_of

from agnmpi.simulation.replay import replay


def test_all_of_them_over_mpi(tmp_path):
    code, output = agnmpi(
        4, "train", QUADRATIC, "--epochs", 8, "--batch", 16, "--period", 3, "--rate", 0.05, "--outer-rate", 1.5,
        "--staleness-power", 1, "--staleness-cap", 4, "--dylu", "--center-optimizer", "momentum",
        "--center-rate", 1.0, "--set", "center_options.beta=0.3", "--record", "--run", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, output
    assert "effective outer rate 1.5" in output
    result = result_of(tmp_path / "run")
    assert result["staleness"]["max"] <= 4
    assert tomllib.loads((tmp_path / "run/config.toml").read_text())["center_rate"] == 1.0
    again = config(
        tmp_path / "again", 3, outer_rate=1.5, staleness_power=1.0, staleness_cap=4, dylu=True,
        center_optimizer="momentum", center_rate=1.0, center_options={"beta": 0.3},
    )  # fmt: skip
    assert replay(tmp_path / "run", again)()["same_bits"] is True


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--no-use-locking", "--transport", "rma", "--outer-rate", 1], "weighs commits"),
        (["--no-use-locking", "--transport", "rma", "--dylu"], "dylu needs a center"),
        (["--rule", "synchronous", "--dylu"], "dylu needs a center"),
    ],
)
def test_what_is_refused_over_mpi(options, text):
    code, output = agnmpi(2, "train", QUADRATIC, *options)
    assert code == 2
    assert text in output
