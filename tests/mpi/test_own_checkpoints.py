"""Loops of one's own that are interrupted, and go on where they were."""

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from agnmpi import AGNOptimizer, Interrupted, Monitoring, adam, schedules, sgd
from agnmpi.core import rules
from agnmpi.recovery.checkpoint import folder, folders, newest
from agnmpi.reporting.runs import read
from agnmpi.transport import registry
from agnmpi.transport.agreement import ConfigError

pytestmark = pytest.mark.mpi(min_size=2)

TRANSPORTS = [entry for entry in registry.entries() if entry.capabilities.center_ranks]
WHOLE = [entry for entry in TRANSPORTS if entry.capabilities.single_commits]


@pytest.fixture
def directory(comm, tmp_path):
    """One directory for all ranks."""
    return Path(comm.bcast(str(tmp_path)))


def name(transport):
    return transport.name if transport else "allreduce"


def epochs(comm, directory, at=None, **options):
    """Three loops of 60 steps with Adam and a schedule; at step `at` of the second all get a signal, as under mpiexec.

    Returns where it ended, the steps that this rank took, and whether it was interrupted.
    """
    taken, target = [], np.linspace(-1, 1, 8)
    opt = AGNOptimizer(
        adam(schedules.cosine(0.1, 180)), np.zeros(8), comm, 5, checkpoint=directory, resume="auto", **options
    )
    try:
        for epoch in range(3):
            for step in opt.steps(60):
                opt.minimize(lambda p: (0.0, p["0"] - target))
                taken.append((epoch, step))
                if at is not None and epoch == 1 and step >= at:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    at = None
    except Interrupted:
        return opt, taken, True
    return opt, taken, False


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", [0, 32, 57])
def test_with_one_worker_the_numbers_are_those_of_an_undisturbed_run(comm, directory, at, overlap):
    part = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    if comm.rank < 2:
        whole, all_taken, _ = epochs(part, directory / "whole", overlap=overlap)
        whole.close()
        before, first, interrupted = epochs(part, directory / "cut", at, overlap=overlap)
        assert interrupted
        before.close()
        resumed, second, interrupted = epochs(part, directory / "cut", overlap=overlap)
        assert not interrupted
        assert first + second == all_taken
        if not overlap:  # there the interruption ends a period early
            assert (resumed.center["0"] == whole.center["0"]).all()
            assert resumed.clock == whole.clock
        resumed.close()
        complete, third, _ = epochs(part, directory / "cut")
        assert third == []
        assert (complete.center["0"] == resumed.center["0"]).all()
        complete.close()
    part.Free()


def test_one_worker_goes_on_from_the_newest_checkpoint_that_has_its_state(comm, directory):
    part = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    if comm.rank < 2:
        whole, _, _ = epochs(part, directory / "whole")
        whole.close()
        for at in (32, None):  # leaves two checkpoints that have its state, where it was interrupted and the last
            cut, _, interrupted = epochs(part, directory / "cut", at, overlap=False)
            assert interrupted is (at is not None)
            cut.close()
        part.Barrier()
        if comm.rank == 0:  # as where the job is killed at that moment
            (max((directory / "cut/checkpoints").iterdir()) / "worker-0.safetensors").unlink()
        resumed, taken, _ = epochs(part, directory / "cut")
        assert part.bcast(taken, root=1)[0] == (1, 35), "not from where it was interrupted"
        assert (resumed.center["0"] == whole.center["0"]).all()
        assert resumed.clock == whole.clock
        resumed.close()
        whole.close()
    part.Free()


def test_a_part_of_a_period_that_an_exception_leaves_is_in_no_checkpoint(comm, directory):
    part = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    if comm.rank < 2:
        opt = AGNOptimizer(sgd(0.1), np.zeros(2), part, 5, checkpoint=directory, checkpoint_every=0.001)
        with contextlib.suppress(ZeroDivisionError):
            for count, _ in enumerate(opt.steps(None)):
                opt.minimize(lambda p: (0.0, {"0": p["0"] - 1}))
                if count == 17:
                    raise ZeroDivisionError
        opt.finish()
        part.Barrier()
        saved = {int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").glob("step-*")}
        part.Barrier()
        assert saved
        assert saved <= {5, 10, 15}
        opt.close()
        assert opt.taken == 18
    part.Free()


@pytest.mark.parametrize("transport", [*TRANSPORTS, None], ids=name)
def test_each_step_is_taken_once_over_two_interruptions(comm, directory, transport, recwarn):
    options = {"rule": rules.synchronous()} if transport is None else {"transport": transport}
    n = comm.size - (transport is not None)
    taken, clock = [], 0
    for at in (20, 40, None):
        opt, more, interrupted = epochs(comm, directory, at, **options)
        assert interrupted == (at is not None)
        assert opt.clock > clock
        taken, clock = taken + more, opt.clock
        end = opt.center["0"]
        opt.close()
    everyone = sorted(step for steps in comm.allgather(taken) for step in steps)
    if transport is None:  # each rank has left its round where it was: their number is kept, not which
        assert len(everyone) == 180
    elif transport.capabilities.single_commits:
        assert everyone == [(epoch, step) for epoch in range(3) for step in range(60)]
    else:
        assert len(everyone) == len(set(everyone)) >= 180 - 2 * 5 * n, "what a worker gave back goes to nobody"
    assert np.abs(end - np.linspace(-1, 1, 8)).max() < 0.7
    if transport is None or transport.capabilities.single_commits:
        assert not [str(warning.message) for warning in recwarn if "steps were taken" in str(warning.message)]


@pytest.mark.parametrize("saves", [False, True])
def test_a_run_that_is_opened_and_closed_leaves_its_checkpoint(comm, directory, saves):
    """As by a script that ends, or saves what it has, before it comes to the loop that is to go on."""
    opt, taken, interrupted = epochs(comm, directory, 32)
    opt.close()
    assert interrupted
    opened = AGNOptimizer(adam(0.1), np.zeros(8), comm, 5, checkpoint=directory, resume="auto")
    if saves:
        assert list(opened.steps(60)) == []
        opened.save(directory)
    opened.close()
    opt, more, _ = epochs(comm, directory)
    everyone = sorted(step for steps in comm.allgather(taken + more) for step in steps)
    assert everyone == [(epoch, step) for epoch in range(3) for step in range(60)]
    assert opt.taken == 180
    opt.close()


@pytest.mark.parametrize("transport", WHOLE, ids=name)
def test_a_loop_that_diverges_leaves_what_was_good(comm, directory, transport):
    opt = AGNOptimizer(
        sgd(0.1), np.zeros(2), comm, 5, transport=transport, checkpoint=directory, monitor=Monitoring(directory)
    )

    def diverge():
        for count, _ in enumerate(opt.steps(1000)):
            opt.minimize(lambda p: (0.0, p["0"] * np.nan if count > 20 else p["0"] - 1))  # noqa: B023

    with pytest.raises(RuntimeError, match="commits in a row were refused"):
        diverge()
    opt.close()
    comm.Barrier()
    assert read(directory).state == "failed"
    found = newest(directory, pytest.fail)
    assert 20 <= found[2]["steps"] < 1000
    assert np.isfinite(found[1]["c"]).all()


def test_a_signal_between_two_loops_is_of_the_next(comm, directory):
    for interrupts in (True, False):
        opt, interrupted = AGNOptimizer(sgd(0.1), np.zeros(2), comm, 5, checkpoint=directory, resume="auto"), False
        try:
            for loop in range(2):
                for _ in opt.steps(200):
                    opt.minimize(lambda p: (0.0, p["0"] - 1))
                if loop == 0 and interrupts:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        except Interrupted:
            interrupted = True
        assert interrupted is interrupts
        assert opt.taken == 400 or (interrupts and 200 <= opt.taken < 400)
        opt.close()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("transport", [*TRANSPORTS, None], ids=name)
def test_a_complete_loop_that_is_asked_for_more_steps_goes_on(comm, directory, transport):
    """The last one alone; asked for as many or for fewer, it yields nothing."""
    options = {"rule": rules.synchronous()} if transport is None else {"transport": transport}
    taken, totals = [], []
    for asked in ([20, 13], [20, 13], [30, 60], [20, 60, 60], [20, 60, 40]):
        opt = AGNOptimizer(adam(0.1), np.zeros(8), comm, 5, checkpoint=directory, resume="auto", **options)
        for loop, total in enumerate(asked):
            for step in opt.steps(total):
                opt.minimize(lambda p: (0.0, p["0"] - 1))
                taken.append((loop, step))
        totals.append(opt.taken)
        opt.close()
    everyone = sorted(step for steps in comm.allgather(taken) for step in steps)
    assert everyone == [(loop, step) for loop, steps in enumerate((20, 60, 60)) for step in range(steps)]
    assert totals == [33, 33, 80, 140, 140]


def test_a_checkpoint_between_two_loops_has_all(comm, directory):
    """Also moments of the caller's own, and arrays of it."""
    part = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    if comm.rank < 2:

        def run(loops, save=None, load=None):
            m, x = np.zeros(3), np.zeros(6).reshape(3, 2)
            opt = AGNOptimizer(None, x, part, 4, state=lambda: {"m": m}, load_state=lambda a: np.copyto(m, a["m"]))
            if load:
                opt.restore(load)
                assert comm.rank == 0 or (m != 0).all()
            for epoch in range(loops):
                for step in opt.steps(20):
                    m[...] = 0.5 * m + np.cos(step + np.arange(3)) + x[:, 0] / 10
                    x -= 0.1 * m[:, None]
                    opt.step()
                    with pytest.raises(RuntimeError, match="between two loops"):
                        opt.save(directory)
                if save and epoch == 1:
                    opt.save(save)
                    with pytest.raises(RuntimeError, match="before the first loop"):
                        opt.restore(save)
            assert (x == opt.center["0"]).all()
            return opt, x.copy()

        whole, expected = run(4, save=directory)
        resumed, x = run(4, load=directory)
        assert (x == expected).all()
        assert resumed.clock == whole.clock
        whole.close()
        resumed.close()
    part.Free()


def test_checkpoints_are_written_meanwhile(comm, directory):
    """The loop goes on until there is one."""
    with AGNOptimizer(sgd(0.1), np.zeros(4), comm, 2, checkpoint=directory, checkpoint_every=1e-3) as opt:
        for _ in opt.steps(10**6, at_center=lambda _: folders(directory) and opt.stop(), every=20):
            opt.minimize(lambda p: (0.0, p["0"] - 1))
        taken = opt.taken
    assert taken < 10**6
    assert (folder(directory, taken) / "center-0.safetensors").exists()
    comm.Barrier()


@pytest.mark.parametrize("workers", ["all", "end", "none"])
def test_checkpoints_hold_the_workers_where_that_is_asked_for(comm, directory, workers):
    """The loop goes on until some were written, and, if they are asked for, one with a worker's file."""
    options = {"checkpoint": directory, "checkpoint_every": 0.02, "checkpoint_workers": workers}
    written, held = set(), set()

    def look(_):
        for path in folders(directory):
            written.add(path)
            with contextlib.suppress(FileNotFoundError):  # it was pruned for newer ones
                held.update(path.glob("worker-*"))
        if len(written) > 3 and (held or workers != "all"):
            opt.stop()

    with AGNOptimizer(adam(0.1), np.zeros(4), comm, 2, **options) as opt:
        for _ in opt.steps(10**5, at_center=look, every=20):
            opt.minimize(lambda p: (0.0, p["0"] - 1))
            time.sleep(1e-3)
        taken = opt.taken
    comm.Barrier()
    assert taken < 10**5
    assert bool(held) == (workers == "all" and comm.rank == 0)
    assert folders(directory)[0] == folder(directory, taken)
    assert len(list(folder(directory, taken).glob("worker-*"))) == (0 if workers == "none" else comm.size - 1)


def test_what_cannot_be_is_refused(comm, directory):
    with pytest.raises(ValueError, match="needs checkpoint"):
        AGNOptimizer(sgd(0.1), np.zeros(4), comm, resume="auto")
    with pytest.raises(ValueError, match="checkpoint_workers must be auto, all, end or none, not 'some'"):
        AGNOptimizer(sgd(0.1), np.zeros(4), comm, checkpoint=directory, checkpoint_workers="some")
    with pytest.raises(ValueError, match=r"checkpoint_every must be .* at least 0, not -1.0"):
        AGNOptimizer(sgd(0.1), np.zeros(4), comm, checkpoint=directory, checkpoint_every=-1.0)
    (directory / "file").touch()
    with pytest.raises(ConfigError, match=r"file' \(rank 0\)$"):
        AGNOptimizer(sgd(0.1), np.zeros(4), comm, checkpoint=directory / "file")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        AGNOptimizer(sgd(0.1), np.zeros(4), comm, resume=directory / "none")
    with AGNOptimizer(sgd(0.1), np.zeros(4), comm, checkpoint=directory) as opt:
        for _ in opt.steps(10):
            opt.minimize(lambda p: (0.0, p["0"] - 1))
    with pytest.raises(ValueError, match="another model"):
        AGNOptimizer(sgd(0.1), np.zeros(5), comm, checkpoint=directory, resume="auto")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("transport", [*TRANSPORTS, None], ids=name)
def test_an_interruption_loses_and_repeats_no_step(comm, directory, transport, overlap):
    """One rank is asked to stop within its period, while the others are anywhere in theirs.

    With a center they wait there: else all steps might be taken before that rank has come so far.
    """
    total, parts, stopper = 40 * comm.size, [], 1 if transport else 0  # whose lease is not the last of a round
    rule = rules.downpour() if transport else rules.synchronous()

    def one_hot(step):
        return np.where(np.arange(total) == step, -1.0, 0.0)

    for at in (7, 0):
        interrupted, taken = False, []
        others = [rank for rank in range(1, comm.size) if rank != stopper] if at and transport else []
        waits = comm.rank in others
        opt = AGNOptimizer(
            sgd(1.0), np.zeros(total), comm, 5, rule=rule, transport=transport or "auto", overlap=overlap,
            checkpoint=directory, resume="auto",
        )  # fmt: skip
        try:
            for step in opt.steps(total):
                opt.minimize(lambda p: (0.0, one_hot(step)))  # noqa: B023
                taken.append(step)
                time.sleep(0.001)
                if at and comm.rank == stopper and len(taken) == at:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    for rank in others:
                        comm.send(None, rank)
                if waits and len(taken) == 1 + comm.rank % 4:
                    waits = comm.recv(source=stopper)
        except Interrupted:
            interrupted = True
        if waits:  # it was not granted so many
            comm.recv(source=stopper)
        assert interrupted is bool(at)
        count = opt.center["0"]
        opt.close()
        parts.append(taken)
    if transport:  # element i counts the commits of step i
        np.testing.assert_array_equal(count, np.ones(total))
        return
    assert (count > 0).all()  # of a mean
    everything = sorted(step for rank in comm.allgather(parts[0] + parts[1]) for step in rank)
    assert sorted(set(everything)) == list(range(total))
    if not overlap:  # there the interruption drops steps, which are taken again
        assert everything == list(range(total))
