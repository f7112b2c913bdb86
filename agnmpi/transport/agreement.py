"""What ranks must agree on before training: errors raised on every rank, and values that must be equal.

This costs a few bytes per rank, whatever their number and the length of the texts: digests are compared first, and
texts are sent only where digests differ.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from ..core.backoff import wait_until

T = TypeVar("T")


class ConfigError(ValueError):
    """An invalid configuration, raised on every rank with the same text, before any training."""


def digest(text: str) -> int:
    """A 64-bit hash of a string, as a signed number."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _differ(comm: MPI.Comm, numbers: Sequence[int]) -> list[bool]:
    """Which of `numbers` differ between ranks; collective, with as many on every rank."""
    values = np.array(numbers, np.int64)
    # ~ reverses the order of all int64 without overflow: the maximum of ~k belongs to the minimum of k.
    extremes = np.stack([values, ~values])
    wait_until(comm.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX).Test)
    return [bool(most != ~least) for most, least in extremes.T]


def equal_on_all(comm: MPI.Comm, text: str) -> bool:
    """Whether all ranks have the same string; collective, 16 bytes per rank."""
    return not any(_differ(comm, [digest(text)]))


def allgather(comm: MPI.Comm, text: str, few: int = 16) -> list[str]:
    """Gather a string of every rank, by rank; no pickles.

    Where all are equal only digests are sent; up to `few` different ones are broadcast one by one, each once.
    """
    if equal_on_all(comm, text):
        return [text] * comm.size
    encoded = np.frombuffer(text.encode(), np.uint8)
    gathered = np.empty((comm.size, 2), np.int64)
    wait_until(comm.Iallgather(np.array([digest(text), encoded.size]), gathered).Test)
    digests, sizes = gathered.T.tolist()
    first = {d: digests.index(d) for d in dict.fromkeys(digests)}  # the lowest rank that has it
    if len(first) <= few:
        texts = {d: _broadcast(comm, encoded, rank, sizes[rank]) for d, rank in first.items()}
        return [texts[d] for d in digests]
    # Padded: mpi4py 4.1 does not keep the lists of counts that Iallgatherv may still read.
    padded = np.zeros(max(sizes), np.uint8)
    padded[: encoded.size] = encoded
    rows = np.empty((comm.size, padded.size), np.uint8)
    wait_until(comm.Iallgather(padded, rows).Test)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def _broadcast(comm: MPI.Comm, encoded: np.ndarray[Any, np.dtype[np.uint8]], root: int, size: int) -> str:
    text = encoded.copy() if comm.rank == root else np.empty(size, np.uint8)
    wait_until(comm.Ibcast(text, root).Test)
    return text.tobytes().decode()


def failed_ranks(comm: MPI.Comm) -> list[int]:
    """The ranks of `comm` that MPI knows to be dead; needs ULFM."""
    failed, group = comm.Get_failed(), comm.Get_group()
    ranks = failed.Translate_ranks(list(range(failed.size)), group)
    failed.Free()
    group.Free()
    return ranks


def format_ranks(ranks: list[int]) -> str:
    """Ranks as text.

    >>> format_ranks([2]), format_ranks([0, 1, 2, 5])
    ('rank 2', 'ranks 0-2, 5')
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def raise_on_all(comm: MPI.Comm, call: Callable[[], T]) -> T:
    """Run `call` on every rank; if it fails on any, raise the same ConfigError, naming ranks, on all.

    A failure is a ValueError, TypeError, OSError or ImportError; other exceptions pass through.

    Args:
        comm: the ranks; collective.
        call: what may fail.

    Returns:
        What `call` returned on this rank.

    Raises:
        ConfigError: with each different message, and its ranks unless all have it.
    """
    result, failure = None, ""
    try:
        result = call()
    except (ValueError, TypeError, OSError, ImportError) as error:
        failure = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        failure = failure or type(error).__name__
    failures = allgather(comm, failure)
    if any(failures):
        texts = dict.fromkeys(text for text in failures if text)
        everywhere = len(texts) == 1 and all(failures)
        lines = [
            text if everywhere else f"{text} ({format_ranks([r for r, t in enumerate(failures) if t == text])})"
            for text in texts
        ]
        raise ConfigError("\n".join(lines))
    return result  # type: ignore[return-value]


def require_equal(comm: MPI.Comm, facts: Mapping[str, str]) -> None:
    """Raise ConfigError on all ranks if any of `facts` differs between them.

    Args:
        comm: the ranks; collective.
        facts: values by name.

    Raises:
        ConfigError: the same on all ranks, with the values and the ranks that have them.
    """
    if equal_on_all(comm, json.dumps(dict(facts), sort_keys=True)):
        return
    names = sorted(facts)
    if equal_on_all(comm, json.dumps(names)):  # then only those that differ are sent
        differing = dict(zip(names, _differ(comm, [digest(facts[name]) for name in names])))
        facts = {name: value for name, value in facts.items() if differing[name]}
    holders = dict[str, list[int]]()
    for rank, text in enumerate(allgather(comm, json.dumps(dict(facts)))):
        holders.setdefault(text, []).append(rank)
    groups_of_facts = [(json.loads(text), ranks) for text, ranks in holders.items()]
    problems = []
    for key in dict.fromkeys(key for values, _ in groups_of_facts for key in values):
        groups = dict[str, list[int]]()
        for values, ranks in groups_of_facts:
            groups.setdefault(values.get(key, "missing"), []).extend(ranks)
        if len(groups) > 1:
            texts = [f"{value} on {format_ranks(sorted(ranks))}" for value, ranks in groups.items()]
            problems.append(f"{key} differs between ranks: {'; '.join(_first(texts))}")
    if problems:
        raise ConfigError("\n".join(_first(problems)))


def _first(lines: list[str], most: int = 5) -> list[str]:
    return lines[:most] + ([f"… and {len(lines) - most} more"] if len(lines) > most else [])


def require_equal_total(comm: MPI.Comm, total: int | None) -> None:
    """Raise ValueError on all ranks if they do not ask for the same number of steps."""
    number = -1 if total is None else total
    extremes = np.array([number, -number])
    wait_until(comm.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX).Test)
    if extremes[0] != -extremes[1]:
        raise ValueError(f"the ranks ask for different numbers of steps, from {-extremes[1]} to {extremes[0]}")
