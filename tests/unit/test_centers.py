"""What the center may do with a commit beyond adding it: each piece, and the case in which it is AGN."""

import json

import numpy as np
import pytest
from golden import close
from in_process import UNEVEN, center, config, trajectory, world

from agnmpi import sgd
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import Lease, Leases, SpeedProportional
from agnmpi.core.messages import Commit
from agnmpi.core.optimizers import OPTIMIZERS
from agnmpi.core.rules import CommitInfo
from agnmpi.reporting.advice import advice
from agnmpi.simulation import simulate
from agnmpi.simulation.replay import replay
from agnmpi.simulation.timing import Timing


def test_identity_cases():
    plain = trajectory(rules.agn())
    assert rules.weighted(rule := rules.agn()) is rule
    rate = rules.weighted(rules.agn(), rules.outer_rate(4 / 5))
    np.testing.assert_allclose(trajectory(rate), plain, rtol=1e-12)
    for weight in (rules.staleness_power(0.0), rules.staleness_cap(3), rules.staleness_power(2.0)):
        # In turn each worker's staleness is n − 1 = 3, or less at the start: what is expected stays whole.
        np.testing.assert_array_equal(trajectory(rules.weighted(rules.agn(), weight)), plain)


def test_weights_are_what_their_formulas_say():
    seen = CommitInfo(staleness=24, steps=10, workers=40)
    assert rules.outer_rate(2.0)(seen) == 0.5
    assert rules.outer_rate(2.0)(seen._replace(steps=5)) == 0.25
    assert rules.staleness_power(1.0)(seen) == 1.0
    assert rules.staleness_power(1.0)(seen._replace(workers=5)) == 0.2
    assert rules.staleness_power(0.5)(seen._replace(workers=1)) == 0.2
    assert [rules.staleness_cap(24)(seen), rules.staleness_cap(23)(seen)] == [1.0, 0.0]
    both = rules.weighted(rules.dynsgd(), rules.staleness_power(1.0), rules.staleness_cap(99))
    assert both.weight(seen._replace(workers=5)) == pytest.approx(1 / 25 * 0.2)
    assert both.weighs
    for made, text in (
        (rules.outer_rate, "outer rate r"),
        (rules.staleness_power, "power"),
        (rules.staleness_cap, "cap"),
    ):
        with pytest.raises(ValueError, match=text):
            made(-1)
    for rule in (rules.aeasgd(0.1), rules.synchronous()):
        with pytest.raises(ValueError, match="takes no further weights"):
            rules.weighted(rule, rules.staleness_cap(1))


def test_r_1_averages_whatever_lambda_is():
    """Three workers that pull together and move by 6, 3 and 0 in periods of their own length: c is their mean."""
    _, local, made = world(rules.weighted(rules.agn(), rules.outer_rate(1.0)), None, [0.0], 3, 2)
    for worker, steps, moved in zip(made, (2, 1, 2), (6, 3, 0)):
        worker.held.leases[0] = worker.held.leases[0]._replace(steps=2)
        worker.x += moved
        for _ in range(steps):
            worker.step(None)
    made[1].leave()  # its period is cut short
    made[1].settle()
    close(local.c, [3.0])


@pytest.mark.parametrize("workers", [1, 2, 7, 40])
def test_an_outer_rate_of_1_is_stable_whatever_n_is(workers):
    """Workers that reach their optimum, 0, in each period; in turn, so that their staleness is n − 1.

    Then c ← c − (r/n)·c_old, which is stable for r/n < 2 cos(kπ/(2k + 1)), k = n − 1 (Levin, May 1976): for large n
    r < π/2. So r = 1 is, and would be with an overshoot of half; r = 2, that is n/λ = 2, is not.
    """

    def end(r):
        rule = rules.weighted(rules.agn(), rules.outer_rate(r))
        _, local, made = world(rule, None, [1.0], workers, 3)
        for _ in range(60):
            for worker in made:
                for _ in range(3):
                    worker.x[:] = 0
                    worker.step(None)
        return abs(local.c[0])

    edge = workers * 2 * np.cos((workers - 1) * np.pi / (2 * workers - 1))
    assert edge > np.pi / 2
    assert end(1.0) < 1e-4
    assert end(0.8 * edge) < 0.1
    assert end(1.2 * edge) > 10


def test_who_is_lost_weighs_no_longer_until_it_is_back():
    """n is who trains, and shares of samples are of theirs; who only reads, or waits as a spare, does not count."""
    seen = []
    rule = rules.weighted(rules.agn(), lambda info: seen.append((info.workers, info.share)) or 1.0)
    kept, c = Center(rule, np.zeros(1), workers=3), np.zeros(1)

    def commit(worker, samples):
        sequence = kept.applied[worker] + 1
        kept.apply(Commit(worker, sequence, 1, clock=kept.clock, samples=samples, payload=np.ones(1)), c)

    for worker, samples in enumerate((10, 20, 70)):
        commit(worker, samples)
    commit(0, 10)
    assert seen.pop() == (3, pytest.approx(0.1))
    kept.worker_lost(5)  # a reader
    kept.worker_lost(2)
    commit(0, 10)
    assert seen.pop() == (2, pytest.approx(1 / 3))
    commit(2, 70)
    commit(0, 10)
    assert seen.pop() == (3, pytest.approx(0.1))
    assert c == len(seen) + 3


def test_what_is_too_old_is_dropped_and_done_again():
    rule = rules.weighted(rules.agn(), rules.staleness_cap(1))
    held, local, made = world(rule, sgd(1.0), [0.0], 3, 2, total=8)
    dropped = []
    for worker in made:  # all pulled at clock 0: their staleness is 0, 1, 2
        worker.step(-np.ones(1)), worker.step(-np.ones(1))
        dropped.append(held.dropped)
    assert dropped == [0, 0, 1]
    close([local.c[0], made[2].x[0], made[2].o[0]], [2, 2, 2])
    assert (held.clock, held.steps, held.refused, made[2].clock) == (2, 4, 0, 2)
    assert held.applied == [1, 1, 0]
    assert made[2].held.leases[0] == Lease(4, 2), "its steps, and nobody has done them"
    made[0].leave(), made[1].leave()
    numbers = []
    while made[2].held.leases:
        numbers.append(made[2].held.number)
        made[2].step(-np.ones(1))
    assert numbers == [4, 5, 6, 7]
    assert (held.steps, held.leases.committed) == (8, 8)
    close(local.c, [4.0])


def test_a_cap_of_nothing_ends_all_the_same(tmp_path):
    result = simulate.run(config(tmp_path / "run", 5, staleness_cap=0), Timing(**UNEVEN))()
    assert result["steps"] == 8 * 15
    assert result["samples"] == 8 * 240
    assert result["dropped"] > 10
    assert result["staleness"]["max"] == 0


@pytest.mark.parametrize("name", ["add", *OPTIMIZERS])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_what_is_done_moves_no_more(name, weight):
    """Workers read c up to there, while the rest is still to come."""
    rng, seen = np.random.default_rng(0), []
    c, delta = rng.normal(size=(2, 5 * (1 << 17) + 3))
    optimizer = None if name == "add" else OPTIMIZERS[name](0.1, clip=1.0)
    state = optimizer.init(c) if optimizer else None
    for _ in range(3):
        seen.clear()
        state = rules.center_step(
            c, delta, weight, optimizer, state, on_block=lambda stop: seen.append((stop, c[:stop].copy()))
        )
        stops = [stop for stop, _ in seen]
        assert stops == sorted(set(stops))
        assert len(stops) > 1
        assert stops[-1] == c.size
        assert all((c[:stop] == before).all() for stop, before in seen)


def test_speed_proportional_periods():
    now = 0.0
    pace = SpeedProportional(10, lambda: now)
    assert [pace(w, 0) for w in range(3)] == [10, 10, 10]
    now = 1.0
    assert pace(0, 10) == 10
    now = 2.0
    assert pace(1, 10) == 5
    now = 100.0
    assert pace(2, 10) == 1
    pace.forget(0)  # it is lost: the next fastest has λ
    assert pace(1, 0) == 10
    book = Leases(total=20, period=10, pace=lambda worker, steps: 10 if worker == 0 else 4)
    assert [book.grant(0), book.grant(1)] == [Lease(0, 10), Lease(10, 4)]
    book.commit(0, Lease(0, 3)), book.release_all(0)
    assert [book.grant(1), book.grant(1), book.grant(0)] == [Lease(3, 4), Lease(7, 3), Lease(14, 6)]


def test_by_default_one_worker_trains_as_one_process_does(tmp_path):
    """Whatever λ is; as published it moves the center by a λth of what it has done."""
    ends = [
        simulate.run(config(tmp_path / name, 1, period=period, outer_rate=r), Timing())()["metrics"]["distance"]
        for name, period, r in (("one", 1, "published"), ("default", 10, None), ("published", 10, "published"))
    ]
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    assert ends[2] > 2 * ends[0]


def test_equal_speeds_are_agn_with_one_lambda(tmp_path):
    for name, dylu in (("plain", False), ("dylu", True)):
        simulate.run(config(tmp_path / name, 4, dylu=dylu), Timing())()
    assert center(tmp_path / "plain") == center(tmp_path / "dylu")


def test_a_slow_worker_takes_shorter_periods(tmp_path):
    result = {}
    for dylu in (False, True):
        given = config(tmp_path / str(dylu), 3, dylu=dylu, period=8, record=True, epochs=16)
        result[dylu] = simulate.run(given, Timing(speed_factors="1,1,4"))()
    lines = (tmp_path / "True/order.jsonl").read_text().splitlines()
    names = json.loads(lines[0])["fields"]
    served = [dict(zip(names, json.loads(line))) for line in lines[1:]]
    steps = [[e["steps"] for e in served if e["kind"] == "commit" and e["worker"] == w][1:-1] for w in (0, 1, 2)]
    assert set(steps[0] + steps[1]) == {8}
    assert set(steps[2]) == {2}
    assert result[True]["staleness"]["max"] < result[False]["staleness"]["max"]


OPTIONS = {
    "outer rate": {"outer_rate": 1.0},
    "staleness": {"staleness_power": 0.5, "staleness_cap": 6},
    "nesterov": {"center_optimizer": "nesterov", "center_rate": 1.0, "center_options": {"beta": 0.3}, "centers": 2},
    "dylu": {"dylu": True, "staleness_cap": 6},
    "all": {
        "outer_rate": 1.5, "staleness_power": 1.0, "staleness_cap": 8, "dylu": True,
        "center_optimizer": "momentum", "center_rate": 1.0, "center_options": {"beta": 0.3},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_simulation_repeats_and_replays_bit_for_bit(tmp_path, name):
    options, bits = OPTIONS[name], []
    for run in ("a", "b"):
        given = config(tmp_path / run, 5, record="centers" not in options, **options)
        result = simulate.run(given, Timing(**UNEVEN))()
        bits.append(center(tmp_path / run))
        assert result["samples"] == 8 * 240, "each sample of an epoch is used once"
        assert result["metrics"]["distance"] < 0.5, "0.765 before the first step"
        assert (result["dropped"] > 0) == ("staleness_cap" in options)
    assert bits[0] == bits[1]
    simulate.run(config(tmp_path / "plain", 5, outer_rate="published"), Timing(**UNEVEN))()
    assert center(tmp_path / "plain") != bits[0]
    if "centers" not in options:
        again = replay(tmp_path / "a", config(tmp_path / "again", 5, **options))()
        assert again["same_bits"] is True
        assert again["dropped"] == result["dropped"]


def test_advice_goes_by_the_effective_outer_rate():
    weighted = rules.weighted(rules.agn(), rules.outer_rate(1.0))
    assert any("WARNING" in line for line in advice(rules.agn(), 40, 10))
    lines = advice(weighted, 40, 10)
    assert "effective outer rate 1" in lines[1]
    assert len(lines) == 2
    assert not any("note" in line for line in advice(weighted, 4, 10))
    lines = advice(rules.weighted(rules.agn(), rules.outer_rate(1.0), rules.staleness_cap(1)), 4, 10)
    assert lines[1].startswith("WARNING: with 4 workers a commit is 3 others late, and the rule drops it")
    assert len(advice(rules.agn("gradient"), 3, 10)) == len(advice(rules.agn(), 30, 10, adds=False)) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"outer_rate": 0.0}, "outer_rate must be positive"),
        ({"outer_rate": 1.0, "rule": "downpour"}, "is of rule agn, not of downpour"),
        ({"staleness_power": -1.0}, "staleness_power must be at least 0"),
        ({"staleness_cap": 3, "rule": "aeasgd"}, "takes no further weights"),
        ({"center_optimizer": "momentum", "center_options": {"gamma": 0}}, "gamma"),
    ],
)
def test_what_is_refused(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        config(tmp_path, 3, **options).complete()
