"""The vectors at a p2p center: c itself, and the message buffers beside it."""

from collections.abc import Iterator
from itertools import tee

from ..arrays.backend import Array, empty_like
from .chunks import PIECE
from .staging import Wire, cut, make_wire


class Buffer:
    """A vector at the center, the wire that carries it, and the number of replies under way that read it."""

    def __init__(self, x: Array, wire: Wire) -> None:
        self.x, self.wire, self.readers = x, wire, 0
        self._copied: Iterator[Array] = iter(())  # what the wire gives out for the x of now, from the beginning

    def outgoing(self) -> Iterator[Array]:
        """Pieces to send; x keeps still while they are read."""
        if not self.readers:
            self._copied = self.wire.outgoing(self.x)
        self._copied, chunks = tee(self._copied)  # each reader waits for the copies of the chunks that it comes to
        return (piece for chunk in chunks for piece in cut(chunk, PIECE))


class Buffers:
    """The message buffers of a center, made when they are first needed.

    `like`: (n,) c; `limit`: how many there may be, besides those that silent workers hold. `made`: how many there are.
    """

    def __init__(self, like: Array, limit: int, wire: str) -> None:
        self._like, self._limit, self._wire = like, limit, wire
        self._free: list[Buffer] = []
        self.made = 0

    def take(self, lent: int) -> Buffer | None:
        """Return a buffer, or None if all are in use; `lent`: how many silent workers hold now."""
        if self._free:
            return self._free.pop()
        if self.made - lent >= self._limit:
            return None
        self.made += 1
        return Buffer(empty_like(self._like), make_wire(self._like, self._wire))

    def give_back(self, buffer: Buffer, lent: int) -> None:
        """Take `buffer` back; it is freed if it was one more, made in the place of one that is back by now."""
        if self.made - lent > self._limit:
            self.made -= 1
        else:
            self._free.append(buffer)

    def give_up(self) -> None:
        """Count one no longer: it stays with a dead worker, and another may take its place."""
        self.made -= 1
