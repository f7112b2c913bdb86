"""Signals and forks: what asks a run to stop, and what is none of its business."""

import os
import signal
import sys
import time

import pytest
from launcher import PROBLEMS, agnmpi, progresses, ranks_of, result_of, started

from agnmpi.recovery.checkpoint import newest
from agnmpi.recovery.files import load

SHORT = ["--batch", "16", "--period", "2", "--log-every", "0.1"]


def train(problem, run, *options):
    return ["-m", "agnmpi", "train", f"{PROBLEMS}:{problem}", *SHORT, "--run", run, *options]


def test_a_problem_may_fork(tmp_path):
    """A pool ends, though we handle TERM; a child that raises ends alone, and says why."""
    run = tmp_path / "run"
    code, output = agnmpi(3, *train("Pools", run, "--steps", "8")[2:])
    assert code == 0, output
    assert result_of(run)["steps"] == 8
    assert "ArithmeticError: in a child" in output
    assert "failed, ending the job" not in output


def test_a_signal_does_not_end_what_a_problem_has_forked(tmp_path):
    """Launchers send it to all processes of a rank's group; a pool that loses a task would wait for ever."""
    run = tmp_path / "run"
    job = started(lambda: progresses(run), 2, sys.executable, *train("Pools", run, "--steps", "100000"))
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.finish(60)
    assert code == 75, output


@pytest.mark.parametrize("who", ["a worker", "all and the launcher"])
def test_a_signal_stops_the_run_whoever_gets_it(tmp_path, who):
    run = tmp_path / "run"
    given = train("Quadratic", run, "--steps", "1000000", "--set", "options.slow=0.005")
    job = started(lambda: progresses(run), 3, sys.executable, *given)
    pids = ranks_of(run)
    assert len(pids) == 3
    for pid in [pids[2]] if who == "a worker" else [*pids, job.process.pid]:
        os.kill(pid, signal.SIGUSR1)
    code, output = job.finish(60)
    assert code == 75, output
    saved = newest(run, pytest.fail)
    assert saved is not None
    center = load(run / "center.safetensors")[0]
    assert sum(array.size for array in center.values()) == saved[1]["c"].size
    assert "w" in center, "by name"


def test_a_signal_in_the_last_evaluation_changes_nothing(tmp_path):
    run = tmp_path / "run"
    given = train("SlowLastEvaluation", run, "--steps", "12", "--evaluate-every", "0")
    job = started((tmp_path / "last").exists, 2, sys.executable, *given, cwd=tmp_path)
    for _ in range(3):
        job.process.send_signal(signal.SIGUSR1)
        time.sleep(1.2)
    code, output = job.finish(60)
    assert code == 0, output
    assert result_of(run)["steps"] == 12
