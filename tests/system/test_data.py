"""Data that are prepared ahead, read at first use, sorted, or without end."""

import threading
import tracemalloc

import numpy as np
import pytest
from launcher import agnmpi, result_of
from mpi4py import MPI

from agnmpi import Failed, train
from agnmpi.recovery.files import load

PERIOD, STEPS = 4, 24
GIVEN = {"transport": "local", "batch": 16, "period": PERIOD, "steps": STEPS, "optimizer": "sgd", "rate": 0.1}

LAZY = """
from functools import cached_property
from pathlib import Path
import time
import numpy as np

class Lazy:
    samples = 256
    def __init__(self, xp, where):
        self.where = Path(where)
    @cached_property
    def x(self):
        from mpi4py import MPI
        (self.where / f"rank{MPI.COMM_WORLD.rank}").touch()
        return np.random.default_rng(0).normal(size=self.samples)
    def init(self, rng):
        return {"w": np.zeros(1)}
    def prepare(self, indices):
        return self.x[indices]
    def gradient(self, params, x):
        time.sleep(5e-4)  # each rank gets its share: none commits at the end what it computed from the beginning
        error = params["w"] * x - 3 * x
        return (error**2).mean() / 2, {"w": (error * x).mean(keepdims=True)}
    def evaluate(self, params):
        return {"w": params["w"]}
"""


class Plain:
    samples = 100

    def __init__(self, xp):
        self.x = np.random.default_rng(0).normal(size=self.samples)

    def init(self, rng):
        return {"w": np.ones(1)}

    def gradient(self, params, indices):
        return 0.0, {"w": params["w"] - self.x[indices].mean(keepdims=True)}

    def evaluate(self, params):
        return {"w": params["w"]}


class Prepared(Plain):
    """Each gradient waits until the batches of a period after it are prepared."""

    def __init__(self, xp):
        super().__init__(xp)
        self.prepared = self.taken = 0
        self.changed = threading.Condition()
        self.threads = set()

    def prepare(self, indices):
        with self.changed:
            self.prepared += 1
            self.threads.add(threading.current_thread())
            self.changed.notify()
        return self.x[indices]

    def gradient(self, params, batch):
        with self.changed:
            self.taken += 1
            wanted = min(self.taken + PERIOD, STEPS)
            assert self.changed.wait_for(lambda: self.prepared >= wanted, timeout=20), "it is not prepared ahead"
            assert self.prepared <= self.taken + PERIOD
        assert threading.current_thread() not in self.threads
        return 0.0, {"w": params["w"] - batch.mean(keepdims=True)}


class PreparedInRounds(Plain):
    def prepare(self, indices):
        return self.x[indices]

    def gradient(self, params, batch):
        return 0.0, {"w": params["w"] - batch.mean(keepdims=True)}


class Sorted(Plain):
    sort_indices = True
    taken = 0

    def gradient(self, params, indices):
        assert (np.diff(indices) > 0).all()
        Sorted.taken += indices.size
        return super().gradient(params, indices)


class Broken(Plain):
    def prepare(self, indices):
        raise ArithmeticError("this sample is broken")


class Endless(Plain):
    samples = 10**9

    def __init__(self, xp):
        pass

    def gradient(self, params, indices):
        assert indices.max() > 10**6
        return 0.0, {"w": params["w"] - 1e-9 * indices.mean(keepdims=True)}


def center_of(problem, tmp_path, **options):
    run = tmp_path / problem.__name__
    train(problem, MPI.COMM_SELF, run_dir=str(run), **(GIVEN | options))
    return load(run / "center.safetensors")[0]["w"]


def test_a_batch_is_prepared_a_period_ahead(tmp_path):
    assert center_of(Prepared, tmp_path) == center_of(Plain, tmp_path)


def test_in_rounds_of_all_ranks_the_numbers_are_the_same(tmp_path):
    options = {"rule": "synchronous", "transport": "auto"}
    assert center_of(PreparedInRounds, tmp_path, **options) == pytest.approx(center_of(Plain, tmp_path, **options))


def test_indices_are_sorted_if_asked(tmp_path):
    center_of(Sorted, tmp_path, steps=None, epochs=2)
    assert Sorted.taken == 2 * Sorted.samples


def test_an_error_in_it_shows_the_users_frames(tmp_path, capsys):
    with pytest.raises(Failed):
        center_of(Broken, tmp_path)
    said = capsys.readouterr().err
    assert "ArithmeticError: this sample is broken" in said
    assert said.count('File "') == 1, said
    assert "in prepare" in said


def test_a_billion_samples_cost_no_memory(tmp_path):
    tracemalloc.start()
    try:
        center_of(Endless, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("transport", ["p2p", "accumulate"])
def test_a_center_does_not_read_what_only_training_needs(tmp_path, transport):
    (tmp_path / "lazy.py").write_text(LAZY)
    run = tmp_path / "run"
    code, output = agnmpi(
        3, "train", f"{tmp_path}/lazy.py:Lazy", "--set", f"options.where={tmp_path}", "--run-dir", run,
        "--transport", transport, "--optimizer", "sgd", "--rate", "0.3", "--period", "2", "--epochs", "100",
    )  # fmt: skip
    assert code == 0, output
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank1", "rank2"]
    assert result_of(run)["samples"] == 100 * 256
    assert result_of(run)["metrics"]["w"] == pytest.approx(3.0, abs=0.01)
