"""Checkpoints: folders of files with checksums, one for each center and worker."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.backend import Array
from ..core.params import parts
from .files import chunks, load, load_facts, save, signature


def seal(path: Path, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Write arrays and facts (any JSON) with a checksum over all of it; copies no array."""
    text = json.dumps(dict(facts), sort_keys=True)
    save(path, arrays, {"agnmpi": text}, hashlib.sha256(text.encode()))


def unseal(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what `seal` wrote. Raises ValueError if it is not whole, OSError if it cannot be read."""
    arrays, metadata = load(path)
    text = metadata.get("agnmpi", "")
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(signature(name, arrays[name]))
        for chunk in chunks(arrays[name]):
            digest.update(chunk)
    if metadata.get("sha256") != digest.hexdigest():
        raise ValueError(f"{path} does not match its checksum")
    return arrays, dict(json.loads(text))


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole_number, value))


def _is_layout(value: Any) -> bool:
    kinds = {"names": list, "shapes": list, "offsets": list, "dtype": str}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    names, shapes, offsets = value["names"], value["shapes"], value["offsets"]
    return len(names) == len(shapes) == len(offsets) - 1 and all(map(_whole_numbers, [offsets, *shapes]))


def _is_leases(value: Any) -> bool:
    if value is None:  # the work is divided elsewhere
        return True
    counts = isinstance(value, dict) and all(_whole_number(value.get(key)) for key in ("next", "committed"))
    free = value.get("free") if counts else None
    return isinstance(free, list) and all(_whole_numbers(lease) and len(lease) == 2 for lease in free)


# Facts that a center's file must have, and a check of each.
_FACTS: Mapping[str, Callable[[Any], bool]] = {
    "centers": lambda value: _whole_number(value) and value > 0,
    "workers": _whole_number,
    "layout": _is_layout,
    "clock": _whole_number,
    "steps": _whole_number,
    "applied": _whole_numbers,
    "refused": _whole_number,
    "dropped": _whole_number,
    "staleness": lambda value: _whole_numbers(value) and len(value) == 2,
    "center_optimizer": lambda value: isinstance(value, str),
    "center_optimizer_step": _whole_number,
    "leases": _is_leases,
}
# Further ones of the first center, which grants the work.
_PROGRESS: Mapping[str, Callable[[Any], bool]] = {
    "samples": _whole_number,
    "seconds": lambda value: isinstance(value, int | float) and value >= 0,
}

# Optional: files of earlier releases do not have them.
_OPTIONAL: Mapping[str, Callable[[Any], bool]] = {
    "data": lambda value: isinstance(value, dict),
    "processed": _whole_numbers,
    "consistent": lambda value: isinstance(value, bool),
}


def check_facts(facts: Mapping[str, Any], name: str, first: bool = True) -> None:
    """Raise ValueError, naming the first wrong one, unless `facts` are those of a center's file.

    Args:
        facts: as read.
        name: of the checkpoint, for the message.
        first: whether of the first center.
    """
    needed = {**_FACTS, **(_PROGRESS if first else {})}
    for fact, is_valid in {**needed, **_OPTIONAL}.items():
        if fact not in facts and fact in needed:
            raise ValueError(f"{name} does not say {fact!r}: it is no checkpoint of a center")
        if fact in facts and not is_valid(facts[fact]):
            value = repr(facts[fact])
            raise ValueError(f"{name} says that {fact!r} is {value[:80]}, which cannot be")


def folder(run: Path, steps: int) -> Path:
    """Directory of the checkpoint after `steps` local steps."""
    return run / "checkpoints" / f"step-{steps:012d}"


def folders(run: Path) -> list[Path]:
    """All checkpoints of a run, the newest first, complete or not."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def center_file(folder: Path, center: int = 0) -> Path:
    """The file of a center: its block of the center variable and its slots."""
    return folder / f"center-{center}.safetensors"


def worker_file(folder: Path, worker: int) -> Path:
    """The file of a worker's local state."""
    return folder / f"worker-{worker}.safetensors"


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the facts of the first center, without its vectors, and check that all blocks are of one cut.

    Raises ValueError for invalid facts, or blocks of different commits; OSError for missing files.
    """
    facts = _facts_of(center_file(folder), first=True)
    for i in range(1, facts["centers"]):
        other = _facts_of(center_file(folder, i), first=False)
        # Equal in a consistent cut; where there can be none, the facts say so.
        if facts.get("consistent", True) and _cut(other) != _cut(facts):
            raise ValueError(f"{folder}: the blocks of centers 0 and {i} do not hold the same commits")
    return facts


def _facts_of(path: Path, first: bool) -> dict[str, Any]:
    try:
        facts = json.loads(load_facts(path).get("agnmpi", ""))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has no facts that can be read: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} has no facts")
    check_facts(facts, str(path), first)
    return facts


def _cut(facts: Mapping[str, Any]) -> Any:
    """The commits that a block contains, or has refused: last sequence, by worker."""
    return facts.get("processed", facts["applied"])


def read_span(folder: Path, facts: Mapping[str, Any], span: slice) -> dict[str, Array]:
    """Read c and the slots, from element `span.start` to `span.stop`; each file that contains part of it, once.

    Args:
        folder: of the checkpoint.
        facts: from `read_facts`.
        span: of the whole vectors; open ends are theirs.

    Returns:
        The arrays of one center, by name: those of the file itself if it contains just this span.

    Raises:
        ValueError: a file is incomplete, or of another length than the others imply.
        OSError: a file cannot be read.
    """
    size = facts["layout"]["offsets"][-1]
    start, stop, _ = span.indices(size)
    pieces: dict[str, list[Array]] = {}
    for i, block in enumerate(parts(size, facts["centers"])):
        low, high = max(start, block.start), min(stop, block.stop)
        if low >= high:
            continue
        arrays, _ = unseal(center_file(folder, i))
        if wrong := [name for name, x in arrays.items() if x.shape != (block.stop - block.start,)]:
            raise ValueError(
                f"{center_file(folder, i)}: {wrong[0]!r} has shape {arrays[wrong[0]].shape}, but the model has {size} "
                f"numbers, {block.stop - block.start} of them here"
            )
        whole = (low, high) == (block.start, block.stop)
        for name, x in arrays.items():
            # A copy, so that the rest can be freed.
            part = x if whole else x[low - block.start : high - block.start].copy()
            pieces.setdefault(name, []).append(part)
    if "c" not in pieces or len({len(blocks) for blocks in pieces.values()}) > 1:
        raise ValueError(f"{folder}: the blocks of the centers do not fit together")
    return {name: blocks[0] if len(blocks) == 1 else np.concatenate(blocks) for name, blocks in pieces.items()}


def read_center(folder: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read the files of all centers as one: whole vectors, and the facts of the first.

    Raises ValueError for files that are not whole or do not fit together, OSError for missing ones.
    """
    facts = read_facts(folder)
    return read_span(folder, facts, slice(None)), facts


def newest(run: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Array], dict[str, Any]] | None:
    """The newest complete checkpoint of a run, None if there is none; `say` is called for each broken one."""
    for candidate in folders(run):
        try:
            return candidate, *read_center(candidate)
        except (OSError, ValueError) as error:
            say(left_out(candidate, error))
    return None


def left_out(candidate: Path, why: object) -> str:
    """The warning about a checkpoint that is incomplete."""
    return f"WARNING: checkpoint {candidate.name} is left out: {why}"


def prune(run: Path, keep: int, centers: int = 1) -> None:
    """Keep the newest `keep` checkpoints that have the files of all centers; remove all older ones."""
    complete = [path for path in folders(run) if all(center_file(path, i).is_file() for i in range(centers))]
    if len(complete) < keep:
        return
    for old in folders(run):
        if old < complete[keep - 1]:
            shutil.rmtree(old, ignore_errors=True)  # a worker may be writing there


def set_aside(run: Path, newest: Path | None) -> None:
    """Rename folders newer than the newest complete checkpoint: they are broken, and would hide later checkpoints.

    The newest broken one is kept for inspection.
    """
    for broken in folders(run):
        if newest is None or broken > newest:
            broken.rename(broken.with_name(f"broken-{broken.name}-{os.getpid()}"))
    for old in sorted((run / "checkpoints").glob("broken-*"))[:-1]:
        shutil.rmtree(old, ignore_errors=True)
