"""Goodput, of events whose times and steps are given."""

import pytest

from agnmpi.reporting.goodput import goodput


def run(*events):
    """The events of a run: (time, event, facts)."""
    return [{"time": time, "event": event, **facts} for time, event, facts in events]


def progress(first, last, step, each):
    """Each second from `first` to `last`, `each` steps more, beginning at `step`."""
    return [(t, "progress", {"step": step + each * (t - first)}) for t in range(first, last + 1)]


def start(time, workers):
    return (time, "start", {"workers": workers})


def test_an_undisturbed_run_has_none():
    assert goodput([]) is None
    assert goodput(run(start(0, 4), *progress(1, 60, 40, 40))) is None


def test_a_worker_that_is_replaced_at_once_costs_its_uncommitted_steps():
    lost = [(20, "lost", {"workers": 3}), (20, "joined", {"workers": 4})]
    events = run(start(0, 4), *progress(1, 20, 40, 40), *lost, *progress(21, 40, 800 + 40 - 12, 40))
    assert goodput(events) == pytest.approx((1600 - 12) / 1600)


def test_who_is_not_there_could_do_nothing():
    """Three of four workers do 3/4: the goodput is that of the dead one's lost steps alone."""
    events = run(start(0, 4), *progress(1, 20, 40, 40), (20, "lost", {"workers": 3}), *progress(21, 40, 830, 30))
    assert goodput(events) == pytest.approx(1)


def test_the_seconds_after_a_loss_are_no_yardstick():
    """A spare that needs 4 s to begin costs these, whatever the rate of the others is meanwhile."""
    lost = [(20, "lost", {"workers": 0}), (20, "joined", {"workers": 1})]
    events = run(start(0, 1), *progress(1, 20, 10, 10), *lost, *progress(21, 24, 200, 0), *progress(25, 40, 210, 10))
    assert goodput(events) == pytest.approx(36 / 40)


def test_a_lost_center_counts_while_another_comes_and_a_dead_job_does_not():
    before = run(start(0, 4), *progress(1, 20, 40, 40))
    follows = run(start(23, 4), (23, "resume", {"step": 760}), *progress(24, 43, 800, 40))
    failover = run((23, "failover", {"workers": 4}))
    assert goodput([*before, *follows[:2], *failover, *follows[2:]]) == pytest.approx(1560 / (4 * 10 * 43))
    lost = run((20.0, "lost", {"workers": 4}))  # for a yardstick alone
    assert goodput([*before, *lost, *follows]) == pytest.approx(1560 / (4 * 10 * 40))


def test_a_moment_is_no_yardstick():
    """Of a short run, with a loss at its start, the end alone is undisturbed: one second, and what came after it."""
    lost = [(0.1, "lost", {"workers": 1}), *progress(1, 6, 70, 72), (6.2, "progress", {"step": 436})]
    assert goodput(run(start(0, 3), *lost)) is None
    assert goodput(run(start(0, 3), *lost[:-1], *progress(7, 10, 502, 72))) is None
    later = [(11.2, "progress", {"step": 796}), (11.2, "end", {})]
    assert goodput(run(start(0, 3), *lost[:-1], *progress(7, 11, 502, 72), *later)) == pytest.approx(1, abs=0.05)


def test_the_end_is_no_yardstick():
    """The last seconds, in which one worker of four has steps left: as if all had been that slow."""
    lost = [(20, "lost", {"workers": 3}), (20, "joined", {"workers": 4})]
    whole = run(
        start(0, 4), *progress(1, 20, 40, 40), *lost, *progress(21, 40, 828, 40), (44, "progress", {"step": 1598})
    )
    assert goodput(whole) == pytest.approx(1598 / (4 * 10 * 44))
