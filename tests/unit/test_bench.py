"""What `agnmpi bench` computes from what it measures, by a clock that only the work itself moves."""

import numpy as np
import pytest
from mpi4py import MPI

from agnmpi.arrays.encodings import NAMES
from agnmpi.bench.periods import NoWire, hidden, period_times
from agnmpi.bench.problem import about_spoilt, fitting, step_times, usable_encodings
from agnmpi.bench.recommendation import (
    MOST,
    Choice,
    Costs,
    Measured,
    Trial,
    bandwidth_needed,
    choose,
    conclude,
    confirm,
    options,
    recommend,
)
from agnmpi.bench.utilisation import Case, cases, row
from agnmpi.bench.written import json_file
from agnmpi.cli.arguments import ArgumentsRefused, parse
from agnmpi.core import rules
from agnmpi.core.optimizers import Optimizer, sgd
from agnmpi.core.worker import Worker
from agnmpi.training.config import Config


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def gradient(self, *each):
        """Of a step: it takes so many seconds, in turn."""
        return lambda step: (setattr(self, "seconds", self.seconds + each[step % len(each)]), (0.0, np.ones(2)))[1]


def worker_alone(period, optimizer=None, start=3.0):
    return Worker(np.zeros(2), rules.agn(), optimizer or sgd(0.5), NoWire(np.full(2, start), period), 0)


def test_periods_are_timed_from_exchange_to_exchange():
    clock = Clock()
    times = period_times(worker_alone(3), clock.gradient(1.0, 2.0, 4.0, 10.0, 20.0, 40.0), 3, 5, clock)
    assert times == [7.0, 70.0, 7.0, 70.0, 7.0]


def test_without_a_wire_each_period_begins_from_the_same_center():
    worker, seen = worker_alone(2), []

    def gradient(step):
        seen.append((step, worker.x[0]))
        return 0.0, np.ones(2)

    period_times(worker, gradient, 2, 2)
    assert seen == [(0, 3.0), (1, 2.5), (2, 3.0), (3, 2.5)]


def test_gradient_and_optimizer_are_timed_apart():
    clock = Clock()
    inner = sgd(0.5)

    def update(*args, **kwargs):
        clock.seconds += 0.25
        return inner.update(*args, **kwargs)

    worker = worker_alone(4, Optimizer("slow", inner.init, update))
    assert step_times(worker, clock.gradient(100.0, 100.0, 1.0, 2.0, 9.0), 1.0, clock) == (2.0, 0.25, 0.0, 0.0)


@pytest.mark.parametrize(
    ("loss", "g", "share", "refused"),
    [(0.5, 1.0, 0, 0), (np.nan, 1.0, 1, 0), (np.inf, 1.0, 1, 0), (0.5, np.nan, 1, 1), (0.5, -np.inf, 1, 1)],
)
def test_a_problem_that_does_not_train_is_told(loss, g, share, refused):
    clock = Clock()
    gradient = clock.gradient(1.0)
    times = step_times(worker_alone(4), lambda step: (gradient(step) and loss, np.full(2, g)), 2.0, clock)
    assert (times.spoilt, times.refused) == (share, refused)
    said = about_spoilt(times.spoilt)
    assert len(said) == (share > 0)
    assert all("WARNING: 100.0 % of the steps gave NaN or infinity" in line for line in said)


def test_each_row_comes_after_the_one_that_it_is_compared_with():
    rows = cases(["p2p", "accumulate"], ["float32", "int4"])
    p2p = [Case("p2p", overlap, encoding) for encoding in ("float32", "int4") for overlap in (False, True)]
    assert rows == [*p2p, Case("accumulate", False), Case("accumulate", True)]
    more = cases(["p2p", "allreduce"], no_wait=True)
    assert more == [*p2p[:2], p2p[1]._replace(wait=False), Case("allreduce", False), Case("allreduce", True)]
    assert more[2].without_overlap() == more[0]
    assert [case.setup("staged").wait for case in more] == [True, True, False, True, True]
    for case in rows:
        assert rows.index(case.without_overlap()) == rows.index(case) - case.overlap
        setup = case.setup("staged")
        assert (setup.transport.name, setup.transport.wire, setup.overlap) == (case.transport, "staged", case.overlap)
        assert (setup.transport.encoding, setup.transport.pull_encoding) == (case.encoding, case.encoding)
        assert not setup.caller_uses_mpi, "as in train: else overlap has no thread"


def test_a_row():
    """Workers that compute for 8 s in periods of 10 and 16 s: exchanges of 2 and 8 s, of which overlap hides 3/4."""
    plain = row(Case("p2p", False), [8.0, 8.0], [10.0, 16.0], [10.0, 16.0])
    assert (plain["workers"], plain["hidden"]) == (2, None)
    assert [plain[f"{name}_seconds"] for name in ("period", "compute", "exchange")] == [13.0, 8.0, 5.0]
    assert (plain["utilisation"], plain["lowest_utilisation"]) == (0.65, 0.5)
    overlapped = row(Case("p2p", True), [8.0, 8.0], [8.5, 10.0], [10.0, 16.0])
    assert overlapped["hidden"] == pytest.approx(0.75)
    assert overlapped["overlap"]
    assert row(Case("p2p", True), [8.0, 8.0], [8.5, 10.0], [10.0, 16.0], noise=0.7)["hidden"] is None, "5 s are 5/8"


def test_what_overlap_costs_is_seen():
    assert hidden(8.0, 10.0, 11.0) == -0.5


# Costs: one worker's exchange takes 1 s; a center that does nothing but serve is busy for `busy` of them with each.


def costs_of(workers, busy, **others):
    return Costs("p2p", workers, False, 1.0, max(1.0, workers * busy), **others)


@pytest.mark.parametrize("workers", [1, 2, 7, 1000])
def test_exchanges_queue_at_a_busy_center(workers):
    costs = costs_of(workers, 1.0)
    assert costs.exchange(0.0) == pytest.approx(workers), "all wait in the queue"
    assert costs.exchange(1e6) == pytest.approx(1.0, rel=0.01), "they hardly meet"
    times = [costs.exchange(compute) for compute in (0.0, 1.0, 10.0, 100.0, 1e6)]
    assert times == sorted(times, reverse=True)


def test_a_queue_of_two():
    """Z = 1 s apart, s = 1 s: alone the second finds a queue of R/(Z + R) = 1/2."""
    assert costs_of(2, 1.0).exchange(1.0) == pytest.approx(1.5)


def test_several_centers_share_the_queue_but_not_the_way():
    costs = costs_of(8, 1.0)
    assert costs.exchange(0.0, centers=8) < costs.exchange(0.0, centers=2) < costs.exchange(0.0)
    assert costs.exchange(1e6, centers=8) == pytest.approx(1.0, rel=0.01)


def test_all_together_wait_for_the_same():
    assert Costs("allreduce", 9, True, 2.0, 2.0).exchange(123.0) == 2.0


@pytest.mark.parametrize("step", [0.001, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("workers", [1, 5])
def test_the_smallest_period_is_the_first_that_waits_less_than_5_percent(workers, overlap, step):
    costs = costs_of(workers, 0.7, hidden=0.6)
    period = costs.smallest_period(step, overlap)
    assert costs.waiting(period * step, overlap) < MOST
    assert period == 1 or costs.waiting((period - 1) * step, overlap) >= MOST


def test_overlap_hides_no_more_than_is_computed():
    costs = costs_of(1, 1.0, hidden=1.0)
    assert costs.waiting(0.25, overlap=True) == pytest.approx(0.75), "0.75 s of each second are waited for"
    assert costs.waiting(1.0, overlap=True) == 0.0
    assert costs_of(1, 1.0, hidden=-0.5).waiting(1.0, overlap=True) == 0.5, "a negative share is noise"


def measured(*costs, step=1.0, period=10, hosts=1, centers=1):
    return Measured(step, 1_000_000, 4, period, hosts, centers, costs)


P2P, RMA = costs_of(1, 1.0), costs_of(1, 1.0)._replace(transport="rma")
FAST = {"alone": 0.1, "all_at_once": 0.1}


@pytest.mark.parametrize(
    ("facts", "chosen"),
    [
        (measured(P2P), "--period 20"),
        (measured(P2P, period=40), "--period 40"),
        (measured(P2P._replace(hidden=0.05)), "--period 20"),
        (measured(P2P._replace(hidden=0.8)), "--period 10 --overlap"),
        (measured(P2P._replace(hidden=0.8), period=2), "--period 4 --overlap"),
        (measured(P2P._replace(hidden=0.8), period=40), "--period 40"),
        (measured(P2P, RMA), "--period 20"),
        (measured(P2P, RMA._replace(**FAST)), "--period 10 --transport rma"),
        (measured(P2P, RMA._replace(**FAST, transport="accumulate", whole=False)), "--period 20"),
        (measured(RMA._replace(transport="accumulate", whole=False)), "--period 20"),
    ],
)
def test_what_is_chosen(facts, chosen):
    assert options(facts, choose(facts)) == chosen
    parse(["train", "module:Problem", *chosen.split()])


def words(facts, encodings=()):
    lines = recommend(facts, choose(facts), rules.agn(), encodings)
    assert all(": " in line for line in lines)
    return {line.partition(":")[0].split()[0]: line for line in reversed(lines)}


def test_the_advice_has_the_numbers():
    facts = measured(P2P, RMA._replace(**FAST, transport="accumulate", whole=False))
    said = words(facts)
    assert "from λ = 20 on" in said["Period"]
    assert "λ = 10, as given, 9.1 %; a larger --batch" in said["Period"]
    assert words(measured(P2P, period=40))["Period"].endswith("λ = 40, as given, 2.4 %"), "enough"
    assert "no need" in said["Overlap"]
    assert "n/λ = 1/20" in said["Rule"]
    assert any("accumulate would do with λ = 2" in line for line in recommend(facts, choose(facts), rules.agn()))
    assert "Encoding" not in said


@pytest.mark.parametrize(
    ("hidden_share", "said"),
    [(None, "no need"), (0.02, "does not help here: it hides 2.0 %"), (0.9, "helps: it hides 90.0 % of an exchange")],
)
def test_the_advice_on_overlap(hidden_share, said):
    assert said in words(measured(P2P._replace(hidden=hidden_share)))["Overlap"]


@pytest.mark.parametrize(
    ("costs", "hosts", "centers", "said"),
    [
        (costs_of(8, 1.0), 1, 1, "1, since all ranks are on one host"),
        (costs_of(8, 1.0), 4, 1, "one on each host, 4"),
        (costs_of(2, 0.1), 4, 1, "1; 4, one on each host, would hardly"),
        (costs_of(8, 1.0), 4, 2, "measured with 2"),
        (Costs("allreduce", 4, True, 1.0, 1.0), 4, 1, "none"),
    ],
)
def test_the_advice_on_centers(costs, hosts, centers, said):
    assert said in words(measured(costs, hosts=hosts, centers=centers))["Centers"]


@pytest.mark.parametrize(
    ("period", "enough"),
    [(40, "float32 is enough"), (10, "bf16 is enough"), (5, "int8 is enough"), (3, "int4 is enough"), (1, "even int4")],
)
def test_the_advice_on_encodings(period, enough):
    """An exchange of 8 MB takes 1 s; in periods of 10 s float32 needs 15.2 MB/s, and the others in proportion."""
    said = words(measured(P2P, period=period), NAMES)["Encoding"]
    assert enough in said
    assert "moves 8 MB/s here" in said
    if period == 10:
        assert "bf16 pays below 15.2 MB/s, int8 pays below 7.6 MB/s, int4 pays below 3.86 MB/s" in said


def small(numbers, number_bytes=4, period=10, costs=P2P):
    """A model whose exchange takes as long as that of one number."""
    costs = costs._replace(one_alone=costs.alone, one_all_at_once=costs.all_at_once)
    return measured(costs, period=period)._replace(numbers=numbers, number_bytes=number_bytes)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (small(1, 2), "float32 and a longer period: no other writes 1 number in fewer bytes"),
        (small(1, 2, period=40), "float32: no other writes 1 number in fewer bytes"),
        (small(6), "float32 and a longer period: of an exchange, 1,000 ms, one of a single number would take 1,000 ms"),
        (small(6, costs=P2P._replace(hidden=0.8)), "float32 and a longer period or --overlap: of an exchange"),
        (small(100_000_000, period=40), "float32: of an exchange, 1,000 ms"),
    ],
)
def test_no_encoding_helps_where_an_exchange_is_latency(facts, said):
    line = words(facts, NAMES)["Encoding"]
    assert said in line
    assert not any(text in line for text in ("int4", "int8", "bf16", "B/s", "is enough"))


def test_encodings_that_make_a_model_longer_are_left_out():
    """Of 40 numbers, 160 bytes, int8 writes 260, bf16 80 and int4 34."""
    line = words(measured(P2P)._replace(numbers=40), NAMES)["Encoding"]
    assert "int8" not in line
    assert "bf16 pays below" in line
    assert "int4 pays below" in line


def test_latency_is_no_bandwidth():
    """8 MB take 0.6 s of an exchange of 1 s: with λ = 15 they may take 0.389 s, of which 16-bit numbers need 0.3."""
    costs = P2P._replace(one_alone=0.4, one_all_at_once=0.4)
    line = words(measured(costs, period=15), NAMES)["Encoding"]
    assert "moves 13.3 MB/s here: bf16 is enough" in line
    assert "bf16 pays below 20.5 MB/s" in line
    assert "with λ = 7 none is enough: a longer period is needed" in words(measured(costs, period=7), NAMES)["Encoding"]


def test_latency_queues_as_exchanges_do():
    costs = costs_of(8, 1.0, one_alone=0.5, one_all_at_once=4.0)
    assert costs.latency(0.0) == pytest.approx(4.0)
    assert costs._replace(one_alone=9.0, one_all_at_once=99.0).latency(3.0) == costs.exchange(3.0), "no more than all"


def trials_of(*shares, unrest=0.0):
    left = list(shares)
    return confirm(Choice(P2P, True, 100), lambda choice: (left.pop(0), unrest))


def test_a_choice_that_its_trial_confirms():
    trials = trials_of(0.03)
    assert conclude(measured(P2P), trials) == [
        "So: --period 100 --overlap (tried: workers waited for 3.0 % of their time)"
    ]


def test_longer_periods_are_tried_until_workers_wait_little():
    trials = trials_of(0.2, 0.06, 0.03)
    assert [trial.choice.period for trial in trials] == [100, 600, 920]
    assert conclude(measured(P2P), trials) == [
        "So: --period 920 --overlap (tried: workers waited for 3.0 % of their time; with λ = 100 for 20.0 %; "
        "with λ = 600 for 6.0 %)"
    ]


@pytest.mark.parametrize(
    ("shares", "unrest", "period", "needed"),
    [
        ((0.2, 0.2, 0.2), 0.0, 3600, 21600),  # however long
        ((0.2,), 0.3, 100, 600),  # noise: a longer period may be longer than need be
        ((0.2, None), 0.0, 100, 600),  # too long to be tried
    ],
)
def test_what_no_trial_confirms_is_said_so(shares, unrest, period, needed):
    trials = trials_of(*shares, unrest=unrest)
    conclusion, warning = conclude(measured(P2P), trials)
    assert conclusion.startswith(f"So: --period {period} --overlap (tried: workers waited for 20.0 % of their time")
    assert "WARNING: the trial does not confirm it: 20.0 % is not less than 5 %" in warning
    assert f"By it λ = {needed} is needed" in warning


def test_what_takes_too_long_is_not_tried():
    assert conclude(measured(P2P, step=0.1), trials_of(None)) == [
        "So: --period 100 --overlap (not tried, since a period takes 10.0 s: give --seconds as many)"
    ]
    assert trials_of(None) == [Trial(Choice(P2P, True, 100), None)]


def test_less_bytes_need_less_bandwidth_in_proportion():
    assert bandwidth_needed(4000, 1.0) == 2 * bandwidth_needed(2000, 1.0) == 2 * bandwidth_needed(4000, 2.0)


@pytest.mark.parametrize(
    ("given", "fit", "refused"),
    [
        ({}, ["p2p", "rma", "accumulate"], ["allreduce"]),
        ({"rule": "dynsgd"}, ["p2p", "rma"], ["accumulate", "allreduce"]),
        ({"rule": "diloco"}, ["allreduce"], ["rma", "p2p", "accumulate"]),
        ({"center_device": "gpu"}, ["p2p"], ["rma", "accumulate", "allreduce"]),
    ],
    ids=str,
)
def test_transports_that_fit_a_problem(given, fit, refused):
    config = Config(problem="module:Problem", **given)
    configs, refusals = fitting(config, ["rma", "p2p", "accumulate", "allreduce"], 3)
    assert [other.transport for other in configs] == fit, "that of auto first"
    assert sorted(text.split(": ")[1] for text in refusals) == sorted(refused)


@pytest.mark.parametrize(
    ("given", "usable"),
    [
        ({}, list(NAMES)),
        ({"transport": "rma"}, list(NAMES)),
        ({"transport": "accumulate"}, []),
        ({"rule": "aeasgd"}, []),
        ({"encoding": "int8"}, []),
        ({"pull_encoding": "bf16"}, []),
    ],
    ids=str,
)
def test_encodings_that_a_problem_can_use(given, usable):
    assert usable_encodings(Config(problem="module:Problem", **given).complete(), 3) == usable


@pytest.mark.parametrize(
    ("argv", "command", "values"),
    [
        (["bench", "--sizes", "7"], "bench", {"sizes": [7], "workers": []}),
        (["bench", "utilisation", "--step", "0.5"], "bench utilisation", {"step": 0.5, "period": 10}),
        (["bench", "a.py:B", "--batch", "8"], "bench problem", {"problem": "a.py:B", "batch": 8, "seconds": 1.0}),
        (["bench", "problem", "--config", "c.toml"], "bench problem", {"config": "c.toml", "sets": []}),
    ],
)
def test_the_three_benches_on_the_command_line(argv, command, values):
    args = parse(argv)
    assert args.command == command
    assert {name: getattr(args, name) for name in values} == values


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["bench", "a.py:B", "--workers", "7"], "--workers is an option of train, sweep, simulate, bench\n"),
        (["bench", "a.py:B", "--workres", "7"], "--workers is an option of train, sweep, simulate, bench\n"),
        (["bench", "a.py:B", "--xyz", "7"], "unrecognized arguments: --xyz 7\n"),
        (["bench", "a.py:B", "--perod=7"], "did you mean --period?\n"),
        (["bench", "utilisation", "--perods", "7"], "did you mean --periods?\n"),
        (["bench", "--rouns", "7"], "did you mean --rounds?\n"),
        (["simulate", "a.py:B", "--workres", "7"], "did you mean --workers?\n"),
        (["train", "a.py:B", "--grid", "7", "--perod", "3"], "--grid is an option of sweep; did you mean --period?\n"),
        (["train", "a.py:B", "--injekt-faults"], "unrecognized arguments: --injekt-faults\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_of_the_command_that_was_called_are_offered(argv, said):
    with pytest.raises(ArgumentsRefused) as refused:
        parse(argv)
    assert str(refused.value).endswith(said)


def test_a_full_disk_is_named():
    write = json_file(MPI.COMM_SELF, "/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write("{}")
