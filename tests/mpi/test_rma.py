"""What is particular to windows: a center that is busy or asleep, a worker that leaves early, memory, refusals."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conditions import until
from mpi4py import MPI
from worlds import MPIWorld

from agnmpi import AGNOptimizer, sgd
from agnmpi.arrays.encodings import get
from agnmpi.cluster import probe
from agnmpi.cluster.connect import connect
from agnmpi.cluster.setup import Setup
from agnmpi.core import rules
from agnmpi.core.center import serve
from agnmpi.core.leases import Leases
from agnmpi.core.messages import IDLE, WORK, Commit, Reply
from agnmpi.transport.accumulate import AccumulateCenter, AccumulateWorker
from agnmpi.transport.agreement import ConfigError
from agnmpi.transport.chunks import bcast_in_pieces
from agnmpi.transport.readers_lock import WAITING, WRITING
from agnmpi.transport.registry import accumulate, resolve, rma
from agnmpi.transport.rma import RMACenter, RMAWorker
from agnmpi.transport.windows import COUNTS, READERS, Windows

pytestmark = pytest.mark.mpi(min_size=2)
MAILBOX, SUMS = rma(), accumulate()


def shared(comm):
    windows = Windows(comm, np.zeros(1), 0)
    windows.free()
    return windows.shared


def test_whether_windows_are_shared_memory_is_found_out(comm):
    """By what is so: the center stays out of MPI for seconds, if it must, to see a worker's write."""
    windows = Windows(comm, np.zeros(1), 0)
    if comm.rank == 0:
        assert not windows.words.any(), "the trial leaves no trace"
    comm.Barrier()
    if comm.rank == 1:
        windows.put(windows.posted, b"\1" * 8)
        windows.add(windows.posted + 1, 1)
    before, seen = time.monotonic(), False
    while comm.rank == 0 and not seen and time.monotonic() < before + 10:
        time.sleep(1e-3)
        seen = windows.words[windows.posted] != 0 and windows.words[windows.posted + 1] == 1
    assert windows.shared == comm.bcast(seen)
    assert bool(windows.caveat) != windows.shared
    windows.free()


@pytest.mark.parametrize("transport", [MAILBOX, SUMS], ids=lambda transport: transport.name)
def test_windows_that_are_no_shared_memory_are_told(comm, transport, monkeypatch, recwarn):
    """Here pretended: what is written to find out never arrives."""
    monkeypatch.setattr(Windows, "add", lambda *_: 0)
    windows = Windows(comm, np.zeros(1), 0)
    monkeypatch.undo()
    windows.free()
    assert not windows.shared
    assert "transport p2p is faster here" in windows.caveat
    monkeypatch.setattr(Windows, "caveat", windows.caveat)
    AGNOptimizer(sgd(0.1), np.zeros(3), comm, transport=transport).close()
    said = [str(warning.message) for warning in recwarn if "no shared memory" in str(warning.message)]
    assert len(said) == (comm.rank == 0)


@pytest.mark.parametrize("n", [10, 300_000])
@pytest.mark.parametrize("setup", [MAILBOX, SUMS], ids=["rma", "accumulate"])
def test_a_busy_center_costs_no_more_than_its_delay(comm, setup, n):
    def sleepy(end, center):
        serve_one, naps = end.serve_one, [0.3, 0.0, 0.3]

        def late(apply):
            if naps:
                time.sleep(naps.pop())
            return serve_one(apply)

        end.serve_one = late

    def work(end, index):
        out = np.empty(n)
        for k in range(1, 5):
            end.exchange(Commit(index, k, steps=1, payload=np.ones(n)), out).wait()
        end.leave(None, out).wait()
        assert (out == 4 * (comm.size - 1)).all()

    MPIWorld(comm, setup).play(n, work, on_end=sleepy)


def test_a_worker_reads_c_behind_the_apply(comm):
    """It comes in while its commit is being applied, and leaves with c as a whole; nobody changes c before."""
    if not shared(comm):
        pytest.skip("these windows are no shared memory: the center answers reads between two calls of MPI alone")
    n, followed = 600_000, []

    def patient(end, center):
        move_on, windows = end.move_on, end.windows

        def wait_for_its_reader(stop):
            move_on(stop)
            if any(windows.read(windows.served(worker) + 1) for worker in range(comm.size - 1)):  # else none wants c
                until(lambda: windows.read(READERS) % WAITING, "nobody reads")
                followed.append(stop)

        center.on_block = wait_for_its_reader

    def work(end, index):
        out = np.empty(n)
        for k in range(1, 5):
            reply = end.exchange(Commit(index, k, steps=1, payload=np.ones(n)), out).wait()
            assert out.min() == out.max() == reply.clock
        end.exchange(Commit(index, 5, steps=1, payload=np.ones(n)), None).wait()
        handle = end.exchange(Commit(index, 6, steps=1, payload=np.ones(n)), None)
        while not handle.test():  # who has something else to do is not kept
            pass
        end.leave(None, out).wait()
        assert (out == 6 * (comm.size - 1)).all()

    MPIWorld(comm, MAILBOX).play(n, work, on_end=patient)
    assert comm.rank or followed.count(n) == 4 * (comm.size - 1)


@pytest.mark.mpi(min_size=3)
def test_who_was_kept_out_is_let_in_before_the_next_apply(comm):
    """Worker 0 only pulls, while the others commit one after the other."""
    n, clocks = 1000, []

    def patient(end, center):
        end.lock.courtesy, windows = 60.0, end.windows
        apply = center.apply

        def wait_for_the_pull(commit, c):
            if commit.payload is not None and not center.clock:  # the first
                until(lambda: windows.read(READERS) % WRITING >= WAITING, "nobody is kept out")
            return apply(commit, c)

        center.apply = wait_for_the_pull

    def work(end, index):
        out, windows = np.empty(n), end.windows
        if index == 0:
            until(lambda: windows.read(READERS) >= WRITING, "the center does not shut c")
            clocks.append(end.pull(out).wait().clock)
        else:
            for k in range(1, 4):
                end.exchange(Commit(index, k, steps=1, payload=np.ones(n)), None).wait()
        end.leave(None, out).wait()

    world = MPIWorld(comm, MAILBOX)
    world.play(n, work, on_end=patient)
    assert comm.rank != 1 or clocks == [1]


def test_whoever_comes_after_the_apply_pulls_as_everybody(comm):
    """A worker sees that c may be read behind the apply, and is counted as a reader when that has ended."""
    if not shared(comm):
        pytest.skip("these windows are no shared memory: nobody reads behind the apply")
    n, late = 600_000, []
    seen = comm.Dup()

    def wait_until_it_was_seen(end, center):
        move_on, windows = end.move_on, end.windows
        told = set()

        def on_block(stop):
            move_on(stop)
            for worker in range(comm.size - 1):
                if worker not in told and windows.read(windows.served(worker) + 1):
                    told.add(worker)
                    seen.recv(source=worker + 1)

        center.on_block = on_block

    def work(end, index):
        windows, enter_behind, out = end.windows, end.lock.enter_behind, np.empty(n)

        def come_late():
            if not late:
                late.append(index)
                seen.send(None, 0)
                until(lambda: not windows.read(windows.served(index) + 1), "the apply does not end")
            enter_behind()

        end.lock.enter_behind = come_late
        reply = end.exchange(Commit(index, 1, steps=1, payload=np.ones(n)), out).wait()
        assert out.min() == out.max() == reply.clock
        end.leave(None, out).wait()

    MPIWorld(comm, MAILBOX).play(n, work, on_end=wait_until_it_was_seen)
    assert comm.rank == 0 or late
    seen.Free()


def test_one_look_finds_all_messages(comm):
    looks, workers = [], comm.Split(min(comm.rank, 1))

    def count(end, center):
        windows, look, serve_one = end.windows, end.windows.read_each, end.serve_one

        def when_all_have_come(apply):
            end.serve_one = serve_one
            until(lambda: (look(windows.posted, comm.size - 1) == 2).all(), "a message does not come")
            windows.read_each = lambda *where: looks.append(center.clock) or look(*where)
            return serve_one(apply)

        end.serve_one = when_all_have_come

    def work(end, index):
        end.exchange(Commit(index, 1, payload=np.ones(10)), None).wait()
        workers.Barrier()  # no farewell before all were served
        end.leave(None, np.empty(10)).wait()

    MPIWorld(comm, MAILBOX).play(10, work, on_end=count)
    assert comm.rank or [clock for clock in looks if clock < comm.size - 1] == [0]


def test_a_pull_reads_the_same_number_of_words_with_any_number_of_workers(comm):
    n, words = 1000, []

    def work(end, index):
        windows, get, out = end.windows, end.windows.get, np.empty(n)
        windows.get = lambda word, count: words.append(count) or get(word, count)
        end.exchange(Commit(index, 1, steps=1, payload=np.ones(n)), out).wait()
        end.pull(out).wait()
        end.leave(None, out).wait()

    for setup in (MAILBOX, SUMS):
        MPIWorld(comm, setup).play(n, work)
    assert comm.rank == 0 or max(words) <= COUNTS


@pytest.mark.mpi(min_size=3)
def test_a_request_for_work_that_others_hold_is_answered_when_some_is_free(comm):
    """All but worker 0 ask once and wait; the center is asked again after each served message, in order of arrival."""
    n, idle, tried = 1000, comm.size - 2, []

    def park(end, center):
        apply = center.apply

        def wait_for_the_last_commit(commit, c):
            if commit.requests & IDLE:
                tried.append((commit.worker, center.clock))
                if center.clock < 3:
                    return None
            return apply(commit, c)

        center.apply = wait_for_the_last_commit

    def work(end, index):
        out = np.empty(n)
        if index:
            reply = end.exchange(Commit(index, requests=WORK | IDLE), out).wait()
            assert reply.clock >= 3
            assert out.min() == out.max() == reply.clock, "c of the moment of the answer"
        else:
            windows = end.windows
            for worker in range(1, comm.size - 1):  # they have asked
                until(lambda worker=worker: windows.read(windows.posted + worker) == 2, "no request")
            for k in range(1, 4):
                assert not any(windows.read(windows.served(worker)) for worker in range(1, comm.size - 1)), "answered"
                end.exchange(Commit(index, k, steps=1, payload=np.ones(n)), out).wait()
        end.leave(None, out).wait()

    MPIWorld(comm, MAILBOX).play(n, work, on_end=park)
    if comm.rank == 0:
        order = list(dict.fromkeys(worker for worker, _ in tried))  # of arrival
        assert [worker for worker, clock in tried if clock == 3] == order
        assert all(tried.count((worker, clock)) <= 2 for worker, clock in tried), "not asked without a reason"
        assert len(order) == idle


def test_commits_that_are_held_wait_and_others_do_not(comm):
    """The cut of several centers: a commit beyond it is not applied before the block is saved."""
    n, applied, workers = 1000, [], comm.Split(min(comm.rank, 1))

    def hold(end, center):
        apply, end.hold = center.apply, lambda commit: commit.sequence > 1

        def log(commit, c):
            if commit.payload is not None:
                assert end.hold is None or commit.sequence == 1
                applied.append(commit.sequence)
            elif commit.requests & WORK:
                assert center.clock == comm.size - 1, "a request is not held"
                end.hold = None
            return apply(commit, c)

        center.apply = log
        assert end.in_flight_deltas == 0

    def work(end, index):
        out = np.empty(n)
        end.exchange(Commit(index, 1, payload=np.ones(n)), out).wait()
        workers.Barrier()
        if index == comm.size - 2 and index:
            until(lambda: (end.windows.read_each(end.windows.posted, index) == 4).all(), "the others do not commit")
        if index == comm.size - 2:
            assert end.exchange(Commit(index), out).wait().clock == comm.size - 1
            assert (out == comm.size - 1).all(), "c may be pulled"
            end.exchange(Commit(index, requests=WORK), None).wait()
        end.exchange(Commit(index, 2, payload=np.ones(n)), out).wait()
        end.leave(None, out).wait()
        assert (out == 2 * (comm.size - 1)).all()

    MPIWorld(comm, MAILBOX).play(n, work, on_end=hold)
    assert comm.rank or applied == [1] * (comm.size - 1) + [2] * (comm.size - 1)


def test_a_commit_that_is_held_while_readers_finish_keeps_nobody_out(comm):
    """The center has shut c for a commit, and waits for a reader; then it is told to hold that commit."""
    n, told = 1000, comm.Dup()

    def listen(end, center):
        serve_one = end.serve_one

        def look_first(apply):
            if told.Iprobe():
                end.hold = (lambda _commit: True) if told.recv() else None
            return serve_one(apply)

        end.serve_one = look_first

    def work(end, index):
        windows, out = end.windows, np.empty(n)
        if index == 0:
            assert end.lock.enter(True)
            handle = end.exchange(Commit(index, 1, payload=np.ones(n)), None)
            until(lambda: windows.read(READERS) >= WRITING, "the center does not shut c")
            told.send(True, 0)
            until(lambda: windows.read(READERS) < WRITING, "c stays shut")
            end.lock.leave()
            assert end.pull(out).wait().clock == 0
            assert not handle.test()
            told.send(False, 0)
            assert handle.wait().clock == 1
        end.leave(None, out).wait()
        assert (out == 1).all()

    MPIWorld(comm, MAILBOX).play(n, work, on_end=listen)
    told.Free()


@pytest.mark.parametrize(
    ("center_end", "worker_end"),
    [(RMACenter, RMAWorker), (AccumulateCenter, AccumulateWorker)],
    ids=["rma", "accumulate"],
)
def test_no_call_moves_more_than_it_may(comm, center_end, worker_end):
    n, most = 1000, 1200

    def add(commit, c):
        if commit.payload is not None:  # else it was summed into c
            c += commit.payload
        return Reply(commit.clock)

    if comm.rank == 0:
        end = center_end(comm, np.zeros(n), most=most)
        end.begin(None, 1, Leases(None, 1))
        serve(end, add)
        assert (end.c == np.arange(n) * (comm.size - 1)).all()
    else:
        end, out = worker_end(comm, np.zeros(n), most=most), np.empty(n)
        end.begin(None, 1, Leases(None, 1))
        moved = recorded(end.windows)
        end.exchange(Commit(comm.rank - 1, 1, steps=1, payload=np.arange(n, dtype=float)), out).wait()
        end.leave(None, out).wait()
        assert (out == np.arange(n) * (comm.size - 1)).all()
        assert max(moved) == most
        assert sum(moved) >= 2 * out.nbytes
    end.close()


def recorded(windows):
    """From now on, the bytes of each call on the vectors of `windows`."""
    moved = []

    class Recorded:
        def __init__(self, win):
            self.win = win

        def __getattr__(self, name):
            call = getattr(self.win, name)

            def counted(*arguments):
                if name != "Flush":
                    moved.append(arguments[0].nbytes)
                return call(*arguments)

            return counted

    windows.center, windows.slots = Recorded(windows.center), Recorded(windows.slots)
    return moved


def test_a_vector_is_broadcast_in_pieces(comm):
    for root in range(comm.size):
        for n in (0, 1, 1000):
            x = np.arange(n, dtype=float) if comm.rank == root else np.zeros(n)
            bcast_in_pieces(comm, x, root, most=1200)
            assert x.tolist() == list(range(n))


def test_serverless_commits_land_while_rank_0_is_away(comm):
    """On one machine rank 0 need not be in the library, nor in MPI, for them to arrive."""
    if not shared(comm):
        pytest.skip("these windows are no shared memory: they need rank 0 in MPI now and then")
    n = 1000
    role = connect(comm, rules.agn(), np.zeros(n), None, setup=Setup(SUMS))
    role.begin(None, 1)
    if role.serves:
        # Plain memory: no call of MPI.
        until(lambda: (role.end.c == 3 * (comm.size - 1)).all(), "commits wait for rank 0")
        role.serve()
        assert role.center.clock == 3 * (comm.size - 1)
    else:
        (worker,) = role.workers
        out = np.empty(n)
        for k in range(1, 4):
            worker.end.exchange(Commit(worker.index, k, steps=1, payload=np.ones(n)), out).wait()
        worker.end.leave(None, out).wait()
        assert (out == 3 * (comm.size - 1)).all()
    role.close()


@pytest.mark.parametrize("setup", [MAILBOX, SUMS], ids=["rma", "accumulate"])
def test_a_worker_may_leave_early(comm, setup):
    def work(end, index):
        out = np.empty(5)
        if index:  # worker 0 leaves without a commit
            end.exchange(Commit(index, 1, payload=np.ones(5)), None).wait()
        end.leave(Commit(index, 2, payload=np.ones(5)) if index else None, out).wait()
        assert (out == 2 * (comm.size - 2)).all()

    MPIWorld(comm, setup).play(5, work, sessions=1)


def test_memory_at_the_center(comm):
    """The mailbox holds c and a slot for each worker, the accumulate way c alone."""
    n = 5000
    for setup, slots in ((MAILBOX, comm.size - 1), (SUMS, 0)):
        role = connect(comm, rules.agn(), np.zeros(n), None, setup=Setup(setup))
        windows = (role.end if role.serves else role.workers[0].end).windows
        assert windows.slots.tomemory().nbytes == (slots * windows.stride if comm.rank == 0 else 0)
        assert windows.stride < 8 * n + 4096
        role.close()
    setup = Setup(rma(encoding="int8", pull_encoding="int4"))
    role = connect(comm, rules.agn(), np.zeros(n), None, setup=setup)
    windows = (role.end if role.serves else role.workers[0].end.end).windows
    delta, pulled = (-(-get(name).nbytes(n) // 4096) * 4096 for name in ("int8", "int4"))
    if comm.rank == 0:
        assert windows.slots.tomemory().nbytes == (comm.size - 1) * delta
        assert windows.center.tomemory().nbytes == windows.stride + pulled
    else:
        commit = Commit(comm.rank - 1, 1, steps=1, payload=np.zeros(n))
        with pytest.raises(ValueError, match="a delta of 40000 bytes, but its slot has 5200: encode it"):
            role.workers[0].end.end.exchange(commit, None)
    role.close()


def test_windows_beyond_shared_memory_are_refused(comm, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2**19))
    with pytest.raises(ConfigError, match=r"MiB of shared memory.*transport p2p"):
        connect(comm, rules.agn(), np.zeros(10**6), None, setup=Setup(MAILBOX))


def shared_memory(pid="self"):
    """Bytes of shared memory that a process has touched."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssShmem")]
    return int(line.split()[1]) << 10


@pytest.mark.mpi(min_size=3)
def test_windows_take_their_memory_before_the_next_center_looks(comm, monkeypatch):
    """Two centers on one host, the first and the last rank, and workers of both; there is room for one and a half."""
    if not shared(comm):
        pytest.skip("these windows are no shared memory")
    x, last = np.zeros(4_000_000), comm.size - 1
    need = x.nbytes * last
    centers = {pid: shared_memory(pid) for pid in np.array(comm.allgather(os.getpid()))[[0, last]]}
    comm.Barrier()  # all have looked
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _path: SimpleNamespace(
            free=need * 3 // 2 - sum(shared_memory(pid) - before for pid, before in centers.items())
        ),
    )
    groups = [comm.Split(0 if comm.rank != other else MPI.UNDEFINED, (comm.rank - first) % comm.size)
              for first, other in ((0, last), (last, 0))]  # fmt: skip
    first = Windows(groups[0], x, last - 1) if comm.rank != last else None
    if comm.rank != 0:
        with pytest.raises(ConfigError, match="MiB of shared memory"):
            Windows(groups[1], x, last - 1)
    if first is not None:
        first.free()
    for group in groups:
        if group != MPI.COMM_NULL:
            group.Free()


def test_vectors_that_differ_are_refused(comm):
    with pytest.raises(ConfigError, match="size of the vector differs between ranks"):
        connect(comm, rules.agn(), np.zeros(10 + (comm.rank > 0)), None, setup=Setup(MAILBOX))


@pytest.mark.parametrize("locking", [True, False], ids=["rma", "accumulate"])
@pytest.mark.parametrize("overlap", [False, True])
def test_loops_follow_each_other_and_may_be_broken_off(comm, locking, overlap):
    with AGNOptimizer(sgd(0.1), np.zeros(20), comm, 3, locking, transport="rma", overlap=overlap) as opt:
        for session in range(1, 5):
            for count, _ in enumerate(opt.steps(12 * opt.num_worker)):
                opt.minimize(lambda p: (0.0, -np.ones(20)))
                if session == 2 and comm.rank == comm.size - 1 and count == 1:
                    break
            comm.Barrier()  # who has broken off may wait for the others elsewhere, and look at the center later
            opt.finish()
            seen = comm.allgather((opt.center["0"].tolist(), opt.global_step))
            assert seen == seen[:1] * comm.size


def test_the_trial_of_device_pointers_checks_what_arrives(comm):
    """Here with host memory, which every MPI sends."""
    assert probe.try_messages(comm, np) == probe.try_windows(comm, np) == ""
    entry = resolve("rma")
    assert probe.choose_wire(comm, np.zeros(3), replace(entry, wire="direct")) == "staged", "nobody has a device"
    with pytest.raises(ConfigError, match="auto, staged or direct"):
        probe.choose_wire(comm, np.zeros(3), replace(entry, wire="telepathy" if comm.rank == 0 else "auto"))
