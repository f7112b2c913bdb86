"""Checkpoints, resuming and signals, as a person meets them: through the command line."""

import json
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from in_process import center
from launcher import PROBLEMS, QUADRATIC, agnmpi, events_of, mpi_kind, progresses, result_of, started

from agnmpi.recovery.checkpoint import center_file, folders, newest, read_facts, seal, unseal, worker_file
from agnmpi.recovery.files import load

LIMIT = 90
SHORT = ["--batch", "16", "--rate", "0.05", "--period", "4"]


def train(ranks, *options, code=0, problem=QUADRATIC):
    found, output = agnmpi(ranks, "train", problem, *options, timeout=LIMIT)
    assert found == code, output
    return output


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ["--transport", "local", "--optimizer", "adamw"]),
        (2, ["--transport", "rma", "--schedule", "step", "--decay-every", "24"]),
        (2, ["--rule", "eamsgd", "--rho", "2"]),
        pytest.param(2, ["--variant", "gradient", "--optimizer", "momentum"], marks=pytest.mark.long),
        (3, ["--centers", "2", "--center-optimizer", "nesterov"]),
        pytest.param(2, ["--transport", "rma", "--no-use-locking"], marks=pytest.mark.long),
        (2, ["--outer-rate", "0.7", "--center-optimizer", "momentum", "--set", "center_options.beta=0.3"]),
        (1, ["--rule", "diloco"]),
        (2, ["--encoding", "int8", "--pull-encoding", "int4", "--set", "options.unused=600"]),
        pytest.param(
            3, ["--centers", "2", "--encoding", "int4", "--set", "options.unused=600"], marks=pytest.mark.long
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_half_and_half_is_the_whole_bit_for_bit(tmp_path, ranks, options):
    """One worker: k steps, resume, k steps equal 2k steps; λ divides k. (With overlap resuming cuts it once.)"""
    whole, half = tmp_path / "whole", tmp_path / "half"
    train(ranks, *SHORT, *options, "--steps", "48", "--run", whole)
    train(ranks, *SHORT, *options, "--steps", "24", "--run", half)
    assert center(half) != center(whole)
    output = train(ranks, "--resume", half, "--steps", "48", problem=QUADRATIC)
    assert "resumed from step-000000000024: 24 of 48 steps" in output
    assert "local state" not in output
    assert center(half) == center(whole)
    for key in ("clock", "steps", "samples"):
        assert result_of(half)[key] == result_of(whole)[key]


@pytest.mark.parametrize(
    ("then", "options"),
    [
        (2, []),
        pytest.param(5, [], marks=pytest.mark.long),
        (4, ["--centers", "2"]),
        pytest.param(3, ["--transport", "rma"], marks=pytest.mark.long),
        (1, ["--transport", "local", "--workers", "3"]),
    ],
    ids=str,
)
def test_resume_with_other_ranks_and_another_transport(tmp_path, then, options):
    run = tmp_path / "run"
    train(4, *SHORT, "--epochs", "3", "--run", run)
    output = train(then, "--resume", run, "--epochs", "6", *options)
    assert "resumed from step-000000000045" in output
    assert result_of(run)["steps"] == 6 * 15
    assert result_of(run)["samples"] == 6 * 240, "nothing repeated, nothing skipped"
    assert result_of(run)["metrics"]["distance"] < 0.6, "0.765 before the first step"
    kinds = [event["event"] for event in events_of(run)]
    assert "resume" in kinds
    assert kinds.count("end") == 2


def test_from_several_centers_to_one(tmp_path):
    run = tmp_path / "run"
    train(4, *SHORT, "--centers", "3", "--center-optimizer", "adam", "--epochs", "2", "--run", run)
    arrays, _ = load(run / "center.safetensors")
    found = newest(run, pytest.fail)
    assert found is not None
    assert found[1]["c"].tobytes() == arrays["w"].tobytes() + arrays["b"].tobytes()
    train(2, "--resume", run, "--centers", "1", "--epochs", "4")
    assert result_of(run)["steps"] == 60


def interrupted(tmp_path, ranks, *options, number=signal.SIGUSR1):
    """Start a long run, send it a signal when it has made progress, and let it end."""
    run = tmp_path / "run"
    saves = "--checkpoint-seconds" in options
    job = started(
        lambda: progresses(run) and not (saves and newest(run, lambda line: None) is None),
        ranks, sys.executable, "-m", "agnmpi", "train", QUADRATIC, *SHORT, "--epochs", "4000", "--set",
        "options.slow=0.0005", "--log-every", "0.1", "--evaluate-every", "0", "--run", run, *options,
    )  # fmt: skip
    job.process.send_signal(number)
    code, output = job.finish(LIMIT)
    return run, code, output


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, []),
        (3, ["--transport", "rma"]),
        pytest.param(3, ["--transport", "rma", "--no-use-locking"], marks=pytest.mark.long),
        pytest.param(4, ["--centers", "2"], marks=pytest.mark.long),
        (3, ["--rule", "synchronous"]),
    ],
    ids=str,
)
def test_usr1_commits_saves_and_leaves(tmp_path, ranks, options):
    run, code, output = interrupted(tmp_path, ranks, *options)
    assert code == 75, output
    assert f"--resume {run.resolve()}" in output
    assert not (run / "result.json").exists()
    _, facts = unseal(folders(run)[0] / "center-0.safetensors")
    steps = int(facts["steps"])
    assert 0 < steps < 60_000
    assert f"interrupted at step {steps} of 60000" in output
    lasting = ["--steps", str(steps + 400), "--set", "options.slow=0"]
    output = train(ranks, "--resume", run, *lasting)
    assert f"{steps} of {steps + 400} steps" in output
    assert result_of(run)["steps"] == steps + 400
    assert result_of(run)["metrics"]["distance"] < 0.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_term_and_interrupt(tmp_path, number):
    """The job ends, with a code that says so, and nothing is left running."""
    run, code, output = interrupted(tmp_path, 3, "--checkpoint-seconds", "0.2", number=number)
    assert code != 0
    assert "Traceback" not in output
    if mpi_kind() == "mpich":  # Open MPI's mpiexec leaves the ranks 0.3 s and may close their output first
        assert "interrupted at step" in output, output
    assert newest(run, lambda line: None) is not None, "at most the last interval is lost"


def test_a_second_signal_aborts_at_once(tmp_path):
    run = tmp_path / "run"
    job = started(
        (tmp_path / "stuck").exists, 2, sys.executable, "-m", "agnmpi", "train",
        f"{PROBLEMS}:Stuck", "--period", "1000000", "--run", run, cwd=tmp_path,
    )  # fmt: skip
    job.process.send_signal(signal.SIGUSR1)
    time.sleep(2)
    assert job.process.poll() is None, "the period is not finished: the run goes on"
    job.process.send_signal(signal.SIGUSR1)
    code, _ = job.finish(60)
    assert code != 0


def test_checkpoints_while_it_runs_and_a_broken_newest_one(tmp_path):
    run = tmp_path / "run"
    train(3, *SHORT, "--epochs", "20", "--checkpoint-commits", "10", "--keep", "2", "--run", run)
    found = folders(run)
    assert len(found) == 2
    assert found[0].name == "step-000000000300"
    assert found[1].name < found[0].name
    newest_file = found[0] / "center-0.safetensors"
    content = bytearray(newest_file.read_bytes())
    content[-1] ^= 1
    newest_file.write_bytes(content)
    output = train(3, "--resume", run, "--epochs", "24")
    assert "step-000000000300 is left out" in output
    assert len(list((run / "checkpoints").glob("broken-step-000000000300-*"))) == 1
    assert "does not match its checksum" in output
    assert f"resumed from {found[1].name}" in output
    assert result_of(run)["samples"] == 24 * 240


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ["--transport", "local"]),
        (2, []),
        pytest.param(2, ["--transport", "rma"], marks=pytest.mark.long),
        (1, ["--rule", "synchronous"]),
    ],
    ids=str,
)
def test_after_a_crash_it_is_the_whole_bit_for_bit(tmp_path, ranks, options):
    """One worker: its local state is that of the checkpoint, and no gradient enters its moments twice.

    It is slow before it dies: checkpoints have time to be written.
    """
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    options = [*SHORT, "--optimizer", "adam", "--checkpoint-commits", "5", *options]
    train(ranks, *options, "--epochs", "10", "--run", whole)
    code, output = agnmpi(
        ranks, "train", QUADRATIC, *options, "--epochs", "10", "--run", crashed, "--inject-faults",
        "--set", "options.slow=0.005",
        env={"AGNMPI_FAULTS": f"kill:{ranks - 1}@103"}, timeout=LIMIT,
    )  # fmt: skip
    assert code != 0
    assert not (crashed / "result.json").exists(), output
    last = folders(crashed)[0]
    if not worker_file(last, 0).exists():  # the kill came before its thread was through: then from the one before
        shutil.rmtree(last)
    output = train(ranks, "--resume", crashed)
    assert "local state" not in output
    assert center(crashed) == center(whole)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, ["--transport", "p2p"]),
        (4, ["--transport", "rma"]),
        pytest.param(5, ["--transport", "p2p", "--overlap"], marks=pytest.mark.long),
        pytest.param(5, ["--transport", "rma", "--rule", "eamsgd"], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_all_blocks_of_a_checkpoint_hold_the_same_commits(tmp_path, ranks, options):
    run = tmp_path / "run"
    output = train(
        ranks, *SHORT, *options, "--centers", "2", "--epochs", "40", "--set", "options.unused=100000",
        "--set", "options.slow=0.002",
        "--checkpoint-commits", "7", "--keep", "100", "--run", run,
    )  # fmt: skip
    assert "WARNING" not in output
    whole = [found for found in folders(run) if all(center_file(found, i).is_file() for i in range(2))]
    assert whole == folders(run), "every checkpoint that was begun is whole"
    assert len(whole) > 5
    blocks = [[unseal(center_file(found, i))[1] for i in range(2)] for found in whole]
    for first, second in blocks:
        for fact in ("applied", "processed", "clock", "steps"):
            assert first[fact] == second[fact]
    assert any(facts[0]["applied"] != blocks[0][0]["applied"] for facts in blocks)


def test_resume_auto(tmp_path):
    run = tmp_path / "run"
    options = ["--run", run, "--resume", "auto"]
    train(2, *SHORT, *options, "--epochs", "2")
    assert "resumed" in train(2, *SHORT, *options, "--epochs", "4")
    assert result_of(run)["steps"] == 60


@pytest.fixture(scope="module")
def an_epoch(tmp_path_factory):
    """The directory of a run of one epoch; who takes it leaves it as it is."""
    run = tmp_path_factory.mktemp("an-epoch") / "run"
    train(2, *SHORT, "--epochs", "1", "--run", run)
    return run


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--resume", "auto"], "name it with run"),
        (["--resume", "RUN", "--set", "options.dtype=float64"], "dtype is float32 there and float64 here"),
        (["--resume", "RUN", "--center-optimizer", "adam"], "center optimizer is add, not adam"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "RUN", "--steps", "3"], "has 15 steps, but the run ends at 3"),
        (["--resume", "RUN", "--epochs", "2", "--batch", "8"], "has batch 16, not 8: it cannot be told which samples"),
        (["--resume", "RUN", "--epochs", "2", "--seed", "7"], "has seed 0, not 7"),
    ],
)
def test_what_cannot_be_resumed_is_refused(an_epoch, options, text):
    before = contents(an_epoch)
    given = [str(an_epoch) if word == "RUN" else word for word in options]
    assert text in train(2, *given, code=2)
    assert contents(an_epoch) == before


def test_a_complete_run_stays_as_it_is(tmp_path):
    run = tmp_path / "run"
    train(2, *SHORT, "--steps", "16", "--run", run)
    before = (run / "result.json").read_text()
    output = train(2, "--resume", run)
    assert "the run was complete, at step 16" in output
    assert "WARNING" not in output
    assert (run / "result.json").read_text() == before
    (run / "result.json").unlink()  # as if the run had been killed before it wrote it
    output = train(2, "--resume", run)
    assert "WARNING" not in output
    assert result_of(run)["steps"] == 16
    assert result_of(run)["metrics"] == json.loads(before)["metrics"]
    output = train(2, "--resume", run, "--epochs", "2")  # overrides the steps of its configuration
    assert result_of(run)["steps"] > 16


def test_a_checkpoint_that_cannot_be_written_is_reported_and_training_goes_on(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way")
    output = train(3, *SHORT, "--epochs", "10", "--checkpoint-commits", "10", "--run", run, code=74)
    assert "the checkpoint could not be written" in output
    assert result_of(run)["steps"] == 150


def test_checkpoints_of_several_centers_come_as_fast_as_they_can(tmp_path):
    """A center that lags behind is asked for the newest alone, and nobody waits for an answer that does not come."""
    run = tmp_path / "run"
    options = ["--transport", "rma", "--centers", "2", "--checkpoint-commits", "1", "--keep", "1", "--period", "1"]
    train(4, "--steps", "300", *options, "--run", run)
    assert newest(run, pytest.fail) is not None
    assert len(folders(run)) == 1


def test_several_centers_without_locking_are_saved_at_the_end_alone(tmp_path):
    run = tmp_path / "run"
    options = ["--transport", "rma", "--no-use-locking", "--centers", "2"]
    output = train(4, *SHORT, *options, "--epochs", "10", "--checkpoint-commits", "10", "--run", run)
    assert "the only checkpoint is that of the end" in output
    assert [read_facts(folder)["leases"]["free"] for folder in folders(run)] == [[]]
    train(4, "--resume", run, "--epochs", "12")


def test_blocks_of_different_commits_are_left_out(tmp_path):
    run = tmp_path / "run"
    train(4, *SHORT, "--centers", "2", "--epochs", "4", "--checkpoint-commits", "5", "--run", run)
    newest_one, second = folders(run)[:2]
    arrays, facts = unseal(center_file(newest_one, 1))
    seal(center_file(newest_one, 1), arrays, facts | {"processed": [99, 99]})
    output = train(4, "--resume", run, "--epochs", "6")
    assert "the blocks of centers 0 and 1 do not hold the same commits" in output
    assert f"resumed from {second.name}" in output


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (3, ["--rule", "synchronous", "--optimizer", "momentum"]),
        (4, ["--centers", "2", "--optimizer", "adam"]),
        (3, ["--overlap", "--optimizer", "adam"]),
        pytest.param(3, ["--no-wait", "--optimizer", "adam"], marks=pytest.mark.long),
        (3, ["--transport", "rma", "--no-use-locking"]),
    ],
    ids=str,
)
def test_a_refused_commit_leaves_no_trace(tmp_path, ranks, options):
    run = tmp_path / "run"
    problem = f"{PROBLEMS}:SometimesNaN"
    shared = ["--set", "options.slow=0.001"]  # else the others might take all steps before the last rank's sixth
    train(ranks, *SHORT, *options, *shared, "--epochs", "20", "--run", run, problem=problem)
    result = result_of(run)
    assert result["refused"] > 0
    assert result["steps"] + result["given_up"] == 300, "where no center grants steps, none grants them again"
    assert result["samples"] == 16 * result["steps"]
    assert result["metrics"]["distance"] < 0.5, "0.765 before the first step"


def test_commits_that_are_not_finite_are_refused(tmp_path):
    """A few are refused and their steps taken again; many in a row end the run with the reason."""
    run = tmp_path / "run"
    given = ["--epochs", "10", "--set", "options.slow=0.002", "--run", run]  # each gets its share
    output = train(3, *SHORT, *given, problem=f"{PROBLEMS}:SometimesNaN")
    assert result_of(run)["refused"] > 0
    assert "commits were refused" in output
    assert result_of(run)["samples"] == 2400
    assert np.isfinite(result_of(run)["metrics"]["distance"])
    output = train(3, *SHORT, "--epochs", "10", code=1, problem=f"{PROBLEMS}:AlwaysNaN")
    assert "10 commits in a row were refused" in output
