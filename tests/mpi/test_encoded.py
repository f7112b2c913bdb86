"""Encoded commits and pulls: exact where the numbers are, with error feedback where they are not."""

import numpy as np
import pytest
from conditions import until_near
from mpi4py import MPI
from worlds import MPIWorld

from agnmpi import AGNOptimizer, sgd
from agnmpi.cluster import setup as setups
from agnmpi.core import rules
from agnmpi.core.messages import OK, REFUSED, Commit
from agnmpi.transport import registry as transports
from agnmpi.transport.agreement import ConfigError

pytestmark = pytest.mark.mpi(min_size=2)

# A vector of this number is written exactly, and so are its small multiples, as which c is pulled.
EXACT = {"bf16": 1.0, "int8": 127.0, "int4": 7.0}
both = pytest.mark.parametrize("transport", [transports.p2p, transports.rma])


@pytest.mark.parametrize("n", [10, 1000, 2_200_000])  # of the last even an int4 is more than a piece
@pytest.mark.parametrize(
    "options",
    [{}, {"message_buffers": 1}, {"centers": 2}, {"transport": "rma"}, {"transport": "rma", "centers": 2}],
    ids=lambda options: " ".join(map(str, options.values())) or "p2p",
)
@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(("encoding", "pull_encoding"), [("int8", "int8"), ("bf16", "int4"), ("int4", "float32")])
def test_sums_are_whole_and_pulls_follow_the_clock(comm, n, options, threaded, encoding, pull_encoding):
    if n > 1000 and (comm.size != 3 or options not in ([{}] if threaded else [{}, {"transport": "rma"}])):
        pytest.skip("18 MB: covered with 3 ranks and one center")
    if options.get("centers", 1) >= comm.size:
        pytest.skip("needs a worker")
    if threaded and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("MPI was initialized without MPI_THREAD_MULTIPLE")
    one = EXACT[encoding] * (EXACT[pull_encoding] if pull_encoding != "float32" else 1.0)
    commits = 12 if n <= 1000 else 3  # of many pieces, fewer

    def work(end, index):
        out, before = np.full(n, np.nan), 0.0
        for k in range(1, commits + 1):
            reply = end.exchange(Commit(index, k, steps=1, payload=np.full(n, one)), out).wait()
            assert reply.status == OK
            first = out[0]
            assert before + one <= first <= one * commits * (comm.size - 1)
            if options.get("centers", 1) == 1:
                assert (out == one * reply.clock).all(), "all of c, at the clock of the reply"
            before = first
        final = np.full(n, np.nan)
        end.leave(None, final).wait()
        return final

    transport = transports.resolve(**{"transport": "p2p", **options}, encoding=encoding, pull_encoding=pull_encoding)
    outcome = MPIWorld(comm, transport, threaded=threaded).play(n, work)
    total = one * commits * (comm.size - options.get("centers", 1))
    for final in outcome.results:
        assert (final == total).all()
    if comm.rank == 0:
        assert (outcome.c == total).all()


@both
@pytest.mark.parametrize("encoding", ["bf16", "int8", "int4"])
def test_what_rounding_takes_from_one_commit_the_next_ones_bring(comm, encoding, transport):
    """The sum over all commits differs from the exact one by one residual for each worker, however many there are."""
    n, commits = 5000, 40

    def work(end, index):
        rng, exact = np.random.default_rng(index), np.zeros(n)
        for k in range(1, commits + 1):
            delta = rng.normal(size=n)
            exact += delta
            end.exchange(Commit(index, k, steps=1, payload=delta), None).wait()
        final = np.empty(n)
        end.leave(None, final).wait()
        return exact, final, end.residual.copy()

    outcome = MPIWorld(comm, transport(encoding=encoding)).play(n, work)
    gathered = comm.gather(outcome.results[0] if outcome.results else None, 0)
    if comm.rank:
        return
    exact = sum(each[0] for each in gathered[1:])
    residual = sum(each[2] for each in gathered[1:])
    for _, final, _ in gathered[1:]:
        np.testing.assert_allclose(final + residual, exact, atol=1e-4)
    rounding = {"bf16": 0.02, "int8": 0.02, "int4": 0.5}[encoding]
    assert 0 < np.abs(residual).max() < rounding * (comm.size - 1)


@both
def test_a_refused_commit_leaves_the_residual_as_it_was(comm, transport):
    def work(end, index):
        kept = []
        for k, delta in enumerate([np.linspace(0, 1, 1000), np.full(1000, np.nan), np.linspace(1, 2, 1000)], 1):
            reply = end.exchange(Commit(index, k, steps=1, payload=delta), None).wait()
            kept.append((reply.status, end.residual.copy()))
        end.leave(None, np.empty(1000)).wait()
        return kept

    def patient(_end, center):
        center.patience = 2 * comm.size

    outcome = MPIWorld(comm, transport(encoding="int4")).play(1000, work, on_end=patient)
    if comm.rank:
        ((first, refused, second),) = outcome.results
        assert [first[0], refused[0], second[0]] == [OK, REFUSED, OK]
        assert np.abs(first[1]).max() > 0
        assert (refused[1] == first[1]).all()
        assert (second[1] != refused[1]).any()
        assert np.isfinite(second[1]).all()


@both
@pytest.mark.parametrize("n", [1000, 3000])
@pytest.mark.parametrize("pull_encoding", ["float32", "int8"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_loop_learns_and_ends_with_the_center_itself(comm, overlap, pull_encoding, n, transport):
    """1000 numbers travel with their headers and replies, encoded or not."""
    transport, target = transport(encoding="int8", pull_encoding=pull_encoding), np.linspace(-1, 1, n, dtype="f4")
    options = {"transport": transport, "overlap": overlap, "outer_rate": 0.5}  # well damped, however stale commits are
    with AGNOptimizer(sgd(0.2), {"w": np.zeros(n, "f4")}, comm, 4, **options) as opt:
        for _ in until_near(opt, target, 0.03):
            for _ in opt.steps(160 * (comm.size - 1)):
                opt.minimize(lambda p: (0.0, {"w": p["w"] - target}))
        center = opt.center["w"]
    for other in comm.allgather(center):
        assert (other == center).all()


@pytest.mark.parametrize(
    ("rule", "transport", "text"),
    [
        (rules.aeasgd(0.1), transports.p2p(encoding="bf16"), "takes from x what it adds to c"),
        (rules.eamsgd(0.1), transports.p2p(pull_encoding="int8"), "takes from x what it adds to c"),
    ],
)
def test_elastic_rules_are_refused(comm, rule, transport, text):
    with pytest.raises(ConfigError, match=text):
        AGNOptimizer(sgd(0.1), np.zeros(3), comm, 1, rule=rule, transport=transport)


def test_who_may_take_over_does_not_begin_from_rounded_numbers(comm, monkeypatch):
    monkeypatch.setattr(setups, "outlives_loss", lambda _transport: True)
    with pytest.raises(ConfigError, match="pull_encoding int4 with ULFM"):
        AGNOptimizer(sgd(0.1), np.zeros(3), comm, 1, transport=transports.p2p(pull_encoding="int4"))
