"""Taking up a run from its newest whole checkpoint, with the same or another number of workers and centers."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpi4py import MPI

from ..cluster.roles import Role, WorkerRole
from ..core.params import Layout
from ..transport.agreement import allgather, raise_on_all
from .checkpoint import newest, read_center, set_aside, unseal, worker_file


def resume(
    comm: MPI.Comm,
    role: Role,
    layout: Layout,
    total: int,
    data: Mapping[str, int],
    run: Callable[[], Path] | None,
    required: bool,
    say: Callable[[str], None],
) -> Mapping[str, Any] | None:
    """Restore `role` from the newest whole checkpoint; collective. Returns its facts, None if there is none.

    `total`: steps of the run; `data`: what says which samples a step has (samples, batch, seed); `run()`: its
    directory, on rank 0; `required`: refuse if there is no checkpoint; `say` is told what is left out, and where the
    run goes on.
    """

    def find() -> tuple[str, dict[str, Any]]:
        if run is None:
            return "", {}
        where = run()
        found = newest(where, say)
        set_aside(where, found[0] if found else None)
        if found is None and required:
            raise ValueError(f"{where} has no whole checkpoint to resume from")
        if found is None:
            return "", {}
        check_model(layout, found[2], str(found[0]))
        saved = found[2].get("data", data)
        differ = [f"{key} {saved[key]}, not {data[key]}" for key in data if saved[key] != data[key]]
        if differ:
            raise ValueError(f"{found[0]} has {' and '.join(differ)}: it cannot be told which samples are done")
        if found[2]["steps"] > total:
            raise ValueError(
                f"{found[0]} has {found[2]['steps']} steps, but the run ends at {total}: give more "
                "--epochs (or --steps) to go on"
            )
        return str(found[0].resolve()), found[2]

    name, facts = json.loads(allgather(comm, json.dumps(raise_on_all(comm, find)))[0])
    if not name:
        return None

    def restore() -> bool:
        role.resume({} if isinstance(role, WorkerRole) else read_center(Path(name))[0], facts)
        if facts["workers"] != role.count:
            return False
        for worker in role.workers:
            worker.checkpoint = int(facts["steps"])
            try:
                worker.restore(*unseal(worker_file(Path(name), worker.index)))
            except (OSError, ValueError, KeyError) as error:
                print(f"agnmpi: worker {worker.index} starts anew: {error}", file=sys.stderr, flush=True)
                return False
        return True

    mine = raise_on_all(comm, restore)
    local = all(json.loads(text) for text in allgather(comm, json.dumps(mine)))
    say(
        f"resumed from {Path(name).name}: {facts['steps']} of {total} steps, clock {facts['clock']}"
        + ("" if local else "; not all workers find their local state: their optimizers start anew there")
    )
    return dict(facts)


def check_model(layout: Layout, facts: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, with the differences, for a checkpoint of another model."""
    theirs = facts["layout"]
    ours = dict(zip(layout.names, layout.shapes))
    saved = {n: tuple(shape) for n, shape in zip(theirs["names"], theirs["shapes"])}
    differ = [
        f"{n!r} is {saved.get(n, 'missing')} there and {ours.get(n, 'missing')} here"
        for n in dict.fromkeys([*saved, *ours])
        if saved.get(n) != ours.get(n)
    ]
    if theirs["dtype"] != layout.dtype:
        differ.append(f"dtype is {theirs['dtype']} there and {layout.dtype} here")
    if not differ and list(saved) != list(ours):
        differ.append(f"the order is {', '.join(saved)} there and {', '.join(ours)} here")
    if differ:
        raise ValueError(f"{name} is of another model: {'; '.join(differ[:5])}")
