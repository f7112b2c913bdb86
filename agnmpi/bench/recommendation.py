"""From measured times to advice: which transport, which period λ, whether to overlap, how many centers, which encoding.

Arithmetic and words alone; `problem` measures.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from ..arrays.encodings import get
from ..core.rules import Rule
from ..reporting.advice import advice
from .tables import milliseconds, percent, size

MOST = 0.05  # of a worker's time may be spent waiting
_SIMILAR = 1.2  # a period that is not shorter than by this factor is no reason to leave the default
_LONGEST = 1 << 30
_TRIES = 3
_MARGIN = 0.8  # of MOST: what a longer period aims at, so that noise does not undo it
_LATENCY = 0.5  # of an exchange: from then on fewer bytes shorten it too little, and noise looks like bytes


class Costs(NamedTuple):
    """What exchanges by a transport cost at this world, in seconds.

    Args:
        transport: its name.
        workers: n.
        together: whether all exchange at the same time.
        alone: an exchange of one worker, after a pause, while the others do nothing.
        all_at_once: an exchange of each worker, while all do nothing else.
        whole: whether the center applies whole commits, and refuses those that are not finite.
        hidden: share of an exchange that overlap hides, measured; None where there is nothing to hide.
        one_alone: as `alone`, of one number instead of the parameters, with each center.
        one_all_at_once: as `all_at_once`, likewise.
    """

    transport: str
    workers: int
    together: bool
    alone: float
    all_at_once: float
    whole: bool = True
    hidden: float | None = None
    one_alone: float = 0.0
    one_all_at_once: float = 0.0

    def exchange(self, compute: float, centers: int = 1) -> float:
        """Seconds of an exchange where each worker computes for `compute` seconds between two.

        The center is a queue: one that is busy for s seconds with each exchange serves n workers that do nothing else
        in n·s. With `centers` as many share the work; an exchange that meets no other takes as long as with one.

        Source: exact mean value analysis of a closed queueing network, Reiser and Lavenberg, J. ACM 27 (1980).
        """
        if self.together:
            return self.all_at_once
        service = self.all_at_once / self.workers / centers
        delay = max(self.alone - service, 0.0)
        queue = response = 0.0
        for workers in range(1, self.workers + 1):
            response = service * (1 + queue)
            queue = response * workers / (compute + delay + response)
        return delay + response

    def latency(self, compute: float) -> float:
        """What of these seconds an exchange of a single number takes as well."""
        one = self._replace(alone=self.one_alone, all_at_once=self.one_all_at_once)
        return min(one.exchange(compute), self.exchange(compute))

    def waiting(self, compute: float, overlap: bool = False, centers: int = 1) -> float:
        """The share of its time for which a worker waits, with `compute` seconds of computing in each period."""
        exchange = self.exchange(compute, centers)
        if overlap:
            # What overlap hides goes by while the worker computes: no more than that.
            exchange = max(exchange * (1 - min(max(self.hidden or 0.0, 0.0), 1.0)), exchange - compute)
        return exchange / (compute + exchange)

    def smallest_period(self, step: float, overlap: bool = False, centers: int = 1) -> int:
        """The smallest λ with which a worker waits for less than 5 % of its time; `step`: seconds of one."""
        return _first(lambda period: self.waiting(period * step, overlap, centers) < MOST)

    def overlap_helps(self, step: float) -> bool:
        """Whether it allows a clearly shorter period."""
        return self.smallest_period(step, overlap=True) * _SIMILAR < self.smallest_period(step)


def _first(holds: Callable[[int], bool]) -> int:
    """The first of 1, 2, … that `holds`, which then holds for all greater ones.

    >>> _first(lambda n: n * n > 50)
    8
    """
    high = 1
    while not holds(high) and high < _LONGEST:
        high *= 2
    low = high // 2  # does not hold
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def bandwidth_needed(nbytes: int, compute: float, latency: float = 0.0) -> float:
    """Bytes/s with which a worker waits for just 5 % of its time, if `nbytes` go each way in a period.

    >>> f"{bandwidth_needed(4_000_000, 0.19):.0f}", f"{bandwidth_needed(4_000_000, 0.19, 0.005):.0f}"
    ('800000000', '1600000000')
    """
    return 2 * nbytes / (_allowed(compute) - latency)


def _allowed(compute: float) -> float:
    """Seconds of waiting that are 5 % of a period."""
    return compute * MOST / (1 - MOST)


class Measured(NamedTuple):
    """What was measured of a problem.

    Args:
        step: seconds of a step: gradient and optimizer, the mean of the workers.
        numbers: of parameters.
        number_bytes: of each.
        period: λ, as given.
        hosts: number of them.
        centers: number of them.
        costs: of each transport; the first is what `auto` takes.
    """

    step: float
    numbers: int
    number_bytes: int
    period: int
    hosts: int
    centers: int
    costs: Sequence[Costs]

    @property
    def compute(self) -> float:
        """Seconds of the steps of a period."""
        return self.period * self.step


class Choice(NamedTuple):
    """What is recommended: a transport, whether to overlap, λ."""

    costs: Costs
    overlap: bool
    period: int


def choose(measured: Measured) -> Choice:
    """The transport of `auto`, unless another with whole commits is clearly better; overlap where the given λ needs it.

    λ is the one given, where that is long enough: a longer one makes AGN slower.
    """
    step, given, default = measured.step, measured.period, measured.costs[0]
    whole = [costs for costs in measured.costs if costs.whole] or measured.costs
    best = min(whole, key=lambda costs: costs.smallest_period(step))
    costs = best if default.smallest_period(step) > _SIMILAR * best.smallest_period(step) else default
    if costs.waiting(measured.compute) < MOST:
        return Choice(costs, False, given)
    if costs.overlap_helps(step):
        return Choice(costs, True, max(given, costs.smallest_period(step, overlap=True)))
    return Choice(costs, False, costs.smallest_period(step))


def options(measured: Measured, choice: Choice) -> str:
    """What to type for it."""
    transport = "" if choice.costs is measured.costs[0] else f" --transport {choice.costs.transport}"
    return f"--period {choice.period}" + " --overlap" * choice.overlap + transport


class Trial(NamedTuple):
    """A choice that was tried, and the share of their time for which workers waited; None: a period is too long."""

    choice: Choice
    waiting: float | None


def confirm(choice: Choice, attempt: Callable[[Choice], tuple[float | None, float]]) -> list[Trial]:
    """Try a choice, and longer periods while workers wait too much with it; the last trial is what to recommend.

    Args:
        choice: the first.
        attempt: returns for which share of their time workers waited, None where a period is too long to try, and by
            which share the same differs on this machine: where that is more, the trial says nothing.
    """
    trials = list[Trial]()
    for _ in range(_TRIES):
        waiting, unrest = attempt(choice)
        if waiting is None and trials:
            break
        trials.append(Trial(choice, waiting))
        if waiting is None or waiting < MOST or waiting <= unrest:
            break
        choice = choice._replace(period=_longer(choice.period, waiting))
    return trials


def _longer(period: int, waiting: float) -> int:
    """λ with which workers wait for less than 5 % of their time, if an exchange costs as much as with `period`.

    >>> _longer(100, 0.2)
    600
    """
    return ceil(period * waiting / (1 - waiting) * (1 - _MARGIN * MOST) / (_MARGIN * MOST) - 1e-9)


def conclude(measured: Measured, trials: Sequence[Trial]) -> list[str]:
    """What to type, and whether a trial confirms it."""
    choice, waiting = trials[-1]
    typed = options(measured, choice)
    if waiting is None:
        seconds = choice.period * measured.step
        return [f"So: {typed} (not tried, since a period takes {seconds:.1f} s: give --seconds as many)"]
    seen = f"tried: workers waited for {percent(max(waiting, 0.0))} of their time"
    before = "".join(f"; with λ = {trial.choice.period} for {percent(trial.waiting)}" for trial in trials[:-1])
    lines = [f"So: {typed} ({seen}{before})"]
    if waiting >= MOST:
        lines.append(
            f"WARNING: the trial does not confirm it: {percent(waiting)} is not less than {100 * MOST:.0f} %. By it "
            f"λ = {_longer(choice.period, waiting)} is needed; but other work on this machine, or fewer cores than "
            "ranks, may be why: measure again without that, and with a larger --seconds"
        )
    return lines


def recommend(measured: Measured, choice: Choice, rule: Rule, encodings: Sequence[str] = ()) -> list[str]:
    """Why that choice, in words.

    Args:
        measured: the times.
        choice: made from them.
        rule: of exchange.
        encodings: that can be chosen.
    """
    costs = choice.costs
    lines = [*_transport_words(measured, costs), _period_words(measured, costs), _overlap_words(measured, costs)]
    lines.append(_centers_words(measured, costs))
    if encodings:
        lines.append(_encoding_words(measured, costs, encodings))
    return lines + [f"Rule: {line}" for line in advice(rule, costs.workers, choice.period)]


def _transport_words(measured: Measured, chosen: Costs) -> list[str]:
    default, step = measured.costs[0], measured.step
    if len(measured.costs) == 1:
        return [f"Transport: {chosen.transport}, the only one measured"]
    if chosen is default:
        lines = [f"Transport: {chosen.transport}, which auto takes: no other allows a clearly shorter period"]
    else:
        lines = [
            f"Transport: {chosen.transport}, for which λ = {chosen.smallest_period(step)} is enough; "
            f"{default.transport}, which auto takes, needs {default.smallest_period(step)}"
        ]
    for costs in measured.costs:
        if not costs.whole and costs.smallest_period(step) * _SIMILAR < chosen.smallest_period(step):
            lines.append(
                f"Transport: {costs.transport} would do with λ = {costs.smallest_period(step)}, if commits need not be "
                "whole, nor refused where they are not finite"
            )
    return lines


def _period_words(measured: Measured, costs: Costs) -> str:
    waiting = costs.waiting(measured.compute)
    return (
        f"Period: from λ = {costs.smallest_period(measured.step)} on a worker waits less than {100 * MOST:.0f} % of "
        f"its time; with λ = {measured.period}, as given, {percent(waiting)}"
    ) + "; a larger --batch, and so longer steps, would help as well" * (waiting >= MOST)


def _overlap_words(measured: Measured, costs: Costs) -> str:
    if costs.hidden is None:
        return f"Overlap: no need: an exchange, {milliseconds(costs.exchange(measured.step))}, is short beside a step"
    hides = f"it hides {percent(max(costs.hidden, 0.0))} of an exchange"
    if not costs.overlap_helps(measured.step):
        return f"Overlap: does not help here: {hides}"
    period = costs.smallest_period(measured.step, overlap=True)
    return f"Overlap: helps: {hides}, and λ = {period} is enough with it; its commits are a period older"


def _centers_words(measured: Measured, costs: Costs) -> str:
    hosts, step = measured.hosts, measured.step
    if costs.together:
        return "Centers: none; all ranks exchange together"
    if measured.centers > 1:
        return f"Centers: measured with {measured.centers}, as given; leave out --centers to compare with one"
    if hosts == 1:
        return "Centers: 1, since all ranks are on one host"
    one, several = costs.smallest_period(step), costs.smallest_period(step, centers=hosts)
    if one > _SIMILAR * several:
        return (
            f"Centers: one on each host, {hosts}: a single one is so busy that it takes λ = {one}, and as many would "
            f"allow about {several}, if their links are apart; measure again with --centers hosts, and "
            "one rank more on each"
        )
    return f"Centers: 1; {hosts}, one on each host, would hardly shorten the period: a single one is not busy enough"


def _encoding_words(measured: Measured, costs: Costs, encodings: Sequence[str]) -> str:
    """Whether fewer bytes help; if so below which bandwidth each encoding pays, and which is enough with ours."""
    numbers, compute, dtype = measured.numbers, measured.compute, f"f{measured.number_bytes}"
    sizes, plain = {name: get(name).nbytes(numbers, dtype) for name in encodings}, numbers * measured.number_bytes
    sizes = {name: nbytes for name, nbytes in sizes.items() if nbytes < plain} | {"float32": plain}
    exchange, latency = costs.exchange(compute), costs.latency(compute)
    about = "Encoding (--encoding and --pull-encoding)"
    float32 = f"{about}: float32{_instead(measured, costs)}: "
    if len(sizes) == 1:
        return f"{float32}no other writes {numbers:,} number{'s' * (numbers > 1)} in fewer bytes"
    parts = (
        f"of an exchange, {milliseconds(exchange)}, one of a single number would take {milliseconds(latency)} as well"
    )
    if latency >= _LATENCY * exchange:
        return f"{float32}{parts}: mostly latency, which fewer bytes do not shorten"
    if latency >= _allowed(compute):
        return f"{about}: {parts}: with λ = {measured.period} none is enough: a longer period is needed"
    here = 2 * plain / (exchange - latency)
    needed = {name: bandwidth_needed(nbytes, compute, latency) for name, nbytes in sizes.items()}
    names = sorted(needed, key=lambda name: -needed[name])
    enough = next((name for name in names if needed[name] <= here), None)
    limits = [f"{name} pays below {size(needed[longer])}/s" for longer, name in pairwise(names)]
    verdict = f"{enough} is enough" if enough else f"even {names[-1]} is not enough: a longer period is needed"
    return (
        f"{about}, by bytes alone, with λ = {measured.period}: {', '.join(limits)}: "
        f"there the longer numbers make a worker wait more than {100 * MOST:.0f} % of its time. An exchange moves "
        f"{size(here)}/s here: {verdict}"
    )


def _instead(measured: Measured, costs: Costs) -> str:
    """What helps where no encoding does, if help is needed."""
    if costs.waiting(measured.compute) < MOST:
        return ""
    return " and a longer period" + " or --overlap" * (costs.hidden is not None and costs.overlap_helps(measured.step))
