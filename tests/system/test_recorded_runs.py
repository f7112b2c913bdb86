"""Runs that are recorded and replayed, and timed against their simulation."""

import signal
import sys

import pytest
from in_process import center, config
from launcher import PROBLEMS, agnmpi, result_of, started

from agnmpi.cli.main import main
from agnmpi.reporting import record
from agnmpi.simulation import simulate
from agnmpi.simulation.timing import Timing


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--rule", "aeasgd", "--rate", "0.05"],
        ["--rule", "dynsgd", "--set", "options.dtype=float64"],
        ["--variant", "gradient", "--clip", "0.5"],
        ["--encoding", "int4", "--pull-encoding", "int8"],
    ],
    ids=" ".join,
)
def test_a_recorded_run_replays_to_the_same_bits(tmp_path, capsys, options):
    run, blobs = tmp_path / "run", f"{PROBLEMS}:Blobs"
    code, output = agnmpi(4, "train", blobs, "--epochs", 6, "--period", 3, *options, "--record", "--run", run)
    assert code == 0, output
    assert main(["simulate", "--replay", str(run), "--run", str(tmp_path / "replay")]) == 0
    output = capsys.readouterr().out
    assert "the same bits as" in output
    assert "BLAS" not in output
    assert center(run) == center(tmp_path / "replay")
    original, replayed = result_of(run), result_of(tmp_path / "replay")
    assert replayed["same_bits"] is True
    for key in ("clock", "workers", "metrics", "samples"):
        assert original[key] == replayed[key]
    assert original["staleness"]["mean"] == pytest.approx(replayed["staleness"]["mean"], abs=1e-3)


def test_a_record_of_an_interrupted_run_replays(tmp_path, capsys):
    run = tmp_path / "run"
    served = run / record.NAME
    job = started(
        lambda: served.exists() and served.read_text().count("\n") >= 50,
        3, sys.executable, "-m", "agnmpi", "train", f"{PROBLEMS}:Blobs", "--epochs", "100000",
        "--period", "3", "--log-every", "0.1", "--evaluate-every", "0", "--record", "--run", run,
    )  # fmt: skip
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.finish(60)
    assert code == 75, output
    _, order = record.read(run)
    commits = max(served.clock for served in order)
    assert main(["simulate", "--replay", str(run), "--run", str(tmp_path / "replay")]) == 0
    assert result_of(tmp_path / "replay")["clock"] == commits


@pytest.mark.long
@pytest.mark.parametrize(
    ("workers", "spread", "last", "rule"),
    [(2, 0.0, 1.0, "agn"), (4, 1.0, 1.0, "agn"), (6, 0.5, 4.0, "agn"), (8, 0.5, 1.0, "agn"), (4, 0.5, 2.0, "aeasgd")],
)
def test_a_real_run_takes_the_time_that_was_simulated(tmp_path, workers, spread, last, rule):
    """Steps of 20 ms that sleep: commits per second and staleness within 15 %. It measures: leave the machine alone."""
    real, options = tmp_path / "real", {"rule": rule, "period": 5, "steps": 250 * workers, "evaluate_every": 0}
    given = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    times = ["--set", "options.mean=0.02", "--set", f"options.spread={spread}", "--set", f"options.last={last}"]
    timed = f"{PROBLEMS}:Timed"
    code, output = agnmpi(workers + 1, "train", timed, "--rate", 0.05, *given, *times, "--run", real, timeout=120)
    assert code == 0, output
    factors = ",".join(["1"] * (workers - 1) + [str(last)])
    timing = Timing(step_time=0.02, step_distribution="exponential", step_spread=spread, speed_factors=factors)
    virtual = simulate.run(config(tmp_path / "virtual", workers, **options), timing)()
    real = result_of(real)
    rates = real["commits"] / real["seconds"], virtual["virtual"]["commits_per_second"]
    staleness = real["staleness"]["mean"], virtual["staleness"]["mean"]
    print(f"real and virtual: {rates} commits/s, staleness {staleness}, {real['staleness']} {virtual['staleness']}")
    assert rates[0] == pytest.approx(rates[1], rel=0.15)
    if rule == "agn":  # an elastic rule's commit follows its pull by microseconds here: no staleness to compare
        assert staleness[0] == pytest.approx(staleness[1], rel=0.15)
