"""What is particular to windows: a center that is busy or asleep, a worker that leaves early, memory, refusals."""

import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI
from worlds import MPIWorld

from agnmpi import AGNOptimizer, sgd
from agnmpi.cluster import probe
from agnmpi.cluster.connect import connect
from agnmpi.cluster.setup import Setup, check_setup
from agnmpi.core import rules
from agnmpi.core.messages import Commit
from agnmpi.transport.agreement import ConfigError
from agnmpi.transport.registry import accumulate, allreduce, p2p, resolve, rma
from agnmpi.transport.windows import READERS, WAITING, WRITING

pytestmark = pytest.mark.mpi(min_size=2)
MAILBOX, SUMS = rma(), accumulate()


def one_host(comm):
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    same = node.size == comm.size
    node.Free()
    return same


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
    if not one_host(comm):
        pytest.skip("across hosts the center answers reads between two calls of MPI alone")
    n, followed = 600_000, []

    def patient(end, center):
        move_on, windows = end.move_on, end._windows

        def wait_for_its_reader(stop):
            move_on(stop)
            if not end._readable:
                return  # it does not want c
            before = time.monotonic()
            while not windows.read(READERS) % WAITING:
                assert time.monotonic() - before < 60, "nobody reads"
                time.sleep(1e-3)
            followed.append(stop)

        center.on_block = wait_for_its_reader

    def work(end, index):
        out = np.empty(n)
        for k in range(1, 5):
            reply = end.exchange(Commit(index, k, steps=1, payload=np.ones(n)), out).wait()
            assert out.min() == out.max() == reply.clock
            assert reply.applied[index] == k
        assert end.exchange(Commit(index, 5, steps=1, payload=np.ones(n)), None).wait().applied == ()
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
        end.courtesy, windows = 60.0, end._windows
        apply = center.apply

        def wait_for_the_pull(commit, c):
            if commit.payload is not None and not center.clock:  # the first
                before = time.monotonic()
                while windows.read(READERS) % WRITING < WAITING:
                    assert time.monotonic() - before < 60, "nobody is kept out"
                    time.sleep(1e-3)
            return apply(commit, c)

        center.apply = wait_for_the_pull

    def work(end, index):
        out, windows = np.empty(n), end.windows
        if index == 0:
            while windows.read(READERS) < WRITING:
                time.sleep(1e-3)
            clocks.append(end.pull(out).wait().clock)
        else:
            for k in range(1, 4):
                end.exchange(Commit(index, k, steps=1, payload=np.ones(n)), None).wait()
        end.leave(None, out).wait()

    world = MPIWorld(comm, MAILBOX)
    world.play(n, work, on_end=patient)
    assert comm.rank != 1 or clocks == [1]


def test_whoever_comes_after_the_apply_pulls_as_everybody(comm):
    def work(end, index):
        out = np.empty(10)
        posted = end._posted + 2
        end.exchange(Commit(index, 1, steps=1, payload=np.ones(10)), None).wait()
        assert end._follow(posted, out) is None
        end.leave(None, out).wait()

    outcome = MPIWorld(comm, MAILBOX).play(10, work)
    assert comm.rank or outcome.center.clock == comm.size - 1


def test_serverless_commits_land_while_rank_0_is_away(comm):
    """On one machine rank 0 need not be in the library, nor in MPI, for them to arrive."""
    if not one_host(comm):
        pytest.skip("across hosts the windows need rank 0 in MPI now and then")
    n = 1000
    role = connect(comm, rules.agn(), np.zeros(n), None, setup=Setup(SUMS))
    role.begin(None, 1)
    if role.serves:
        before = time.monotonic()
        while not (role.end.c == 3 * (comm.size - 1)).all():  # plain memory: no call of MPI
            assert time.monotonic() - before < 60, "commits wait for rank 0"
            time.sleep(0.01)
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
        windows = role.end._windows if role.serves else role.workers[0].end.windows
        assert windows.slots.tomemory().nbytes == (slots * windows.stride if comm.rank == 0 else 0)
        assert windows.stride < 8 * n + 4096
        role.close()


def test_windows_beyond_shared_memory_are_refused(comm, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2**20, 2**19, 2**19))
    with pytest.raises(ConfigError, match=r"MiB of shared memory.*transport p2p"):
        connect(comm, rules.agn(), np.zeros(10**6), None, setup=Setup(MAILBOX))


def test_vectors_that_differ_are_refused(comm):
    with pytest.raises(ConfigError, match="size of the vector differs between ranks"):
        connect(comm, rules.agn(), np.zeros(10 + (comm.rank > 0)), None, setup=Setup(MAILBOX))


@pytest.mark.parametrize(
    ("rule", "transport", "center_optimizer", "text"),
    [
        (rules.dynsgd(), SUMS, None, "weighs commits"),
        (rules.agn("gradient"), SUMS, sgd(1.0), "no center optimizer"),
        (rules.agn(), SUMS, sgd(1.0), "no center optimizer"),
        (rules.synchronous(), MAILBOX, None, "use allreduce"),
        (rules.synchronous(), replace(allreduce(), centers=2), None, "centers = 2 needs transport p2p"),
        (rules.agn(), p2p(centers=99), None, "99 centers and at least one worker"),
    ],
)
def test_what_a_transport_lacks_is_refused(comm, rule, transport, center_optimizer, text):
    with pytest.raises(ConfigError, match=text):
        check_setup(rule, Setup(transport), comm.size, sgd(1.0), center_optimizer)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("p2p", {"use_locking": False}, "needs transport 'rma'"),
        ("rma", {"center_device": "gpu"}, "center on a GPU needs transport p2p"),
        ("p2p", {"message_buffers": 0}, "at least 1, not 0"),
        ("pigeon", {}, "unknown transport 'pigeon'"),
    ],
)
def test_what_no_transport_can_be_is_refused(comm, name, options, text):
    with pytest.raises(ValueError, match=text):
        resolve(name, **options)


@pytest.mark.parametrize("how", [{}, {"use_locking": False}], ids=["rma", "accumulate"])
@pytest.mark.parametrize("overlap", [False, True])
def test_loops_follow_each_other_and_may_be_broken_off(comm, how, overlap):
    with AGNOptimizer(sgd(0.1), np.zeros(20), comm, 3, transport="rma", overlap=overlap, **how) as opt:
        for session in range(1, 5):
            for count, _ in enumerate(opt.steps(12 * opt.num_worker)):
                opt.minimize(lambda p: (0.0, -np.ones(20)))
                if session == 2 and comm.rank == comm.size - 1 and count == 1:
                    break
            seen = comm.allgather((opt.center["0"].tolist(), opt.global_step))
            assert seen == seen[:1] * comm.size


def test_the_trial_of_device_pointers_checks_what_arrives(comm):
    """Here with host memory, which every MPI sends."""
    assert probe.try_out(comm, np) == ""
    assert probe.choose_wire(comm, np.zeros(3), "direct") == "staged", "nobody has a device"
    with pytest.raises(ConfigError, match="auto, staged or direct"):
        probe.choose_wire(comm, np.zeros(3), "telepathy" if comm.rank == 0 else "auto")
