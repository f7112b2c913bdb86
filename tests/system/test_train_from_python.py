"""`agnmpi.train` of a class in a script, with a function that takes the events, and with writers."""

import csv
import json
import sys

import pytest
from launcher import QUADRATIC, events_of, mpiexec, result_of

from agnmpi.cli.main import main

SCRIPT = """
import json, sys, time
import numpy as np
import agnmpi

class Line:
    samples = 256
    def __init__(self, xp, slope=3.0):
        self.x = np.random.default_rng(0).normal(size=self.samples)
        self.y = slope * self.x
    def init(self, rng):
        return {"w": np.zeros(1)}
    def gradient(self, params, indices):
        time.sleep(5e-4)  # each rank gets its share: none commits at the end what it computed from the beginning
        error = self.x[indices] * params["w"] - self.y[indices]
        return (error**2).mean() / 2, [(error * self.x[indices]).mean(keepdims=True)]
    def evaluate(self, params):
        return {"w": params["w"]}

seen = []
result = agnmpi.train(
    Line, epochs=100, optimizer="sgd", rate=0.1, period=2, options={"slope": 2.0}, run_dir=sys.argv[1],
    on_event=seen.append,
)
if result is not None:
    print(json.dumps([result, seen]))
"""


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_class_of_a_script(tmp_path, ranks):
    (tmp_path / "mine.py").write_text(
        SCRIPT if ranks > 1 else SCRIPT.replace("epochs=100", 'transport="local", epochs=100')
    )
    run = tmp_path / "run"
    code, output = mpiexec(ranks, sys.executable, tmp_path / "mine.py", run)
    assert code == 0, output
    result, seen = json.loads(next(line for line in output.splitlines() if line.startswith("[{")))
    assert result["metrics"]["w"] == pytest.approx(2.0, abs=0.02)
    assert seen == events_of(run)
    assert result == result_of(run)
    assert result["options"]["problem"] == f"{tmp_path}/mine.py:Line"
    assert result["run_dir"] == str(run)
    assert sum(result["hosts"].values()) == ranks
    assert "mine.py" in result["command"]
    assert result["versions"]["numpy"]
    last = [event for event in seen if event["event"] == "workers"][-1]
    assert sum(last["steps"]) == result["steps"]
    assert len(last["steps"]) == max(1, ranks - 1)


def test_numbers_as_csv(tmp_path):
    given = ["--workers", "2", "--epochs", "3", "--writers", "csv", "--run-dir", str(tmp_path / "run")]
    assert main(["simulate", QUADRATIC, *given]) == 0
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    evaluated = [event for event in events_of(tmp_path / "run") if event["event"] == "evaluation"]
    assert [(int(row["step"]), float(row["value"])) for row in rows if row["name"] == "distance"] == [
        (event["step"], event["metrics"]["distance"]) for event in evaluated
    ]


def test_numbers_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    given = ["--workers", "2", "--epochs", "3", "--writers", "tensorboard", "--run-dir", str(tmp_path / "run")]
    assert main(["simulate", QUADRATIC, *given]) == 0
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:  # length, its checksum, an event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [
            (event.step, value.simple_value) for value in event.summary.value if value.tag == "evaluation/distance"
        ]
        data = data[16 + size :]
    evaluated = [event for event in events_of(tmp_path / "run") if event["event"] == "evaluation"]
    assert found == [(event["step"], pytest.approx(event["metrics"]["distance"])) for event in evaluated]


def test_a_writer_that_is_not_there_is_reported_and_training_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    given = ["--workers", "2", "--writers", "csv,wandb", "--run-dir", str(tmp_path / "run")]
    assert main(["simulate", QUADRATIC, *given]) == 0
    assert "WARNING: wandb takes no events" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.csv").exists()
    assert main(["simulate", QUADRATIC, "--writers", "nothing", "--run-dir", str(tmp_path / "other")]) == 2
    assert "writers are csv, tensorboard" in capsys.readouterr().err
