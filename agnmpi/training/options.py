"""How options are declared, once for files, the command line and their checks."""

from collections.abc import Mapping, Sequence
from dataclasses import field
from math import isfinite
from typing import Any


def option(default: Any, group: str, text: str, kind: type = str, choices: Sequence[str] = ()) -> Any:
    """A field of a dataclass that is an option, with what the command line and the checks need."""
    metadata = {"group": group, "help": text, "kind": kind, "choices": tuple(choices)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_type(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that the field `name` cannot hold."""
    kind = metadata["kind"]
    if name.endswith("options"):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a table, not {value!r}")
        return
    if value is None:
        return
    good = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not good:
        raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}")
    if kind is float and not isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(metadata['choices'])}, not {value!r}")


def at_least(name: str, value: float, least: int) -> None:
    """Raise ValueError for a value below `least`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
