import time

import numpy as np
import pytest
from worlds import MPIWorld

from agnmpi import adam
from agnmpi.cluster.connect import connect
from agnmpi.cluster.setup import Setup
from agnmpi.core import rules
from agnmpi.core.ends import Done
from agnmpi.core.messages import OK, REFUSED, WORK, Commit, Reply
from agnmpi.transport.registry import p2p

pytestmark = pytest.mark.mpi(min_size=2)


def message_buffers(count):
    return p2p(message_buffers=count)


@pytest.mark.parametrize("n", [10, 1000])  # with the header, and after it
def test_no_worker_starves(comm, n):
    """All first commits wait when the center begins; each is overtaken by at most as many as there are workers.

    The center is slow, so whoever has been answered is there again at once, and would win any race.
    """
    order = []

    def slow(_end, center):
        apply = center.apply

        def late(commit, c):
            if commit.payload is not None:
                order.append(commit.worker)
                time.sleep(0.003)
            return apply(commit, c)

        center.apply = late
        comm.Barrier()
        time.sleep(0.2)  # until the last bytes of large ones have come, too

    def work(end, index):
        out, one = np.empty(n), np.ones(n)
        first = end.exchange(Commit(index, 1, payload=one), out)
        comm.Barrier()
        first.wait()
        for k in range(2, 21):
            end.exchange(Commit(index, k, payload=one), out).wait()
        end.leave(None, out).wait()

    MPIWorld(comm, message_buffers(2)).play(n, work, on_end=slow)
    if comm.rank == 0:
        assert len(order) == 20 * (comm.size - 1)
        firsts = [order.index(worker) for worker in range(comm.size - 1)]
        assert max(firsts) < 2 * (comm.size - 1), order


@pytest.mark.parametrize("n", [1, 1000])
def test_no_waiting_commit_is_overtaken_by_more_than_the_live_workers(comm, n):
    """A commit waits from when its last byte is there; one still on its way, over a slow link, holds up none."""
    arrived, overtaken = {}, []

    def watch(end, center):
        end.on_whole = lambda commit: arrived.update({commit.worker: center.clock})
        center.on_block = end.move_on  # commits arrive while another is applied, too
        apply = center.apply

        def count(commit, c):
            if commit.payload is not None:
                overtaken.append(center.clock - arrived[commit.worker])
                if commit.sequence % 7 == 0:
                    time.sleep(0.005)  # let a queue build up
            return apply(commit, c)

        center.apply = count

    def work(end, index):
        out, one = np.empty(n), np.ones(n)
        for k in range(1, 101):
            end.exchange(Commit(index, k, payload=one), out).wait()
        end.leave(None, out).wait()

    MPIWorld(comm, message_buffers(2)).play(n, work, on_end=watch)
    if comm.rank == 0:
        assert len(overtaken) == 100 * (comm.size - 1)
        assert max(overtaken) <= comm.size - 1


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("optimizer", [None, adam(0.1)], ids=["add", "adam"])
def test_messages_move_on_while_a_commit_is_applied(comm, optimizer):
    n, moved = 2_000_000, []

    def watch(end, center):
        if optimizer:
            center.optimizer, center.state = optimizer, optimizer.init(end.c)

        def on_block(stop):
            # The workers, which share its core, send meanwhile: until something has moved, they get the time.
            before, until = end.progress, time.perf_counter() + (2e-4 if any(moved) else 0.1)
            while end.progress == before and time.perf_counter() < until:
                time.sleep(2e-4)
                end.move_on(stop)

        center.on_block = on_block
        apply = center.apply

        def count(commit, c):
            before = end.progress
            reply = apply(commit, c)
            moved.append(end.progress - before)
            return reply

        center.apply = count

    def work(end, index):
        out, one = np.empty(n), np.ones(n)
        for k in range(1, 6):
            end.exchange(Commit(index, k, payload=one), out).wait()
            assert optimizer or out.min() == out.max()
        end.leave(None, out).wait()

    outcome = MPIWorld(comm, message_buffers(4)).play(n, work, on_end=watch)
    if comm.rank == 0:
        assert sum(moved) > 0
        assert optimizer or (outcome.c == 5 * (comm.size - 1)).all()
        assert outcome.center.clock == 5 * (comm.size - 1)


def test_memory_at_the_center_is_bounded(comm):
    """However many workers commit and pull at once, the center holds 1 + message_buffers vectors."""
    ends = []

    def watch(end, _):
        ends.append(end)

    def work(end, index):
        out, one = np.empty(100_000), np.ones(100_000)
        for k in range(1, 30):
            end.exchange(Commit(index, k, payload=one), out).wait()
        end.leave(None, out).wait()

    MPIWorld(comm, message_buffers(3)).play(100_000, work, on_end=watch)
    assert [0 < end.buffers_allocated <= 3 for end in ends] == [True] * (comm.rank == 0)


def test_a_sleeping_center_costs_a_delay_and_nothing_else(comm):
    n = 300_000

    def sleepy(_end, center):
        apply = center.apply

        def late(commit, c):
            if commit.sequence == 2 and commit.worker == 0:
                time.sleep(0.5)
            return apply(commit, c)

        center.apply = late

    def work(end, index):
        out = np.empty(n)
        for k in range(1, 5):
            end.exchange(Commit(index, k, payload=np.ones(n)), out).wait()
            assert out.min() == out.max()
        end.leave(None, out).wait()
        assert (out == 4 * (comm.size - 1)).all()

    MPIWorld(comm, message_buffers(4)).play(n, work, on_end=sleepy)


def test_commits_in_flight_when_a_worker_leaves_are_applied(comm):
    """The farewell goes out right behind a commit that nobody waited for."""

    def work(end, index):
        last = end.exchange(Commit(index, 1, payload=np.ones(50_000)), None)
        out = np.empty(50_000)
        farewell = end.leave(None, out)
        last.wait(), farewell.wait()
        assert (out == comm.size - 1).all()

    outcome = MPIWorld(comm, message_buffers(1)).play(50_000, work)
    if comm.rank == 0:
        assert (outcome.c == comm.size - 1).all()


def test_work_is_granted_once_and_to_everyone_who_asks(comm):
    taken = []

    def work(end, index):
        reply = end.exchange(Commit(index, total=40, requests=WORK), None).wait()
        k = 0
        while reply.work.steps:
            k += 1
            taken.append(reply.work.first)
            commit = Commit(index, k, steps=1, first_step=reply.work.first, requests=WORK, payload=np.ones(3))
            reply = end.exchange(commit, None).wait()
        end.leave(None, np.empty(3)).wait()

    MPIWorld(comm, message_buffers(4)).play(3, work, total=40)
    everyone = comm.allgather(taken)
    assert sorted(step for steps in everyone for step in steps) == list(range(40))


@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.parametrize("size", [1, 11, 400_000])
def test_what_is_no_commit_to_the_model_is_refused(comm, size, n):
    """Of another size, or of another worker: refused and counted; the same worker's next commit is applied."""

    def work(end, index):
        odd = end.exchange(Commit(index, 1, payload=np.zeros(size)), None).wait()
        foreign = end.exchange(Commit(index + 1, 2, payload=np.ones(n)), None).wait()
        good = end.exchange(Commit(index, 3, payload=np.ones(n)), out := np.empty(n)).wait()
        end.leave(None, out).wait()
        return [reply.status for reply in (odd, foreign, good)], out.tolist()

    def patient(_end, center):
        center.patience = 2 * comm.size

    outcome = MPIWorld(comm, message_buffers(2)).play(n, work, on_end=patient)
    workers = comm.size - 1
    if comm.rank == 0:
        assert outcome.center.refused == 2 * workers
        assert outcome.c.tolist() == [workers] * n
    else:
        ((statuses, out),) = outcome.results
        assert statuses == [REFUSED, REFUSED, OK]
        assert out == [workers] * n


@pytest.mark.mpi(min_size=3)
def test_copies_for_evaluations_come_before_the_farewell(comm):
    """What another center still sends for one would be taken for the final center."""
    n, order = 100, []
    role = connect(comm, rules.agn(), np.zeros(n), None, setup=Setup(p2p(centers=2)))
    role.begin(4, 1)
    if role.serves:
        if comm.rank == 0:
            _, other = role.ends()
            leave = other.leave
            other.leave = lambda *given: order.append("leave") or leave(*given)

            class Slow(Done):
                def wait(self):
                    order.append("copy")
                    return super().wait()

            other.pull = lambda out: Slow(Reply(0))
            role.copy_center()
        role.serve()
        assert comm.rank or order == ["copy", "leave"]
    else:
        (worker,) = role.workers
        for _ in worker.steps():
            worker.step(None)
        worker.settle()
    role.close()
