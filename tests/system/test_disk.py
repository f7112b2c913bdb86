"""Disks that fail: training goes on, says so once, and the exit code tells what is not written at the end."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from launcher import QUADRATIC, agnmpi, events_of, progresses, result_of, started

from agnmpi.recovery.checkpoint import newest
from agnmpi.recovery.files import load

LIMIT = 90
GIVEN = ["-m", "agnmpi", "train", QUADRATIC, "--batch", "16", "--period", "2", "--log-every", "0.1"]
GIVEN += ["--set", "options.slow=0.005", "--evaluate-every", "0", "--checkpoint-seconds", "0.2"]


def running(run, *options):
    return started(lambda: progresses(run), 3, sys.executable, *GIVEN, "--run", run, *options)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes."""
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def fill(disk):
    with (disk / "filler").open("ab", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass


def keep_full(disk, until):
    """Until `until()`: also with what a write frees that fails."""
    while not until():
        with pytest.raises(OSError, match="No space"):
            fill(disk)
        time.sleep(0.02)
    (disk / "filler").unlink()


def outages(output, begins, ends):
    """How often something is said to begin, and as often to end."""
    assert output.count(begins) == output.count(ends), output
    return output.count(begins)


def test_a_disk_that_is_full_for_a_while(small_disk):
    run = small_disk / "run"
    job = running(run, "--steps", "2000")
    end = time.monotonic() + 1.5
    keep_full(small_disk, lambda: time.monotonic() > end)
    code, output = job.finish(LIMIT)
    assert code == 0, output
    # Of 15 events and 7 checkpoints; more than once where a write that had begun fits into what another has freed.
    assert 1 <= outages(output, "events.jsonl cannot be written", "events.jsonl can be written again") < 4
    assert 1 <= outages(output, "the checkpoint could not be written", "the checkpoint is written again") < 4
    assert [event for event in events_of(run) if event["event"] == "unwritten"]
    assert result_of(run)["steps"] == 2000
    assert newest(run, pytest.fail)[2]["steps"] == 2000


def test_a_disk_that_is_full_to_the_end(small_disk):
    run = small_disk / "run"
    job = running(run, "--steps", "1200")
    until = time.monotonic() + 30
    while newest(run, lambda _: None) is None:
        assert time.monotonic() < until
    keep_full(small_disk, lambda: job.process.poll() is not None)
    code, output = job.finish(LIMIT)
    assert code == 74, output
    assert "the result could not be written" in output
    assert "exit code 74" in output
    assert not (run / "result.json").exists()
    assert newest(run, lambda _: None) is not None, "the last good one stays"
    code, output = agnmpi(3, "train", "--resume", run, timeout=LIMIT)
    assert code == 0, output
    assert result_of(run)["samples"] == 1200 * 16


def test_a_directory_that_is_removed_is_made_again(tmp_path):
    run = tmp_path / "run"
    job = running(run, "--steps", "1200")
    run.rename(tmp_path / "removed")  # at once, whatever is being written there
    shutil.rmtree(tmp_path / "removed", ignore_errors=True)
    code, output = job.finish(LIMIT)
    assert code == 0, output
    assert "events.jsonl was removed; it is made again" in output
    assert result_of(run)["steps"] == 1200
    assert newest(run, pytest.fail)[2]["steps"] == 1200
    code, output = agnmpi(3, "train", "--resume", run, timeout=LIMIT)
    assert code == 0, output
    assert "the run was complete" in output


def test_directories_in_the_place_of_files(tmp_path):
    run = tmp_path / "run"
    job = running(run, "--steps", "600")
    (run / "result.json").mkdir()
    code, output = job.finish(LIMIT)
    assert code == 74, output
    assert "the result could not be written" in output
    assert load(run / "center.safetensors")
    without = tmp_path / "without"
    job = running(without, "--steps", "600")
    (without / "center.safetensors").mkdir()
    code, output = job.finish(LIMIT)
    assert code == 74, output
    assert not (without / "result.json").exists(), "a result of a center that is not there"
    assert events_of(without)[-1]["event"] == "failed"
    other = tmp_path / "other"
    (other / "events.jsonl").mkdir(parents=True)
    code, output = agnmpi(3, *GIVEN[2:], "--run", other, timeout=LIMIT)
    assert code == 2, output
    assert "events.jsonl" in output
    assert "Traceback" not in output


def test_two_jobs_in_one_directory(tmp_path):
    run = tmp_path / "run"
    job = running(run, "--steps", "1000000", "--resume", "auto")
    code, output = agnmpi(3, *GIVEN[2:], "--run", run, "--resume", "auto", timeout=LIMIT)
    assert code == 2, output
    assert "is in use by another job (host " in output
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.finish(LIMIT)
    assert code == 75, output
