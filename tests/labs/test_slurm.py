"""The batch files of jobs/, each submitted as people do, to a real SLURM on this machine (tests/labs/slurm_lab.sh)."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from launcher import INHERITED, KNOWN_FAILURE, QUADRATIC, ROOT, mpi_kind, mpi_library, progresses

from agnmpi.arrays.backend import device_count
from agnmpi.recovery.checkpoint import newest

LAB = ROOT / "tests/labs/slurm_lab.sh"
FILES = sorted(path.name for path in (ROOT / "jobs").glob("*.sbatch"))
RIGHT, WRONG = ("pmix", ("none", "pmi2")) if mpi_kind() == "openmpi" else ("pmi2", ("none", "pmix"))
ABORTS = mpi_library().startswith("Open MPI v4")  # without its PMI
LIMIT = 120
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


def install():
    """Install SLURM, or skip with the reason why not."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if all(shutil.which(name, path=path) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"no SLURM here; on Debian or Ubuntu, as root: {LAB} install")
    if Path("/run/systemd/system").is_dir() and not os.environ.get("CI"):
        pytest.skip(f"no SLURM here, and its packages would start services on this machine; if you like: {LAB} install")
    install = ["timeout", "200", LAB, "install"]
    done = subprocess.run(install, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SLURM cannot be installed: rc {done.returncode}, {done.stderr[-300:]}")


def free_ports(count):
    """The first of `count` ports in a row that nobody uses."""
    for _ in range(100):
        sockets = []
        try:
            for i in range(count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", sockets[0].getsockname()[1] + i if i else 0))
            return sockets[0].getsockname()[1]
        except (OSError, OverflowError):
            pass
        finally:
            for s in sockets:
                s.close()
    pytest.skip(f"no {count} free ports in a row")
    return 0


class Slurm:
    def __init__(self, home):
        self.home = home
        # An allocation or an MPI job that this may run in, is none of the lab's business.
        clean = {k: v for k, v in os.environ.items() if not k.startswith((*INHERITED, "SLURM_", "SBATCH_", "AGNMPI_"))}
        self.environment = clean | {
            "SLURM_CONF": str(home / "slurm.conf"),
            "AGNMPI_VENV": sys.prefix,
            "PYTHONPATH": str(ROOT),
            # The virtual nodes share one /dev/shm and one loopback, but not what Open MPI thinks is a host.
            "OMPI_MCA_btl": "self,tcp",
            "OMPI_MCA_btl_tcp_if_include": "lo",
        }

    def call(self, *command, cwd=None, env=None):
        """Run a command of SLURM; returns (exit code, output)."""
        done = subprocess.run(
            [*map(str, command)], cwd=cwd, env=self.environment | (env or {}), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
        )  # fmt: skip
        return done.returncode, done.stdout

    def submit(self, directory, file, *args, options=(), env=None):
        """Submit a batch file as from a checkout of agnmpi at `directory`; returns the job's number."""
        for name in ("jobs", "examples"):
            if not (directory / name).exists():
                (directory / name).symlink_to(ROOT / name)
        own = {"TMPDIR": tempfile.mkdtemp(dir=self.home / "tmp")}  # Open MPI leaves session directories
        code, output = self.call(
            "sbatch", "--parsable", *options, f"jobs/{file}", *args, cwd=directory, env=own | (env or {})
        )
        assert code == 0, output
        return int(output)

    def states(self, job):
        """The state of a job, or of each job of an array."""
        return self.call("squeue", "-h", "-r", "-t", "all", "-o", "%T", "-j", job)[1].split()

    def restarts(self, job):
        """How often the job went back to the queue."""
        return int(re.search(r"Restarts=(\d+)", self.call("scontrol", "show", "job", job)[1])[1])

    def until(self, job, directory, what, holds):
        """Wait until `holds()`; fails the test if that takes too long, or the job ends without it."""
        stop = time.monotonic() + LIMIT
        while not holds():
            over = ENDED.issuperset(self.states(job))
            if over and holds():
                return
            if over or time.monotonic() > stop:
                state = self.call("scontrol", "show", "job", job)[1]
                self.call("scancel", job)
                pytest.fail(f"job {job} is not {what}:\n{state}\n{log(directory)[-6000:]}")
            time.sleep(0.2)

    def run(self, directory, file, *args, **submission):
        """Submit, and wait for the end; returns (states, log, the job's number)."""
        for attempt in range(3):
            where = directory / str(attempt)
            where.mkdir()
            job = self.submit(where, file, *args, **submission)
            self.until(job, where, "at its end", lambda job=job: ENDED.issuperset(self.states(job)))
            if KNOWN_FAILURE not in log(where):
                break
        return self.states(job), log(where), where / "runs"


def log(directory):
    return "\n".join(path.read_text() for path in sorted(directory.glob("*.out")))


@pytest.fixture(scope="module")
def slurm():
    """A SLURM of two nodes with 16 cores and 4 GPUs each, for the tests of this file; stopped in any case."""
    install()
    home = Path(tempfile.mkdtemp(prefix="agnmpi-slurm-"))
    home.chmod(0o755)
    # It stops when its input ends: also when this process is killed.
    lab = subprocess.Popen(
        [LAB, "run", home, str(free_ports(3))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        if lab.stdout.readline() != "up\n":
            pytest.skip(f"SLURM cannot be started: {lab.stdout.read()[-600:]}")
        yield Slurm(home)
    finally:
        lab.stdin.close()
        lab.wait(60)
        stop = time.monotonic() + 20
        while (left := left_over(home)) and time.monotonic() < stop:
            time.sleep(0.1)
        shutil.rmtree(home, ignore_errors=True)
        assert not left, f"still running: {left}"


def left_over(home):
    """The processes of this lab: each has its configuration in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if f"SLURM_CONF={home}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def results(runs):
    return [json.loads(path.read_text()) for path in sorted(runs.rglob("result.json"))]


@pytest.mark.parametrize("file", FILES)
def test_slurm_accepts_the_file(slurm, file):
    code, output = slurm.call("sbatch", "--test-only", f"jobs/{file}", cwd=ROOT)
    assert code == 0, output
    # What --test-only does not see: an option after the first command is no option.
    text = (ROOT / "jobs" / file).read_text()
    body = text[re.search(r"^[^#\n]", text, re.MULTILINE).start() :]
    assert "#SBATCH" not in body


def test_one_node_by_default_trains_digits(slurm, tmp_path):
    pytest.importorskip("sklearn", reason="the digits example needs scikit-learn: pip install 'agnmpi[examples]'")
    states, output, runs = slurm.run(tmp_path, "one_node.sbatch")
    assert states == ["COMPLETED"], output
    (result,) = results(runs)
    assert result["workers"] == 3
    assert result["samples"] == 60 * 1437
    assert result["metrics"]["accuracy"] > 0.9
    assert result["loss"] is not None
    assert re.search(r"(?s)thread level.*world\s+of\s+4.*1,437 samples", output), output  # doctor first


@pytest.mark.skipif(mpi_kind() == "openmpi", reason="differs from one_node by no call of MPI: run with MPICH")
def test_gpus(slurm, tmp_path):
    states, output, runs = slurm.run(tmp_path, "gpus.sbatch", QUADRATIC, "--epochs", 4)
    assert states == ["COMPLETED"], output
    (result,) = results(runs)
    assert result["workers"] == 4, "one on each GPU"
    assert result["samples"] == 4 * 240
    if not device_count():  # the GPUs of the lab are made up
        assert "WARNING: SLURM gave this job 4 GPU(s) on this node, but CuPy finds none" in output


def test_nodes(slurm, tmp_path):
    problem = tmp_path / "problem.py"
    problem.write_text(
        "import os, sys, pathlib\n"
        f"sys.path.insert(0, {str(ROOT / 'tests/support')!r})\n"
        "from problems import Quadratic\n"
        "class Here(Quadratic):\n"
        "    def __init__(self, xp):\n"
        "        super().__init__(xp)\n"
        f"        file = pathlib.Path({str(tmp_path)!r}, os.environ['SLURMD_NODENAME'] + '-' + str(os.getpid()))\n"
        "        file.write_text('')\n"
    )
    states, output, runs = slurm.run(tmp_path, "nodes.sbatch", f"{problem}:Here", "--epochs", 4)
    assert states == ["COMPLETED"], output
    (result,) = results(runs)
    assert result["workers"] == 9, "the nodes are one host here"
    assert result["samples"] == 4 * 240
    for node in ("n1", "n2"):
        assert len([*tmp_path.glob(f"{node}-*")]) == 5, f"ranks of {node}: {[*tmp_path.glob('n*-*')]}"


@pytest.mark.skipif(mpi_kind() == "openmpi", reason="differs from one_node by no call of MPI: run with MPICH")
def test_sweep(slurm, tmp_path):
    states, output, runs = slurm.run(tmp_path, "sweep.sbatch", QUADRATIC, "--epochs", 4)
    assert states == ["COMPLETED"] * 4, output
    assert [(r["period"], r["rule"]) for r in results(runs)] == [(1, "agn"), (3, "agn"), (10, "agn"), (10, "dynsgd")]
    assert {r["samples"] for r in results(runs)} == {4 * 240}


@pytest.mark.parametrize("offer", WRONG)
def test_the_wrong_srun_is_refused(slurm, tmp_path, offer):
    """Worlds of one, or an abort in MPI_Init: neither trains, and the log says what to type."""
    states, output, runs = slurm.run(
        tmp_path, "one_node.sbatch", QUADRATIC, env={"AGNMPI_LAUNCH": f"srun --mpi={offer}"}
    )
    assert states == ["FAILED"], output
    assert not runs.exists()
    assert f"agnmpi doctor failed under: srun --mpi={offer} -n 4" in output
    if offer != "pmix" and not ABORTS:  # MPICH does not get as far
        assert "srun started 4 tasks, but each is a world of its own" in output
        assert f"pass srun --mpi={RIGHT}" in output


@pytest.mark.skipif(ABORTS, reason="Open MPI 4 aborts in MPI_Init, and says how to build it")
def test_train_itself_refuses_worlds_of_one(slurm, tmp_path):
    command = ["srun", "-n2", "--mpi=none", sys.executable, "-m", "agnmpi", "train", QUADRATIC]
    code, output = slurm.call(*command, cwd=tmp_path)
    assert code == 2, output
    assert "each is a world of its own" in output
    assert not (tmp_path / "runs").exists()


def test_without_mpiexec_the_right_srun_is_found(slurm, tmp_path):
    offered = slurm.call("srun", "--mpi=list")[1].split()
    if RIGHT not in offered:
        pytest.skip(f"this SLURM has no --mpi={RIGHT}, only {offered}")
    venv = tmp_path / "venv/bin"
    venv.mkdir(parents=True)
    (venv / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "python3").chmod(0o755)
    path = ":".join(d for d in os.environ["PATH"].split(":") if d != str(Path(sys.executable).parent))
    if found := shutil.which("mpiexec", path=path):
        pytest.skip(f"there is a {found} besides")
    states, output, runs = slurm.run(
        tmp_path, "nodes.sbatch", QUADRATIC, "--epochs", 4, options=["--ntasks-per-node=2"],
        env={"AGNMPI_VENV": str(venv.parent), "PATH": path},
    )  # fmt: skip
    assert states == ["COMPLETED"], output
    assert f": srun --mpi={RIGHT} --cpus-per-task=1 -n 4 python3 -m agnmpi" in output
    (result,) = results(runs)
    assert result["workers"] == 3


def submit_requeue(slurm, directory, epochs, *options):
    """Submit the file that requeues itself."""
    return slurm.submit(
        directory, "requeue.sbatch", QUADRATIC, "--epochs", epochs, "--rate", 0.05,
        "--set", "options.slow=0.05", "--log-every", 0.1, *options,
    )  # fmt: skip


def interrupt(slurm, job, directory):
    """Send USR1 to the batch shell, as --signal=B:USR1@120 does, and wait for the requeue."""
    turn = slurm.restarts(job)
    code, output = slurm.call("scancel", "--batch", "--signal=USR1", job)
    assert code == 0, output
    slurm.until(job, directory, "back in the queue", lambda: slurm.restarts(job) == turn + 1)


def finish_requeue(slurm, job, directory, epochs, turns):
    """Wait for the end, and require what an undisturbed run gives."""
    slurm.until(job, directory, "at its end", lambda: ENDED.issuperset(slurm.states(job)))
    output = log(directory)
    assert slurm.states(job) == ["COMPLETED"], output
    (result,) = results(directory / "runs")
    assert result["steps"] == epochs * 8, output
    assert result["metrics"]["distance"] < 0.25, output
    assert output.count(": back to the queue") == turns


def test_requeue_until_done(slurm, tmp_path):
    """Interrupted twice, back in the queue twice, and at the end each epoch was trained once."""
    job = submit_requeue(slurm, tmp_path, 60)
    run = tmp_path / "runs" / f"agnmpi-requeue-{job}"
    for turn in (0, 1):
        since = time.time()
        slurm.until(job, tmp_path, f"under way in turn {turn}", lambda since=since: progresses(run, since))
        interrupt(slurm, job, tmp_path)
    finish_requeue(slurm, job, tmp_path, 60, 2)


def test_a_lost_rank_puts_the_job_back_in_the_queue(slurm, tmp_path):
    """A rank is killed, the job ends with that, and goes on from the newest checkpoint."""
    job = submit_requeue(slurm, tmp_path, 60, "--checkpoint-commits", 2)
    run = tmp_path / "runs" / f"agnmpi-requeue-{job}"
    slurm.until(job, tmp_path, "at a checkpoint", lambda: newest(run, lambda line: None) is not None)
    ranks = []
    for pid in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            said = (pid / "cmdline").read_bytes().split(b"\0")
            if b"python" in said[0] and f"runs/{run.name}".encode() in said:
                ranks.append(int(pid.name))
    assert len(ranks) == 4
    os.kill(max(ranks), signal.SIGKILL)
    slurm.until(job, tmp_path, "back in the queue", lambda: slurm.restarts(job) == 1)
    finish_requeue(slurm, job, tmp_path, 60, 1)


@pytest.mark.long
def test_requeue_at_any_moment(slurm, tmp_path):
    """A signal while doctor runs, while the ranks start, and while they train: nothing is lost but time."""
    job = submit_requeue(slurm, tmp_path, 60)
    delays = [0, 0.5, 1, 1.5, 2, 3]
    for turn, delay in enumerate(delays):
        slurm.until(
            job,
            tmp_path,
            f"started in turn {turn}",
            lambda turn=turn: log(tmp_path).count(f"job {job} on ") == turn + 1,
        )
        time.sleep(delay)
        interrupt(slurm, job, tmp_path)
    finish_requeue(slurm, job, tmp_path, 60, len(delays))
