"""A run that survives: ranks are killed, stalled and corrupted, and what is left is counted."""

import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache, partial

import pytest
from launcher import QUADRATIC, ROOT, ULFM, agnmpi, events_of, has_ulfm, left_behind, mpiexec, printed, result_of
from mpi4py import MPI

from agnmpi.recovery.checkpoint import newest
from agnmpi.training import job
from agnmpi.training.config import Config

DIGITS = f"{ROOT / 'examples/digits.py'}:Digits"
EPOCHS, SAMPLES, STEPS = 40, 1437, 45  # of digits: samples and steps in an epoch
LIMIT = 90

ulfm = pytest.mark.skipif(
    not has_ulfm(), reason="this MPI ends the whole job when a rank dies: no ULFM, which Open MPI 5 has"
)


def train(run, ranks, faults, *options, epochs=EPOCHS, launcher=ULFM, problem=DIGITS):
    return agnmpi(
        ranks, "train", problem, "--period", "3", "--epochs", epochs, "--run", run, "--evaluate-every", "0",
        "--inject-faults", *options, launcher=launcher, env={"AGNMPI_FAULTS": faults}, timeout=LIMIT,
        ended=partial(gone, run),
    )  # fmt: skip


def gone(run, job):
    """Nothing is left running."""
    assert not (left := left_behind(run, job)), left


@cache
def undisturbed():
    """Accuracy in one process, with four workers."""
    digits = Config(DIGITS, transport="local", workers=4, period=3, epochs=EPOCHS, evaluate_every=0, keep_checkpoints=0)
    with tempfile.TemporaryDirectory() as run:
        return job.train(replace(digits, run_dir=run), MPI.COMM_SELF)["metrics"]["accuracy"]


def check(run, code, output, lost, accuracy=None, epochs=EPOCHS):
    """The run went to its end, every sample of every epoch once, whatever was lost on the way."""
    assert code == (76 if lost else 0), output
    result = result_of(run)
    assert sorted(result["lost"]) == sorted(lost)
    assert result["steps"] == epochs * STEPS
    assert result["samples"] == epochs * SAMPLES
    room = 0.0101 if len(lost) < 3 else 0.0201  # a sole survivor trains most of it alone
    assert result["metrics"]["accuracy"] > (accuracy or undisturbed() - room), result
    events = events_of(run)
    turn = max((i for i, event in enumerate(events) if event["event"] == "resume"), default=0)
    said = {event["rank"] for event in events[turn:] if event["event"] == "lost"}
    said |= {rank for event in events[turn:] if event["event"] == "failover" for rank in event["lost"]}
    assert said <= set(lost)
    for rank in lost:
        assert f"rank {rank} on " in output
    return result


@ulfm
@pytest.mark.parametrize(
    ("faults", "lost"),
    [
        ("kill:2@0", [2]),  # at the start
        pytest.param("kill:2@40", [2], marks=pytest.mark.long),  # in the middle of a period
        ("cut:3@7", [3]),  # in the middle of an exchange
        pytest.param("cut:1@0", [1], marks=pytest.mark.long),  # in the first of them
        pytest.param("kill:1@30,kill:3@31", [1, 3], marks=pytest.mark.long),
        ("kill:1@0,kill:2@50,cut:3@9", [1, 2, 3]),  # all but one
        pytest.param("corrupt:2@5,corrupt:1@6", [], marks=pytest.mark.long),
        pytest.param("stall:1@20:2,slow:2@0:0.001", [], marks=pytest.mark.long),
    ],
)
def test_lost_workers_cost_only_their_uncommitted_periods(tmp_path, faults, lost):
    run = tmp_path / "run"
    code, output = train(run, 5, faults)
    result = check(run, code, output, lost)
    assert result["refused"] == faults.count("corrupt")


LAST = EPOCHS * STEPS // 3 - 1  # commits before the last one


@ulfm
@pytest.mark.parametrize(
    ("faults", "lost", "options"),
    [
        ("kill:0@0", [0], []),  # the first commit is applied, and not answered
        pytest.param("kill:0@60", [0], [], marks=pytest.mark.long),
        (f"kill:0@{LAST}", [0], []),
        ("kill:0@80", [0], ["--checkpoint-commits", "1", "--keep", "2"]),  # while checkpoints are being written
        pytest.param("kill:0@60,cut:2@9,kill:3@31", [0, 2, 3], [], marks=pytest.mark.long),
        ("kill:0@30,kill:1@45,kill:2@60,kill:3@75", [0, 1, 2, 3], []),  # the sole survivor trains on
        ("kill:1@5,kill:0@60,kill:3@90", [0, 1, 3], ["--overlap"]),
        ("kill:2@9,kill:0@60", [0, 2], ["--no-wait"]),
        pytest.param(
            "kill:0@60,cut:2@9",
            [0, 2],
            ["--rule", "aeasgd", "--rho", "50", "--optimizer", "adam"],
            marks=pytest.mark.long,
        ),
        pytest.param("kill:0@60,corrupt:3@8,corrupt:1@9", [0], [], marks=pytest.mark.long),
        ("kill:0@90", [0], ["--variant", "gradient", "--checkpoint-commits", "10"]),
    ],
    ids=str,
)
def test_a_lost_center_is_followed_by_another(tmp_path, faults, lost, options):
    """Whoever has pulled last serves on; each sample is used once, and no clock goes back without a word."""
    run = tmp_path / "run"
    code, output = train(run, 5, faults, *options)
    result = check(run, code, output, lost, 0.9 if options else None)
    events = events_of(run)
    followed = [event for event in events if event["event"] == "failover"]
    assert followed
    for event in followed:
        assert f"rank {event['center']} on " in output
        assert f"clock {event['clock']}" in output
    found = newest(run, pytest.fail)
    assert found[2]["steps"] == result["steps"], "the new center keeps checkpoints, too"
    if "gradient" in options:
        assert "no checkpoint has the slots" not in output


@ulfm
def test_who_waits_for_its_large_state_to_be_written_outlives_another(tmp_path):
    run = tmp_path / "run"
    code, output = mpiexec(
        4, sys.executable, ROOT / "tests/support/large_states.py", "train", DIGITS, "--period", "3", "--epochs", "3",
        "--run", run, "--inject-faults", "--checkpoint-workers", "all", "--checkpoint-commits", "2", launcher=ULFM,
        env={"AGNMPI_FAULTS": "kill:2@10"}, timeout=LIMIT, ended=partial(gone, run),
    )  # fmt: skip
    check(run, code, output, [2], 0.3, epochs=3)


@ulfm
@pytest.mark.parametrize("who", ["center", "1"])
def test_who_dies_when_all_is_done_holds_up_nobody(tmp_path, who):
    run = tmp_path / "run"
    code, output = mpiexec(
        4, sys.executable, ROOT / "tests/support/dies_at_the_end.py", "train", DIGITS, "--period", "3", "--epochs", "2",
        "--run", run, "--checkpoint-workers", "end", launcher=ULFM, env={"DIES_AT_THE_END": who}, timeout=LIMIT,
        ended=partial(gone, run),
    )  # fmt: skip
    check(run, code, output, [0 if who == "center" else 2], 0.3, epochs=2)
    assert "diverged" not in output, "a new center that sees no commit any more has no loss to show"


@pytest.mark.long
@ulfm
def test_slots_that_no_checkpoint_has_start_anew(tmp_path):
    run = tmp_path / "run"
    code, output = train(run, 4, "kill:0@90", "--variant", "gradient", "--keep", "0")
    check(run, code, output, [0], 0.9)
    assert "no checkpoint has the slots of its adam, which start anew" in output


@ulfm
def test_a_worker_that_dies_in_the_last_period(tmp_path):
    """Nothing is left to grant, and the others wait for what the dead one held."""
    run = tmp_path / "run"
    faults = "stall:1@2:3,kill:1@2,slow:2@0:0.02"
    code, output = train(run, 3, faults, "--steps", "30", "--batch", "16", problem=QUADRATIC)
    assert code == 76, output
    result = result_of(run)
    assert result["steps"] == 30
    assert result["samples"] == 480


def test_a_worker_that_stalls_is_reported(tmp_path):
    run = tmp_path / "run"
    code, output = train(run, 3, "stall:2@20:5", "--stall-limit", "2", launcher=())
    check(run, code, output, [])
    assert "WARNING: rank 2 on " in output
    assert " is silent for " in output


@pytest.mark.parametrize(
    ("faults", "launcher"),
    [
        ("stall:2@20:1000", ()),
        pytest.param("stall:2@20:1000", ULFM, marks=[ulfm, pytest.mark.long]),
        pytest.param("stall:2@20:1000,kill:3@30", ULFM, marks=ulfm),
    ],
)
def test_a_worker_that_hangs_is_dropped_if_asked(tmp_path, faults, launcher):
    lost = [2, 3] if "kill" in faults else [2]
    run = tmp_path / "run"
    code, output = train(run, 5, faults, "--stall-limit", "2", "--drop-stalled", launcher=launcher)
    check(run, code, output, lost)
    assert "and is dropped" in output


@pytest.mark.parametrize("launcher", [(), pytest.param(ULFM, marks=ulfm)], ids=["plain", "ulfm"])
def test_an_interrupted_run_ends_the_ranks_that_hang(tmp_path, launcher):
    run = tmp_path / "run"
    job, said = printed(
        "is dropped", 4, sys.executable, "-m", "agnmpi", "train", DIGITS, "--period", "3", "--epochs", EPOCHS,
        "--run", run, "--inject-faults", "--stall-limit", "2", "--drop-stalled", launcher=launcher,
        env={"AGNMPI_FAULTS": "stall:2@20:1000,slow:1@0:0.02,slow:3@0:0.02"},
    )  # fmt: skip
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.finish(LIMIT)
    assert code == 75, said + output
    gone(run, job)


@pytest.mark.parametrize("options", [[], pytest.param(["--no-wait"], marks=pytest.mark.long)], ids=" ".join)
def test_a_dropped_worker_may_come_back(tmp_path, options):
    run = tmp_path / "run"
    faults = "stall:2@20:5,slow:1@0:0.012,slow:3@0:0.012"
    code, output = train(run, 4, faults, "--stall-limit", "2", "--drop-stalled", *options, launcher=())
    result = check(run, code, output, [])
    assert "and is dropped" in output
    assert result["dropped"] == 1 or (options and result["dropped"]), (
        "they came too late: the others had done its steps"
    )


def test_the_last_worker_that_stalls_is_waited_for(tmp_path):
    code, output = train(
        tmp_path / "run", 3, "stall:1@20:5,stall:2@20:5", "--stall-limit", "2", "--drop-stalled", launcher=()
    )
    assert code in (0, 76), output
    assert "and is dropped" in output
    assert "and is waited for: no other worker is left" in output


def test_a_commit_that_never_arrives_is_made_again(tmp_path):
    run = tmp_path / "run"
    code, output = train(run, 4, "drop:1@5,drop:2@8", launcher=())
    check(run, code, output, [])


@ulfm
@pytest.mark.parametrize("options", [["--centers", "2"], ["--rule", "synchronous"]], ids=" ".join)
def test_a_run_that_needs_all_ranks_says_which_one_died(tmp_path, options):
    code, output = train(tmp_path / "run", 4, "kill:2@30", *options)
    assert code != 0
    assert "ends the job: rank 2 died, and it needs all of its ranks; resume it" in output
    assert "Traceback" not in output


@ulfm
def test_all_workers_die(tmp_path):
    run = tmp_path / "run"
    code, output = train(run, 3, "kill:1@40,kill:2@50")
    assert code not in (0, 76)
    assert "all workers are lost" in output
    found = newest(run, pytest.fail)
    assert found is not None, "what was committed is kept"
    code, output = train(run, 3, "", "--resume", "auto")
    check(run, code, output, [])


@pytest.mark.parametrize(
    ("launcher", "options"),
    [((), []), pytest.param(ULFM, ["--centers", "2"], marks=ulfm)],
    ids=["plain", "sharded"],
)
@pytest.mark.parametrize("faults", ["kill:0@60", pytest.param("kill:2@40", marks=pytest.mark.long)])
def test_whoever_dies_the_job_ends_at_once_and_can_be_resumed(tmp_path, faults, launcher, options):
    """Where the death cannot be survived: no hang, and the newest checkpoint is whole."""
    run = tmp_path / "run"
    slow = ",slow:1@0:0.02,slow:2@0:0.02,slow:3@0:0.02"  # time to write a checkpoint
    code, output = train(run, 4, faults + slow, "--checkpoint-commits", "5", *options, launcher=launcher)
    assert code != 0
    found = newest(run, lambda line: None)
    assert found is not None, output
    assert found[2]["steps"] > 0
    code, output = train(run, 4, "", "--resume", "auto", launcher=())
    check(run, code, output, [])


@pytest.mark.long
@ulfm
@pytest.mark.parametrize("seed", range(50))
def test_random_kill_schedules(tmp_path, seed):
    rng = random.Random(seed)
    ranks = rng.randint(3, 7)
    lost = rng.sample(range(1, ranks), rng.randint(1, ranks - 2))
    faults = ",".join(f"{rng.choice(['kill', 'cut'])}:{rank}@{rng.randint(0, 25)}" for rank in lost)
    if seed % 2:  # the center, too
        lost, faults = [0, *lost], f"{faults},kill:0@{rng.randint(0, 150)}"
    run, way = tmp_path / "run", (["--overlap"], ["--no-wait"], [], [])[seed // 2 % 4]
    code, output = train(run, ranks, faults, "--seed", seed, *way)
    result = result_of(run)
    check(run, code, output, result["lost"], undisturbed() - 0.0201)  # one worker may be left, with another seed
    assert set(result["lost"]) <= set(lost)
    assert 0 in result["lost"] or not seed % 2


@pytest.mark.long
@pytest.mark.timeout(900)
@ulfm
def test_soak(tmp_path):
    """Ten minutes of kills every few seconds, and restarts."""
    run, rng, turns = tmp_path / "run", random.Random(0), 0
    until = time.monotonic() + 600
    epochs = 0
    while time.monotonic() < until:
        epochs += 20
        turns += 1
        faults = f"{rng.choice(['kill', 'cut'])}:{rng.randint(0, 4)}@{rng.randint(0, 40)}"
        for given in (faults, ""):
            code, output = train(run, 5, given, "--resume", "auto", epochs=epochs)
            if code in (0, 76):
                break
        assert code in (0, 76), output
        result = result_of(run)
        assert result["samples"] == epochs * SAMPLES
    assert turns > 5
