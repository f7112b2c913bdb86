"""Atomic files, events, and who started whom."""

import hashlib
import json
import os
import resource
import shutil
import threading
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from agnmpi import adam, momentum
from agnmpi.cluster.placement import check_world
from agnmpi.core import rules
from agnmpi.core.backoff import Every
from agnmpi.core.center import Center
from agnmpi.core.worker import Worker
from agnmpi.recovery.checkpoint import folder, folders, seal, unseal, worker_file
from agnmpi.recovery.files import load, load_facts, save, write_atomic
from agnmpi.recovery.saver import CenterSaver, WorkerSaver, state_bytes, workers_saved
from agnmpi.reporting.events import JsonLines, RecentMean
from agnmpi.training.config import Config
from agnmpi.training.outputs import run_directory
from agnmpi.transport.agreement import ConfigError
from agnmpi.transport.local import LocalCenter


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


def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/x'$"):
        write_atomic(tmp_path / "x", b"1")
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    path.symlink_to(victim)
    write_atomic(path, b"new")
    assert victim.read_text() == "mine"
    assert not path.is_symlink()
    monkeypatch.setattr("agnmpi.recovery.files.secrets.token_hex", lambda _: "known")
    (tmp_path / ".file.known").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomic(path, b"newer")
    assert victim.read_text() == "mine"
    assert path.read_bytes() == b"new"


def test_the_directory_is_flushed_after_the_rename(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def note(descriptor):
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr("agnmpi.recovery.files.os.fsync", note)
    write_atomic(tmp_path / "file", b"new")
    assert flushed[0].startswith(".file.")
    assert flushed[1:] == [tmp_path.name]


def test_files_have_the_rights_that_the_user_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "c", {"w": np.ones(3)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("size", [0, 1, (8 << 20) // 4, 5_000_001])
def test_the_library_reads_what_is_written_by_pieces(tmp_path, size):
    from safetensors.numpy import load_file

    arrays = {"c": np.arange(size, dtype="f4"), "slot/m": np.ones((2, 3)), "b": np.arange(7, dtype="f4")[::2]}
    digest = hashlib.sha256()
    save(tmp_path / "c", arrays, {"clock": "7", "name": "ä"}, digest)
    back, facts = load(tmp_path / "c")
    assert facts == {"clock": "7", "name": "ä", "sha256": digest.hexdigest()} == load_facts(tmp_path / "c")
    for name, x in load_file(tmp_path / "c").items():
        np.testing.assert_array_equal(x, arrays[name])
        np.testing.assert_array_equal(back[name], arrays[name])


def test_the_checksum_is_that_of_earlier_releases(tmp_path):
    """Over the facts' text, and name, type, shape and bytes of each array in the order of their names."""
    arrays, facts = {"slot/m": np.ones(3, "f4"), "c": np.arange(3.0)}, {"b": 1, "a": [2]}
    seal(tmp_path / "c", arrays, facts)
    text = '{"a": [2], "b": 1}'
    whole = text.encode() + b"c float64 (3,)" + arrays["c"].tobytes() + b"slot/m float32 (3,)"
    assert load_facts(tmp_path / "c") == {
        "agnmpi": text,
        "sha256": hashlib.sha256(whole + arrays["slot/m"].tobytes()).hexdigest(),
    }


def test_saving_takes_no_second_copy(tmp_path):
    x = np.ones(25_000_000, "f4")
    tracemalloc.start()
    seal(tmp_path / "c", {"c": x, "slot/m": x}, {})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1e6


def a_worker(index=0):
    end = LocalCenter(np.ones(10, "f4"), index + 1, lambda *_: None).worker_end(index)
    return Worker(np.ones(10, "f4"), rules.agn(), momentum(0.1), end, index)


def test_workers_states_are_written_with_each_checkpoint_while_they_are_small():
    assert state_bytes(400, adam(0.1)) == 4 * 400
    assert state_bytes(400, None) == 2 * 400
    assert workers_saved("auto", 64 << 20, 4) == ("all", "")
    when, line = workers_saved("auto", 64 << 20, 5)
    assert when == "end"
    assert "(336 MB) are written at the end alone" in line
    for option in ("all", "end", "none"):
        assert workers_saved(option, 1 << 40, 1000) == (option, "")


@pytest.mark.parametrize("small", [0, 1 << 20], ids=["as it lies", "copied"])
def test_a_workers_state_is_written_when_the_checkpoint_is_announced(tmp_path, small):
    worker = a_worker()
    saver = WorkerSaver(tmp_path, worker, 1, "all", pytest.fail, small=small)
    saver.tick()
    worker.checkpoint = 8
    worker.held.done = 1
    saver.tick()
    assert not (tmp_path / "checkpoints").exists(), "amid a period"
    worker.held.done = 0
    saver.tick()
    worker.x += 1
    saver.finish(None)
    np.testing.assert_array_equal(unseal(worker_file(folder(tmp_path, 8), 0))[0]["x"], np.ones(10, "f4"))
    saver.finish(12)
    np.testing.assert_array_equal(unseal(worker_file(folder(tmp_path, 12), 0))[0]["x"], 2 * np.ones(10, "f4"))


@pytest.mark.parametrize(("when", "written"), [("all", [8, 12]), ("end", [12]), ("none", [])])
def test_when_workers_states_are_written(tmp_path, when, written):
    worker = a_worker()
    saver = WorkerSaver(tmp_path, worker, 1, when, pytest.fail)
    worker.checkpoint = 8
    saver.tick()
    saver.finish(12)
    assert sorted(folders(tmp_path)) == [folder(tmp_path, steps) for steps in written]


def test_workers_do_not_write_at_the_same_moment(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("agnmpi.recovery.saver.time.monotonic", lambda: clock[0])
    worker = a_worker(index=5)
    saver = WorkerSaver(tmp_path, worker, 10, "all", pytest.fail)
    clock[0], worker.checkpoint = 100.0, 8
    for clock[0] in (100.0, 104.9):
        saver.tick()
        assert folders(tmp_path) == []
    clock[0] = 105.0
    saver.tick()
    saver.finish(None)
    assert folders(tmp_path) == [folder(tmp_path, 8)]


@pytest.mark.parametrize(("workers", "written"), [(1, [8]), (2, [8, 12])])
def test_the_state_of_the_only_worker_is_that_of_its_checkpoint_or_is_not_written(
    tmp_path, monkeypatch, workers, written
):
    free = threading.Event()
    monkeypatch.setattr("agnmpi.recovery.saver.seal", lambda *what: free.wait(30) and seal(*what))
    worker = a_worker()
    saver = WorkerSaver(tmp_path, worker, workers, "all", pytest.fail)
    for worker.checkpoint in (8, 12):
        saver.tick()
    free.set()
    until = time.monotonic() + 10
    while len(list(tmp_path.rglob("worker-0*"))) < len(written) and time.monotonic() < until:
        worker.x += 1  # it trains on
        saver.tick()
        time.sleep(0.01)
    saver.tick()
    saver.finish(None)
    assert sorted(folders(tmp_path)) == [folder(tmp_path, steps) for steps in written]


def test_no_memory_for_a_checkpoint_is_reported_and_training_goes_on(tmp_path, monkeypatch):
    said, worker = [], a_worker()

    def none(*_args, **_options):
        raise MemoryError

    center = Center(rules.agn(), worker.x, 1)
    saver = CenterSaver(tmp_path, center, lambda: {"centers": 1}, said.append)
    monkeypatch.setattr("agnmpi.core.center.host_copy", none)
    saver.save(worker.x)
    assert "the checkpoint could not be written (MemoryError); there is no checkpoint so far" in said.pop()
    monkeypatch.setattr("agnmpi.recovery.saver.host_copy", none)
    workers = WorkerSaver(tmp_path, worker, 1, "all", said.append)
    worker.checkpoint = 8
    workers.tick()
    assert "worker 0 could not be written (MemoryError)" in said.pop()
    monkeypatch.undo()
    monkeypatch.setattr("agnmpi.recovery.saver.seal", none)  # in the thread
    for steps in (1, 2):
        saver.save(worker.x, steps)
    worker.checkpoint = 9
    workers.tick()
    assert not saver.writing() or not said, "said once"
    monkeypatch.undo()
    saver.save(worker.x, 3)
    saver.finish()
    workers.finish(10)
    assert said == ["the checkpoint is written again", "the local state of worker 0 is written again"]


@contextmanager
def no_file_longer_than(size):
    """As on a full disk, a write beyond that is cut, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_that_cannot_be_written_are_told_and_counted(tmp_path):
    said, path = [], tmp_path / "run" / "events.jsonl"
    path.parent.mkdir()
    log = JsonLines(path, say=said.append)
    log.write("a")
    for _ in range(2):
        with no_file_longer_than(path.stat().st_size + 7):
            log.write("b")
            log.write("c")
        log.write("d")
    shutil.rmtree(path.parent)
    log.write("e")
    log.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["e"]
    kinds = ["cannot be written", "can be written again; 2 of its lines are missing"] * 2 + ["was removed"]
    assert len(said) == len(kinds)
    for line, kind in zip(said, kinds):
        assert kind in line


def test_what_is_written_after_an_outage_is_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    log = JsonLines(path, say=[].append)
    with no_file_longer_than(7):
        log.write("a")
    log.write("b")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["b", "unwritten"]
    with pytest.raises(IsADirectoryError):
        JsonLines(tmp_path)


def test_default_run_directories_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agnmpi.training.outputs.time.strftime", lambda _format: "now")
    names = [str(run_directory(Config(problem="m:P"))) for _ in range(3)]
    assert names == ["runs/p-now", "runs/p-now-2", "runs/p-now-3"]


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
    speaks = "pmix" if MPI.Get_library_version().startswith("Open MPI") else "pmi2"
    check_world(MPI.COMM_SELF, {})
    check_world(MPI.COMM_SELF, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"})
    # `mpiexec -n 1` over two nodes: the step is that of its daemons.
    check_world(MPI.COMM_SELF, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    for environment, text in [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "started 4 ranks, but each is a world of its own"),
        ({"PMI_SIZE": "8"}, "another MPI"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, f"srun --mpi={speaks}"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}, f"srun --mpi={speaks}"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, "another MPI"),
    ]:
        with pytest.raises(ConfigError, match=text):
            check_world(MPI.COMM_SELF, environment)
