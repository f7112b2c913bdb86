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
from ..arrays.kernels import all_finite
from ..core.params import parts
from . import facts
from .center_state import Saved
from .files import Shapes, chunks, load, load_facts, save, signature


def seal(path: Path, arrays: Mapping[str, Array], told: Mapping[str, Any]) -> None:
    """Write arrays and facts (`told`, any JSON) with a checksum over all of it; copies no array."""
    text = json.dumps(dict(told), sort_keys=True)
    save(path, arrays, {"agnmpi": text}, hashlib.sha256(text.encode()))


def unseal(path: Path, check: Callable[[Shapes], None] | None = None) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what `seal` wrote; `check` is called before any array is read, and may raise ValueError.

    Raises ValueError if it is not whole, OSError if it cannot be read.
    """
    arrays, metadata = load(path, check)
    text = metadata.get("agnmpi", "")
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(signature(name, arrays[name]))
        for chunk in chunks(arrays[name]):
            digest.update(chunk)
    if metadata.get("sha256") != digest.hexdigest():
        raise ValueError(f"{path} does not match its checksum")
    return arrays, facts.parse(text, str(path))


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
    first = _facts_of(center_file(folder), first=True)
    for i in range(1, first["centers"]):
        other = _facts_of(center_file(folder, i), first=False)
        if any(other[fact] != first[fact] for fact in ("centers", "layout")):
            raise ValueError(f"{folder}: the blocks of centers 0 and {i} are not of one model")
        # Equal in a consistent cut; where there can be none, the facts say so.
        if first.get("consistent", True) and _cut(other) != _cut(first):
            raise ValueError(f"{folder}: the blocks of centers 0 and {i} do not hold the same commits")
    return first


def _facts_of(path: Path, first: bool) -> dict[str, Any]:
    found = facts.parse(load_facts(path).get("agnmpi", ""), str(path))
    facts.check_center(found, str(path), first)
    return found


def _cut(found: Mapping[str, Any]) -> Any:
    """The commits that a block contains, or has refused: last sequence, by worker."""
    return found.get("processed", found["applied"])


def read_span(folder: Path, found: Mapping[str, Any], span: slice) -> dict[str, Array]:
    """Read c and the slots, from element `span.start` to `span.stop`; each file that contains part of it, once.

    Args:
        folder: of the checkpoint.
        found: its facts, from `read_facts`.
        span: of the whole vectors; open ends are theirs.

    Returns:
        The arrays of one center, by name: those of the file itself if it contains just this span.

    Raises:
        ValueError: a file is incomplete, or of another length than the others imply.
        OSError: a file cannot be read.
    """
    size = found["layout"]["offsets"][-1]
    start, stop, _ = span.indices(size)
    pieces: dict[str, list[Array]] = {}
    for i, block in enumerate(parts(size, found["centers"])):
        low, high = max(start, block.start), min(stop, block.stop)
        if low >= high:
            continue
        path, length = center_file(folder, i), block.stop - block.start
        arrays, _ = _unseal_vectors(path, ("c",), length)
        whole = (low, high) == (block.start, block.stop)
        for name, x in arrays.items():
            # A copy, so that the rest can be freed.
            part = x if whole else x[low - block.start : high - block.start].copy()
            pieces.setdefault(name, []).append(part)
    if len({len(blocks) for blocks in pieces.values()}) > 1:
        raise ValueError(f"{folder}: the blocks of the centers do not fit together")
    return {name: blocks[0] if len(blocks) == 1 else np.concatenate(blocks) for name, blocks in pieces.items()}


def caller_file(folder: Path, worker: int) -> Path:
    """The file of the arrays that the caller of a worker saves with it."""
    return folder / f"caller-{worker}.safetensors"


def read_caller(folder: Path, worker: int) -> dict[str, Array]:
    """Read what the caller of a worker has saved with it, {} if nothing. Raises ValueError if it is not whole."""
    path = caller_file(folder, worker)
    return unseal(path)[0] if path.exists() else {}


def read_worker(folder: Path, worker: int, size: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read the local state of a worker of a model of `size` numbers; raises as `read_center`."""
    path = worker_file(folder, worker)

    arrays, found = _unseal_vectors(path, ("x", "o"), size)
    facts.check_worker(found, str(path))
    return arrays, found


def _unseal_vectors(path: Path, needed: tuple[str, ...], size: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """As `unseal`: vectors of `size` numbers, among them `needed`, all finite."""
    arrays, found = unseal(path, lambda shapes: facts.check_arrays(shapes, needed, size, str(path)))
    if spoilt := [name for name, x in arrays.items() if not all_finite(x)]:
        raise ValueError(f"{path}: {spoilt[0]!r} holds NaN or infinity")
    return arrays, found


def read_center(folder: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read the files of all centers as one: whole vectors, and the facts of the first.

    Raises ValueError for files that are not whole or do not fit together, OSError for missing ones.
    """
    found = read_facts(folder)
    return read_span(folder, found, slice(None)), found


def newest(run: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Array], dict[str, Any]] | None:
    """The newest complete checkpoint of a run, None if there is none; `say` is called for each broken one."""
    for candidate in folders(run):
        try:
            return candidate, *read_center(candidate)
        except (OSError, ValueError) as error:
            say(left_out(candidate, error))
    return None


def newest_state(run: Path, say: Callable[[str], None]) -> Saved | None:
    """What the newest complete checkpoint of a run holds, as `newest`."""
    checkpoint = newest(run, say)
    return checkpoint and checkpoint[1:]


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
