"""Which survivor replaces a lost center, and which of the survivors' leases it records. No MPI."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..core.center import Center
from ..core.leases import Lease
from ..core.messages import NOT_FINITE
from ..core.worker import Worker


class SurvivorReport(NamedTuple):
    """What a survivor sends to the others."""

    rank: int  # at the beginning of the session
    worker: int  # its index at the lost center
    session: int
    clock: int  # of its last complete pull
    served: int  # of the snapshot that came with it; -1 without one
    sequence: int  # of the commit without a reply, 0 for none
    under_way: list[Lease]  # the steps of that commit
    held: list[Lease]  # further leases
    spare: bool = False  # it was not called

    @classmethod
    def of(cls, worker: Worker, rank: int) -> "SurvivorReport":
        """The report of `worker`, of rank `rank` at the beginning of the session."""
        snapshot = worker.last_reply.snapshot if worker.last_reply else None
        commit = worker.under_way
        sent = list(commit.leases) if commit and commit.steps and not commit.flags & NOT_FINITE else []
        served, sequence = (snapshot.served if snapshot else -1), (commit.sequence if commit else 0)
        held = [lease for lease in worker.held.leases if lease.steps]
        return cls(rank, worker.index, worker.session, worker.clock, served, sequence, sent, held, worker.spare)

    @classmethod
    def read(cls, text: str) -> "SurvivorReport":
        """Decode a report."""
        report = cls(*json.loads(text))
        under_way, held = ([Lease(*lease) for lease in leases] for leases in (report.under_way, report.held))
        return report._replace(under_way=under_way, held=held)


def elect(reports: Sequence[SurvivorReport]) -> int:
    """Index of the survivor with the latest pull; the first of several.

    Raises RuntimeError where no center can continue for all of them.
    """
    if len({report.session for report in reports}) > 1:
        raise RuntimeError("the center was lost between two loops over steps, of which some workers were in either")
    winner = max(range(len(reports)), key=lambda i: reports[i].served)
    best = reports[winner]
    if best.clock < max(report.clock for report in reports) or (best.served < 0 < best.clock):
        raise RuntimeError("the center was lost, and its snapshot was too long to travel: too many gaps of open steps")
    return winner


def take_over(
    center: Center,
    state: Mapping[str, Any],
    applied_by_rank: Mapping[int, int],
    reports: Sequence[SurvivorReport],
    first: int,
) -> int | None:
    """Record the survivors' leases at the restored `center`.

    Args:
        center: restored, with leases that nobody holds.
        state: the leases from which it was restored: `next`, and the steps that were `free` or held.
        applied_by_rank: last sequence applied.
        reports: `reports[first:]` are its workers, in order; with `first` = 1, `reports[0]` is the elected rank
            itself, whose commit under way counts as that of a further worker.

    Returns:
        The number of that further worker, if its commit is to be applied.
    """
    applied = [applied_by_rank.get(report.rank, 0) for report in reports]
    workers, leases = reports[first:], center.leases
    assert leases is not None
    order = [(i, report, applied[first + i]) for i, report in enumerate(workers)]
    if first:
        order.append((len(workers), reports[0], applied[0]))
    held = [(i, lease) for i, report, _ in order for lease in report.held if i < len(workers)]
    sent = [(i, lease) for i, report, last in order for lease in report.under_way if report.sequence > last]
    claims = [*held, *sent]
    free, given_up = [Lease(*lease) for lease in state["free"]], int(state.get("given_up", 0))
    valid = leases.take_over(state["next"], free, claims, given_up)
    for (i, _), is_valid in zip(claims, valid):
        if not is_valid and i < len(workers):  # it was silent, or its commit refused: others have these steps
            center.worker_released(i)
    center.applied = [last for _, _, last in order][: len(workers)]
    own = [is_valid for (i, _), is_valid in zip(claims, valid) if i == len(workers)]
    if own and all(own):
        return len(workers)
    leases.release_all(len(workers))
    return None
