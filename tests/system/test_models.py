"""The model of a run, written by name and measured, without MPI: of its end, of a checkpoint, of the best."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from launcher import QUADRATIC, ROOT, agnmpi, result_of

from agnmpi.cli.main import main
from agnmpi.recovery.checkpoint import newest
from agnmpi.recovery.files import load


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    given = ["--epochs", "4", "--monitor", "distance:min", "--checkpoint-commits", "1", "--centers", "2"]
    code, output = agnmpi(4, "train", QUADRATIC, *given, "--run-dir", path, timeout=60)
    assert code == 0, output
    return path


def test_export_of_the_end(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "model.npz")]) == 0
    final, _ = load(run / "center.safetensors")
    with np.load(tmp_path / "model.npz") as written:
        assert set(written) == set(final) == {"w", "b"}
        for name, x in final.items():
            np.testing.assert_array_equal(written[name], x)


@pytest.mark.parametrize("unfinished", [False, True])
def test_export_of_a_checkpoint(run, tmp_path, unfinished):
    """Named, or the newest of a run that has no end."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    folder, arrays, _ = newest(copy, print)
    (copy / "center.safetensors").unlink()
    assert main(["export", str(copy if unfinished else folder), str(tmp_path / "model.safetensors")]) == 0
    written, facts = load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(np.concatenate([written["w"], written["b"]]), arrays["c"])
    assert facts["step"] == "32"


def test_evaluate_needs_no_mpi(run, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py/__init__.py").write_text("raise RuntimeError('cannot load MPI library')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    best = result_of(run)["best"]["value"]
    for source, expected in ((run, result_of(run)["metrics"]["distance"]), (run / "best.safetensors", best)):
        command = [sys.executable, "-m", "agnmpi", "evaluate", source]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done
        assert json.loads(done.stdout)["metrics"]["distance"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "{run}", "model.pt"], "ends in .safetensors or .npz"),
        (["export", "{run}", "{run}/center.safetensors"], "exists"),
        (["export", "{run}/checkpoints", "model.npz"], "neither center.safetensors nor a whole checkpoint"),
        (["evaluate", "nowhere"], "neither center.safetensors nor a whole checkpoint"),
    ],
)
def test_refusals(run, capsys, arguments, said):
    assert main([argument.format(run=run) for argument in arguments]) == 2
    assert said in capsys.readouterr().err
