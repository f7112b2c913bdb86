"""Numbers of a run as they go to other files."""

import csv

from problems import Quadratic

import agnmpi
from agnmpi.reporting.runs import read


def test_the_seconds_of_a_resumed_run_go_on(tmp_path):
    """In metrics.csv, as in the report."""
    run = tmp_path / "run"
    given = {"batch": 16, "rate": 0.05, "optimizer": "sgd", "transport": "local", "period": 4, "log_every": 1e-9}
    for epochs in (1, 2):
        resumes = {"resume": str(run)} if epochs > 1 else {"run_dir": str(run)}
        agnmpi.train(Quadratic, **given, epochs=epochs, writers="csv", **resumes)
    with (run / "metrics.csv").open() as file:
        rows = [(float(row["seconds"]), int(row["step"])) for row in csv.DictReader(file) if row["name"] == "loss"]
    events = [event for event in read(run).of("progress") if event["loss"] is not None]
    assert rows == [(round(event["wall"], 3), event["step"]) for event in events]
    assert [second for second, _ in rows] == sorted(second for second, _ in rows)
