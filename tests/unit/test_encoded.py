"""Encoded exchanges within one process and in virtual time."""

import threading

import numpy as np
import pytest
from in_process import config

from agnmpi.arrays.encodings import get, rounding_key
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import Leases
from agnmpi.core.messages import DROPPED, ENCODED, OK, PULL, Commit
from agnmpi.core.worker import Worker
from agnmpi.recovery.worker_state import save_worker
from agnmpi.simulation import simulate
from agnmpi.simulation.timing import Timing
from agnmpi.transport import registry as transports
from agnmpi.transport.communication_thread import ThreadedEnd
from agnmpi.transport.composed import EncodedEnd, ShardedWorker, encode
from agnmpi.transport.local import LocalCenter

N = 1000


def connected(commits, pulls, weight=None):
    rule = rules.agn() if weight is None else rules.agn()._replace(weight=weight)
    c = np.random.default_rng(0).normal(size=N).astype("f4")
    center = Center(rule, c, 1)
    local = LocalCenter(c, 1, center.apply, pulls)
    return local, EncodedEnd(local.worker_end(0), c, get(commits), get(pulls))


@pytest.mark.parametrize("pulls", ["bf16", "int8", "int4"])
def test_a_pull_is_c_encoded_by_its_clock_and_the_last_one_is_c(pulls):
    local, end = connected("float32", pulls)
    out, form = np.empty(N, "f4"), get(pulls)
    for sequence in (1, 2):
        reply = end.exchange(Commit(0, sequence, payload=np.ones(N, "f4"), requests=PULL), out).wait()
        data, expected = np.empty(form.nbytes(N), "u1"), np.empty(N, "f4")
        form.encode(local.c, data, key=rounding_key(0, 0, reply.clock))
        form.decode(data, expected)
        np.testing.assert_array_equal(out, expected)
        assert (out != local.c).any()
    end.leave(Commit(0, 3, payload=np.ones(N, "f4")), out).wait()
    np.testing.assert_array_equal(out, local.c)


def test_the_residual_is_what_was_not_sent_and_a_dropped_commit_leaves_it():
    weights = iter([1.0, 0.0, 1.0])
    local, end = connected("int4", "float32", lambda _commit: next(weights))
    start, rng, sent = local.c.copy(), np.random.default_rng(1), np.zeros(N)
    statuses = []
    for sequence in (1, 2, 3):
        before, delta = end.residual.copy(), rng.normal(size=N).astype("f4")
        reply = end.exchange(Commit(0, sequence, payload=delta), None).wait()
        statuses.append(reply.status)
        if reply.status == OK:
            sent += delta
            assert (end.residual != before).any()
        else:
            np.testing.assert_array_equal(end.residual, before)
    assert statuses == [OK, DROPPED, OK]
    np.testing.assert_allclose(local.c - start + end.residual, sent, atol=1e-5)


class Gate(EncodedEnd):
    """Exchanges that are answered when `opened`."""

    opened, answered = threading.Event(), threading.Event()

    def finish(self, reply, committed, out):
        assert self.opened.wait(60)
        super().finish(reply, committed, out)
        self.answered.set()


def test_a_checkpoint_during_an_exchange_holds_the_residual_of_before_or_after_it():
    """The exchange is answered in the communication thread while the residual is being copied."""
    c = np.zeros(N, "f4")
    center = Center(rules.agn(), c, 1)
    center.leases = Leases(total=None, period=1)
    gate = Gate(LocalCenter(c, 1, center.apply).worker_end(0), c, get("int4"), get("float32"))
    worker = Worker(np.zeros(N, "f4"), rules.agn(), None, end := ThreadedEnd(gate, c), 0, overlap=True)

    def commit(numbers):
        worker.x += numbers.astype("f4")
        worker.step(None)

    gate.opened.set()
    worker.begin()
    commit(np.linspace(1, 2, N))
    worker.finish_exchange()
    held, before = end.residual, end.residual.copy()
    gate.opened.clear()
    gate.answered.clear()
    commit(np.linspace(2, 5, N))

    def copy_during_the_answer(x):
        if x is not held:
            return x.copy()
        half = x[: x.size // 2].copy()
        gate.opened.set()
        assert gate.answered.wait(60)
        return np.concatenate([half, x[x.size // 2 :]])

    arrays = {name: copy_during_the_answer(x) for name, x in save_worker(worker)[0].items()}  # as its saver does
    worker.finish_exchange()
    end.close()
    assert (end.residual[: N // 2] != before[: N // 2]).any()
    assert (end.residual[N // 2 :] != before[N // 2 :]).any()
    assert any((arrays["residual"] == whole).all() for whole in (before, end.residual))


def trained(rule, divided, overlap):
    """x, c and the residual after six commits, the fourth of which is infinite; of one or two centers."""
    c = np.zeros(2 * N, "f4")
    spans = [slice(0, N), slice(N, 2 * N)] if divided else [slice(0, 2 * N)]
    ends, centers = [], []
    for span in spans:
        centers.append(center := Center(rule, c[span], 1))
        center.leases = None if span.start else Leases(total=None, period=2)  # the first grants the work
        ends.append(encode(LocalCenter(c[span], 1, center.apply, "bf16").worker_end(0), c[span], "int8", "bf16"))
    end = ShardedWorker(ends, spans) if divided else ends[0]
    end = ThreadedEnd(end, c) if overlap else end
    worker, rng = Worker(np.zeros(2 * N, "f4"), rule, None, end, 0, overlap=overlap), np.random.default_rng(2)
    worker.begin()
    for step in range(12):
        worker.x += np.inf if step == 7 else rng.normal(size=2 * N).astype("f4")
        worker.step(None)
        worker.x += rng.normal(size=2 * N).astype("f4")  # while the exchange may be under way
        worker.finish_exchange()
    end.close()
    assert worker.refusals == 1
    assert {center.refused for center in centers} == {1}
    return worker.x, c, end.residual


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("rule", [rules.agn(), rules.dynsgd()], ids=["agn", "dynsgd"])
def test_a_delta_that_is_formed_with_its_encoding_is_the_same(rule, divided, overlap):
    def adopt(x, sent, delta, c):
        rule.adopt(x, sent, delta, c)

    assert rule.divisor(2)
    other = rule._replace(adopt=adopt)  # may need the delta
    assert other.divisor(2) is None
    for formed, before in zip(trained(rule, divided, overlap), trained(other, divided, overlap)):
        np.testing.assert_array_equal(formed, before)


def test_a_worker_of_several_centers_saves_and_restores_the_residual_of_all():
    c = np.zeros(2 * N, "f4")
    spans = [slice(0, N), slice(N, 2 * N)]

    def end(first, second):
        locals_ = [LocalCenter(c[span], 1, Center(rules.agn(), c[span], 1).apply) for span in spans]
        ends = [local.worker_end(0) for local in locals_]
        return ShardedWorker([encode(e, c[:N], name, "float32") for e, name in zip(ends, (first, second))], spans)

    both, half, none = end("int4", "int4"), end("float32", "int8"), end("float32", "float32")
    both.exchange(Commit(0, 1, payload=np.linspace(1, 2, 2 * N, dtype="f4")), None).wait()
    saved = both.residual
    assert saved[:N].any()
    assert saved[N:].any()
    half.restore(saved)
    np.testing.assert_array_equal(half.residual, np.concatenate([np.zeros(N), saved[N:]]))
    none.restore(saved)
    assert none.residual is None


def test_a_short_vector_goes_as_it_is():
    local, _ = connected("int8", "int8")
    end = local.worker_end(0)
    assert encode(end, np.zeros(64, "f4"), "int8", "int8") is end, "260 bytes are no fewer than 256"
    assert encode(end, np.zeros(66, "f4"), "float32", "float32") is end
    made = encode(end, np.zeros(10, "f4"), "int8", "int4")
    assert (made.commits.name, made.pulls.name) == ("float32", "int4")
    assert made.residual is None


def test_who_asks_for_an_encoded_pull_says_so():
    seen = []

    class Watched(LocalCenter):
        def put(self, handle):
            seen.append(handle.commit)
            super().put(handle)

    c = np.zeros(N, "f4")
    local = Watched(c, 1, Center(rules.agn(), c, 1).apply, "int8")
    end = EncodedEnd(local.worker_end(0), c, get("bf16"), get("int8"))
    out = np.empty(N, "f4")
    end.exchange(Commit(0, 1, payload=np.ones(N, "f4"), requests=PULL), out).wait()
    end.exchange(Commit(0), None).wait()
    end.pull(out).wait()
    assert [bool(commit.requests & ENCODED) for commit in seen] == [True, False, False]
    assert (seen[0].encoding, seen[0].payload.nbytes) == (get("bf16").number, 2 * N)


@pytest.mark.parametrize("name", ["accumulate", "allreduce"])
@pytest.mark.parametrize("option", ["encoding", "pull_encoding"])
def test_transports_whose_sums_are_mpis_refuse(name, option):
    with pytest.raises(ValueError, match=f"{option} int8 needs transport p2p or rma or local: with {name} MPI itself"):
        transports.resolve(name, name == "allreduce", **{option: "int8"})
    with pytest.raises(ValueError, match="encoding 'int9': choose one of float32, bf16, int8, int4"):
        transports.p2p(**{option: "int9"})


def test_in_virtual_time_an_encoded_exchange_takes_the_time_of_its_bytes(tmp_path):
    size = {"options": {"unused": 2000}}
    timing = Timing(step_time=1.0, latency=0.0, bandwidth=1000.0, service=0.0)
    raw = simulate.run(config(tmp_path / "raw", 1, **size), timing)()
    small = simulate.run(config(tmp_path / "small", 1, encoding="int8", pull_encoding="int4", **size), timing)()
    n, commits = 2004, raw["clock"]
    by_commits, by_pulls = 4 * n - get("int8").nbytes(n), 4 * n - get("int4").nbytes(n)
    saved = (commits * by_commits + (commits + 1) * by_pulls) / 1000.0  # one pull at the start; the last is as it is
    assert raw["virtual"]["seconds"] - small["virtual"]["seconds"] == pytest.approx(saved)
    assert small["clock"] == commits
    assert small["metrics"]["distance"] < 0.6


@pytest.mark.parametrize("pull_encoding", ["float32", "int8"])
def test_in_virtual_time_each_of_several_centers_gets_whole_blocks(tmp_path, pull_encoding):
    """With one worker the numbers are those of one center; 2,004 numbers are 8 blocks of int8, the last a short one."""
    options = {"encoding": "int8", "pull_encoding": pull_encoding, "options": {"unused": 2000}}
    timing, ends = Timing(step_time=1.0, latency=0.0, bandwidth=1000.0, service=0.0), {}
    for centers in (1, 3):
        given = config(tmp_path / f"run-{centers}", 1, centers=centers, **options)
        result = ends[centers] = simulate.run(given, timing)()
        result["sent"] = result["virtual"]["seconds"] - result["steps"]
    assert ends[3]["clock"] == ends[1]["clock"]
    assert ends[3]["sent"] < 0.4 * ends[1]["sent"], "at most 3 of 8 blocks travel to each"
    near = 0 if pull_encoding == "float32" else 0.01
    assert ends[3]["metrics"]["distance"] == pytest.approx(ends[1]["metrics"]["distance"], abs=near)
    too_many = config(tmp_path / "run", 1, centers=9, **options)
    with pytest.raises(ValueError, match=r"9 centers .* at least one block of 256 encoded numbers"):
        simulate.run(too_many, timing)
