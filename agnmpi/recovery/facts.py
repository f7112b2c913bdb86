"""What a checkpoint's facts must be, for a center's file and a worker's: nothing is read of a file that lies."""

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import isfinite, prod
from typing import Any, TypeAlias

from .files import Shapes

Check: TypeAlias = Callable[[Any], bool]

_MOST = 1 << 62  # of any count: all travel as 64 bits
_MOST_RANKS = 1 << 24
_MOST_ARRAYS = 16  # of a file: no optimizer has as many slots


def parse(text: str, name: str) -> dict[str, Any]:
    """The facts in a file's metadata. Raises ValueError where there are none."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} has no facts that can be read: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{name} has no facts")
    return facts


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_layout(value: Any) -> bool:
    kinds = {"names": list, "shapes": list, "offsets": list, "dtype": str}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    names, shapes, offsets = value["names"], value["shapes"], value["offsets"]
    if not (0 < len(names) == len(shapes) == len(offsets) - 1 and all(map(_are_counts, [offsets, *shapes]))):
        return False
    named = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    sizes = [high - low for low, high in pairwise(offsets)]
    return named and not offsets[0] and offsets[-1] > 0 and sizes == list(map(prod, shapes))


def _are_named_texts(value: Any) -> bool:
    """Whether they are pairs of strings, with different names."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return False
    strings = all(isinstance(text, str) for pair in value for text in pair)
    return strings and len({name for name, _ in value}) == len(value)


def _is_leases(value: Any) -> bool:
    """Whether each step before `next` is committed, given up, or in one free lease."""
    if value is None:  # the work is divided elsewhere
        return True
    counts = isinstance(value, dict) and all(_is_count(value.get(key)) for key in ("next", "committed"))
    given_up, free = (value.get("given_up", 0), value.get("free")) if counts else (None, None)
    if not _is_count(given_up) or not isinstance(free, list):
        return False
    if not all(_are_counts(lease) and len(lease) == 2 and lease[1] for lease in free):
        return False
    ordered = sorted(free)
    ends = [first + steps for first, steps in ordered]
    apart = all(end <= first for end, (first, _) in zip(ends, ordered[1:]))
    accounted = value["committed"] + given_up + sum(steps for _, steps in free)
    return apart and (not ends or ends[-1] <= value["next"]) and accounted == value["next"]


# Facts that a center's file must have, and a check of each.
_CENTER: Mapping[str, Check] = {
    "centers": lambda value: _is_count(value) and 0 < value < _MOST_RANKS,
    "workers": lambda value: _is_count(value) and value < _MOST_RANKS,
    "layout": _is_layout,
    "clock": _is_count,
    "steps": _is_count,
    "applied": _are_counts,
    "refused": _is_count,
    "dropped": _is_count,
    "staleness": lambda value: _are_counts(value) and len(value) == 2,
    "center_optimizer": lambda value: isinstance(value, str),
    "center_optimizer_step": _is_count,
    "leases": _is_leases,
}
# Further ones of the first center, which grants the work.
_PROGRESS: Mapping[str, Check] = {
    "samples": _is_count,
    "seconds": lambda value: isinstance(value, int | float) and isfinite(value) and 0 <= value < _MOST,
}
# Optional: files of earlier releases do not have them.
_OPTIONAL: Mapping[str, Check] = {
    "data": lambda value: isinstance(value, dict),
    "processed": _are_counts,
    "consistent": lambda value: isinstance(value, bool),
    "given_up": _is_count,
    "served": _is_count,
    "session": _is_count,
    "complete": _is_count,
    "epoch": _is_count,
    "since_best": _is_count,
    "stopped": lambda value: isinstance(value, str),
    "ranks": _are_counts,
    "tensors": _are_named_texts,
}
_WORKER: Mapping[str, Check] = {
    "worker": _is_count,
    "clock": _is_count,
    "optimizer": lambda value: value is None or isinstance(value, str),
    "optimizer_step": _is_count,
}


def check_center(facts: Mapping[str, Any], name: str, first: bool = True) -> None:
    """Raise ValueError, naming the first wrong one, unless `facts` are those of a center's file.

    Args:
        facts: as read.
        name: of the checkpoint, for the message.
        first: whether of the first center.
    """
    _check(facts, {**_CENTER, **(_PROGRESS if first else {})}, _OPTIONAL, name)
    leases = facts["leases"]
    if leases is not None and leases["committed"] > facts["steps"]:
        raise ValueError(f"{name} says that {leases['committed']} steps are committed, but that c has {facts['steps']}")


def check_worker(facts: Mapping[str, Any], name: str) -> None:
    """The same for a worker's file."""
    _check(facts, _WORKER, {}, name)


def _check(facts: Mapping[str, Any], needed: Mapping[str, Check], optional: Mapping[str, Check], name: str) -> None:
    for fact, is_valid in {**needed, **optional}.items():
        if fact not in facts and fact in needed:
            raise ValueError(f"{name} does not say {fact!r}: it is no checkpoint of this kind")
        if fact in facts and not is_valid(facts[fact]):
            raise ValueError(f"{name} says that {fact!r} is {repr(facts[fact])[:80]}, which cannot be")


def check_arrays(shapes: Shapes, needed: tuple[str, ...], size: int, name: str) -> None:
    """Raise ValueError unless a file's arrays are `needed` and slots, each of `size` numbers; before they are read."""
    if missing := [array for array in needed if array not in shapes]:
        raise ValueError(f"{name} has no {missing[0]!r}")
    if len(shapes) > _MOST_ARRAYS:
        raise ValueError(f"{name} has {len(shapes)} arrays")
    for array, (dtype, shape) in shapes.items():
        if array not in (*needed, "residual") and not array.startswith("slot/"):
            raise ValueError(f"{name} has an array {array[:40]!r}, which cannot be")
        if shape != (size,) or dtype not in ("F32", "F64"):
            raise ValueError(f"{name}: {array[:40]!r} is {dtype} of shape {shape}, but should be {size} numbers")
