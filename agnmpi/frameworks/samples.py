"""Samples of a solver: a reservoir of them, and how they come from ranks that do not train."""

import io
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from mpi4py import MPI

from ..transport.agreement import failed_ranks
from ..transport.chunks import PIECE
from ..transport.peers import peer_failed

Samples: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_TAG = 1
_IN_FLIGHT = 16  # messages of a sender that nobody has taken yet
_DRAWN, _FAR = 256, 2.0**40  # kept pairs drawn at once; pairs between two of them, at most


def _pairs(x: Samples, y: Samples) -> tuple[Samples, Samples]:
    x, y = np.asarray(x), np.asarray(y)
    if not x.ndim or not y.ndim or len(x) != len(y):
        raise ValueError(f"put takes x (m, …) and y (m, …) of m samples, not shapes {x.shape} and {y.shape}")
    return x, y


class Reservoir:
    """At most `capacity` pairs (x, y) of all that were put: after m of them each is held with probability capacity/m.

    A solver's newest states are much alike; who trains on these alone forgets the old ones.

    Args:
        capacity: pairs held, at least 1.
        rng: draws which are kept, and the batches.

    Raises:
        ValueError: for a capacity below 1.

    Source: Li 1994, algorithm L (10.1145/198429.198435); for in-situ training Meyer et al. 2023, arXiv:2309.16645.

    >>> reservoir = Reservoir(10, np.random.default_rng(0))
    >>> reservoir.put(np.arange(100.0).reshape(100, 1), np.arange(100.0))
    >>> reservoir.seen, len(reservoir)
    (100, 10)
    >>> x, y = reservoir.batch(3)
    >>> x.shape, bool((x[:, 0] == y).all())
    ((3, 1), True)
    """

    def __init__(self, capacity: int, rng: np.random.Generator) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity of a reservoir must be at least 1, not {capacity}")
        self.capacity, self.seen = capacity, 0  # seen: pairs put so far
        self._rng = rng
        self._held: tuple[Samples, Samples] | None = None
        # Of the pairs that come when it is full, those that it keeps next: their numbers, ascending, and places.
        self._numbers = self._places = np.empty(0, np.int64)
        self._log_w, self._last = 0.0, capacity - 1  # of the last of them
        self._draw()
        self._next = int(self._numbers[0])

    def __len__(self) -> int:
        """Number of pairs held."""
        return min(self.seen, self.capacity)

    def put(self, x: Samples, y: Samples) -> None:
        """Offer pairs x (m, …), y (m, …): what is kept is copied. Raises ValueError for shapes that do not fit."""
        x, y = _pairs(x, y)
        if self._held is None:
            self._held = tuple(np.empty((self.capacity, *a.shape[1:]), a.dtype) for a in (x, y))  # type: ignore[assignment]
        assert self._held is not None
        held_x, held_y = self._held
        for name, held, a in (("x", held_x, x), ("y", held_y, y)):
            if held.shape[1:] != a.shape[1:]:
                raise ValueError(f"samples {name} had shape {held.shape[1:]}, and have {a.shape[1:]} now")
        first, self.seen = self.seen, self.seen + len(x)
        if first < self.capacity:  # the first of all have places of their own
            free = self.capacity - first
            held_x[first : self.seen], held_y[first : self.seen] = x[:free], y[:free]
        while self.seen > self._next:
            kept = int(self._numbers.searchsorted(self.seen))
            places, rows = self._places[:kept], self._numbers[:kept] - first
            held_x[places], held_y[places] = x[rows], y[rows]  # of several for one place the last stays
            self._numbers, self._places = self._numbers[kept:], self._places[kept:]
            if not len(self._numbers):
                self._draw()
            self._next = int(self._numbers[0])

    def _draw(self) -> None:
        """Draw the next that are kept: algorithm L skips the others."""
        steps, skips = self._rng.standard_exponential((2, _DRAWN))
        log_w = self._log_w - np.cumsum(steps) / self.capacity
        gaps = np.minimum(skips / -np.log1p(-np.exp(log_w)), _FAR) // 1 + 1
        self._numbers = self._last + np.cumsum(gaps.astype(np.int64))
        self._places = self._rng.integers(self.capacity, size=_DRAWN)
        self._log_w, self._last = float(log_w[-1]), int(self._numbers[-1])

    def batch(self, size: int) -> tuple[Samples, Samples]:
        """Draw `size` pairs, with replacement: copies x (size, …), y (size, …)."""
        if self._held is None or not self.seen:
            raise ValueError("the reservoir is empty: put samples first")
        chosen = self._rng.integers(0, len(self), size)
        x, y = self._held
        return x[chosen], y[chosen]


class Sender:
    """Sends samples to the ranks that train, and never waits: what these do not take in time is dropped, and counted.

    A synchronous send is done when its receive has begun: so few are under way, and no buffer of MPI fills.

    Args:
        comm: ours, for samples alone.
        trainers: their ranks in it.
        rng: draws what is sent where not all can be.
    """

    def __init__(self, comm: MPI.Comm, trainers: Sequence[int], rng: np.random.Generator) -> None:
        self.offered = self.dropped = 0  # samples
        self._comm, self._rng = comm, rng
        # Of each rank that trains, in turn: the sends under way, their memory and number of samples.
        self._sent: dict[int, list[tuple[MPI.Request, bytes, int]]] = {rank: [] for rank in trainers}
        self._abandoned: list[object] = []  # sends to the dead: MPI may still read their memory

    def put(self, x: Samples, y: Samples) -> None:
        """Offer pairs x (m, …), y (m, …): those that are sent are copied. Raises ValueError for shapes that differ."""
        x, y = _pairs(x, y)
        self.offered += len(x)
        rows = max(1, PIECE * len(x) // max(1, x.nbytes + y.nbytes))  # of a message
        most = rows * (_IN_FLIGHT - self.poll()) if self._sent else 0
        if len(x) > most:  # of all places alike: not the first, which may be one side of the solver's domain
            self.dropped += len(x) - most
            chosen = np.sort(self._rng.choice(len(x), most, replace=False))
            x, y = x[chosen], y[chosen]
        for at in range(0, len(x), rows):
            if self._sent:
                rank = min(self._sent, key=lambda rank: len(self._sent[rank]))
                self._send(rank, x[at : at + rows], y[at : at + rows])

    def _send(self, rank: int, *pair: Samples) -> None:
        file = io.BytesIO()
        for array in pair:
            np.save(file, array, allow_pickle=False)
        memory, count = file.getvalue(), len(pair[0]) if pair else 0
        under_way = self._sent[rank] = self._sent.pop(rank)  # last in its turn
        try:
            under_way.append((self._comm.Issend(memory, rank, _TAG), memory, count))
        except MPI.Exception as error:
            self.dropped += count
            self._lose(rank, error)

    def _lose(self, rank: int, error: MPI.Exception) -> None:
        """That rank has died (ULFM), else raise `error`."""
        if not peer_failed(error):
            raise error
        self._abandoned.append(lost := self._sent.pop(rank))
        self.dropped += sum(count for _, _, count in lost)

    def end(self) -> None:
        """Tell all that no more samples come."""
        for rank in list(self._sent):
            self._send(rank)

    def poll(self) -> int:
        """Make progress; the number of messages that nobody has taken yet."""
        for rank, under_way in list(self._sent.items()):
            try:
                self._sent[rank] = [sent for sent in under_way if not sent[0].Test()]
            except MPI.Exception as error:
                self._lose(rank, error)
        return sum(map(len, self._sent.values()))


class Receiver:
    """Puts the samples that others send into this rank's reservoir, and never waits.

    Args:
        comm: as of the `Sender`.
        senders: their ranks in it.
        reservoir: of this rank.
    """

    def __init__(self, comm: MPI.Comm, senders: Sequence[int], reservoir: Reservoir) -> None:
        self._comm, self._senders, self._reservoir = comm, set(senders), reservoir
        self._coming: list[tuple[int, MPI.Request, bytearray]] = []
        self._abandoned: list[object] = []  # receives from the dead: MPI may still write to their memory
        self._status = MPI.Status()

    @property
    def ended(self) -> bool:
        """Whether no more samples come."""
        return not (self._senders or self._coming)

    def poll(self) -> None:
        """Take what has come."""
        try:
            probe = partial(self._comm.Improbe, MPI.ANY_SOURCE, _TAG, self._status)
            while len(self._coming) < _IN_FLIGHT and (message := probe()):
                memory = bytearray(self._status.Get_count())
                self._coming.append((self._status.Get_source(), message.Irecv(memory), memory))
        except MPI.Exception as error:
            if not peer_failed(error):
                raise
            self._bury()
        coming, self._coming = self._coming, []
        self._coming = [each for each in coming if not self._has_come(*each)]

    def _has_come(self, rank: int, request: MPI.Request, memory: bytearray) -> bool:
        try:
            if not request.Test():
                return False
        except MPI.Exception as error:
            if not peer_failed(error):
                raise
            self._abandoned.append((request, memory))
            return True
        if not memory:
            self._senders.discard(rank)
            return True
        file = io.BytesIO(memory)
        try:
            self._reservoir.put(np.load(file, allow_pickle=False), np.load(file, allow_pickle=False))
        except ValueError as error:
            raise ValueError(f"from rank {rank}: {error}") from None
        return True

    def _bury(self) -> None:
        """Some rank has died (ULFM): wait for no samples of it, and let the probe work again."""
        ranks = failed_ranks(self._comm)
        self._senders.difference_update(ranks)
        self._comm.Ack_failed(len(ranks))
