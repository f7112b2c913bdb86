"""One job in a run's directory, and none that is dead keeps others out."""

import os
import signal
import subprocess
import sys

import pytest

from agnmpi.recovery.lock import lock, unlock_all

HOLDER = """
import os, sys, time
from pathlib import Path
from agnmpi.recovery.lock import lock
lock(Path(sys.argv[1]))
if not os.fork():
    print("locked", flush=True)
    time.sleep(600)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock, and a forked child; in a group of their own."""
    command = [sys.executable, "-c", HOLDER, tmp_path]
    environment = {**os.environ, "SLURM_JOB_ID": "4711"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_another_job_is_refused_until_the_first_has_died(tmp_path, holder):
    with pytest.raises(FileExistsError, match=rf"in use by another job \(host .*, process {holder.pid}, job 4711\)"):
        lock(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    lock(tmp_path)  # though a child of it lives
    lock(tmp_path)
    unlock_all()
    assert (tmp_path / "lock").read_bytes() == b""


def test_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        lock(tmp_path)
    assert victim.read_text() == "mine"
