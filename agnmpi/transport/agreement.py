"""What ranks must agree on before training: refusals that every rank hears of, and facts that must be the same.

Agreeing costs a few bytes a rank, however many there are and however long their words: digests are compared first, and
words travel only where digests differ.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from ..core.backoff import wait_until

T = TypeVar("T")
Words = np.ndarray[Any, np.dtype[np.int64]]
_FEW = 16  # so many different strings are sent one by one, each once


class ConfigError(ValueError):
    """A refusal that every rank knows of, with the same text; raised before any training."""


def digest(text: str) -> int:
    """64 bits that tell a string from others, as a signed number."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _differ(comm: MPI.Comm, numbers: Sequence[int]) -> list[bool]:
    """Which of `numbers` differ between ranks; collective, with as many on every rank."""
    mine = np.array(numbers, np.int64)
    # ~ turns the order of all numbers around, and overflows with none: the greatest of ~k is that of the least k.
    extremes = np.stack([mine, ~mine])
    wait_until(comm.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX).Test)
    return [bool(most != ~least) for most, least in extremes.T]


def equal_on_all(comm: MPI.Comm, text: str) -> bool:
    """Whether all ranks hold the same string; collective, 16 bytes a rank."""
    return not any(_differ(comm, [digest(text)]))


def allgather(comm: MPI.Comm, text: str) -> list[str]:
    """Gather a string of every rank, by rank; no pickles.

    Where all are the same nothing travels but digests; where there are few different ones, each travels once.
    """
    if equal_on_all(comm, text):
        return [text] * comm.size
    mine = np.frombuffer(text.encode(), np.uint8)
    seen = np.empty((comm.size, 2), np.int64)
    wait_until(comm.Iallgather(np.array([digest(text), mine.size]), seen).Test)
    digests, sizes = seen.T.tolist()
    first = {d: digests.index(d) for d in dict.fromkeys(digests)}  # the lowest rank that holds it
    if len(first) <= _FEW:
        words = {d: _broadcast(comm, mine, rank, sizes[rank]) for d, rank in first.items()}
        return [words[d] for d in digests]
    # Padded: mpi4py 4.1 lets go of the lists of counts that Iallgatherv may still read.
    padded = np.zeros(max(sizes), np.uint8)
    padded[: mine.size] = mine
    everything = np.empty((comm.size, padded.size), np.uint8)
    wait_until(comm.Iallgather(padded, everything).Test)
    return [row[:size].tobytes().decode() for row, size in zip(everything, sizes)]


def _broadcast(comm: MPI.Comm, mine: np.ndarray[Any, np.dtype[np.uint8]], root: int, size: int) -> str:
    text = mine.copy() if comm.rank == root else np.empty(size, np.uint8)
    wait_until(comm.Ibcast(text, root).Test)
    return text.tobytes().decode()


def ranks_in_words(ranks: list[int]) -> str:
    """Name ranks.

    >>> ranks_in_words([2]), ranks_in_words([0, 1, 2, 5])
    ('rank 2', 'ranks 0-2, 5')
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


def raise_on_all(comm: MPI.Comm, make: Callable[[], T]) -> T:
    """Call `make` on every rank; if it refuses on any, raise the same ConfigError, naming ranks, on all.

    A refusal is a ValueError, TypeError, OSError or ImportError; whatever else is raised passes through.

    Args:
        comm: the ranks; collective.
        make: what may refuse.

    Returns:
        What `make` returned on this rank.

    Raises:
        ConfigError: with each text of a refusal, and the ranks that it is of unless all have it.
    """
    made, refusal = None, ""
    try:
        made = make()
    except (ValueError, TypeError, OSError, ImportError) as error:
        refusal = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        refusal = refusal or type(error).__name__
    refusals = allgather(comm, refusal)
    if any(refusals):
        texts = dict.fromkeys(text for text in refusals if text)
        everywhere = len(texts) == 1 and all(refusals)
        lines = [
            text if everywhere else f"{text} ({ranks_in_words([r for r, t in enumerate(refusals) if t == text])})"
            for text in texts
        ]
        raise ConfigError("\n".join(lines))
    return made  # type: ignore[return-value]


def require_equal(comm: MPI.Comm, facts: Mapping[str, str]) -> None:
    """Refuse facts that differ between ranks.

    Args:
        comm: the ranks; collective.
        facts: values by what they are of.

    Raises:
        ConfigError: the same on all ranks, with the values and the ranks that hold them.
    """
    if equal_on_all(comm, json.dumps(dict(facts), sort_keys=True)):
        return
    names = sorted(facts)
    if equal_on_all(comm, json.dumps(names)):  # then only those that differ need words
        differing = dict(zip(names, _differ(comm, [digest(facts[name]) for name in names])))
        facts = {name: value for name, value in facts.items() if differing[name]}
    holders = dict[str, list[int]]()
    for rank, text in enumerate(allgather(comm, json.dumps(dict(facts)))):
        holders.setdefault(text, []).append(rank)
    everyone = [(json.loads(text), ranks) for text, ranks in holders.items()]
    problems = []
    for key in dict.fromkeys(key for theirs, _ in everyone for key in theirs):
        groups = dict[str, list[int]]()
        for theirs, ranks in everyone:
            groups.setdefault(theirs.get(key, "missing"), []).extend(ranks)
        if len(groups) > 1:
            said = [f"{value} on {ranks_in_words(sorted(ranks))}" for value, ranks in groups.items()]
            problems.append(f"{key} differs between ranks: {'; '.join(_first(said))}")
    if problems:
        raise ConfigError("\n".join(_first(problems)))


def _first(lines: list[str], most: int = 5) -> list[str]:
    return lines[:most] + ([f"… and {len(lines) - most} more"] if len(lines) > most else [])


def require_equal_total(comm: MPI.Comm, total: int | None) -> None:
    """Raise ValueError on all ranks if they do not ask for the same number of steps."""
    said = -1 if total is None else total
    extremes = np.array([said, -said])
    wait_until(comm.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX).Test)
    if extremes[0] != -extremes[1]:
        raise ValueError(f"the ranks ask for different numbers of steps, from {-extremes[1]} to {extremes[0]}")
