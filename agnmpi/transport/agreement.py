"""What ranks must agree on before training: refusals that every rank hears of, and facts that must be the same."""

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from ..core.backoff import wait_until

T = TypeVar("T")


class ConfigError(ValueError):
    """A refusal that every rank knows of, with the same text; raised before any training."""


def allgather(comm: MPI.Comm, text: str) -> list[str]:
    """Gather a string of every rank, by rank; no pickles."""
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.empty(comm.size, np.int64)
    wait_until(comm.Iallgather(np.array([mine.size]), sizes).Test)
    # Padded: mpi4py 4.1 lets go of the lists of counts that Iallgatherv may still read.
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: mine.size] = mine
    everything = np.empty((comm.size, padded.size), np.uint8)
    wait_until(comm.Iallgather(padded, everything).Test)
    return [row[:size].tobytes().decode() for row, size in zip(everything, sizes)]


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
    """
    made, refusal = None, ""
    try:
        made = make()
    except (ValueError, TypeError, OSError, ImportError) as error:
        refusal = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
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
    """Raise the same ConfigError on all ranks if `facts` differ between them, naming the ranks that differ."""
    everyone = [json.loads(text) for text in allgather(comm, json.dumps(dict(facts)))]
    problems = []
    for key in dict.fromkeys(key for theirs in everyone for key in theirs):
        groups: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            groups.setdefault(theirs.get(key, "missing"), []).append(rank)
        if len(groups) > 1:
            said = "; ".join(f"{value} on {ranks_in_words(ranks)}" for value, ranks in groups.items())
            problems.append(f"{key} differs between ranks: {said}")
    if problems:
        shown = problems[:5] + ([f"… and {len(problems) - 5} more"] if len(problems) > 5 else [])
        raise ConfigError("\n".join(shown))


def require_equal_total(comm: MPI.Comm, total: int | None) -> None:
    """Raise ValueError on all ranks if they do not ask for the same number of steps."""
    said = -1 if total is None else total
    extremes = np.array([said, -said])
    wait_until(comm.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX).Test)
    if extremes[0] != -extremes[1]:
        raise ValueError(f"the ranks ask for different numbers of steps, from {-extremes[1]} to {extremes[0]}")
