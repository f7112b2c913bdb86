import weakref

import fake_device
import numpy as np
import pytest

from agnmpi import AGNOptimizer, nesterov, sgd
from agnmpi.cluster.connect import connect
from agnmpi.cluster.setup import Setup
from agnmpi.core import rules
from agnmpi.core.drive import train
from agnmpi.core.messages import WORK, Commit
from agnmpi.transport import allreduce, registry
from agnmpi.transport.agreement import ConfigError
from agnmpi.transport.staging import CHUNK, Staged

pytestmark = pytest.mark.mpi(min_size=2)


def join(comm, rule, optimizer, n=3, center_optimizer=None, overlap=False, dtype="f8"):
    x = np.full(n, float(comm.rank), dtype)  # rank 0's counts
    return connect(comm, rule, x, optimizer, center_optimizer, Setup(registry.allreduce(), overlap))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("total", [1, 7, 40, 41])
def test_rounds_sum_everything_once(comm, total, overlap):
    """SGD(1) on gradient −1: every step adds 1 to its rank's x; the center gets the mean of each round."""
    role = join(comm, rules.synchronous(), sgd(1.0), overlap=overlap)
    (worker,) = role.workers
    taken = []
    for session in range(2):
        role.begin(total, 3)
        for step in train(worker, lambda _: (0.5, -np.ones(3))):
            taken.append(step)
        everyone = comm.allgather(taken)
        assert sorted(s for steps in everyone for s in steps) == sorted(list(range(total)) * (session + 1))
        assert role.center.steps == total * (session + 1)
        # Of each round of 3 steps a rank, the center moves by the mean over the ranks that took any.
        full, rest = divmod(total, 3 * comm.size)
        moved = 3.0 * full + (rest / min(rest, comm.size) if rest else 0)
        np.testing.assert_allclose(worker.x, moved * (session + 1))
        np.testing.assert_allclose(role.c, worker.x)
    assert role.center.clock == 2 * (full * comm.size + min(rest, comm.size))
    clocks = comm.allgather(role.center.clock)
    assert clocks == clocks[:1] * comm.size


@pytest.mark.parametrize("rest", [0, 1])
def test_ranks_without_steps_take_part_in_large_sums(comm, rest):
    """Of more than 64 KiB, where MPIs choose among algorithms: all ranks must choose the same."""
    n = 100_000
    role = join(comm, rules.synchronous(), sgd(1.0), n)
    (worker,) = role.workers
    role.begin(4 * comm.size + rest, 4)
    for _ in train(worker, lambda _: (0.0, -np.ones(n))):
        pass
    assert (worker.x == 4 + rest).all()
    role.begin(None, 4)
    loop = worker.steps()
    for count, _ in enumerate(loop):
        if comm.rank == 0 and count == 4:
            break  # at the beginning of a period: nothing to commit
        worker.step(-np.ones(n))
    loop.close()
    worker.settle()
    assert (worker.x == 4 + rest + 8 - 4 * (comm.size == 1)).all()


def test_one_step_rounds_are_data_parallel_sgd(comm):
    """λ = 1: the same numbers as one process that averages the gradients of all ranks."""
    role = join(comm, rules.synchronous(), sgd(0.1))
    (worker,) = role.workers
    role.begin(10 * comm.size, 1)
    alone = np.zeros(3)
    for t in range(10):
        alone -= 0.1 * np.mean([alone * 0.3 + (t * comm.size + r) for r in range(comm.size)], axis=0)
    for _ in train(worker, lambda step: (0.0, worker.x * 0.3 + step)):
        pass
    np.testing.assert_allclose(worker.x, alone, rtol=1e-12)


@pytest.mark.parametrize("name", ["synchronous", "diloco"])
def test_converges(comm, name):
    rule = rules.RULES[name]()
    role = join(comm, rule, sgd(0.05), 5, nesterov(0.7, 0.9) if name == "diloco" else None)
    (worker,) = role.workers
    target = np.linspace(-1, 1, 5)
    role.begin(600 * comm.size, 3)
    for _ in train(worker, lambda _: (0.0, worker.x - target)):
        pass
    np.testing.assert_allclose(worker.x, target, atol=1e-3)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("at", range(10))
def test_a_rank_may_break_off_at_any_point(comm, rounds, at, overlap):
    """Before or after a step, in any round, the last one, too: nobody waits for a round that does not come."""
    role = join(comm, rules.synchronous(), sgd(1.0), overlap=overlap)
    (worker,) = role.workers
    role.begin(rounds * 3 * comm.size, 3)
    loop = worker.steps()
    for count, _ in enumerate(loop):
        if comm.rank == comm.size - 1 and count == at:
            break
        worker.step(-np.ones(3))
    loop.close()
    worker.settle()
    finals = comm.allgather((worker.x.tolist(), worker.clock, role.center.steps))
    assert finals == finals[:1] * comm.size
    role.begin(3 * comm.size, 3)  # and the next session is whole
    for _ in train(worker, lambda _: (0.0, -np.ones(3))):
        pass
    assert role.center.steps == finals[0][2] + 3 * comm.size


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", [0, 4])
def test_a_rank_that_breaks_stops_all_and_loses_nothing(comm, at, overlap):
    role = join(comm, rules.synchronous(), sgd(1.0), overlap=overlap)
    (worker,) = role.workers
    role.begin(None, 3)
    loop, count = worker.steps(), 0
    for _ in loop:
        worker.step(-np.ones(3))
        count += 1
        if comm.rank == comm.size - 1 and count > at:
            break
    loop.close()
    worker.settle()
    # With overlap the others have begun their next period when they hear of it; without, nothing is lost.
    assert not worker.dropped or overlap
    assert sum(comm.allgather(count - worker.dropped)) == role.center.steps
    finals = comm.allgather(worker.x.tolist())
    assert finals == finals[:1] * comm.size


def test_replicas_that_differ_are_noticed(comm):
    role = join(comm, rules.synchronous(), sgd(1.0))
    (worker,) = role.workers
    role.begin(comm.size, 1)
    loop = worker.steps()
    with pytest.raises(RuntimeError, match="replicas of the center differ"):  # noqa: PT012
        for _ in loop:
            worker.step(-np.ones(3))
            if comm.rank == 0:
                worker.end.c[0] += 1e-3


def test_cpus_and_gpus_together_are_refused(comm):
    """A GPU contracts c + weight·delta to one rounding, a CPU has two: the replicas would drift apart."""
    c = np.zeros(3, "f4") if comm.rank == 0 else fake_device.Vector(np.zeros(3, "f4"))
    with pytest.raises(ConfigError, match=r"\(CPU on rank 0, GPU on ranks? [\d-]+\).*--device cpu"):
        allreduce.AllreduceEnd(comm, c, lambda commit, c: None)


def test_vectors_on_a_device_are_summed(comm):
    """What is sent in chunks is summed in the pieces of the whole vector; here more than one chunk."""
    n = CHUNK // 4 + 300_000
    role = join(comm, rules.synchronous(), None, n=n, dtype="f4")
    (worker,) = role.workers
    role.begin(None, 1)
    end, out = worker.end, np.empty(n, "f4")
    apply, seen = end.apply, []
    end.wire, end.sum = Staged(), fake_device.Vector(np.zeros(n, "f4"))
    end.apply = lambda commit, c: apply(commit._replace(payload=commit.payload.memory), c)
    end.exchange(Commit(comm.rank, requests=WORK), None)
    for turn in range(1, 4):
        x = (np.arange(n) % 1000 + comm.rank).astype("f4")
        commit = Commit(comm.rank, turn, steps=1, requests=WORK, payload=fake_device.Vector(x))
        end.exchange(commit, out).wait()
        seen.append(out.copy())
    mean = np.arange(n) % 1000 + (comm.size - 1) / 2
    np.testing.assert_allclose(seen[2] - seen[1], mean, rtol=1e-5)
    np.testing.assert_allclose(seen[1] - seen[0], mean, rtol=1e-5)


def test_what_is_sent_stays_alive_until_the_round_is_done(comm, monkeypatch):
    """mpi4py 4.1 lets go of the buffers of a nonblocking reduction as soon as it has begun."""
    events = []

    class Watched(np.ndarray):
        pass

    def nothing(x, value):
        made = np.full_like(x, value).view(Watched)
        weakref.finalize(made, events.append, "freed")
        return made

    role = join(comm, rules.synchronous(), None, n=100_000)
    (worker,) = role.workers
    role.begin(None, 1)
    end, out = worker.end, np.empty(100_000)
    end.exchange(Commit(comm.rank, requests=WORK), None)
    monkeypatch.setattr(allreduce, "full_like", nothing)
    handle = end.leave(None, out)
    while not handle.test():
        assert not events
    events.append("done")
    handle.wait()
    del handle
    assert events == ["done", "freed"]


def test_the_steps_of_a_refused_round_are_not_among_those_taken(comm):
    """NaN on one rank: the round is refused on all, and the center holds the other three."""
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 5, rule=rules.synchronous()) as opt:
        for step in opt.steps(20 * comm.size):
            opt.minimize(lambda p, step=step: (0.0, [np.full(2, np.nan if step == 7 else -1.0)]))
        assert opt.center["0"].tolist() == [15, 15]
        assert opt.status.step == 15 * comm.size
