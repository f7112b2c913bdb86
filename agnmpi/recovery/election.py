"""Who of the survivors takes the place of a lost center, and what it books of what they hold. No MPI."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..core.center import Center
from ..core.leases import Lease
from ..core.messages import NOT_FINITE
from ..core.worker import Worker


class Witness(NamedTuple):
    """What a survivor tells the others."""

    rank: int  # of the beginning
    worker: int  # its index at the lost center
    session: int
    clock: int  # of its last whole pull
    served: int  # of the snapshot that came with it; -1 without one
    sequence: int  # of the commit that is not answered, 0 for none
    under_way: list[Lease]  # the steps of that commit
    held: list[Lease]  # by it, and not in that commit

    @classmethod
    def of(cls, worker: Worker, rank: int) -> "Witness":
        """What `worker`, of rank `rank` when all began, has to tell."""
        snapshot = worker.last_reply.snapshot if worker.last_reply else None
        commit = worker.under_way
        sent = (
            [Lease(commit.first_step, commit.steps)]
            if commit and commit.steps and not commit.flags & NOT_FINITE
            else []
        )
        served, sequence = (snapshot.served if snapshot else -1), (commit.sequence if commit else 0)
        held = [lease for lease in worker.leases if lease.steps]
        return cls(rank, worker.index, worker.session, worker.clock, served, sequence, sent, held)

    @classmethod
    def read(cls, text: str) -> "Witness":
        """Read what was told."""
        said = cls(*json.loads(text))
        under_way, held = ([Lease(*lease) for lease in leases] for leases in (said.under_way, said.held))
        return said._replace(under_way=under_way, held=held)


def elect(witnesses: Sequence[Witness]) -> int:
    """Index of the survivor that has pulled last; of several the first.

    Raises RuntimeError where no center can go on for all of them.
    """
    if len({witness.session for witness in witnesses}) > 1:
        raise RuntimeError("the center was lost between two loops over steps, of which some workers were in either")
    winner = max(range(len(witnesses)), key=lambda i: witnesses[i].served)
    best = witnesses[winner]
    if best.clock < max(witness.clock for witness in witnesses) or (best.served < 0 < best.clock):
        raise RuntimeError("the center was lost, and its snapshot was too long to travel: too many gaps of open steps")
    return winner


def take_over(
    center: Center,
    state: Mapping[str, Any],
    applied_by_rank: Mapping[int, int],
    witnesses: Sequence[Witness],
    first: int,
) -> int | None:
    """Book at the restored `center` what the survivors hold.

    Args:
        center: restored, with leases that nobody holds.
        state: of the leases that it was restored from: `next`, and the steps that were `free` or held then.
        applied_by_rank: last sequence applied.
        witnesses: `witnesses[first:]` are its workers, in order; with `first` = 1, `witnesses[0]` is the elected rank
            itself, whose commit under way counts as that of a further worker.

    Returns:
        The number of that further worker, if its commit is to be applied.
    """
    applied = [applied_by_rank.get(witness.rank, 0) for witness in witnesses]
    workers, leases = witnesses[first:], center.leases
    assert leases is not None
    order = [(i, witness, applied[first + i]) for i, witness in enumerate(workers)]
    if first:
        order.append((len(workers), witnesses[0], applied[0]))
    held = [(i, lease) for i, witness, _ in order for lease in witness.held if i < len(workers)]
    sent = [(i, lease) for i, witness, last in order for lease in witness.under_way if witness.sequence > last]
    claims = [*held, *sent]
    free, given_up = [Lease(*lease) for lease in state["free"]], int(state.get("given_up", 0))
    holds = leases.take_over(state["next"], free, claims, given_up)
    for (i, _), hold in zip(claims, holds):
        if not hold and i < len(workers):  # it was silent, or refused unheard: these steps are another's
            center.worker_released(i)
    center.applied = [last for _, _, last in order][: len(workers)]
    own = any(hold for (i, _), hold in zip(claims, holds) if i == len(workers))
    return len(workers) if own else None
