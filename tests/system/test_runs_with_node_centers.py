"""`agnmpi train --node-centers` from the command line, on one machine whose ranks lie on hosts that are told."""

import signal
import sys

from launcher import QUADRATIC, ROOT, events_of, mpiexec, progresses, result_of, started

from agnmpi.recovery.checkpoint import folders, read_center, worker_file

COMMAND = [sys.executable, ROOT / "tests/support/pretended_hosts.py", "a,a,b,b,b", "train", "--node-centers"]
OPTIONS = ["--batch", 16, "--rate", 0.05, "--period", 4, "--evaluate-every", 0, "--log-every", 0.1]


def test_interrupted_saved_and_resumed(tmp_path):
    """A signal reaches the workers of a node center by way of rank 0; no step is lost or done twice."""
    run = tmp_path / "run"
    long = ["--epochs", 4000, "--set", "options.slow=0.002", "--checkpoint-commits", 40, "--checkpoint-workers", "all"]
    job = started(
        lambda: progresses(run) and len(folders(run)) > 1, 5, *COMMAND, QUADRATIC, *OPTIONS, *long, "--run-dir", run
    )
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.finish(60)
    assert code == 75, output
    assert "node center: rank 2 on" in output
    assert "n/λ = 3/4" in output
    _, facts = read_center(folders(run)[0])
    steps = facts["steps"]
    assert facts["leases"]["committed"] == steps
    assert all(worker_file(folders(run)[0], worker).is_file() for worker in range(3))
    assert f"interrupted at step {steps} of 60000" in output
    more = ["--resume", run, "--steps", steps + 400, "--set", "options.slow=0"]
    code, output = mpiexec(5, *COMMAND, QUADRATIC, *more, timeout=60)
    assert code == 0, output
    assert f"{steps} of {steps + 400} steps" in output
    assert "local state" not in output
    result = result_of(run)
    assert (result["workers"], result["steps"], result["samples"]) == (3, steps + 400, 16 * (steps + 400))
    assert result["metrics"]["distance"] < 0.5
    last = [event for event in events_of(run) if event["event"] == "workers"][-1]
    assert sum(last["steps"]) == 400, "of the worker beside rank 0, and of the node center"
    assert len(last["steps"]) == 2
    assert [event["step"] for event in events_of(run) if event["event"] in ("interrupted", "resume")] == [steps, steps]


def test_nan_ends_the_run_with_its_cause(tmp_path):
    """A node center refuses what its workers send; rank 0 counts it, and the run ends."""
    code, output = mpiexec(
        5, *COMMAND, QUADRATIC, *OPTIONS, "--optimizer", "sgd", "--rate", 1e38, "--epochs", 40, "--run-dir",
        tmp_path / "run", timeout=60,
    )  # fmt: skip
    assert code == 1, output
    assert "they hold NaN or infinity; lower the rate" in output
    assert "--resume" in output
