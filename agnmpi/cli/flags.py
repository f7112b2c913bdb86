"""Flags of the command line, made from the fields of a dataclass of options."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from functools import partial
from typing import Any

from ..simulation.timing import Timing
from ..training.config import Config

_GROUPS = {
    "rule": "rule of exchange",
    "transport": "transport",
    "optimizer": "optimizers",
    "run": "work",
    "output": "files and display",
    "checkpoint": "checkpoints and losses",
    "time": "virtual time",
}


def add_fields(
    command: Any, options: type[Config] | type[Timing], without: Sequence[str] = (), hidden: Sequence[str] = ()
) -> None:
    """Add an option for each field of the dataclass `options` but tables; groups in `hidden` are not shown."""
    used = dict.fromkeys(f.metadata["group"] for f in fields(options))
    groups = {name: command.add_argument_group(_GROUPS[name]) for name in used if name in _GROUPS}
    for f in fields(options):
        meta = f.metadata
        if f.name == "problem" or f.name.endswith("options") or f.name in without:
            continue
        default = f"{f.default:g}" if isinstance(f.default, float) else f.default
        is_shown = default not in (None, "") and meta["kind"] is not bool
        text = f"{meta['help']} [default: {default}]" if is_shown else meta["help"]
        shown = argparse.SUPPRESS if meta["group"] in hidden else text.replace("%", "%%")
        names = [(f.name, shown), *((other, argparse.SUPPRESS) for other in meta["also"])]
        for name, help_text in names:
            _add_flag(groups[meta["group"]], name, f, help_text)


def _add_flag(group: Any, name: str, f: Field[Any], text: str) -> None:
    dest, default, meta = f.name, f.default, f.metadata
    flag = name.replace("_", "-")
    if meta["kind"] is bool:
        shown = {is_on: argparse.SUPPRESS if is_on is default else text for is_on in (True, False)}  # over a file
        group.add_argument(f"--{flag}", dest=dest, action="store_true", help=shown[True])
        group.add_argument(f"--no-{flag}", dest=dest, action="store_false", help=shown[False])
    elif meta["choices"]:
        canonical, names, metavar = partial(_canonical, meta["aliases"]), ",".join(meta["choices"]), None
        if len(f"  --{flag} {{{names}}}") > 80 and text is not argparse.SUPPRESS:
            metavar, text = "NAME", f"{text}: {names.replace(',', ', ')}"
        group.add_argument(f"--{flag}", dest=dest, type=canonical, choices=meta["choices"], metavar=metavar, help=text)
    else:
        metavar = {int: "N", float: "X"}.get(meta["kind"], "DIR" if dest in ("run_dir", "resume") else "TEXT")
        value = partial(_value, meta["kind"], meta["words"])
        value.__name__ = " or ".join((meta["kind"].__name__, *meta["words"]))  # type: ignore[attr-defined]  # for argparse's messages
        group.add_argument(f"--{flag}", dest=dest, type=value, metavar="|".join((metavar, *meta["words"])), help=text)


def _canonical(aliases: Mapping[str, str], value: str) -> str:
    return aliases.get(value, value)


def _value(kind: type, words: Sequence[str], value: str) -> Any:
    return value if value in words else kind(value)
