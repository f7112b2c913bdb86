"""The progress that a run writes to its events."""

import re
import time

import pytest
from launcher import QUADRATIC, agnmpi, events_of
from mpi4py import MPI
from problems import Quadratic

from agnmpi import Config, train
from agnmpi.cli.main import main
from agnmpi.core.backoff import Every
from agnmpi.reporting.events import Pace


@pytest.mark.parametrize(
    "options", [{"rule": "synchronous"}, {"rule": "diloco"}, {"transport": "local", "workers": 2}], ids=str
)
def test_it_is_written_whatever_is_evaluated(tmp_path, options):
    """Here each round crosses an evaluation, and is followed by a line that is due."""
    given = {"batch": 16, "rate": 0.05, "period": 4, "steps": 48, "evaluate_every": 1e-3, "log_every": 1e-9}
    train(Config(QUADRATIC, run_dir=str(tmp_path / "run"), **given, **options), MPI.COMM_SELF)
    events = [event["event"] for event in events_of(tmp_path / "run")]
    assert events.count("evaluation") >= 12
    assert events.count("progress") >= 12


@pytest.mark.parametrize(
    ("ranks", "told", "rows"),
    [(2, ["--rule", "synchronous"], 0), (3, ["--transport", "accumulate"], 0), (3, [], 2)], ids=str,
)  # fmt: skip
def test_steps_of_workers_where_the_center_sees_whose_they_are(tmp_path, ranks, told, rows):
    """Where all sum, it does not: worker 0 had them all."""
    given = ["--batch", "16", "--rate", "0.05", "--period", "4", "--steps", "96", "--run-dir", tmp_path / "run"]
    code, output = agnmpi(ranks, "train", QUADRATIC, *given, *told)
    assert code == 0, output
    lines = [event["steps"] for event in events_of(tmp_path / "run") if event["event"] == "workers"]
    assert [len(steps) for steps in lines[-1:]] == ([rows] if rows else [])


def test_steps_of_workers_in_simulated_rounds(tmp_path):
    given = ["--workers", "3", "--epochs", "3", "--rule", "synchronous", "--run-dir", str(tmp_path / "run")]
    assert main(["simulate", QUADRATIC, *given]) == 0
    assert not [event for event in events_of(tmp_path / "run") if event["event"] == "workers"]


def paced(times, each, pace=None):
    """Its pace, of a run that has done `each` steps more at each of `times`."""
    pace, steps = pace or Pace(0.0, 0), 0
    for at in times:
        steps += each
        pace.add(at, steps)
    return pace


def test_the_time_left_is_that_of_late():
    """Slow for 10 minutes, then 4 times as fast for 4: it is the rate of these that counts."""
    times = [*range(4, 601, 4), *range(601, 841)]
    left = paced(times, 1).left(840.0, len(times) + 60)
    assert left == pytest.approx(60, rel=0.1)


def test_the_time_left_does_not_rise_while_nothing_happens():
    pace = paced(range(1, 61), 2)
    first = [pace.left(60.0 + wait, 200.0) for wait in range(10)]
    assert first == sorted(first, reverse=True)
    assert [pace.left(60.0 + wait, 200.0) for wait in (11, 100, 10_000)] == [None] * 3
    assert [pace.since(60.0 + wait) for wait in (9, 11, 10_000)] == [0.0, 11.0, 10_000.0]
    pace.add(10_060.0, 122)  # it goes on: the pause is soon forgotten
    for i in range(1, 121):
        pace.add(10_060.0 + i, 122 + 2 * i)
    assert pace.left(10_180.0, 562.0) == pytest.approx(100, rel=0.05)


def test_the_time_left_is_smooth_where_commits_come_unevenly():
    """Each 1 or 3 s, and after each 40 s an evaluation of 6 s: it falls by about a second each second."""
    pace, now, steps, lefts = Pace(0.0, 0), 0.0, 0, []
    for i in range(600):
        now, steps = now + (1, 3, 1, 3, 2)[i % 5] + (6 if i % 20 == 0 else 0), steps + 10
        pace.add(now, steps)
        lefts.append(now + pace.left(now, 10_000.0))
    ends = lefts[30:]
    assert max(ends) < 1.25 * min(ends)


def test_slow_commits_are_no_silence():
    pace = paced(range(300, 3001, 300), 100)
    assert pace.since(3500.0) == 0
    assert pace.left(3000.0, 1200.0) == pytest.approx(600)
    assert pace.left(3200.0, 1200.0) == pytest.approx(400)
    assert pace.since(4000.0) == 1000.0


def test_where_nobody_knows_the_time_left():
    assert Pace(0.0, 50).left(20.0, 100.0) is None
    assert paced([1.0, 2.0], 5).left(2.0, float("inf")) is None


class Hastening(Quadratic):
    """100 steps of 10 s, and more of 1 s; so far: `seconds`."""

    seconds = 0.0

    def gradient(self, params, indices):
        Hastening.seconds += 10.0 if self.seconds < 1000.0 else 1.0
        return super().gradient(params, indices)


def test_the_lines_of_a_run_that_becomes_faster(tmp_path, monkeypatch, capsys):
    """The mean of all its steps would say 5 min where 100 s are left."""
    clock = time.monotonic
    monkeypatch.setattr(Hastening, "seconds", 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + Hastening.seconds)
    monkeypatch.setitem(Every.__init__.__kwdefaults__, "now", time.monotonic)
    given = {"batch": 16, "rate": 0.05, "optimizer": "sgd", "transport": "local", "workers": 1, "period": 4}
    train(Hastening, run_dir=str(tmp_path / "run"), steps=500, **given)
    said = capsys.readouterr().out
    lines = re.findall(r"epoch ([\d.]+)/([\d.]+) .*  (?:(\d+) min )?([\d.]+) s left$", said, re.M)
    near = min(lines, key=lambda line: abs(float(line[0]) / float(line[1]) - 0.8))
    assert 80 < 60 * int(near[2] or 0) + float(near[3]) < 140
