"""Across hosts: 4 pseudo-hosts on this machine, TCP alone between them, over links of 1 Gbit/s.

The test bed is netlab.sh: AGNMPI_NETLAB names it, else it lies in ../shared/tools.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from launcher import QUADRATIC, ROOT, mpi_kind, mpiexec, mpiexec_path, progresses, result_of, started

NETLAB = Path(os.environ.get("AGNMPI_NETLAB") or ROOT.parent / "shared/tools/netlab.sh")
HOSTS = 4
LIMIT = 40  # seconds for the bed to come up or go down
TRANSPORTS = {
    "p2p": ["--transport", "p2p"],
    "rma": ["--transport", "rma"],
    "accumulate": ["--transport", "rma", "--no-use-locking"],
    "p2p-2-centers": ["--centers", "2"],
}


OPENMPI = mpi_kind() == "openmpi"
SHORT = ("p2p", "rma")  # the others where there is time (AGNMPI_LONG=1)


def why_not():
    """What is missing for the test bed; empty if nothing is."""
    if not NETLAB.is_file():
        return f"no test bed for hosts at {NETLAB}; AGNMPI_NETLAB may name netlab.sh"
    if os.geteuid() != 0:
        return "pseudo-hosts need root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if lacking := [
        name for name in ("ip", "tc", "sysctl", "unshare", "nsenter", "gcc") if not shutil.which(name, path=path)
    ]:
        return f"pseudo-hosts need {', '.join(lacking)}: apt-get install iproute2 procps util-linux gcc libc6-dev"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "pseudo-hosts need /dev/net/tun"
    tried = subprocess.run(
        ["unshare", "-n", "-u", "-i", "-m", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/dev/shm"],
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Bed:
    """Hosts h0 … h3; `home` holds all that the bed writes."""

    def __init__(self, home):
        venv = Path(mpiexec_path()).parent.parent
        self.home = home
        self.environment = {
            "NC_STATE": str(home / "state"), "NC_BIN": str(home), "NC_OMPI": str(venv), "NC_MPICH": str(venv),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }  # fmt: skip

    def call(self, *command):
        """Run a command of the bed; returns (exit code, output)."""
        done = subprocess.run(
            [NETLAB, *command], env=os.environ | self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
        )  # fmt: skip
        return done.returncode, done.stdout

    def run(self, *args, hosts=HOSTS, timeout=60, placed=None):
        """Run Python with one rank on each of the first `hosts` hosts, or `placed` so; returns what it printed."""
        placed = placed or ["-H", ",".join(f"h{i}" for i in range(hosts)), "ompi" if OPENMPI else "mpich"]
        try:
            code, output = mpiexec(
                hosts, *args, timeout=timeout, env=self.environment, start=[str(NETLAB), "run", *placed, sys.executable]
            )
        finally:
            self.call("clean")  # what a killed mpiexec has left
        assert code == 0, output[-8000:]
        return output

    def left_over(self):
        """The processes of this bed: each has its directory in its environment."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if f"NC_STATE={self.home}/".encode() in (process / "environ").read_bytes():
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found


@pytest.fixture(scope="module")
def bed():
    with hosts_up() as bed:
        yield bed


@contextlib.contextmanager
def hosts_up():
    if reason := why_not():
        pytest.skip(reason)
    bed = Bed(Path(tempfile.mkdtemp(prefix="agnmpi-netlab-")))
    # A keeper takes the bed down when its input ends: also when this process is killed.
    keeper = subprocess.Popen(
        ["bash", "-c", f'"$0" up {HOSTS} --rate 1gbit && echo up && read -r; "$0" down; rm -rf "$NC_BIN"', NETLAB],
        env=os.environ | bed.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said = []
        for line in keeper.stdout:
            said.append(line)
            if line == "up\n":
                break
        else:
            pytest.skip(f"the test bed cannot be started: {''.join(said)[-600:]}")
        yield bed
    finally:
        keeper.stdin.close()
        keeper.wait(LIMIT)
        stop = time.monotonic() + 10
        while (left := bed.left_over()) and time.monotonic() < stop:
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(bed.home, ignore_errors=True)
        assert not left, f"still running: {left}"


def test_the_hosts_share_no_memory(bed):
    said = bed.run("-m", "agnmpi", "doctor", "--json")
    report = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert sorted({rank["host"] for rank in report["ranks"]}) == [f"h{i}" for i in range(HOSTS)]


@pytest.mark.parametrize("away", [pytest.param(0, marks=pytest.mark.long), 2])
@pytest.mark.parametrize(
    "transport", [t if t in SHORT else pytest.param(t, marks=pytest.mark.long) for t in TRANSPORTS]
)
def test_digits(bed, tmp_path, transport, away):
    """Trained, and every sample counted, also where rank 0 is outside MPI for seconds."""
    pytest.importorskip("sklearn", reason="the digits example needs scikit-learn: pip install 'agnmpi[examples]'")
    command = ["-m", "agnmpi"] if not away else [ROOT / "tests/support/busy_center.py", away]
    said = bed.run(
        *command, "train", f"{ROOT}/examples/digits.py:Digits", *TRANSPORTS[transport],
        "--epochs", 10, "--period", 3, "--run", tmp_path / "run",
    )  # fmt: skip
    result = result_of(tmp_path / "run")
    assert said.count("rank 0 is away") == (1 if away else 0)
    assert result["samples"] == 10 * 1437
    assert result["metrics"]["accuracy"] > 0.75
    assert 0 < result["loss"] < 1.5


# Two ranks on each of three hosts, not the host of mpiexec first.
BLOCK = ["-H", "h1,h0,h2", "-n", "2", "ompi" if OPENMPI else "mpich"]
CYCLIC = [*BLOCK, "--rank-by", "node", "--"] if OPENMPI else ["-H", "h1,h0,h2,h1,h0,h2", "mpich"]


@pytest.mark.parametrize("transport", ["p2p", pytest.param("rma", marks=pytest.mark.long)])
@pytest.mark.parametrize(("placed", "serve"), [(BLOCK, (0, 2, 4)), (CYCLIC, (0, 1, 2))], ids=["block", "cyclic"])
def test_a_center_on_each_host(bed, tmp_path, placed, serve, transport):
    pytest.importorskip("sklearn", reason="the digits example needs scikit-learn: pip install 'agnmpi[examples]'")
    said = bed.run(
        "-m", "agnmpi", "train", f"{ROOT}/examples/digits.py:Digits", "--centers", "hosts", "--transport", transport,
        "--epochs", 10, "--period", 3, "--run", tmp_path / "run", placed=placed,
    )  # fmt: skip
    names = ", ".join(f"rank {rank} on {host}" for rank, host in zip(serve, ("h1", "h0", "h2")))
    assert f"centers: {names}\n" in said
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["workers"], result["samples"]) == (3, 10 * 1437)
    assert result["metrics"]["accuracy"] > 0.75
    report = bed.run("-m", "agnmpi", "doctor", placed=placed)
    assert "3 hosts with several ranks: with --centers hosts each holds a part of the center" in report


@pytest.mark.parametrize(
    "most", [(0.5, 0.14), pytest.param((0.26, 0.07), marks=pytest.mark.long)], ids=["busy", "idle"]
)
def test_a_node_center_spares_the_link_between_hosts(bed, most):
    """Two hosts with 4 workers each: sums cross instead of each commit; int8 is of these sums.

    Of 4 commits or more where the workers keep pace, which a busy machine does not let them: then of 2 at least.
    """
    placed = ["-H", "h0,h1", "-n", "5", "ompi" if OPENMPI else "mpich"]
    said = bed.run(ROOT / "tests/support/bytes_between_hosts.py", 300_000, 30, placed=placed, timeout=120)
    found = json.loads(said[said.index('{"flat') : said.rindex("}") + 1])
    flat, float32, int8 = (found[layout][0] for layout in ("flat", "node", "node int8"))
    assert flat > 30 * 4 * 2 * 1_200_000, "each commit, and each pull"
    assert float32 <= most[0] * flat
    assert int8 <= most[1] * flat
    assert found["flat"][1] == found["node"][1] == 8 * 30
    assert abs(found["node int8"][1] - 8 * 30) < 0.5


@pytest.mark.long
def test_large_vectors_add_up(bed):
    """40 MB from each of 3 workers, and back, while rank 0 is away for 2 s when they have begun to come."""
    said = bed.run(ROOT / "tests/support/large_sums.py", 10_000_000, 1, 2, "p2p", "rma", "accumulate", timeout=90)
    assert said.count("right") == 3
    assert said.count("rank 0 is away") == 3


@pytest.mark.long
def test_conformance(bed):
    bed.run(
        "-m", "pytest", "--with-mpi", "-q", "-p", "no:cacheprovider", ROOT / "tests/mpi/test_conformance.py",
        "-k", "1000 and (lost or torn or sessions) and not staged and not buffer", timeout=90,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_all_parallel_tests(bed, hosts):
    """With three hosts a quarter of an hour: 24 and 80 MB from two workers, again and again, over 1 Gbit/s."""
    bed.run("-m", "pytest", "--with-mpi", "-q", "-p", "no:cacheprovider", ROOT / "tests/mpi", hosts=hosts, timeout=1200)


DETECTOR = {"": "true", "_period": 1, "_timeout": 4}


@pytest.mark.long
@pytest.mark.skipif(mpi_kind() != "openmpi", reason="MPICH 5.0 has no ULFM in the wheel, and no detector")
@pytest.mark.parametrize(("order", "victim"), [("h0,h1,h2", "h2"), ("h1,h0,h2", "h1")], ids=["worker", "center"])
def test_a_host_vanishes(tmp_path, order, victim):
    """Its power goes off in mid-run: the detector notices, and the run goes on; rank 0 lies on the first host."""
    options = ["--mca", "mpi_ft_propagator_with_rbcast", "true"]
    for name, value in DETECTOR.items():
        options += ["--mca", f"mpi_ft_detector{name}", str(value)]
    run = tmp_path / "run"
    with hosts_up() as bed:
        start = [str(NETLAB), "run", "-H", order, "ompi", "--with-ft", "ulfm", *options, "--", sys.executable]
        job = started(
            lambda: progresses(run),
            3, "-m", "agnmpi", "train", QUADRATIC, "--epochs", 400, "--set",
            "options.slow=0.002", "--evaluate-every", 0, "--log-every", 0.2, "--run", run,
            env=bed.environment, start=start,
        )  # fmt: skip
        bed.call("poweroff", victim)
        until(lambda: (run / "result.json").exists())
        with contextlib.suppress(subprocess.TimeoutExpired):  # mpiexec may wait for the lost host for ever
            job.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        bed.call("clean")
        output, _ = job.process.communicate(timeout=LIMIT)
    result = result_of(run)
    assert result["lost"] == [0 if victim == "h1" else 2], output
    assert (result["steps"], result["samples"]) == (3200, 400 * 240), output
    assert f"on {victim} is lost" in output


def until(done):
    stop = time.monotonic() + 60
    while not done():
        assert time.monotonic() < stop, "it does not come"
        time.sleep(0.1)
