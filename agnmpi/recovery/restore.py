"""Resuming a run from its newest complete checkpoint, with the same or another number of workers and centers."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpi4py import MPI

from ..arrays.backend import Array
from ..cluster.role import Role
from ..core.params import Layout
from ..transport.agreement import allgather, raise_on_all
from .checkpoint import folders, left_out, read_facts, read_span, read_worker, set_aside, worker_file
from .worker_state import restore_worker


def resume(
    comm: MPI.Comm,
    role: Role,
    layout: Layout,
    total: int | None,
    data: Mapping[str, int],
    run: Callable[[], Path] | None,
    required: bool,
    say: Callable[[str], None],
) -> Mapping[str, Any] | None:
    """Restore `role` from the newest complete checkpoint; collective. Returns its facts, None if there is none.

    `total`: steps of the run, None: as many as it takes; `data`: what determines the samples of a step (samples, batch,
    seed); `run()`: its directory, on rank 0; `required`: refuse if there is no checkpoint; `say` is called with what is
    skipped, and with the checkpoint used.
    """
    candidates: list[Path] = []

    def list_candidates() -> str:
        if run is None:
            return ""
        directory = run()
        candidates[:] = folders(directory)
        return str(directory)

    directory = raise_on_all(comm, list_candidates)
    while True:
        chosen = raise_on_all(comm, lambda: _choose(directory, candidates, layout, total, data, required, say))
        name, facts = json.loads(allgather(comm, json.dumps(chosen))[0])
        if not name:
            return None
        checkpoint = Path(name)
        arrays, wrong = raise_on_all(comm, lambda: _read(comm, role, checkpoint, facts))  # noqa: B023
        broken = [text for text in allgather(comm, wrong) if text]
        if not broken:
            break
        del arrays
        if candidates:
            say(left_out(candidates.pop(0), broken[0]))
    local = raise_on_all(comm, lambda: _restore_rank(role, checkpoint, arrays, facts))
    everywhere = all(json.loads(text) for text in allgather(comm, json.dumps(local)))
    say(
        f"resumed from {checkpoint.name}: {facts['steps']}{'' if total is None else f' of {total}'} steps, clock "
        f"{facts['clock']}"
        + ("" if everywhere else "; not all workers find their local state: their optimizers start anew there")
    )
    if not facts.get("consistent", True):
        say(
            "WARNING: the blocks of several centers without locking are saved one after the other: some commits may be "
            "in one and not in another"
        )
    return {**facts, "checkpoint": name}


def _choose(
    directory: str,
    candidates: list[Path],
    layout: Layout,
    total: int | None,
    data: Mapping[str, int],
    required: bool,
    say: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """At rank 0: the newest of `candidates` that looks complete by its facts; newer ones are removed from the list.

    Raises ValueError for one of another run, and if there is none and one is `required`.
    """
    if not directory:
        return "", {}
    while candidates:
        try:
            facts = read_facts(candidates[0])
            _check_state(candidates, facts)
            break
        except (OSError, ValueError) as error:
            say(left_out(candidates.pop(0), error))
    set_aside(Path(directory), candidates[0] if candidates else None)
    if not candidates and required:
        raise ValueError(f"{directory} has no whole checkpoint to resume from")
    if not candidates:
        return "", {}
    name = str(candidates[0])
    check_model(layout, facts, name)
    saved = facts.get("data", data)
    differ = [f"{key} {saved.get(key)}, not {data[key]}" for key in data if saved.get(key) != data[key]]
    if differ:
        raise ValueError(f"{name} has {' and '.join(differ)}: it cannot be told which samples are done")
    granted = max(facts["steps"], (facts["leases"] or {"next": 0})["next"])
    if total is not None and granted > total:
        raise ValueError(
            f"{name} has {granted} steps, but the run ends at {total}: give more --epochs (or --steps) to go on"
        )
    return str(candidates[0].resolve()), facts


def _check_state(candidates: Sequence[Path], facts: Mapping[str, Any]) -> None:
    """Raise ValueError if the state of the only worker was to be in the newest of `candidates`, and is in an older one.

    The run has ended while it was written; from the older one it repeats itself bit by bit.
    """
    if facts.get("states") == "all" and facts["workers"] == 1:
        there = [worker_file(candidate, 0).is_file() for candidate in candidates]
        if any(there) and not there[0]:
            raise ValueError("the state of its worker was not written any more; an older one has it")


def _read(comm: MPI.Comm, role: Role, checkpoint: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Array], str]:
    """The arrays of this rank's span, or what is wrong with their files.

    Raises OSError where they cannot be read here, though rank 0 can.
    """
    if not role.stores:
        return {}, ""
    try:
        return read_span(checkpoint, facts, role.span), ""
    except ValueError as error:
        return {}, str(error)
    except OSError as error:
        if comm.rank:
            raise
        return {}, str(error)


def _restore_rank(role: Role, checkpoint: Path, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> bool:
    """Restore this rank; whether its workers, if any, could restore their local state."""
    role.resume(arrays, facts)
    if facts["workers"] != role.count:
        return False
    for worker in role.workers:
        if worker.spare:
            continue
        worker.checkpoint = int(facts["steps"])
        try:
            restore_worker(worker, *read_worker(checkpoint, worker.index, worker.x.size))
        except (OSError, ValueError) as error:
            print(f"agnmpi: worker {worker.index} starts anew: {error}", file=sys.stderr, flush=True)
            return False
    return True


def check_model(layout: Layout, facts: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, with the differences, for a checkpoint of another model."""
    other = facts["layout"]
    shapes = dict(zip(layout.names, layout.shapes))
    saved = {n: tuple(shape) for n, shape in zip(other["names"], other["shapes"])}
    differ = _differences(saved, shapes)
    if other["dtype"] != layout.dtype:
        differ.append(f"dtype is {other['dtype']} there and {layout.dtype} here")
    if not differ and list(saved) != list(shapes):
        differ.append(f"the order is {', '.join(saved)} there and {', '.join(shapes)} here")
    if differ:
        raise ValueError(f"{name} is of another model: {'; '.join(differ[:5])}")


def check_tensors(tensors: Mapping[str, str], facts: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, with the differences, where other tensors lie in the vector, if both are known."""
    saved = dict(facts.get("tensors", ()))
    if not tensors or not saved or list(saved.items()) == list(tensors.items()):
        return
    differ = _differences(saved, tensors)
    if not differ:
        there, here = next((a, b) for a, b in zip(saved, tensors) if a != b)
        differ = [f"in the order of its tensors {there!r} there stands where {here!r} stands here"]
    raise ValueError(f"{name} is of another model: {'; '.join(differ[:5])}")


def _differences(there: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    return [
        f"{name!r} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
