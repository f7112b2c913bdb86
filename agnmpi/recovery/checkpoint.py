"""Checkpoints: folders of sealed files, one for each center and worker."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.backend import Array, to_host
from .files import load, save


def seal(path: Path, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Write arrays and facts (whatever JSON has words for) with a checksum over all of it."""
    text = json.dumps(dict(facts), sort_keys=True)
    save(path, arrays, {"agnmpi": text, "sha256": _digest(arrays, text)})


def unseal(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what `seal` wrote. Raises ValueError if it is not whole, OSError if it cannot be read."""
    arrays, said = load(path)
    text = said.get("agnmpi", "")
    if said.get("sha256") != _digest(arrays, text):
        raise ValueError(f"{path} does not match its checksum")
    return arrays, dict(json.loads(text))


def _digest(arrays: Mapping[str, Array], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        x = np.ascontiguousarray(to_host(arrays[name]))
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def folder(run: Path, steps: int) -> Path:
    """Where the checkpoint after `steps` local steps lies."""
    return run / "checkpoints" / f"step-{steps:012d}"


def folders(run: Path) -> list[Path]:
    """All checkpoints of a run, the newest first, whole or not."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def center_file(folder: Path, center: int = 0) -> Path:
    """The file of a center: its block of the center variable and its slots."""
    return folder / f"center-{center}.safetensors"


def worker_file(folder: Path, worker: int) -> Path:
    """The file of a worker's local state."""
    return folder / f"worker-{worker}.safetensors"


def read_center(folder: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read the files of all centers as one: whole vectors, and the facts of the first.

    Raises ValueError for files that are not whole or do not fit together, OSError for missing ones.
    """
    first, facts = unseal(center_file(folder))
    pieces = [first] + [unseal(center_file(folder, i))[0] for i in range(1, int(facts["centers"]))]
    whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in first}
    if whole["c"].size != facts["layout"]["offsets"][-1]:
        raise ValueError(f"{folder}: the blocks of the centers make {whole['c'].size} numbers, not the model's")
    return whole, facts


def newest(run: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Array], dict[str, Any]] | None:
    """The newest whole checkpoint of a run, None if there is none; `say` is told of each that is broken."""
    for candidate in folders(run):
        try:
            return candidate, *read_center(candidate)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"WARNING: checkpoint {candidate.name} is left out: {error}")
    return None


def prune(run: Path, keep: int, centers: int = 1) -> None:
    """Keep the newest `keep` checkpoints that have the files of all centers; remove all that is older."""
    complete = [found for found in folders(run) if all(center_file(found, i).is_file() for i in range(centers))]
    if len(complete) < keep:
        return
    for old in folders(run):
        if old < complete[keep - 1]:
            shutil.rmtree(old, ignore_errors=True)  # a worker may be writing there


def set_aside(run: Path, newest: Path | None) -> None:
    """Rename what is newer than the newest whole checkpoint: it is broken, and would hide those to come."""
    for broken in folders(run):
        if newest is None or broken > newest:
            broken.rename(broken.with_name(f"broken-{broken.name}-{os.getpid()}"))
