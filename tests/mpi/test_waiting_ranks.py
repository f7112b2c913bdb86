"""Loops of one's own in which ranks are late, never begin, fail again and again, or stop; and rank 0, which speaks."""

import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from conditions import touch_when_said, until

from agnmpi import AGNOptimizer, adam, sgd
from agnmpi.core import rules
from agnmpi.loops import warner
from agnmpi.transport import registry

pytestmark = pytest.mark.mpi(min_size=2)

TRANSPORTS = [entry for entry in registry.entries() if entry.capabilities.center_ranks]
WHOLE = [entry for entry in TRANSPORTS if entry.capabilities.single_commits]


def name(transport):
    return transport.name


def minus_one(params):
    return 1.0, {name: np.full_like(x, -1.0) for name, x in params.items()}


@pytest.mark.parametrize("transport", TRANSPORTS, ids=name)
@pytest.mark.parametrize("empty", ["rank 0", "rank 1"])
def test_a_loop_that_a_rank_never_begins_is_made_up_for(comm, transport, empty):
    """zip asks an empty loader first: the loop of that rank does not run, and the others wait for it."""
    without = comm.rank == int(empty.split()[1])
    loader = [] if without else range(1000)
    opt = AGNOptimizer(sgd(1.0), np.zeros(2), comm, 3, transport=transport)
    for _turn in range(2):
        taken = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where the only worker is the one without data
            for _, _step in zip(loader, opt.steps(12)):
                opt.minimize(minus_one)
                taken += 1
            opt.finish()
        alone = empty == "rank 1" and comm.size == 2
        given_back = 0 if transport in WHOLE else 3  # to nobody
        assert sum(comm.allgather(taken)) in ([0] if alone else [12, 12 - given_back])
        assert (opt.center["0"] == opt.clock).all()
        assert len(set(comm.allgather(opt.clock))) == 1
    opt.close()


def waited(comm, opt, late, speakers, directory, monkeypatch):
    """What each rank says while the rank `late` does not come before the `speakers` have said something."""
    directory = Path(comm.bcast(str(directory)))
    monkeypatch.setattr(warner, "WAIT", 1.0 if comm.rank != late else 60.0)
    if comm.rank in speakers:
        touch_when_said(monkeypatch, directory / str(comm.rank), "in steps()")
    comm.Barrier()
    if comm.rank == late:
        until(lambda: all((directory / str(rank)).exists() for rank in speakers), "nobody says anything")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in opt.steps(4):
            opt.minimize(minus_one)
        opt.finish()
    return comm.allgather([str(w.message) for w in caught if "in steps()" in str(w.message)])


@pytest.mark.parametrize("transport", TRANSPORTS, ids=name)
def test_a_worker_says_that_rank_0_is_missing(comm, transport, tmp_path, monkeypatch):
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 2, transport=transport) as opt:
        said = waited(comm, opt, 0, range(1, comm.size), tmp_path, monkeypatch)
        assert said[0] == []
        for rank, lines in enumerate(said[1:], 1):
            assert len(lines) == 1
            assert f"rank {rank} has waited for 1 s: rank 0 is not in steps(): every rank must run the loop" in lines[0]


@pytest.mark.parametrize("transport", WHOLE, ids=name)
def test_rank_0_says_which_worker_is_missing(comm, transport, tmp_path, monkeypatch):
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 2, transport=transport) as opt:
        said = waited(comm, opt, 1, [0], tmp_path, monkeypatch)
        assert len(said[0]) == 1
        assert "rank 0 has waited for 1 s: rank 1 is not in steps()" in said[0][0]
        assert said[1:] == [[]] * (comm.size - 1)


@pytest.mark.parametrize("transport", WHOLE, ids=name)
def test_rank_0_says_which_worker_sends_nothing_any_more(comm, transport, tmp_path, monkeypatch):
    said_so = Path(comm.bcast(str(tmp_path))) / "said"
    monkeypatch.setattr(warner, "SILENCE", (0.3, 2.0))
    if comm.rank == 0:
        touch_when_said(monkeypatch, said_so, "rank 1 is silent")
    opt, taken = AGNOptimizer(sgd(1.0), np.zeros(2), comm, 2, transport=transport), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in opt.steps(20 * comm.size):
            if comm.rank == 1 and taken == 5:
                until(said_so.exists, "nobody says anything")
            opt.minimize(minus_one)
            taken += 1
        opt.close()
    silent = [str(w.message) for w in caught if "is silent for" in str(w.message)]
    assert all("rank 1 is silent" in line for line in silent)
    assert bool(silent) == (comm.rank == 0)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("transport", TRANSPORTS, ids=name)
def test_a_worker_that_always_fails_is_named_and_costs_the_others_nothing(comm, transport):
    """An optimizer of one's own gives NaN for good on rank 1, which is the fastest, and outlives the others."""
    x, refused = np.zeros(2), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with AGNOptimizer(None, x, comm, 2, transport=transport, on_refused=refused.append) as opt:
            for count, _ in enumerate(opt.steps()):
                x += np.nan if comm.rank == 1 else 1
                if comm.rank != 1:
                    time.sleep(5e-3)
                opt.step()
                if count == 30 and comm.rank != 1:
                    break
                if count == 400:
                    break
            opt.finish()
            assert np.isfinite(opt.center["0"]).all()
            assert opt.clock >= 15 * (comm.size - 2)
            assert (opt.center["0"] == opt.clock).all()
            assert bool(refused) == (comm.rank == 1)
    named = [str(w.message) for w in caught if "commits of rank 1 were refused" in str(w.message)]
    if comm.rank == 0 and transport in WHOLE:
        assert "the last 5 commits of rank 1" in named[0]
    elif comm.rank == 1 and transport not in WHOLE:
        assert "the last 10 commits of rank 1 were refused: NaN or infinity. It leaves" in named[0]
    else:
        assert named == []


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("own", [True, False], ids=["own", "adam"])
def test_a_nan_once_costs_its_worker_at_most_two_periods(comm, own, overlap):
    """With moments that it spoils: ours begin anew, the caller's are cleared in on_refused; and nobody else notices."""
    m, x, period, turns, spoilt = np.zeros(2), np.zeros(2), 4, 0, 0
    options = {"on_refused": lambda _: m.fill(0)} if own else {}
    with AGNOptimizer(None if own else adam(0.1), x, comm, period, overlap=overlap, **options) as opt:
        for _ in opt.steps():
            g = np.nan if (comm.rank, turns) == (1, 9) else -1.0
            if own:
                m[...] = 0.5 * m - g
                x += m
                opt.step()
            else:
                opt.minimize(lambda p, g=g: (0.0, p["0"] * 0 + g))
            turns += 1
            spoilt += not np.isfinite(opt.params["0"]).all()
            if turns == 60:
                break
        opt.finish()
        assert opt.is_center or turns == 60, "it goes on"
        assert (0 < spoilt <= 2 * period) if comm.rank == 1 else spoilt == 0
        assert np.isfinite(opt.center["0"]).all()
        assert opt.taken >= 60 * opt.num_workers - 2 * period


@pytest.mark.parametrize("transport", TRANSPORTS, ids=name)
def test_any_rank_may_stop_all(comm, transport):
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 3, transport=transport) as opt:
        for total in (None, 10**6):
            with warnings.catch_warnings():
                if transport not in WHOLE:
                    warnings.simplefilter("ignore")
                for count, _ in enumerate(opt.steps(total)):
                    opt.minimize(minus_one)
                    if comm.rank == comm.size - 1 and count == 10:
                        opt.stop()
            assert (opt.center["0"] == opt.clock).all()
            assert opt.clock >= 3
        for _ in opt.steps(6):
            opt.minimize(minus_one)
        assert (opt.center["0"] == opt.clock).all(), "a loop that was stopped is followed by others"


def test_with_an_allreduce_rule_a_loop_without_a_number_may_be_stopped(comm):
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 3, rule=rules.synchronous()) as opt:
        for count, _ in enumerate(opt.steps()):
            opt.minimize(minus_one)
            if comm.rank == comm.size - 1 and count == 10:
                opt.stop()
        opt.finish()
        assert len(set(comm.allgather(opt.clock))) == 1
        for _ in opt.steps(3 * comm.size):
            opt.minimize(minus_one)
            with pytest.raises(RuntimeError, match=r"loop over steps\(\) without a number"):
                opt.stop()


@pytest.mark.parametrize("transport", [*TRANSPORTS, None], ids=lambda t: t.name if t else "allreduce")
def test_rank_0_is_called_while_it_serves(comm, transport):
    """Until it was called often enough: a call that comes due while another is under way waits, or joins the next."""
    seen, own = [], 0

    def at_center(status):
        seen.append((status, threading.current_thread() is threading.main_thread()))
        if len(seen) == 2:
            raise KeyError("mine")
        if len(seen) == 5:
            opt.stop()

    options = {"rule": rules.synchronous()} if transport is None else {"transport": transport}
    n = comm.size if transport is None else comm.size - 1
    with AGNOptimizer(sgd(1.0), {"w": np.zeros((2, 2))}, comm, 2, **options) as opt:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in opt.steps(at_center=at_center, every=20 * n):
                time.sleep(1e-3)
                opt.minimize(minus_one)
                own += 1
        steps = comm.allreduce(own)
        if comm.rank:
            assert seen == []
            assert opt.status.step <= steps
        else:
            assert 5 <= len(seen) <= steps // (20 * n)
            assert any("KeyError: 'mine'" in str(w.message) for w in caught)
            for status, on_main in seen:
                assert on_main == (transport is None)
                assert status.step > 0
                # Sums straight into c are read while they are added to: a commit's loss may be there before its steps.
                summed = transport is not None and not transport.capabilities.single_commits
                assert status.loss == pytest.approx(1.0, rel=0.2 if summed else 0)
                assert status.steps_per_second > 0
                assert status.center["w"].shape == (2, 2)
                if transport is not None and transport in WHOLE:
                    assert (status.center["w"] == status.clock).all(), "a whole center, of just that clock"
            assert opt.status.step == steps
            assert opt.status.clock == opt.clock
        assert (opt.status.center["w"] == opt.center["w"]).all()
        with pytest.raises(ValueError, match="positive number of steps"):
            opt.steps(10, every=0)


def test_at_center_may_stop_all(comm):
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 2) as opt:
        for _ in opt.steps(at_center=lambda status: status.clock < 20 or opt.stop(), every=10):
            opt.minimize(minus_one)
        assert opt.clock >= 20
