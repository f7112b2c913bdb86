"""The state that a new center is restored from: the last pull of the elected rank, or a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..arrays.backend import Array
from ..core.messages import Reply, Snapshot
from ..core.optimizers import Optimizer
from ..core.worker import Worker

Saved: TypeAlias = tuple[Mapping[str, Array], Mapping[str, Any]]  # a checkpoint: arrays and facts


class CenterState(NamedTuple):
    """The state of a center at an earlier time."""

    c: Array  # (n,)
    clock: int
    steps: int
    served: int  # messages served: of two states the later has more; -1: the initial state
    session: int
    refused: int
    dropped: int
    given_up: int
    staleness: tuple[int, int]  # sum, maximum
    checkpoint: int  # steps at its newest checkpoint
    applied: Mapping[int, int]  # last sequence applied, by rank
    leases: Mapping[str, Any]  # next step never granted; steps before it that are not committed
    source: str  # description

    @classmethod
    def pulled(cls, worker: Worker, ranks: Sequence[int]) -> "CenterState":
        """The center as last pulled by `worker`, its own x if it never has; `ranks`: of that center's workers."""
        reply = worker.last_reply or Reply(0)
        snapshot = reply.snapshot or Snapshot(served=-1)
        source = f"its last pull, clock {reply.clock}" if worker.last_reply else "the beginning"
        return cls(
            c=worker.o if worker.last_reply else worker.x,
            clock=reply.clock,
            steps=reply.steps,
            served=snapshot.served,
            session=snapshot.session,
            refused=snapshot.refused,
            dropped=snapshot.dropped,
            given_up=snapshot.given_up,
            staleness=(snapshot.staleness_sum, snapshot.staleness_max),
            checkpoint=reply.checkpoint,
            applied=dict(zip(ranks, reply.applied)),
            leases={"next": snapshot.next, "free": snapshot.open, "given_up": snapshot.given_up},
            source=source,
        )

    @classmethod
    def saved(cls, saved: Saved) -> "CenterState":
        """The center of a checkpoint, which names workers by rank: another center may number them differently."""
        arrays, facts = saved
        return cls(
            c=arrays["c"],
            clock=facts["clock"],
            steps=facts["steps"],
            served=facts.get("served", 0),
            session=facts.get("session", 0),
            refused=facts["refused"],
            dropped=facts["dropped"],
            given_up=facts.get("given_up", 0),
            staleness=tuple(facts["staleness"]),
            checkpoint=facts["steps"],
            applied=dict(zip(facts.get("ranks", ()), facts["applied"])),
            leases=facts["leases"],
            source=f"the newest checkpoint, clock {facts['clock']}",
        )


def with_slots(
    state: CenterState, optimizer: Optimizer | None, initial: Any, saved: Saved | None
) -> tuple[dict[str, Array], dict[str, Any], str]:
    """Arrays and facts for `Center.restore`, and a description of their source.

    A pull holds c alone: the slots of the center optimizer come from the newest checkpoint, or else from its `initial`
    state.
    """
    slots, step, source = optimizer.slots(initial) if optimizer else {}, 0, state.source
    if saved is not None and all(f"slot/{name}" in saved[0] for name in slots):
        slots = {name: saved[0][f"slot/{name}"] for name in slots}
        step = saved[1]["center_optimizer_step"]
    elif optimizer and slots:
        source += f"; no checkpoint has the slots of its {optimizer.name}, which start anew"
    facts = {
        "clock": state.clock,
        "steps": state.steps,
        "served": state.served,
        "refused": state.refused,
        "dropped": state.dropped,
        "given_up": state.given_up,
        "staleness": state.staleness,
        "center_optimizer": optimizer.name if optimizer else "add",
        "center_optimizer_step": step,
    }
    return {"c": state.c} | {f"slot/{name}": slot for name, slot in slots.items()}, facts, source
