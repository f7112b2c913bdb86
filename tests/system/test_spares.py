"""Spares take the places of lost ranks: the number of workers stays, and every sample is counted once an epoch."""

import os
import resource
import signal
import sys
import time

import numpy as np
import pytest
from conditions import until
from launcher import (
    PROBLEMS,
    QUADRATIC,
    ULFM,
    agnmpi,
    events_of,
    has_ulfm,
    left_behind,
    mpiexec,
    progresses,
    ranks_of,
    result_of,
    started,
)

from agnmpi.recovery.checkpoint import folder
from agnmpi.recovery.files import load

LIMIT = 90
COUNTS = f"{PROBLEMS}:Counts"
GIVEN = ["--rule", "downpour", "--optimizer", "sgd", "--rate", "1", "--batch", "4", "--period", "3", "--epochs", "8"]
LONG = pytest.mark.long
ulfm = pytest.mark.skipif(not has_ulfm(), reason="spares need ULFM, which Open MPI 5 has")


def train(run, ranks, spares, faults, *options, slow=0.003, problem=COUNTS, limit=LIMIT):
    given = ["--spares", spares, "--set", f"options.slow={slow}", "--inject-faults", "--run-dir", run, *options]
    faults = {"AGNMPI_FAULTS": faults}
    return agnmpi(ranks, "train", problem, *GIVEN, *given, env=faults, timeout=limit, launcher=ULFM)


def check(run, joined, epochs=8):
    """Every sample of every epoch was committed once, and so many spares were called."""
    called = [event["rank"] for event in events_of(run) if event["event"] == "joined"]
    assert len(set(called)) == len(called) == joined
    np.testing.assert_array_equal(load(run / "center.safetensors")[0]["count"], np.full(240, epochs))


@ulfm
@pytest.mark.parametrize(
    ("faults", "ranks", "spares"),
    [
        ("kill:2@20", 4, 1),
        ("kill:0@40", 4, 2),
        pytest.param("kill:1@20,kill:2@30,kill:3@40", 6, 3, marks=LONG),
        pytest.param("kill:0@40,kill:2@50,kill:4@3", 6, 3, marks=LONG),
        pytest.param("kill:1@10,kill:2@10", 5, 2, marks=LONG),  # all workers at once
        pytest.param("kill:3@0", 4, 1, marks=LONG),  # a spare that was never called lives
    ],
)
def test_a_spare_takes_the_place_of_a_lost_rank(tmp_path, faults, ranks, spares):
    run = tmp_path / "run"
    code, output = train(run, ranks, spares, faults)
    killed = 0 if faults == "kill:3@0" else faults.count("kill")
    assert code == (76 if killed else 0), output
    check(run, min(killed, spares))
    assert result_of(run)["workers"] == ranks - 1 - spares


@LONG
@ulfm
def test_a_spare_takes_the_place_of_a_worker_that_hangs(tmp_path):
    run = tmp_path / "run"
    code, output = train(run, 4, 1, "stall:1@20:1000", "--stall-limit", "3", "--drop-stalled", slow=0.03)
    assert code == 76, output
    assert output.count("is silent for") == 1, "a spare is expected to be silent"
    check(run, 1)


@ulfm
@pytest.mark.parametrize(
    ("problem", "options"),
    [(COUNTS, []), pytest.param(QUADRATIC, ["--set", "options.unused=3000000"], marks=LONG)],
    ids=["short", "long"],
)
def test_a_parked_spare_that_hangs_holds_up_nobody(tmp_path, problem, options):
    run = tmp_path / "run"
    job = running(run, "-m", "agnmpi", problem=problem, options=options)
    os.kill(ranks_of(run)[3], signal.SIGSTOP)
    code, output = job.finish(LIMIT)
    assert code == 76, output
    assert "does not answer, and is left behind" in output
    assert result_of(run)["lost"] == [3]
    assert not left_behind(run, job)
    if problem == COUNTS:
        check(run, 0)


def running(run, *program, problem=COUNTS, options=(), watchdog="4", launcher=ULFM):
    """A run of two workers and a spare, which are rank 3's."""
    given = ["--spares", "1", "--set", "options.slow=0.01", "--run-dir", run, *options]
    command, env = [sys.executable, *program, "train", problem, *GIVEN, *given], {"AGNMPI_WATCHDOG": watchdog}
    return started(lambda: progresses(run), 4, *command, env=env, launcher=launcher)


DETECTOR = [
    *("--mca", "mpi_ft_detector", "true", "--mca", "mpi_ft_detector_period", "1"),
    *("--mca", "mpi_ft_detector_timeout", "8", "--mca", "mpi_ft_propagator_with_rbcast", "true"),
]
STOPS = """
import os, signal, sys
from agnmpi.cli.main import main
from agnmpi.core.worker import Worker
from agnmpi.recovery.resend import ResendingEnd

def stop(*_):
    os.kill(os.getpid(), signal.SIGSTOP)

if os.environ["OMPI_COMM_WORLD_RANK"] == "3":
    MOMENT = stop
if __name__ == "__main__":
    sys.exit(main())
"""


@ulfm
def test_a_spare_that_hangs_before_it_is_parked_holds_up_nobody(tmp_path):
    run, script = tmp_path / "run", tmp_path / "stops.py"
    script.write_text(STOPS.replace("MOMENT", "Worker.waits_to_begin"))
    job = running(run, script)
    code, output = job.finish(LIMIT)
    assert code == 76, output
    assert "does not answer, and is left behind" in output
    assert not left_behind(run, job)
    check(run, 0)


@LONG
@ulfm
@pytest.mark.parametrize("moment", ["parked", "taken for dead", "followed"])
def test_a_spare_that_hangs_holds_up_no_election(tmp_path, moment):
    """Before it, without and with MPI's detector, or when it is to follow the new center."""
    run, script = tmp_path / "run", tmp_path / "stops.py"
    script.write_text(STOPS.replace("MOMENT", "ResendingEnd.replace"))
    how = {"launcher": (*ULFM, *DETECTOR), "watchdog": ""} if moment == "taken for dead" else {}
    job = running(run, *([script] if moment == "followed" else ["-m", "agnmpi"]), **how)
    center, *_, spare = ranks_of(run)
    if moment != "followed":
        os.kill(spare, signal.SIGSTOP)
    os.kill(center, signal.SIGKILL)
    code, output = job.finish(LIMIT)
    assert code == 76, output
    assert result_of(run)["lost"] == [0, 3]
    assert not left_behind(run, job)
    check(run, 0)


@LONG
@ulfm
def test_a_spare_that_is_only_late_is_not_left_behind(tmp_path):
    """The end waits for it 60 s."""
    run = tmp_path / "run"
    job = running(run, "-m", "agnmpi", watchdog="")
    spare = ranks_of(run)[3]
    os.kill(spare, signal.SIGSTOP)
    until(folder(run, 480).exists, "the workers have not left")
    time.sleep(12)
    os.kill(spare, signal.SIGCONT)
    code, output = job.finish(LIMIT)
    assert code == 0, output
    check(run, 0)


LOOPS = """
import mpi4py, os, signal, sys, threading, time
mpi4py.rc.thread_level = "funneled"
import numpy as np
from mpi4py import MPI
from agnmpi import AGNOptimizer, sgd, transports

rank = MPI.COMM_WORLD.rank
opt = AGNOptimizer(sgd(0.1), {"w": np.zeros(int(sys.argv[1]))}, MPI.COMM_WORLD, 5, transport=transports.p2p(spares=1))
if rank == 3:  # the others compute until it has parked
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
for total in (60, 40):
    for step in opt.steps(total):
        time.sleep(0.05)
        opt.minimize(lambda p: (1.0, {"w": -np.ones_like(p["w"])}))
opt.comm.Barrier()
opt.close()
sys.stdout.write(f"rank {rank}: {opt.taken} {opt.center['w'].mean():.3f}\\n")
sys.stdout.flush()
os._exit(0)
"""


@LONG
@ulfm
@pytest.mark.parametrize("size", [10, 300_000])
def test_loops_go_on_without_a_spare_that_hangs(tmp_path, size):
    script = tmp_path / "loops.py"
    script.write_text(LOOPS)
    code, output = mpiexec(4, sys.executable, script, size, env={"AGNMPI_WATCHDOG": "4"}, timeout=LIMIT, launcher=ULFM)
    assert code == 0, output
    assert "rank 3 did not answer at the end, and the others went on" in output
    for rank in range(3):
        assert f"rank {rank}: 100 2.000" in output


@LONG
@ulfm
def test_a_job_with_spares_that_ends_is_resumed_without(tmp_path):
    """All workers die, also the spare that was called."""
    run = tmp_path / "run"
    code, output = train(run, 4, 1, "kill:1@20,kill:2@30,kill:3@10", "--checkpoint-commits", "5")
    assert code == 1, output
    code, output = agnmpi(3, "train", "--resume", run, "--spares", "0", timeout=LIMIT)
    assert code == 0, output
    check(run, 1)


@LONG
@ulfm
def test_a_parked_spare_holds_no_model_and_sleeps(tmp_path):
    parameters = 4_000_000
    given = [f"options.directory={tmp_path}", f"options.parameters={parameters}"]
    given = [word for option in given for word in ("--set", option)]
    run, problem = tmp_path / "run", f"{PROBLEMS}:Watched"
    # Each step is slow: 10 s, of which the spare is parked nearly all.
    code, output = train(run, 3, 1, "", "--steps", "200", *given, slow=0.05, problem=problem)
    assert code == 0, output
    worker, spare = (np.loadtxt(tmp_path / f"rank-{rank}") for rank in (1, 2))
    moved = (worker[:, 0].max() - np.median(spare[:, 0])) * resource.getpagesize() / 4
    assert moved > 4 * parameters, "x, o, what is pulled and the gradient, of the worker alone"
    last = spare[:, 2] > spare[-1, 2] - 8
    _, cpu, wall = np.ptp(spare[last][:-10], axis=0)
    assert wall > 4
    assert cpu < 0.01 * wall


@LONG
@pytest.mark.timeout(500)
@ulfm
def test_goodput_with_a_kill_each_15_seconds(tmp_path):
    """Ten kills, four workers, twelve spares; a kill costs a period of ten steps of 50 ms."""
    run, lives = tmp_path / "run", [15 * min(rank, 4) for rank in range(1, 11)]  # seconds; a spare is called at a kill
    faults = ",".join(f"kill:{rank}@{round(life / 0.0505)}" for rank, life in enumerate(lives, 1))
    code, output = train(run, 17, 12, faults, "--period", "10", "--epochs", "216", slow=0.05, limit=400)
    assert code == 76, output
    assert result_of(run)["lost"] == list(range(1, 11))
    check(run, 10, epochs=216)
    assert result_of(run)["goodput"] > 0.9
    print(f"goodput {result_of(run)['goodput']:.1%}")


def test_spares_are_refused_where_no_rank_can_be_lost():
    code, output = agnmpi(3, "train", QUADRATIC, "--spares", "1", "--steps", "4", timeout=LIMIT)
    assert code == 2, output
    assert "spares = 1 take the places of lost ranks: start it with mpiexec --with-ft ulfm" in output


@ulfm
def test_one_worker_remains():
    code, output = agnmpi(3, "train", QUADRATIC, "--spares", "2", "--steps", "4", timeout=LIMIT, launcher=ULFM)
    assert code == 2, output
    assert "leave no worker beside the center" in output
