"""A run that survives: ranks are killed, stalled and corrupted, and what is left is counted."""

import json
import os
import random
import sys
import time

import pytest
from launcher import ROOT, Job, mpi_kind

from agnmpi.checkpoint import newest
from agnmpi.faults import Fault, fault_tolerant, read_faults

DIGITS = f"{ROOT / 'examples/digits.py'}:Digits"
EPOCHS, SAMPLES, STEPS = 40, 1437, 45  # of digits: samples and steps in an epoch
LIMIT = 90

ulfm = pytest.mark.skipif(
    mpi_kind() != "openmpi", reason="MPICH 5.0 ends the whole job when a rank dies: no ULFM in the wheel"
)


def train(run, ranks, faults, *options, epochs=EPOCHS, launcher=("--with-ft", "ulfm"), problem=DIGITS):
    job = Job(
        ranks, sys.executable, "-m", "agnmpi", "train", problem, "--period", "3", "--epochs", epochs, "--run", run,
        "--evaluate-every", "0", "--inject-faults", *options, launcher=launcher, env={"AGNMPI_FAULTS": faults},
    )  # fmt: skip
    code, output = job.finish(LIMIT)
    with pytest.raises(ProcessLookupError):  # nothing is left running
        os.killpg(job.process.pid, 0)
    return code, output


def check(run, code, output, lost, epochs=EPOCHS):
    """The run went to its end, every sample of every epoch once, whatever was lost on the way."""
    assert code == (76 if lost else 0), output
    result = json.loads((run / "result.json").read_text())
    assert sorted(result["lost"]) == sorted(lost)
    assert result["steps"] == epochs * STEPS
    assert result["samples"] == epochs * SAMPLES
    assert result["metrics"]["accuracy"] > 0.9, result
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    turn = max((i for i, event in enumerate(events) if event["event"] == "resume"), default=0)
    assert sorted(event["rank"] for event in events[turn:] if event["event"] == "lost") == sorted(lost)
    for rank in lost:
        assert f"rank {rank} on " in output
    return result


@ulfm
@pytest.mark.parametrize(
    ("faults", "lost"),
    [
        ("kill:2@0", [2]),  # at the start
        ("kill:2@40", [2]),  # in the middle of a period
        ("cut:3@7", [3]),  # in the middle of an exchange
        pytest.param("cut:1@0", [1], marks=pytest.mark.long),  # in the first of them
        pytest.param("kill:1@30,kill:3@31", [1, 3], marks=pytest.mark.long),
        ("kill:1@0,kill:2@50,cut:3@9", [1, 2, 3]),  # all but one
        ("corrupt:2@5,corrupt:1@6", []),
        pytest.param("stall:1@20:2,slow:2@0:0.001", [], marks=pytest.mark.long),
    ],
)
def test_lost_workers_cost_only_their_uncommitted_periods(tmp_path, faults, lost):
    run = tmp_path / "run"
    code, output = train(run, 5, faults)
    result = check(run, code, output, lost)
    assert result["refused"] == faults.count("corrupt")


@ulfm
def test_a_worker_that_dies_in_the_last_period(tmp_path):
    """Nothing is left to grant, and the others wait for what the dead one held."""
    run = tmp_path / "run"
    problem = f"{ROOT / 'tests/problems.py'}:Quadratic"
    code, output = train(run, 3, "stall:1@2:3,kill:1@2", "--steps", "30", "--batch", "16", problem=problem)
    assert code == 76, output
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 30
    assert result["samples"] == 480


def test_a_worker_that_stalls_is_reported(tmp_path):
    run = tmp_path / "run"
    code, output = train(run, 3, "stall:2@20:5", "--stall-limit", "2", launcher=())
    check(run, code, output, [])
    assert "WARNING: rank 2 on " in output
    assert " is silent for " in output


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


@pytest.mark.parametrize("launcher", [(), ("--with-ft", "ulfm")], ids=["plain", "ulfm"])
@pytest.mark.parametrize("faults", ["kill:0@60", pytest.param("kill:1@40", marks=pytest.mark.long)])
def test_whoever_dies_the_job_ends_at_once_and_can_be_resumed(tmp_path, faults, launcher):
    """Where the death cannot be survived: no hang, and the newest checkpoint is whole."""
    if launcher and mpi_kind() != "openmpi":
        pytest.skip("ULFM is Open MPI's here")
    if launcher and faults.startswith("kill:1"):
        pytest.skip("survived: another test")
    run = tmp_path / "run"
    slow = ",slow:1@0:0.02,slow:2@0:0.02"  # time to write a checkpoint
    code, output = train(run, 3, faults + slow, "--checkpoint-commits", "5", launcher=launcher)
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
    run = tmp_path / "run"
    code, output = train(run, ranks, faults, "--seed", seed)
    result = json.loads((run / "result.json").read_text())
    check(run, code, output, result["lost"])
    assert set(result["lost"]) <= set(lost)


@pytest.mark.long
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
        result = json.loads((run / "result.json").read_text())
        assert result["samples"] == epochs * SAMPLES
    assert turns > 5


def test_faults_are_read_and_only_when_asked():
    assert read_faults("") == []
    assert read_faults("stall:1@20:2") == [Fault("stall", 1, 20, 2.0)]
    with pytest.raises(ValueError, match="KIND:RANK@AT"):
        read_faults("explode:1@2")
    assert fault_tolerant({"OMPI_MCA_mpi_ft_enable": "1"})
    assert fault_tolerant({"AGNMPI_FT": "1"})
    assert not fault_tolerant({})
