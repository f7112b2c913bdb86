"""The batch files of jobs/, run by a shell with a launcher that only pretends to train."""

import os
import subprocess
import sys

import pytest
from launcher import ROOT

LAUNCHER = """#!/bin/sh
echo "$*" >>launched
case " $* " in *" doctor "*) exit 0 ;; esac
while [ "$1" != --run-dir ]; do shift; done
[ -z "$MAKES_RUN" ] || mkdir -p "$2/checkpoints"
[ -z "$MAKES_RESULT" ] || echo '{}' >"$2/result.json"
exit "${ENDS_WITH:-0}"
"""
SLURM = {
    "SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "SLURM_NTASKS": "4",
    "SLURM_GPUS_ON_NODE": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "AGNMPI_JOBS": f"{ROOT}/jobs",
}  # fmt: skip


def submitted(tmp_path, file, *args, **settings):
    """Exit code and output of a batch file, and the directory of its run."""
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    env = os.environ | SLURM | {"AGNMPI_VENV": sys.prefix, "AGNMPI_LAUNCH": str(launcher)} | settings
    done = subprocess.run(
        ["bash", ROOT / "jobs" / file, *args], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    assert "doctor" in (tmp_path / "launched").read_text(), done.stdout
    return done.returncode, done.stdout


@pytest.mark.parametrize("file", [path.name for path in sorted((ROOT / "jobs").glob("*.sbatch"))])
def test_a_run_without_a_result_has_failed_whatever_mpiexec_says(tmp_path, file):
    code, output = submitted(tmp_path, file, MAKES_RUN="1")
    assert code == 1, output
    code, output = submitted(tmp_path, file, MAKES_RUN="1", MAKES_RESULT="1")
    assert code == 0, output


def test_the_exit_code_is_that_of_mpiexec(tmp_path):
    code, output = submitted(tmp_path, "one_node.sbatch", MAKES_RUN="1", ENDS_WITH="76")
    assert code == 76, output


def test_with_a_run_dir_of_ones_own_it_alone_counts(tmp_path):
    code, output = submitted(tmp_path, "one_node.sbatch", "m:P", "--run-dir", "elsewhere")
    assert code == 0, output
    assert "--run-dir runs/name-7 m:P --run-dir elsewhere" in (tmp_path / "launched").read_text()
