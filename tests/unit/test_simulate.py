"""Virtual time: repeatable, equal to the plain loop where it costs nothing, to closed forms, and to recorded runs."""

import numpy as np
import pytest
from in_process import UNEVEN, center, config, world
from launcher import QUADRATIC, events_of, result_of
from problems import Quadratic

from agnmpi.cli.main import main
from agnmpi.core import rules
from agnmpi.core.batches import Plan
from agnmpi.core.center import Center
from agnmpi.core.drive import drive, train
from agnmpi.core.messages import Commit
from agnmpi.core.params import Layout
from agnmpi.recovery.files import load
from agnmpi.reporting import record
from agnmpi.simulation import simulate
from agnmpi.simulation.network import Agenda, Station, VirtualWorker
from agnmpi.simulation.replay import replay
from agnmpi.simulation.timing import Timing, timing_only
from agnmpi.training.problem import gradient_of
from agnmpi.transport.local import LocalCenter

FREE = {"latency": 0.0, "bandwidth": 0.0, "service": 0.0, "service_bandwidth": 0.0}


@pytest.mark.parametrize(
    ("options", "timing"),
    [
        ({}, {}),
        ({"rule": "dynsgd", "centers": 3}, {}),
        ({"variant": "gradient"}, {"step_distribution": "exponential"}),
        ({"rule": "aeasgd", "centers": 2}, {"ties": "random"}),
        ({"overlap": True}, {}),
    ],
    ids=str,
)
def test_a_simulation_repeats_bit_for_bit(tmp_path, options, timing):
    results = []
    for name in ("a", "b"):
        given = config(tmp_path / name, 5, **options)
        results.append(simulate.run(given, Timing(**UNEVEN | timing))())
    a, b = results
    assert center(tmp_path / "a") == center(tmp_path / "b")
    for key in ("virtual", "staleness", "metrics", "loss", "commits"):
        assert a[key] == b[key]
    assert a["samples"] == 8 * 240, "each sample of an epoch is used once"
    assert a["metrics"]["distance"] < 0.5, "0.765 before the first step"
    assert 0 < a["virtual"]["utilisation"]["workers"] <= 1
    assert 0 < a["virtual"]["utilisation"]["center"] <= 1
    assert sum(a["staleness"]["histogram"]["counts"]) == a["commits"]
    assert a["staleness"]["max"] > 0
    seen = events_of(tmp_path / "a")
    at = [e["virtual_seconds"] for e in seen if e["event"] == "evaluation"]
    assert len(at) == 1 + 8, "of the initial parameters, and one an epoch"
    assert at == sorted(at)
    assert at[-1] == a["virtual"]["seconds"]
    # Another draw of the times is another run.
    other = simulate.run(config(tmp_path / "c", 5, **options), Timing(**UNEVEN | timing | {"time_seed": 1}))()
    assert other["virtual"] != a["virtual"]
    assert center(tmp_path / "c") != center(tmp_path / "a")


def round_robin(given):
    """The same workers on transport.local, a step of each in turn."""
    given = given.complete()
    problem = Quadratic()
    plan = Plan(problem.samples, given.batch, given.epochs, seed=given.seed)
    initial = problem.init(np.random.default_rng(given.seed))
    layout = Layout.of(initial)
    c = layout.pack(initial)
    held, local, workers = world(
        given.make_rule(), given.make_optimizer(plan.steps), c, given.workers, given.period, total=plan.steps,
        center_optimizer=given.make_center_optimizer(plan.steps), begin=False, dtype=c.dtype,
    )  # fmt: skip
    drive([train(worker, gradient_of(problem, layout, plan, worker.x)) for worker in workers])
    return layout.views(local.c), held


@pytest.mark.parametrize("options", [{}, {"rule": "aeasgd"}, {"variant": "gradient", "rule": "agn"}], ids=str)
def test_equal_steps_and_no_costs_are_a_round_robin(tmp_path, options):
    given = config(tmp_path / "run", 4, **options)
    result = simulate.run(given, Timing(**FREE))()
    expected, held = round_robin(given)
    found, _ = load(tmp_path / "run/center.safetensors")
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x)
    assert result["clock"] == held.clock
    assert result["staleness"]["mean"] == round(held.staleness_mean, 10)
    assert result["virtual"]["queue"] == {"mean": 0, "max": 0}
    assert result["virtual"]["seconds"] == pytest.approx(0.01 * 120 / 4)


@pytest.mark.parametrize("rule", ["agn", "aeasgd"])
@pytest.mark.parametrize("centers", [1, 2])
def test_the_cost_of_an_exchange(tmp_path, rule, centers):
    """One worker never queues: its time is a sum; rules that pull before send two messages."""
    costs = {"latency": 0.25, "bandwidth": 1024.0, "service": 0.5, "service_bandwidth": 512.0}
    timing = Timing(step_time=1.0, **costs)
    given = config(tmp_path / "run", 1, rule=rule, period=5, steps=20, centers=centers)
    result = simulate.run(given, timing)()
    part = 6 * 4 / centers  # bytes
    way, serve = 0.25 + part / 1024, 0.5 + part / 512
    pull = 0.25 + serve + way  # a request there, a center variable back
    exchange = way + (0.5 + 2 * part / 512) + way if rule == "agn" else pull + (way + serve + 0.25)
    assert result["virtual"]["seconds"] == pytest.approx(pull + 20 + 4 * exchange + pull)  # begin, work, farewell
    assert result["virtual"]["wait_mean"] == 0
    assert result["virtual"]["utilisation"]["workers"] == pytest.approx(20 / result["virtual"]["seconds"])


def test_a_pull_is_of_the_moment_of_its_service():
    """Each commit adds 1: what a worker pulls is the clock of its reply in every element of a shard."""
    n, size, timing = 5, 6, Timing(latency=0.3, service=0.2, bandwidth=100.0)
    agenda, c = Agenda(), np.zeros(size)
    parts = [slice(0, 2), slice(2, 6)]
    centers = [Center(rules.agn(), c[part], n) for part in parts]
    stations = [
        Station(agenda, LocalCenter(c[part], n, held.apply), timing) for part, held in zip(parts, centers)
    ]  # fmt: skip
    ends = [VirtualWorker(i, stations, parts) for i in range(n)]
    pulled = []

    def go(i, k):
        out = np.full(size, np.nan)
        handle = ends[i].exchange(Commit(i, k, payload=np.ones(size)), out)
        assert not handle.test()
        with pytest.raises(RuntimeError, match="nothing can block"):
            handle.wait()

        def then():
            clocks = [piece.reply.clock for piece in handle.pieces]
            np.testing.assert_array_equal(out, np.repeat(clocks, [2, 4]))
            assert handle.wait().clock == clocks[0]
            pulled.append((i, clocks[0]))
            if k < 4:
                go(i, k + 1)

        handle.then = then

    for i in range(n):
        agenda.at(0.1 * i, i, lambda i=i: go(i, 1))
    agenda.run()
    assert len(pulled) == 4 * n
    assert sorted(clock for _, clock in pulled) == list(range(1, 4 * n + 1))
    np.testing.assert_array_equal(c, 4 * n)


@pytest.mark.parametrize("costs", [FREE, {}], ids=["free", "costly"])
def test_no_message_overtakes_another(costs):
    """A last commit and the farewell behind it leave together; the farewell is shorter, and ties are drawn."""
    for seed in range(8):
        timing, kinds = Timing(ties="random", time_seed=seed, **costs), []
        agenda = Agenda(timing.tie())
        held = Center(rules.agn(), np.zeros(1000), 1)

        def apply(commit, c, held=held, kinds=kinds):
            reply = held.apply(commit, c)
            kinds.append(record.Served.of(commit, reply).kind)
            return reply

        station = Station(agenda, LocalCenter(np.zeros(1000), 1, apply), timing)
        end, out = VirtualWorker(0, [station], [slice(0, 1000)]), np.full(1000, np.nan)
        handle = end.leave(Commit(0, 1, payload=np.ones(1000)), out)
        agenda.run()
        assert handle.test()
        assert kinds == ["commit", "leave"]
        np.testing.assert_array_equal(out, 1)


@pytest.mark.parametrize("rule", ["agn", "aeasgd"])
@pytest.mark.parametrize("centers", [1, 2])
def test_timing_only_says_what_the_simulation_says(tmp_path, rule, centers):
    """Two programs, one model: the same rates, waits and staleness once the start is over."""
    timing = Timing(
        speed_factors="1,1.3,0.9,2", start_jitter=0.1, service=0.004, latency=0.002, bandwidth=1e4, exchanges=1000,
        service_bandwidth=1e4,
    )  # fmt: skip
    given = config(tmp_path / "run", 8, rule=rule, centers=centers, period=2, steps=2000, evaluate_every=0)
    whole = simulate.run(given, timing)()
    quick = simulate.network(given, timing)
    for path in (
        ("virtual", "commits_per_second"),
        ("virtual", "utilisation", "workers"),
        ("virtual", "utilisation", "center"),
        ("virtual", "wait_mean"),
        ("virtual", "queue", "mean"),
        ("staleness", "mean"),
    ):
        a, b = whole, quick
        for key in path:
            a, b = a[key], b[key]
        assert a == pytest.approx(b, rel=0.03), path  # at its end workers wait for the last commit
    assert 0 < quick["virtual"]["queue"]["max"] <= whole["virtual"]["queue"]["max"]  # the start is left out


@pytest.mark.parametrize("load", [0.2, 0.5])
def test_many_workers_with_exponential_steps_are_an_m_d_1_queue(load):
    """Mean wait Dρ/(2(1 − ρ)), utilisation ρ (Pollaczek, Khinchine), staleness n − 1."""
    n, service = 4000, 0.01
    timing = Timing(
        step_distribution="exponential", step_spread=1.0, step_time=n * service / load, exchanges=250_000,
        **FREE | {"service": service},
    )  # fmt: skip
    found = timing_only(timing, n, 1, 4)
    rho = found["virtual"]["commits_per_second"] * service
    assert rho == pytest.approx(load, rel=0.02)
    assert found["virtual"]["utilisation"]["center"] == pytest.approx(rho, rel=1e-6)
    assert found["virtual"]["wait_mean"] == pytest.approx(service * rho / (2 * (1 - rho)), rel=0.04)
    assert found["virtual"]["queue"]["mean"] == pytest.approx(rho**2 / (2 * (1 - rho)), rel=0.04)
    assert found["staleness"]["mean"] == pytest.approx(n - 1, rel=0.02)


@pytest.mark.parametrize("distribution", ["constant", "normal", "exponential"])
def test_a_saturated_server(distribution):
    """Throughput 1/D, staleness n − 1; k shards serve k times as many."""
    timing = {"step_time": 1e-3, "step_distribution": distribution, "exchanges": 20_000, "latency": 1e-3}
    found = timing_only(Timing(service=0.0, service_bandwidth=1e6, **timing), 200, 10, 500_000)
    assert found["virtual"]["commits_per_second"] == pytest.approx(1.0)
    assert found["virtual"]["utilisation"]["center"] == pytest.approx(1.0)
    assert found["staleness"]["mean"] == pytest.approx(199, rel=0.001)
    assert found["virtual"]["queue"]["mean"] == pytest.approx(199, rel=0.01)
    four = timing_only(Timing(service=0.0, service_bandwidth=1e6, **timing), 200, 10, 500_000, centers=4)
    assert four["virtual"]["commits_per_second"] == pytest.approx(4.0)
    # With an overlap the steps hide behind the exchanges, and the other way round.
    alone = Timing(service=0.5, service_bandwidth=0.0, bandwidth=0.0, latency=0.0, step_time=0.2, exchanges=1000)
    for overlap, cycle in ((False, 2.5), (True, 2.0)):
        one = timing_only(alone, 1, 10, 4, overlap=overlap)
        assert one["virtual"]["commits_per_second"] == pytest.approx(1 / cycle, rel=0.01)


def test_the_distributions_of_times():
    n = 20_000
    timing = Timing(speed_spread=0.3, stragglers=0.1, straggler_factor=10.0, start_jitter=2.0)
    factors = timing.factors(n)
    slow = np.sort(factors)[-n // 10 :]
    assert np.sort(factors)[: -n // 10].mean() == pytest.approx(1, rel=0.02)
    assert slow.mean() == pytest.approx(10, rel=0.03)
    starts = timing.starts(n)
    assert starts.min() >= 0
    assert starts.max() < 2
    assert starts.mean() == pytest.approx(1, rel=0.03)
    for name, spread in (("constant", 0.0), ("normal", 0.3), ("exponential", 0.7)):
        for k in (1, 8):
            noise = Timing(step_distribution=name, step_spread=spread).noise(k)
            drawn = np.array([next(noise) for _ in range(n)])
            assert drawn.mean() == pytest.approx(k, rel=0.02)
            assert drawn.std() == pytest.approx(spread * k**0.5, rel=0.03, abs=1e-12)
    np.testing.assert_array_equal(Timing(speed_factors="1,2.5").factors(5), [1, 2.5, 1, 2.5, 1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stragglers": 1.5}, "fraction of the workers.*1.5"),
        ({"step_distribution": "exponential", "step_spread": 2.0}, "at most 1, not 2.0"),
        ({"speed_factors": "1,zero"}, "speed_factors .* '1,zero'"),
        ({"speed_factors": "1,-2"}, "speed_factors .* '1,-2'"),
        ({"latency": -1.0}, "latency must be at least 0"),
        ({"ties": "coin"}, "ties must be one of worker, random"),
    ],
    ids=str,
)
def test_bad_times_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Timing(**options)


def test_what_cannot_be_simulated_is_refused(tmp_path):
    for options, timing, text in (
        ({"rule": "diloco", "dylu": True}, {}, "rule diloco has no center: leave out dylu"),
        ({"rule": "synchronous", "encoding": "int8"}, {}, "rule synchronous are not simulated"),
        ({"rule": "aeasgd", "encoding": "int8"}, {}, "rule aeasgd takes from x what it adds to c, so both"),
        ({"centers": 7}, {}, "7 centers for a model of 6 numbers: each needs at least one$"),
        ({"centers": 2, "encoding": "int4"}, {}, "2 centers for a model of 6 numbers: .* one block of 64 encoded"),
    ):
        with pytest.raises(ValueError, match=text):
            simulate.run(config(tmp_path / "run", 2, **options), Timing(**timing))
    with pytest.raises(ValueError, match="elastic rule with overlap"):
        simulate.network(config(tmp_path / "run", 2, rule="aeasgd", overlap=True), Timing())
    with pytest.raises(ValueError, match="train it with --record"):
        replay(tmp_path, config(tmp_path / "run", 2))
    assert not (tmp_path / "run").exists()


def test_the_command_line(tmp_path, capsys):
    """A simulation's own file repeats it; --timing-only needs no problem; a record is replayed."""
    options = ["--epochs", "2", "--batch", "16", "--rate", "0.05", "--period", "2", "--step-distribution", "normal"]
    run = tmp_path / "run"
    assert main(["simulate", QUADRATIC, "--workers", "3", *options, "--record", "--run", str(run)]) == 0
    assert "n/λ = 3/2" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main(["simulate", "--config", str(run / "config.toml"), "--run", str(again)]) == 0
    assert center(again) == center(run)
    results = [result_of(path) for path in (run, again)]
    assert results[0]["virtual"] == results[1]["virtual"]
    assert main(["simulate", "--replay", str(run), "--run", str(tmp_path / "replay")]) == 0
    assert "the same bits as" in capsys.readouterr().out
    timing = ["simulate", "--timing-only", "--workers", "100", "--exchanges", "1000", "--run", str(tmp_path / "timing")]
    assert main(timing) == 0
    assert result_of(tmp_path / "timing")["exchanges"] == 800
    assert main(["simulate", "--workers", "3"]) == 2
    assert "which problem" in capsys.readouterr().err
    assert main(["simulate", QUADRATIC, "--run", str(run)]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_record_cut_short_by_a_crash_replays_to_where_it_ends(tmp_path):
    run = tmp_path / "run"
    simulate.run(config(run, 3, record=True), Timing(**UNEVEN))()
    facts, order = record.read(run)
    order = list(order)
    assert facts["workers"] == 3
    assert [entry.kind for entry in order[:3]] == ["ask"] * 3
    lines = (run / record.NAME).read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(order)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    (crashed / record.NAME).write_text("".join(lines[:20]) + lines[20][:7])
    result = replay(crashed, config(tmp_path / "a", 1))()
    assert result["clock"] == order[18].clock
    assert result["same_bits"] is None
    # A record that does not fit the run is refused at its line.
    lines[10], lines[11] = lines[11], lines[10]
    (crashed / record.NAME).write_text("".join(lines))
    with pytest.raises(RuntimeError, match=r"order.jsonl, line 11: the run had Served"):
        replay(crashed, config(tmp_path / "b", 1))()
