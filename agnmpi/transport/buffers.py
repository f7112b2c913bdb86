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
    """The message buffers of a center, allocated when first needed.

    `like`: (n,) c; `limit`: how many there may be, besides those in use by silent workers; `allocated`: how many there
        are.
    """

    def __init__(self, like: Array, limit: int, wire: str) -> None:
        self._like, self._limit, self._wire = like, limit, wire
        self._free: list[Buffer] = []
        self.allocated = 0

    def acquire(self, lent: int) -> Buffer | None:
        """Return a buffer, or None if all are in use; `lent`: how many are in use by silent workers."""
        if self._free:
            return self._free.pop()
        if self.allocated - lent >= self._limit:
            return None
        self.allocated += 1
        return Buffer(empty_like(self._like), make_wire(self._like, self._wire))

    def release(self, buffer: Buffer, lent: int) -> None:
        """Make `buffer` free again, or drop it if it only replaced one that a silent worker has returned since."""
        if self.allocated - lent > self._limit:
            self.allocated -= 1
        else:
            self._free.append(buffer)

    def abandon(self) -> None:
        """Do not count one that stays with a dead worker; another may be allocated instead."""
        self.allocated -= 1
