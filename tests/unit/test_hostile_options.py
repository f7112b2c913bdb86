"""Odd numbers, names and files of a person or a script: refused with the value, and never a traceback."""

from datetime import date

import numpy as np
import pytest
from launcher import QUADRATIC
from problems import Quadratic

import agnmpi
from agnmpi.cli.main import main
from agnmpi.core.batches import Plan
from agnmpi.training.config import Config, load
from agnmpi.transport.agreement import ConfigError

HUGE = 10**400
FEW = {"transport": "local", "batch": 16, "steps": 8, "period": 2, "optimizer": "sgd"}
TOML = {
    "deep": "options = " + "[" * 5000 + "]" * 5000,
    "dotted": "options" + ".a" * 5000 + " = 1",
    "digits": "steps = " + "9" * 5000,
    "latin": b'problem = "\xff"',
}


@pytest.mark.parametrize("kind", [int, float], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("value", [HUGE, -HUGE], ids=["huge", "minus huge"])
def test_a_number_of_400_digits_is_refused_wherever_it_stands(kind, value):
    names = [name for name, field in Config.__dataclass_fields__.items() if field.metadata["kind"] is kind]
    assert len(names) > 5
    for name in names:
        with pytest.raises(ValueError, match=rf"^{name} must be .*10\^400"):
            load(None, {name: value})


@pytest.mark.parametrize("name", ["evaluate_every", "log_every", "checkpoint_seconds"])
def test_an_interval_may_be_as_short_as_one_likes(tmp_path, name):
    result = agnmpi.train(Quadratic, run_dir=str(tmp_path / "run"), **FEW, **{name: 1e-320})
    assert result["steps"] == 8


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"epochs": 1e308}, "too many steps"),
        ({"workers": 10**6}, "workers must be at most 100000"),
        ({"period": 2**63}, "period must be at most"),
        ({"run_dir": "r\udcff"}, r"run_dir must be UTF-8, not 'r\\udcff'"),
        ({"options": {"slow": ["\udcff"]}}, "options must be .* in UTF-8"),
        ({"options": {"slow": date(2020, 1, 1)}}, "a date in quotes"),
        ({"run_dir": "file/run"}, "file"),
        ({"run_dir": "file"}, "file"),
        ({"run_dir": "a" * 300}, "name too long"),
        ({"run_dir": "a\0b"}, "null"),
        ({"run_dir": "/proc/agnmpi"}, "/proc/agnmpi"),
    ],
)
def test_a_run_is_refused(tmp_path, monkeypatch, given, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    values = {"run_dir": "run", **FEW, **given}
    if "epochs" in given:
        del values["steps"]
    with pytest.raises((ConfigError, ValueError), match=f"(?i){text}"):
        agnmpi.train(Quadratic, **values)


@pytest.mark.parametrize("samples", [240.0, "240", None, True + 0.5])
def test_the_number_of_samples_is_an_integer(samples):
    with pytest.raises(ValueError, match=f"must be an integer, not {samples!r}"):
        Plan(samples, 16)


class Counted(Quadratic):
    samples = np.int64(Quadratic.samples)


def test_a_numpy_integer_is_one(tmp_path):
    assert agnmpi.train(Counted, run_dir=str(tmp_path / "run"), **FEW)["steps"] == 8


@pytest.mark.parametrize("name", TOML)
def test_a_file_that_is_no_configuration_is_named(tmp_path, name):
    path, content = tmp_path / "odd.toml", TOML[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"odd.toml|options"):
        load(str(path))


@pytest.mark.parametrize(
    "more",
    [["--set", "options.slow=" + "[" * 5000 + "]" * 5000], ["--rate", "9" * 400], ["--run-dir", "r\udcff"],
     ["--config", "."], ["--resume", "a\0b"], ["--resume", "a\udcff"]],
    ids=["deep", "rate", "run-dir", "folder", "nul", "resume"],
)  # fmt: skip
def test_the_command_line_answers_2(tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    assert main(["train", QUADRATIC, "--transport", "local", "--steps", "4", *more]) == 2
    assert "error: " in capsys.readouterr().err
