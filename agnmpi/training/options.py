"""Declarations of options, used by files, the command line, checks and documentation."""

import difflib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from datetime import date, time
from math import log10
from pathlib import Path
from sys import float_info
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
# An invalid combination: its predicate, and a message, in which {name} is the value of an option.
Refusal: TypeAlias = tuple[Callable[[T], bool], str]


_MOST = 2**62  # of an integer; of another number, what is finite


def option(
    default: Any,
    group: str,
    text: str,
    kind: type = str,
    choices: Sequence[str] = (),
    *,
    least: float | None = None,
    most: float | None = None,
    positive: bool = False,
    also: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    words: Sequence[str] = (),
) -> Any:
    """Declare a field of a dataclass that is an option.

    Args:
        default: default value; a dict makes a table.
        group: its heading on the command line.
        text: its help on the command line.
        kind: type of its values.
        choices: the only values, if any.
        least: smallest value.
        most: largest value; by default what a message can hold.
        positive: whether values must be above 0.
        also: hidden aliases of its name.
        aliases: hidden aliases of values, and what they stand for.
        words: further values, beside those of its kind.

    Returns:
        The field.
    """
    metadata = {
        "group": group,
        "help": text,
        "kind": kind,
        "choices": tuple(choices),
        "least": least,
        "most": _MOST if most is None else most,
        "positive": positive,
        "also": tuple(also),
        "aliases": dict(aliases or {}),
        "words": tuple(words),
    }
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(options: Any, refusals: Sequence[Refusal[Any]] = ()) -> None:
    """Raise ValueError for an invalid value of a field, or the first of `refusals` that applies."""
    for f in fields(options):
        _check_value(f.name, getattr(options, f.name), f.metadata)
    refuse(options, refusals)


def refuse(options: Any, refusals: Sequence[Refusal[Any]]) -> None:
    """Raise ValueError for the first of `refusals` that applies."""
    for applies, message in refusals:
        if applies(options):
            raise ValueError(message.format_map(vars(options)))


def _check_value(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    kind = metadata["kind"]
    if name.endswith("options"):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a table, not {value!r}")
        try:
            kept = _kept(value)
        except RecursionError as error:
            raise ValueError(f"{name} is nested too deeply") from error
        if not kept:
            what = "numbers, lists, tables and text in UTF-8 (a date in quotes)"
            raise ValueError(f"{name} must be {what}, not {value!a}")
        return
    if value is None or value in metadata["words"]:
        return
    valid = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not valid:
        words = "".join(f", or {word!r}" for word in metadata["words"])
        raise ValueError(f"{name} must be of type {kind.__name__}{words}, not {value!r}")
    if kind is str and not _is_utf8(value):
        raise ValueError(f"{name} must be UTF-8, not {value!a}")
    if kind is float and not abs(value) <= float_info.max:  # an integer of 400 digits is no float
        raise ValueError(f"{name} must be a finite number, not {_short(value)}")
    if kind is int and not abs(value) <= metadata["most"]:
        raise ValueError(f"{name} must be at most {metadata['most']}, not {_short(value)}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(metadata['choices'])}, not {value!r}")
    if metadata["least"] is not None and value < metadata["least"]:
        raise ValueError(f"{name} must be at least {metadata['least']}, not {value!r}")
    if metadata["positive"] and not value > 0:
        raise ValueError(f"{name} must be positive, not {value!r}")


def _kept(value: object) -> bool:
    """Whether files can hold `value`: not a date, nor text of bytes on the command line that are no UTF-8."""
    if isinstance(value, dict):
        return all(map(_kept, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_kept, value))
    return _is_utf8(value) if isinstance(value, str) else not isinstance(value, date | time)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: float) -> str:
    if isinstance(value, float) or abs(value) <= float_info.max:
        return repr(value)
    return f"{'-' * (value < 0)}10^{int(log10(abs(value)))} or so"  # Python refuses to print thousands of digits


def canonical(options: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with aliases of names and values replaced by those of the dataclass `options`.

    Raises ValueError if one option is given under two names.
    """
    names = {other: f for f in fields(options) for other in (f.name, *f.metadata["also"])}
    result, keys = dict[str, Any](), dict[str, str]()
    for key, value in values.items():
        if key not in names:
            result[key] = value
            continue
        f = names[key]
        if f.name in result:
            raise ValueError(f"{keys[f.name]} and {key} are one option: give one of them")
        keys[f.name] = key
        result[f.name] = f.metadata["aliases"].get(value, value) if isinstance(value, str) else value
    return result


def read_toml(path: str) -> dict[str, Any]:
    """Read a file of options; raises ValueError if it is not TOML, OSError if there is none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also of no UTF-8, and of a number with thousands of digits
        raise ValueError(f"{path} is no TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def overlay(options: type, values: dict[str, Any], sets: Sequence[str]) -> list[str]:
    """Apply each `KEY=VALUE` of `sets` to `values`, in place; returns the options that are named."""
    named = list[str]()
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r}: give KEY=VALUE")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        except RecursionError as error:
            raise ValueError(f"--set {key}=…: the value is nested too deeply") from error
        table, dot, inner = key.partition(".")
        if not dot:
            values |= (changed := canonical(options, {key: value}))
            named += changed
            continue
        before = values.get(table, {})
        if not isinstance(before, dict):
            raise ValueError(f"--set {item!r}: {table} is no table")
        values[table] = before | {inner: value}
    return named


def known(options: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return `values`; raises ValueError for a key that is not an option of the dataclass `options`."""
    names = [f.name for f in fields(options)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            raise ValueError(f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return values


def documented(options: type[T]) -> type[T]:
    """Append the options of the dataclass `options` to its docstring, under Args."""
    lines = []
    for f in fields(options):  # type: ignore[arg-type]
        default = "{}" if f.name.endswith("options") else repr(f.default)
        choices = f" One of {', '.join(f.metadata['choices'])}." if f.metadata["choices"] else ""
        lines.append(f"    {f.name}: {f.metadata['help']}.{choices} Default: {default}.")
    options.__doc__ = f"{options.__doc__}\n\nArgs:\n" + "\n".join(lines)
    return options
