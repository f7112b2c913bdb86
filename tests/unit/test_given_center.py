"""What the user's code is given of the center, and changes, is a copy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI
from problems import Quadratic

import agnmpi
from agnmpi import AGNOptimizer, sgd
from agnmpi.recovery.files import load
from agnmpi.reporting.writers import WRITERS

OPTIONS = {"batch": 16, "rate": 0.05, "optimizer": "sgd", "period": 4, "steps": 48, "evaluate_every": 0.05}


class Vandal(Quadratic):
    """It measures, and then destroys what it was given."""

    def evaluate(self, params):
        found = super().evaluate(params)
        for x in params.values():
            x[...] = np.nan
        return found


def trained(run, problem, **options):
    """The final center, and the best that was kept."""
    agnmpi.train(problem, run_dir=str(run), monitor="distance:min", **OPTIONS | options)
    return [load(run / f"{name}.safetensors")[0] for name in ("center", "best")]


@pytest.mark.parametrize("options", [{"transport": "local", "workers": 2}, {"rule": "synchronous"}], ids=str)
def test_evaluate_may_change_its_parameters(tmp_path, options):
    expected, found = (trained(tmp_path / kind.__name__, kind, **options) for kind in (Quadratic, Vandal))
    for ours, theirs in zip(expected, found):
        for name, x in ours.items():
            np.testing.assert_array_equal(theirs[name], x)


def test_on_event_may_change_its_event(tmp_path, monkeypatch):
    seen, cleared = [], []

    def clear(event):
        cleared.append(dict(event))
        event.clear()

    writer = SimpleNamespace(write=lambda event: seen.append(dict(event)), close=lambda: None)
    monkeypatch.setitem(WRITERS, "csv", lambda _directory: writer)
    options = OPTIONS | {"transport": "local", "run_dir": str(tmp_path / "run"), "writers": "csv"}
    agnmpi.train(Quadratic, on_event=clear, **options)
    assert (
        cleared == seen == [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    )


@pytest.mark.parametrize("transport", ["local", "allreduce"])
def test_a_loop_s_status_may_be_changed(transport):
    rule = agnmpi.rules.synchronous() if transport == "allreduce" else agnmpi.rules.agn()
    opt = AGNOptimizer(sgd(0.5), {"w": np.zeros(3)}, MPI.COMM_SELF, 1, rule=rule, transport=transport)
    ruined = []

    def ruin(status):
        status.center["w"][...] = np.nan
        ruined.append(status.step)

    for _ in opt.steps(4, at_center=ruin, every=1):
        opt.minimize(lambda p: (0.0, {"w": -np.ones(3)}))
        opt.status.center["w"][...] = np.nan
        opt.center["w"][...] = np.nan
    assert ruined
    np.testing.assert_array_equal(opt.center["w"], np.full(3, 2.0))
    opt.close()
