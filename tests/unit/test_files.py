"""Atomic files, events, and who started whom."""

import json

import numpy as np
import pytest

from agnmpi.core.timer import Every
from agnmpi.recovery.files import load, save, write_atomic
from agnmpi.reporting.events import JsonLines
from agnmpi.reporting.recent_mean import RecentMean


def test_save_and_load(tmp_path):
    arrays = {"w": np.arange(6.0).reshape(2, 3), "b": np.zeros(3, "f4")[::2]}
    save(tmp_path / "c.safetensors", arrays, {"clock": "7"})
    back, facts = load(tmp_path / "c.safetensors")
    assert facts == {"clock": "7"}
    for name, x in arrays.items():
        np.testing.assert_array_equal(back[name], x)
        assert back[name].dtype == x.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"], "no temporary file is left"


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save(path, {"w": np.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agnmpi.recovery.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_are_whole_at_any_time(tmp_path):
    log = JsonLines(tmp_path / "events.jsonl")
    log.write("a", x=1)
    log.write("b", y=[2])
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["a", "b"]
    assert lines[1]["seconds"] >= lines[0]["seconds"] >= 0
    log.close()


def test_every():
    clock = iter([0.0, 0.4, 1.1, 1.2, 3.5, 3.9])
    due = Every(seconds=1.0, now=lambda: next(clock))
    assert [due() for _ in range(5)] == [False, True, False, True, False]
    due = Every(steps=0.3)
    assert [due(n) for n in (0, 0.2, 0.3, 0.9)] == [False, False, True, True]
    for bad in ({}, {"steps": 1, "seconds": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"either|positive"):
            Every(**bad)


def test_recent_mean():
    mean = RecentMean(span=2)
    assert np.isnan(mean.value)
    mean.add(10, 1)
    mean.add(1, 2)
    mean.add(4, 1)
    mean.add(float("nan"), 0)  # no steps, and so no loss
    assert mean.value == pytest.approx(2.0)
    mean.add(float("nan"), 1)  # missing, not the end of the mean
    assert mean.value == pytest.approx(4.0)
    mean.add(float("inf"), 2)
    assert np.isnan(mean.value)
    mean.add(3.0, 2)
    assert mean.value == 3.0
    long = RecentMean(span=100_000)
    for value in range(300_000):
        long.add(float(value), 1)
    assert long.value == pytest.approx(250_000, rel=1e-3)


def test_worlds_of_one_that_were_meant_to_be_many():
    from mpi4py import MPI

    from agnmpi.cluster.placement import check_world
    from agnmpi.transport.agreement import ConfigError

    if MPI.COMM_WORLD.size > 1:
        pytest.skip("one rank only")
    speaks = "pmix" if MPI.Get_library_version().startswith("Open MPI") else "pmi2"
    check_world(MPI.COMM_WORLD, {})
    check_world(MPI.COMM_WORLD, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"})
    # `mpiexec -n 1` over two nodes: the step is that of its daemons.
    check_world(MPI.COMM_WORLD, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    for environment, text in [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "started 4 ranks, but each is a world of its own"),
        ({"PMI_SIZE": "8"}, "another MPI"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, f"srun --mpi={speaks}"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}, f"srun --mpi={speaks}"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, "another MPI"),
    ]:
        with pytest.raises(ConfigError, match=text):
            check_world(MPI.COMM_WORLD, environment)
