"""The parameters of a loop of one's own: where they lie, when they are read, what a session starts from."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from agnmpi import AGNOptimizer, sgd
from agnmpi.cluster.machine import blas_threads
from agnmpi.core import rules
from agnmpi.transport import registry

pytestmark = pytest.mark.mpi(min_size=2)

TRANSPORTS = [entry for entry in registry.entries() if entry.capabilities.center_ranks or entry.capabilities.together]
SHARDED = [replace(entry, centers=2) for entry in TRANSPORTS if entry.capabilities.shards]


def name(transport):
    return f"{transport.name}-{transport.centers}"


def rule_of(transport):
    return rules.synchronous() if transport.capabilities.together else rules.agn()


def minus_one(params):
    return 0.0, {name: np.full_like(x, -1.0) for name, x in params.items()}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("transport", [*TRANSPORTS, *SHARDED], ids=name)
@pytest.mark.parametrize("n", [6, 20_000])  # inline and not
def test_a_session_starts_from_rank_0_as_it_is_then(comm, transport, own, n):
    """Weights loaded after construction, and between two loops; those of the other ranks do not count."""
    if comm.size <= transport.centers and transport.capabilities.center_ranks:
        pytest.skip("needs a worker")
    w, b = np.zeros((2, n // 2)), np.zeros(3)
    optimizer = None if own else sgd(1.0)
    with AGNOptimizer(
        optimizer, {"w": w, "b": b}, comm, 2, rule=rule_of(transport), transport=replace(transport, encoding="float32")
    ) as opt:
        for start in (10.0, 0.5, 20.0):
            if transport.capabilities.together:
                opt.finish()  # rank 0 has left its loop early, and takes the final center now
            opt.params["w"][...], opt.params["b"][...] = start + comm.rank, start + comm.rank
            for _ in opt.steps():
                assert (opt.params["w"] == opt.center["w"]).all()
                assert start <= opt.params["w"].min() <= opt.params["w"].max() < start + comm.size
                if own:
                    w += 1
                    b += 1
                    opt.step()
                else:
                    opt.minimize(minus_one)
                break
            comm.Barrier()  # the final center is read late, and must not be what the next loop starts from
        opt.finish()
        end = start + (1 if transport.capabilities.together else opt.num_workers)
        assert (opt.center["w"] == end).all()
        assert (opt.center["b"] == end).all()
        if own:
            assert (w == opt.center["w"]).all()


def test_a_vector_of_ones_own_is_the_flat_vector(comm):
    x = np.full(5, float(comm.rank))
    view = x[1:3]
    with AGNOptimizer(None, x, comm, 3, copy=False) as opt:
        assert opt.flat is x
        assert opt.params["0"] is x
        for _ in opt.steps(6 * opt.num_workers):
            view += 1
            opt.step()
        assert opt.flat is x
        assert x.tolist() == [0, opt.clock, opt.clock, 0, 0]
        assert (opt.center["0"] == x).all()
    with AGNOptimizer(sgd(1.0), {"v": x}, comm, 1, copy=False) as opt:
        for _ in opt.steps(opt.num_workers):
            opt.minimize(minus_one)
        assert (opt.center["v"] == x).all()
    whole = np.arange(9.0)
    parts = {"mean": whole[7:], "w": whole[:6].reshape(2, 3), "b": whole[6:7]}
    with AGNOptimizer(None, parts, comm, 3, copy=False, buffers=["mean"]) as opt:
        assert opt.flat.tolist() == list(range(9))
        assert np.shares_memory(opt.flat, whole)
        for _ in opt.steps(6 * opt.num_workers):
            whole[:7] += 1
            whole[7:] = 5
            opt.step()
        assert whole[:7].tolist() == [i + opt.clock for i in range(7)]
        assert (whole[7:] > 5 if comm.size > 2 else whole[7:] == 5).all(), "a mean that began with 7 and 8"
        assert (opt.center["mean"] == whole[7:]).all()
    for wrong in ({"a": x, "b": x.copy()}, np.zeros((4, 2)).T, np.zeros(8)[::2], {"b": x[2:], "a": x[:2]}):
        with pytest.raises(ValueError, match=r"copy=False: '\w' of shape .* is not a contiguous, writeable array"):
            AGNOptimizer(None, wrong, comm, copy=False)


class Counted(np.ndarray):
    """Counts how often it is copied from and to."""

    reads = writes = 0

    def __setitem__(self, key, value):
        self.writes += 1
        super().__setitem__(key, value)


@pytest.mark.parametrize("overlap", [False, True])
def test_arrays_are_read_and_written_at_exchanges_alone(comm, overlap):
    """Strides are kept, and what was moved between two exchanges is not touched."""
    w = np.zeros((3, 4)).T.view(Counted)
    pulls, steps = [], 0
    with AGNOptimizer(None, {"w": w}, comm, 5, overlap=overlap, on_pull=lambda opt: pulls.append(opt.clock)) as opt:
        for _ in opt.steps(20 * opt.num_workers):
            np.add(w, 1, out=w)
            before = opt.flat.copy()
            opt.step()
            steps += 1
            if len(pulls) == w.writes and steps % 5 and not overlap:
                assert (opt.flat == before).all(), "nothing is packed within a period"
        assert len(pulls) == w.writes
        assert pulls == sorted(pulls)
        assert w.flags.f_contiguous
        assert (w == opt.center["w"]).all()
        assert comm.rank or pulls == [opt.clock], "at the center: the final one"
        assert sum(comm.allgather(len(pulls))) > 2 * opt.num_workers  # one of them may take all steps


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["agn", "aeasgd", "synchronous"])
def test_own_arrays_and_an_own_vector_are_trained_alike(comm, name, overlap):
    """One worker: whatever is copied when, the numbers are the same."""
    part = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    if comm.rank < 2:
        rule, ends = rules.RULES[name](*([0.3] if name == "aeasgd" else [])), []
        for copy in (True, False):
            x = np.zeros(6)
            with AGNOptimizer(
                None, x if not copy else [x[:2], x[2:]], part, 4, rule=rule, overlap=overlap, copy=copy
            ) as opt:
                for step in opt.steps(41):
                    x += np.cos(step * np.arange(6))
                    opt.step()
                ends.append(opt.flat.copy())
        if not overlap:
            assert (ends[0] == ends[1]).all()
        elif name != "aeasgd":  # which reads x when a pull happens to arrive
            np.testing.assert_allclose(*ends, rtol=1e-12)
    part.Free()


@pytest.mark.parametrize("overlap", [False, True])
def test_what_rounding_adds_to_arrays_of_fewer_digits_is_not_committed(comm, overlap):
    """float16 at 4096 holds multiples of 4 alone; the center takes an eighth of each step of 4."""
    w, b = np.full(3, 4096, np.float16), np.zeros(2)
    n = comm.size - 1
    with AGNOptimizer(None, {"w": w, "b": b}, comm, 2, outer_rate=0.125 * n, overlap=overlap) as opt:
        assert opt.flat.dtype == np.float32
        for _ in range(2):
            for _ in opt.steps(40):
                w += np.float16(4)
                b += 2
                opt.step()
        assert opt.center["b"].tolist() == [80 * 2 / 8] * 2
        assert opt.center["w"].tolist() == [4096 + 80 * 4 / 8] * 3
        assert abs(w - opt.center["w"]).max() <= 2
        w[:] = 0.125  # loaded anew
        for _ in opt.steps(1):
            opt.step()
        assert opt.center["w"].tolist() == [0.125] * 3


def test_a_turn_without_a_step_uses_up_no_step(comm):
    with AGNOptimizer(None, np.zeros(2), comm, 3) as opt:
        x, seen, last, taken = opt.params["0"], [], None, []
        for step in opt.steps(12):
            seen.append(step)
            if len(seen) % 3:
                opt.skip()
                with pytest.raises(RuntimeError, match="one step in each iteration"):
                    opt.step()
                assert last in (None, step)
                last = step
                continue
            assert step == last
            last = None
            x += 1
            opt.step()
            taken.append(step)
        everyone = comm.allgather(taken)
        assert sorted(s for steps in everyone for s in steps) == list(range(12))
        if not opt.is_center:
            assert len(seen) == 3 * len(taken)


def test_a_refused_commit_is_told(comm):
    """NaN in the moments of an optimizer of one's own: on_refused resets them, and nothing else is lost."""
    m, events = np.zeros(2), []

    def refused(opt):
        assert np.isfinite(opt.params["0"]).all(), "x is the center already"
        events.append("refused")
        m[...] = 0

    x, first, waits = np.zeros(2), comm.rank == 1, comm.rank > 1
    with AGNOptimizer(None, x, comm, 3, on_pull=lambda _: events.append("pull"), on_refused=refused) as opt:
        for _ in opt.steps(9 * opt.num_workers):
            if first:
                for rank in range(2, comm.size):
                    comm.send(None, rank)
            if waits:  # else rank 1 might get no core before all steps are taken
                waits = comm.recv(source=1)
            m += np.nan if first else 1
            first = False
            x += m
            opt.step()
        if waits:  # it was given no step
            comm.recv(source=1)
        assert np.isfinite(opt.center["0"]).all()
        assert comm.allgather(events.count("refused")) == [int(rank == 1) for rank in range(comm.size)]
        if comm.rank == 1:
            assert events[: events.index("refused") + 1] == ["pull", "pull", "refused"]


def test_a_commit_that_leaves_with_nan_is_told_too(comm):
    refused = []
    x = np.zeros(2)
    with AGNOptimizer(None, x, comm, 10, on_refused=lambda opt: refused.append(opt.params["0"].tolist())) as opt:
        for _ in opt.steps():
            x += np.nan
            opt.step()
            break
        opt.finish()
        assert refused == ([] if opt.is_center else [[0.0, 0.0]])
        assert (x == 0).all()


def test_arrays_that_were_replaced_are_named(comm):
    class Tensor:
        """As PyTorch's: the same object, with other memory after double()."""

        def __init__(self):
            self.data = np.zeros(3, np.float32)

        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **options):
            return self.data.__dlpack__(**options)

    for change, text in [
        (lambda p: p.update(w=p["w"] + 1), "'w' is not the array that it was: its memory is another"),
        (lambda p: p.update(w=p["w"].astype("f8")), "float64, not float32"),
        (lambda p: p.update(w=np.zeros((3, 1), "f4")), r"of shape \(3, 1\), not of shape \(3,\)"),
        (lambda p: p.pop("w"), "'w' is gone"),
        (lambda p: setattr(p["t"], "data", np.zeros(3)), "'t' is not the array that it was: float64, not float32"),
    ]:
        params, last = {"w": np.zeros(3, "f4"), "t": Tensor()}, comm.size - 1
        with AGNOptimizer(None, params, comm, 2) as opt:
            opt.initialize()
            if comm.rank == last:
                change(params)
                with pytest.raises(ValueError, match=text):  # noqa: PT012
                    for _ in opt.steps(100):
                        opt.step()
                for rank in range(1, last):
                    comm.send(None, rank)
                params.update(w=opt.params["w"])
                params["t"].data = opt.params["t"]
            else:
                waits = comm.rank > 0
                for _ in opt.steps(100):
                    if waits:  # else all steps might be taken before the last rank begins
                        waits = comm.recv(source=last)
                    opt.step()
                if waits:  # it was given no step
                    comm.recv(source=last)


def test_the_outer_rate_is_an_argument(comm):
    n = comm.size - 1
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 4, outer_rate=0.5) as opt:
        for _ in opt.steps(4 * n):
            opt.minimize(minus_one)
        assert opt.center["0"][0] == pytest.approx(opt.clock * 0.5 / n * 4)
    for options, text in [
        ({"outer_rate": 0.0}, "positive"),
        ({"outer_rate": "published"}, "outer_rate must be a number, or None for the published n/λ, not 'published'"),
        ({"rule": rules.aeasgd(0.1), "outer_rate": 1.0}, "weights"),
    ]:
        with pytest.raises(ValueError, match=text):
            AGNOptimizer(sgd(1.0), np.zeros(2), comm, **options)
    with pytest.raises(ValueError, match=r"rule differs.*outer rate"):
        AGNOptimizer(sgd(1.0), np.zeros(2), comm, outer_rate=1.0 + comm.rank)


def test_advice_about_n_and_period_is_logged_at_rank_0(comm, caplog):
    caplog.set_level(logging.INFO, logger="agnmpi")
    n = comm.size - 1
    for period, rate, text, level in [
        (100 * n, None, "moves the center by only", logging.INFO),
        (n, 2.5, "above 2", logging.WARNING),
    ]:
        caplog.clear()
        AGNOptimizer(sgd(1.0), np.zeros(2), comm, period, outer_rate=rate).close()
        said = [record for record in caplog.records if text in record.getMessage()]
        assert [record.levelno for record in said] == [level] * (comm.rank == 0)
        assert comm.rank or f"n/λ = {n}/{period}" in caplog.text


def test_ranks_share_the_cores_also_among_blas_threads(comm, monkeypatch):
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(2 * (comm.size - 1))))
    before = blas_threads()
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm):
        assert blas_threads() == (1 if comm.rank == 0 else 2)
    assert blas_threads() == before


@pytest.mark.parametrize("name", ["p2p", "rma", "accumulate"])
def test_refused_steps_are_not_among_those_taken(comm, name):
    """NaN in one step: the center holds one for each step that counts, and the others are given up."""
    n, broken = comm.size - 1, 7
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 5, transport=name, rule=rules.downpour()) as opt:
        for step in opt.steps(20 * n):
            opt.minimize(lambda p, step=step: (0.0, [np.full(2, np.nan if step == broken else -1.0)]))
        assert opt.center["0"].tolist() == comm.bcast([float(opt.status.step)] * 2)
        assert 0 < 20 * n - opt.center["0"][0] <= 5
