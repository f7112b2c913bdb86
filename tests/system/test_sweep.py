"""`agnmpi sweep`: a run for each point of a grid, in groups of the ranks of one world."""

import re
import signal
import sys

import pytest
from launcher import PROBLEMS, QUADRATIC, ULFM, agnmpi, events_of, has_ulfm, progresses, result_of, started

from agnmpi.cli.main import main
from agnmpi.reporting.runs import find, read

RATES = ["--grid", "rate=0.05,0.1"]


def in_process(*given):
    return main(["sweep", *map(str, given), "--transport", "local"])


def test_a_run_for_each_point_and_a_table(tmp_path, capsys):
    folder = tmp_path / "sweep"
    given = [QUADRATIC, *RATES, "--grid", "period=2,4", "--epochs", "2", "--run-dir", folder]
    assert in_process(*given) == 0
    runs = {path.name: read(path) for path in find([folder])}
    assert list(runs) == [f"rate={rate},period={period}" for rate in ("0.05", "0.1") for period in (2, 4)]
    assert {(run.options["rate"], run.options["period"]) for run in runs.values()} == {
        (rate, period) for rate in (0.05, 0.1) for period in (2, 4)
    }
    assert all(run.state == "done" for run in runs.values())
    said = capsys.readouterr().out
    table = said[said.index("run  ") :].splitlines()
    assert [line.split()[0] for line in table[1:5]] == list(runs)
    assert "distance" in table[1]
    assert main(["runs", str(folder)]) == 0
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()

    written = {path: path.stat().st_mtime_ns for path in folder.rglob("events.jsonl")}
    assert in_process(*given) == 0, "all points have a result"
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("events.jsonl")}
    assert in_process(*given, "--seed", "1") == 2
    assert "was begun with seed 0, not 1" in capsys.readouterr().err


def test_defaults_that_depend_on_the_workers_are_no_other_options(tmp_path, capsys):
    folder = tmp_path / "sweep"
    given = [QUADRATIC, "--grid", "period=2,4", "--epochs", "1", "--run-dir", folder, "--workers"]
    assert in_process(*given, 3) == 0
    assert in_process(*given, 3) == 0, "all points have a result"
    assert {(run.options["rate"], run.options["warmup"]) for run in map(read, find([folder]))} == {(0.003, 96)}
    assert in_process(*given, 4) == 2
    assert "was begun with workers 3, not 4: give" in capsys.readouterr().err
    assert in_process(*given, 3, "--rate", "0.001") == 2
    assert "was begun with rate 0.003, not 0.001: give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "which points? Give --grid"),
        (["--grid", "perod=1,2"], "perod=1: unknown option 'perod'; did you mean 'period'?"),
        (["--grid", "rate=0.1,-1"], "rate=-1: rate must be positive"),
        (["--grid", "rate="], "--grid 'rate=': give KEY=VALUE"),
        (["--grid", "run_dir=a,b"], "where KEY is an option of train"),
        (["--grid", "rate=1,1"], "the grid has rate=1 twice"),
        ([*RATES, "--ranks-per-run", "2"], "1 ranks make no groups of 2"),
    ],
)
def test_what_is_refused_before_any_training(tmp_path, capsys, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    assert in_process(QUADRATIC, *given) == 2
    assert said in capsys.readouterr().err
    assert not list(find([tmp_path / "runs"]))


def test_a_point_that_fails_leaves_the_others(tmp_path):
    """Two groups of two ranks; one point fails in the problem's code, one is refused, and neither is done again."""
    folder = tmp_path / "sweep"
    given = [f"{PROBLEMS}:Bad", "--grid", "options.bad=false,true", "--grid", "options.dtype=float32,float16,float64"]
    code, output = agnmpi(4, "sweep", *given, "--ranks-per-run", "2", "--run-dir", folder)
    assert code == 1, output
    assert "6 of 6 points to train, by 2 groups of 2 ranks" in output
    assert "ArithmeticError: this point went wrong" in output
    assert len(re.findall(r"float16: is refused: .*float16", output)) == 2
    done = [path.parent.name for path in folder.glob("*/result.json")]
    assert sorted(done) == [f"options.bad=false,options.dtype={kind}" for kind in ("float32", "float64")]
    assert all(result_of(folder / name)["workers"] == 1 for name in done)
    assert {read(path).state for path in find([folder])} == {"done", "failed"}
    assert "evaluation at epoch" not in output, "two displays do not mix"
    assert all("evaluation at epoch" in (folder / name / "output.txt").read_text() for name in done)
    assert not list(folder.glob(".claims*"))


def test_it_is_interrupted_and_goes_on(tmp_path):
    folder = tmp_path / "sweep"
    given = ["sweep", QUADRATIC, *RATES, "--batch", "16", "--steps", "120", "--period", "2", "--log-every", "0.1"]
    given += ["--set", "options.slow=0.02", "--run-dir", folder]
    first, second = folder / "rate=0.05", folder / "rate=0.1"
    job = started(lambda: progresses(first), 3, sys.executable, "-m", "agnmpi", *given)
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.finish(60)
    assert code == 75, output
    assert f"the same command with --run-dir {folder} goes on" in output
    assert not second.exists()
    code, output = agnmpi(3, *given)
    assert code == 0, output
    assert {"interrupted", "resume", "end"} <= {event["event"] for event in events_of(first)}
    assert [result_of(run)["steps"] for run in (first, second)] == [120, 120]


def test_a_lost_rank_ends_it_and_it_goes_on(tmp_path):
    if not has_ulfm():
        pytest.skip("needs Open MPI's ULFM")
    folder = tmp_path / "sweep"
    given = ["sweep", QUADRATIC, *RATES, "--batch", "16", "--steps", "60", "--period", "2", "--run-dir", folder]
    given += ["--set", "options.slow=0.005"]  # rank 2 comes to its tenth step
    faults = {"AGNMPI_FAULTS": "kill:2@10"}
    code, output = agnmpi(3, *given, "--inject-faults", launcher=ULFM, env=faults)
    assert code == 75, output
    assert "a rank is lost, and the sweep ends; the same command" in output
    assert [path.parent.name for path in folder.glob("*/result.json")] == ["rate=0.05"]
    code, output = agnmpi(3, *given)
    assert code == 0, output
    assert "1 of 2 points to train" in output
