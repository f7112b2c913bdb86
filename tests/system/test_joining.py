"""Ranks of another mpiexec become workers of a job that runs; each sample is counted once an epoch."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conditions import until
from launcher import (
    PROBLEMS,
    ROOT,
    Job,
    agnmpi,
    events_of,
    mpi_kind,
    mpiexec,
    progresses,
    result_of,
    started,
    words_of,
)

from agnmpi.recovery.files import load

LIMIT = 90
COUNTS = f"{PROBLEMS}:Counts"
GIVEN = ["--rule", "downpour", "--optimizer", "sgd", "--rate", "1", "--batch", "4", "--period", "3", "--joinable"]
mpich = pytest.mark.skipif(mpi_kind() != "mpich", reason="Open MPI 5.0 does not connect two mpiexec")


def running(run, epochs, *options, problem=COUNTS, env=None):
    """A job of one worker."""
    given = ["--epochs", epochs, "--set", "options.slow=0.02", "--run-dir", run, *GIVEN, *options]
    return started(lambda: progresses(run), 2, sys.executable, "-m", "agnmpi", "train", problem, *given, env=env)


def joining(run):
    """A job of one rank that has joined."""
    guest, before = Job(1, sys.executable, "-m", "agnmpi", "join", run), kinds(run).count("joined")
    until(lambda: kinds(run).count("joined") > before, "it has not joined")
    return guest


def kill(command, run):
    """The ranks of a command on a run."""
    for path in Path("/proc").glob("[0-9]*"):
        words = words_of(path).split(b"\0")
        if words[0] == sys.executable.encode() and {command, str(run).encode()} <= {*words}:
            os.kill(int(path.name), signal.SIGKILL)


def kinds(run):
    return [event["event"] for event in events_of(run)]


def check(job, run, epochs):
    """It ends, with every sample counted once an epoch; returns what it has printed."""
    code, output = job.finish(LIMIT)
    assert code == 0, output
    np.testing.assert_array_equal(load(run / "center.safetensors")[0]["count"], np.full(240, epochs))
    return output


@mpich
@pytest.mark.parametrize(
    "options", [["--stall-limit", "30", "--drop-stalled"], pytest.param(["--no-wait"], marks=pytest.mark.long)], ids=str
)
def test_who_joins_trains_to_the_end(tmp_path, options):
    run = tmp_path / "run"
    job = running(run, 12, *options)
    code, output = agnmpi(2, "join", run, timeout=LIMIT)
    assert code == 0, output
    assert "has joined" in output
    check(job, run, 12)
    assert kinds(run).count("joined") == 2
    assert "lost" not in kinds(run)
    assert result_of(run)["lost"] == []
    assert not (run / "door.json").exists()


@mpich
def test_who_has_joined_and_dies_costs_what_it_had_not_committed(tmp_path):
    run = tmp_path / "run"
    job = running(run, 12)
    guest = joining(run)
    kill(b"join", run)
    until(lambda: "lost" in kinds(run), "its death is not noticed")
    guest.finish(LIMIT)
    guest = joining(run)
    code, output = guest.finish(LIMIT)
    assert code == 0, output
    check(job, run, 12)


HOST = """
import sys
import agnmpi
from problems import Counts

class Mine(Counts):
    pass

if __name__ == "__main__":
    result = agnmpi.train(
        Mine, joinable=True, dylu=sys.argv[2] == "dylu", run_dir=sys.argv[1], epochs=8, rule="downpour",
        optimizer="sgd", rate=1.0, batch=4, period=3, options={"slow": 0.02},
    )
    print("trained", result and result["workers"])
"""
GUEST = """
import sys
import agnmpi
from host import Mine

agnmpi.join(sys.argv[1], problem=Mine)
print("joined")
"""


@mpich
@pytest.mark.parametrize("option", ["", pytest.param("dylu", marks=pytest.mark.long)])
def test_join_from_python(tmp_path, option):
    run = tmp_path / "run"
    (tmp_path / "host.py").write_text(HOST)
    (tmp_path / "guest.py").write_text(GUEST)
    env = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/support"}
    job = started(lambda: progresses(run), 2, sys.executable, tmp_path / "host.py", run, option, env=env)
    code, output = mpiexec(2, sys.executable, tmp_path / "guest.py", run, env=env, timeout=LIMIT)
    assert code == 0, output
    assert output.count("joined\n") == 2
    assert "trained" in check(job, run, 8)
    assert kinds(run).count("joined") == 2


ENDS = """
import os, signal, sys, time
import agnmpi
from agnmpi.core.worker import Worker
from mpi4py import MPI

moment, with_signal = sys.argv[2:]

def end(self):
    until = time.monotonic() + 1
    while time.monotonic() < until:  # what has been sent arrives
        MPI.COMM_SELF.Iprobe()
    os.kill(os.getpid(), getattr(signal, with_signal))

setattr(Worker, moment, end)
agnmpi.join(sys.argv[1])
"""


@mpich
@pytest.mark.parametrize(
    ("moment", "with_signal"),
    [
        ("settle", "SIGKILL"),  # the final center, which is long, is on its way to it
        pytest.param("settle", "SIGSTOP", marks=pytest.mark.long),
        pytest.param("leave", "SIGSTOP", marks=pytest.mark.long),  # its work is done
    ],
)
def test_who_dies_or_hangs_in_the_farewell_holds_up_nobody(tmp_path, moment, with_signal):
    run = tmp_path / "run"
    options = "--set", "options.unused=1000000"
    job = running(run, 8, *options, problem=f"{PROBLEMS}:Quadratic", env={"AGNMPI_WATCHDOG": "4"})
    (tmp_path / "ends.py").write_text(ENDS)
    guest = Job(1, sys.executable, tmp_path / "ends.py", run, moment, with_signal)
    code, output = job.finish(LIMIT)
    if with_signal == "SIGSTOP":  # it does not end by itself
        kill(moment.encode(), run)
    assert guest.finish(LIMIT)[0] != 0
    assert code == 0, output
    assert kinds(run).count("lost") == 1


@pytest.mark.long
@mpich
def test_who_has_joined_ends_with_the_job(tmp_path):
    run = tmp_path / "run"
    job = running(run, 2000)
    guest = joining(run)
    kill(b"train", run)
    job.finish(LIMIT)
    code, output = guest.finish(LIMIT)
    assert code == 69, output
    assert "has lost the job that it had joined" in output


@pytest.mark.long
@mpich
def test_who_does_not_fit_is_refused(tmp_path):
    run = tmp_path / "run"
    job = running(run, 8)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", "seed = 1"))
    code, output = agnmpi(1, "join", run, timeout=LIMIT)
    assert code == 2, output
    assert "this rank is refused: its seed is not the run's" in output
    check(job, run, 8)
    code, output = agnmpi(1, "join", run, timeout=LIMIT)
    assert code == 2, output
    assert "lets nobody in" in output


@pytest.mark.skipif(mpi_kind() == "mpich", reason="MPICH connects two mpiexec")
def test_open_mpi_lets_nobody_in(tmp_path):
    code, output = agnmpi(2, "train", COUNTS, *GIVEN, "--run-dir", tmp_path / "run", timeout=LIMIT)
    assert code == 2, output
    assert "MPI_Comm_connect between two mpiexec waits for ever; leave it out" in output
