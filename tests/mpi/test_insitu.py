import time
import warnings

import numpy as np
import pytest
from mpi4py import MPI
from surrogates import Fails, Mean, Ring

from agnmpi import ConfigError, insitu, sgd
from agnmpi.core.backoff import wait_until
from agnmpi.frameworks import insitu_center
from agnmpi.frameworks.samples import Receiver, Reservoir, Sender
from agnmpi.recovery.files import load

pytestmark = pytest.mark.mpi
ALWAYS = 1e9  # a budget that always has room for a step


def computes(comm, center):
    return comm.rank > 0 or center != "rank"


def play(comm, seed, **given):
    """Coupled solvers, by a schedule drawn from `seed`: who serves and feeds, model, λ, how it ends, steps it takes."""
    draw = np.random.default_rng([seed, comm.size])  # the same on all ranks
    center = draw.choice(["solver", "thread", "none", *(["rank"] if comm.size > 1 else [])])
    period, size = int(draw.integers(1, 13)), int(draw.choice([1, 600, 5000]))
    end, at = draw.choice(["steps", "time", "stop"]), int(draw.integers(1, 60))
    total, stopper = int(draw.integers(1, 400)), int(draw.integers(comm.size))
    others = draw.permutation(range(1, comm.size)).tolist()
    feeding = others[: draw.integers(max(1, len(others) + (center != "rank")))]  # one trains, at least
    does = ("serves", "trains", "feeds")[2 if comm.rank in feeding else computes(comm, center)]
    solver_comm = comm.Split(("serves", "trains", "feeds").index(does), comm.rank)
    given = {"optimizer": sgd(0.1), "batch": 4, "period": period, "center": center} | given
    run = insitu.Run(Mean(size), comm, steps=total if end == "steps" else None, feeds=does == "feeds", **given)
    own, t = np.random.default_rng([seed, comm.size, comm.rank]), 0
    if run.is_center:
        list(run.serve())
    else:
        solver = Ring(solver_comm)
        while not run.done and not (end == "time" and t == at):
            solver.step()
            if own.integers(4):
                run.put(np.zeros(3), np.ones(3))
            for _ in range(own.integers(3) if does == "trains" else 0):
                run.learn(ALWAYS, most=int(own.integers(8)))
            if own.integers(10) == 0:
                time.sleep(1e-3 * own.random())
            if end == "stop" and t >= at and solver_comm.rank == stopper % solver_comm.size:
                run.stop()
            t += 1
    run.close()
    status = run.status
    ends = comm.allgather((does, t, status.steps, status.all_steps, run.params["w"].tobytes()))
    solver_comm.Free()
    assert len({(does, t) for does, t, *_ in ends}) == len({does for does, *_ in ends})  # each ends in one time step
    assert len({(all_steps, w) for *_, all_steps, w in ends}) == 1
    assert sum(steps for _, _, steps, _, _ in ends) == ends[0][3]
    assert end != "steps" or ends[0][3] == total
    # Who feeds is done when nobody trains; who trains on that alone, when nobody feeds.
    assert end != "time" or t == (0 if run.is_center else at) or (feeding and t < at)


@pytest.mark.parametrize("seed", range(8))
def test_a_coupled_solver_ends_by_any_schedule(comm, seed):
    play(comm, seed)


@pytest.mark.parametrize("seed", range(8, 12))
def test_a_coupled_solver_ends_also_where_ranks_often_give_back_what_they_hold(comm, seed, monkeypatch):
    monkeypatch.setattr(insitu_center, "RESTS_AFTER", 1e-4)
    play(comm, seed)


@pytest.mark.long
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("seed", range(100, 300))
def test_a_coupled_solver_ends_by_any_of_200_schedules(comm, seed):
    """On 2 to 5 ranks of those that are there; `-k "any_of_200 and 17"` goes on with those that have a 17 in theirs."""
    size = int(np.random.default_rng(seed).integers(2, min(5, comm.size) + 1))
    few = comm.Split(int(comm.rank >= size), comm.rank)
    if comm.rank < size:
        play(few, seed)
    few.Free()
    wait_until(comm.Ibarrier().Test)  # those that are left over leave the cores to the others


def put_and_learn(run, calls):
    """So many calls, however the others are."""
    for _ in range(calls):
        run.put(np.zeros(3), np.ones(3))
        run.learn(ALWAYS, most=3)


@pytest.mark.parametrize("center", ["solver", "none"])
def test_fewer_steps_than_ranks(comm, center):
    """Most ranks have no work when the run begins, and must not wait for those that have."""
    run = insitu.Run(Mean(), comm, 5, center, optimizer=sgd(0.1), batch=1, steps=1)
    while not run.done:
        run.put(np.zeros(1), np.ones(1))
        run.learn(ALWAYS)
    run.close()
    assert (run.status.all_steps, comm.allreduce(run.status.steps)) == (1, 1)


def leaves_out(comm, center, leaves_it_out, **given):
    """A run in which rank 1 leaves out what it is told in some time steps; the steps that it has taken."""
    run = insitu.Run(Mean(), comm, 5, center, optimizer=sgd(0.1), batch=1, steps=100, **given)
    others, t, idle = comm.Split(int(computes(comm, center)), comm.rank), 0, comm.rank == 1
    if run.is_center:
        list(run.serve())
    while not (run.is_center or run.done or t == 20_000):
        begins = others.allreduce(run.status.steps if idle else 0) >= 3
        if not (idle and leaves_it_out("put", begins)):
            run.put(np.zeros(1), np.ones(1))
        if not (idle and leaves_it_out("learn", begins)):
            run.learn(ALWAYS, most=1)
        elif leaves_it_out("budget", begins):
            run.learn(0.0)
        time.sleep(1e-4)
        t += 1
    run.close()
    others.Free()
    taken = comm.allgather(run.status.steps * (not run.is_center))
    assert (sum(taken), run.status.all_steps) == (100, 100)
    return taken[1]


CENTERS = ["solver", "thread", "none", pytest.param("rank", marks=pytest.mark.mpi(min_size=3))]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("left_out", [("put",), ("learn",), ("learn", "budget")])
def test_a_rank_that_takes_no_step_leaves_all_to_the_others(comm, center, left_out, monkeypatch):
    """Nothing happens in its part of the domain, or it never trains."""
    monkeypatch.setattr(insitu_center, "RESTS_AFTER", 0.1)
    assert leaves_out(comm, center, lambda what, _: what in left_out) == 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("center", CENTERS)
def test_a_rank_that_stops_to_train_within_a_period_leaves_the_rest_to_the_others(comm, center, monkeypatch):
    monkeypatch.setattr(insitu_center, "RESTS_AFTER", 0.1)
    assert leaves_out(comm, center, lambda what, begins: what == "learn" and begins) == 3


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("center", ["solver", "none"])
@pytest.mark.parametrize("late", [0, 1])
def test_no_call_waits_for_a_rank_that_does_not_call(comm, late, center):
    """One rank calls nothing until the others have done all their calls, and tell it."""
    run = insitu.Run(Mean(5000), comm, 2, center, optimizer=sgd(0.1), batch=4)
    if comm.rank != late:
        put_and_learn(run, 30)
    comm.Barrier()
    while not run.status.steps:  # until the center has answered
        put_and_learn(run, 30)
    run.close()
    taken = comm.allgather(run.status.steps)
    assert min(taken) > 0
    assert sum(taken) == run.status.all_steps


@pytest.mark.mpi(min_size=2)
def test_a_thread_serves_while_rank_0_is_elsewhere(comm):
    """The others train until the clock has come far; rank 0 is in a barrier all the time."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("MPI without MPI_THREAD_MULTIPLE")
    run = insitu.Run(Mean(), comm, 2, "thread", optimizer=sgd(0.1), batch=1)
    run.put(np.zeros(1), np.ones(1))
    while comm.rank > 0 and run.status.clock < 3 * comm.size:
        run.learn(ALWAYS, most=1)
    comm.Barrier()
    run.close()
    assert run.status.clock >= 3 * comm.size


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("center", ["solver", pytest.param("none", marks=pytest.mark.long)])
def test_a_fast_rank_does_not_bend_the_optimum(comm, center):
    """Rank 0 takes three times the steps: the center is at the mean over all samples, of which the last rank has half.

    Each rank takes its turn when it has the answer to its last: no turn is skipped, however the machine is loaded.
    """
    run = insitu.Run(Mean(), comm, 4, center, optimizer=sgd(0.02), batch=1)
    each, last = 10, comm.rank == comm.size - 1
    count = each * (comm.size - 1 if last else 1)
    run.put(np.zeros(count), np.full(count, float(last)))
    seen = []
    for turn in range(600):
        wanted = run.status.steps + (3 if comm.rank == 0 else 1)
        while run.status.steps < wanted:
            run.learn(ALWAYS, most=wanted - run.status.steps)
        comm.Barrier()
        seen += [run.params["w"][0]] * (turn >= 300)
    run.close()
    assert abs(np.mean(seen) - 0.5) < 0.1


@pytest.mark.parametrize("center", ["solver", "none"])
def test_a_network_that_fails_does_not_end_the_solver(comm, center):
    """Rank 0 says it, or each rank, where nobody serves."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = insitu.Run(Fails(), comm, 2, center, batch=1)
        put_and_learn(run, 60)
        run.close()
    assert run.params["w"].tolist() == [0]
    assert sum("has sent NaN or infinity" in str(w.message) for w in said) == (comm.rank == 0 or center == "none")


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("center", ["solver", "rank", "thread", "none"])
def test_a_rank_reads_what_the_others_train(comm, center):
    """It sees the center move, commits nothing, and is done when the others are; a solver goes on without it.

    The others take few steps before it has told them that it has seen that.
    """
    reader = comm.size // 2  # in between, so that numbers are not ranks
    trainers = [rank for rank in range(comm.size) if rank != reader and (rank or center != "rank")]
    solver = comm.Split(int(computes(comm, center) and comm.rank != reader), comm.rank)
    run = insitu.Run(
        Mean(), comm, 2, center, optimizer=sgd(0.1), batch=1, steps=40 * comm.size, reads=comm.rank == reader
    )
    clocks = [0]
    if comm.rank == reader:
        while not run.done:
            if run.pull():
                clocks.append(run.status.clock)
                if clocks[-1] and trainers:
                    for rank in trainers:
                        comm.send(None, rank)
                    trainers = []
            time.sleep(1e-3)
    elif not run.is_center:
        ring, told = Ring(solver), False
        while not run.done:
            ring.step()
            run.put(np.zeros(1), np.ones(1))
            told = told or comm.Iprobe(source=reader)
            run.learn(ALWAYS, most=3 if told or run.status.steps < 8 else 0)
        comm.recv(source=reader)
    run.close()
    ends = comm.allgather((run.status.steps * (not run.is_center), run.status.all_steps, run.params["w"].tobytes()))
    assert ends[reader][0] == 0
    assert sum(steps for steps, _, _ in ends) == 40 * comm.size
    assert len({(all_steps, w) for _, all_steps, w in ends}) == 1
    assert clocks == sorted(clocks)
    assert comm.rank != reader or clocks[-1] > 0
    solver.Free()


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("center", ["solver", "rank", "none"])
def test_ranks_that_feed_are_a_solver_and_the_others_train(comm, center):
    """They take no step, see the center move, and end when all steps are taken; no sample is lost uncounted."""
    feeds = comm.rank > 1
    run = insitu.Run(Mean(), comm, 2, center, optimizer=sgd(0.1), batch=8, steps=40, feeds=feeds)
    solver, has_moved = Ring(comm.Split(int(feeds), comm.rank)), False
    while not (run.is_center or run.done):
        if feeds:
            solver.step()
            run.put(np.zeros((5, 2)), np.ones(5))
            has_moved |= run.pull() and run.status.clock > 0
        elif not run.learn(ALWAYS, most=1):
            time.sleep(1e-4)
    run.close()
    status = run.status
    ends = comm.allgather((feeds, status.samples - status.dropped, status.steps * (not run.is_center)))
    assert sum(samples if feeds else -samples for feeds, samples, _ in ends) == 0
    assert [steps for feeds, _, steps in ends if feeds] == [0] * (comm.size - 2)
    assert sum(steps for _, _, steps in ends) == status.all_steps == 40
    assert comm.allreduce(has_moved, MPI.LOR)
    assert len(set(comm.allgather(run.params["w"].tobytes()))) == 1


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_feeds_waits_for_none_that_trains(comm):
    """What nobody takes is dropped, and counted; without an end the training ends when nobody feeds any more."""
    run = insitu.Run(Mean(), comm, 2, optimizer=sgd(0.1), batch=1, feeds=comm.rank > 0)
    if comm.rank > 0:
        for i in range(100):
            run.put(np.zeros(1), np.full(1, i))
        assert run.status.samples == 100
        assert run.status.dropped >= 50
    comm.Barrier()
    while comm.rank == 0 and not run.learn(ALWAYS, most=1):
        time.sleep(1e-4)
    while comm.rank == 0 and not run.done:
        run.learn(ALWAYS, most=1)
    run.close()
    kept = comm.allreduce((run.status.samples - run.status.dropped) * (comm.rank > 0))
    assert comm.rank > 0 or run.status.samples == kept > 0
    assert run.status.all_steps > 0


@pytest.mark.mpi(min_size=2)
def test_what_is_sent_of_many_samples_is_of_all_places(comm):
    """A put of more than may be under way: numbers in order, of which those that arrive lie everywhere."""
    if comm.rank == 1:
        sender = Sender(comm, [0], np.random.default_rng(0))
        sender.put(np.zeros((1000, 16_000)), np.arange(1000.0))
        assert 0 < sender.offered - sender.dropped < 500
        sender.end()
        wait_until(lambda: not sender.poll())
    elif comm.rank == 0:
        reservoir = Reservoir(1000, np.random.default_rng(0))
        receiver = Receiver(comm, [1], reservoir)
        wait_until(lambda: receiver.poll() or receiver.ended)
        _, y = reservoir.batch(3000)
        assert reservoir.seen == len(set(y))
        assert abs(np.mean(y) - 499.5) < 100


@pytest.mark.mpi(min_size=2)
def test_samples_of_another_shape_are_named_by_their_rank(comm):
    if comm.rank == 1:
        sender = Sender(comm, [0], np.random.default_rng(0))
        sender.put(np.zeros((1, 2)), np.zeros(1))
        wait_until(lambda: not sender.poll())
    elif comm.rank == 0:
        reservoir = Reservoir(10, np.random.default_rng(0))
        reservoir.put(np.zeros((1, 3)), np.zeros(1))
        receiver = Receiver(comm, [1], reservoir)
        with pytest.raises(ValueError, match=r"from rank 1: samples x had shape \(3,\), and have \(2,\) now"):
            wait_until(lambda: bool(receiver.poll()))


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("center", ["solver", "none"])
def test_ranks_that_read_and_leave_stop_nobody(comm, center):
    """All but rank 0, which goes on alone until all steps are taken."""
    run = insitu.Run(Mean(), comm, 2, center, optimizer=sgd(0.1), batch=1, steps=60, reads=comm.rank > 0)
    while comm.rank == 0 and not run.done:
        run.put(np.zeros(1), np.ones(1))
        run.learn(ALWAYS, most=1)
    run.close()
    assert run.status.all_steps == 60


@pytest.mark.mpi(min_size=2)
def test_who_reads_does_not_train_and_who_trains_does_not_read(comm):
    last = comm.size - 1
    run = insitu.Run(Mean(), comm, 5, reads=comm.rank == last)
    with pytest.raises(RuntimeError, match=f"rank {last} reads or feeds" if comm.rank == last else "does not read"):
        run.learn() if comm.rank == last else run.pull()
    run.close()
    with pytest.raises(ConfigError, match="rank 0 has the center: let another rank read"):
        insitu.Run(Mean(), comm, 5, reads=comm.rank == 0)
    with pytest.raises(ConfigError, match="one must train"):
        insitu.Run(Mean(), comm, 5, "rank", reads=comm.rank > 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"period": 0}, "period must be at least 1, not 0"),
        ({"center": "nowhere"}, "center must be one of solver, rank, thread, none, not 'nowhere'"),
        ({"surrogate": "nothing.py:X"}, "does not exist"),
        ({"outer_rate": -1.0}, "must be a positive number"),
        ({"capacity": 0}, "capacity of a reservoir must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(comm, given, said):
    with pytest.raises(ConfigError, match=said):
        insitu.Run(**{"surrogate": Mean(), "comm": comm} | given)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_differ_are_named(comm):
    with pytest.raises(ConfigError, match="period differs between ranks"):
        insitu.Run(Mean(), comm, 5 + (comm.rank == 0))


@pytest.mark.mpi(min_size=2)
def test_the_center_is_no_part_of_the_solver(comm):
    run = insitu.Run(Mean(), comm, 5, "rank")
    if comm.rank == 0:
        with pytest.raises(RuntimeError, match="rank 0 is the center"):
            run.learn()
    else:
        with pytest.raises(RuntimeError, match="has nothing to serve"):
            next(run.serve())
        with pytest.raises(ValueError, match="the budget is a share of the time"):
            run.learn(-1)
    run.close()


def test_the_final_center_is_saved_and_predicts(comm, tmp_path):
    path = comm.bcast(tmp_path / "surrogate.safetensors")
    run = insitu.Run(Mean(), comm, 2, optimizer=sgd(0.1), batch=1, steps=200 * comm.size)
    while not run.done:
        run.put(np.zeros(1), np.full(1, 3.0))
        run.learn(ALWAYS, most=4)
    run.close(save=path)
    comm.Barrier()
    arrays, facts = load(path)
    assert arrays["w"].tobytes() == run.params["w"].tobytes()
    assert int(facts["clock"]) == run.status.clock
    assert run.predict(np.zeros(2)).tolist() == [run.params["w"][0]] * 2
    assert abs(run.params["w"][0] - 3) < 1  # how near depends on how many exchanges the steps took
