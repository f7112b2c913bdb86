"""No rank is left behind, and none waits for ever, where neither MPI nor the launcher ends the job."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from launcher import PROBLEMS, QUADRATIC, ROOT, ULFM, agnmpi, has_ulfm, mpiexec, progresses, result_of, started

LIMIT = 60
ulfm = pytest.mark.skipif(not has_ulfm(), reason="this MPI ends the whole job when a rank dies: no ULFM")


def left(run):
    """Processes that still work on a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(run).encode() in words:
            found.append(process.name)
    return found


def nothing_is_left(run):
    until = time.monotonic() + 60
    while found := left(run):
        assert time.monotonic() < until, found
        time.sleep(0.1)


def arguments(run, problem, *options):
    return ["train", problem, "--epochs", "2000", "--evaluate-every", "0", "--run", run, *options]


@ulfm
@pytest.mark.parametrize(
    ("problem", "options", "text"),
    [
        ("Raises", [], "this gradient went wrong"),  # MPI_Abort alone spares the others
        ("ExitsAtOnce", ["--set", "options.n=30", "--epochs", "300"], "the watchdog ends it"),
        pytest.param(
            "ExitsAtOnce", ["--set", "options.n=0"], "the watchdog ends it", marks=pytest.mark.long
        ),  # loading
    ],
    ids=str,
)
def test_four_ranks_with_ulfm_end_together(tmp_path, problem, options, text):
    run = tmp_path / "run"
    code, output = agnmpi(
        4, *arguments(run, f"{PROBLEMS}:{problem}", *options), launcher=ULFM, env={"AGNMPI_WATCHDOG": "3"},
        timeout=LIMIT,
    )  # fmt: skip
    assert code not in (0, 75, 76), output
    assert text in output
    nothing_is_left(run)


@pytest.mark.parametrize("launcher", [(), pytest.param(ULFM, marks=ulfm)], ids=str)
def test_who_ends_before_MPI_starts_holds_up_nobody(tmp_path, launcher):
    """MPICH's mpiexec does not mind, either, if it exits by itself; there agnmpi waits four times as long."""
    run = tmp_path / "run"
    script = f'[ "$OMPI_COMM_WORLD_RANK$PMI_RANK" = 2 ] && exit 3; exec {sys.executable} -m agnmpi "$@"'
    code, output = mpiexec(
        4, "bash", "-c", script, "bash", *arguments(run, QUADRATIC), launcher=launcher,
        env={"AGNMPI_WATCHDOG": "5" if launcher else "2"}, timeout=LIMIT,
    )  # fmt: skip
    assert code not in (0, 75, 76), output
    nothing_is_left(run)


@ulfm
def test_who_dies_after_all_is_written_holds_up_nobody(tmp_path):
    run = tmp_path / "run"
    code, output = mpiexec(
        4, sys.executable, ROOT / "tests/support/dies_at_the_end.py", "train", QUADRATIC, "--epochs", "2", "--run", run,
        launcher=ULFM, env={"DIES_AT_THE_END": "after"}, timeout=LIMIT,
    )  # fmt: skip
    assert result_of(run)["steps"] == 16, output
    assert code == 0, output
    nothing_is_left(run)


@pytest.mark.long
@ulfm
def test_a_launcher_that_does_not_return_is_ended(tmp_path):
    run = tmp_path / "run"
    given = ["train", f"{PROBLEMS}:Quadratic", "--steps", "200", "--set", "options.slow=0.05", "--run-dir", run]
    job = started(
        lambda: progresses(run), 3, sys.executable, "-m", "agnmpi", *given, launcher=ULFM, env={"AGNMPI_WATCHDOG": "3"}
    )
    os.kill(job.process.pid, signal.SIGSTOP)  # as one that has locked itself
    code, output = job.finish(LIMIT)
    assert code == -signal.SIGKILL, output
    assert result_of(run)["steps"] == 200
    nothing_is_left(run)


@ulfm
def test_windows_are_refused_under_ulfm(tmp_path):
    code, output = agnmpi(3, *arguments(tmp_path, QUADRATIC, "--transport", "rma"), launcher=ULFM, timeout=LIMIT)
    assert code == 2, output
    assert "transport rma under mpiexec --with-ft ulfm" in output
    assert "use transport p2p" in output


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ((), ["--transport", "accumulate"]),  # its workers wait for nobody
        ((), []),
        pytest.param(ULFM, [], marks=[ulfm, pytest.mark.long]),
    ],
    ids=str,
)
def test_who_kills_the_launcher_ends_the_ranks(tmp_path, launcher, options):
    run = tmp_path / "run"
    given = arguments(run, QUADRATIC, *options, "--set", "options.slow=0.01")
    job = started(lambda: progresses(run), 3, sys.executable, "-m", "agnmpi", *given, launcher=launcher)
    assert len(left(run)) >= 4
    os.kill(job.process.pid, signal.SIGKILL)
    nothing_is_left(run)
    job.finish(60)
