"""Signals and forks: what asks a run to stop, and what is none of its business."""

import signal
import sys

from launcher import PROBLEMS, agnmpi, progresses, result_of, started

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
