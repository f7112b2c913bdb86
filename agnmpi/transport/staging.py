"""The buffer that MPI sees: the vector itself (direct), or pinned host memory (staged).

A wire is a buffer, not a transport: each transport holds one and asks it before and after every transfer.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ..arrays.backend import Array, namespace, on_host, synchronize

CHUNK = 4 << 20  # bytes of a staged copy: one is copied while the previous one is sent
# Bytes of one call of MPI. Where a library lacks the calls of MPI-4 with large counts, a count is a C int, and one of
# 2^31 elements or more is refused; below 1 GB no count can be, whatever the dtype.
MAX_CALL_BYTES = 1 << 30


class Wire(Protocol):
    """The buffer that MPI uses in the transfers of a vector."""

    name: str

    def outgoing(self, x: Array) -> Iterator[Array]:
        """Yield, piece by piece and in order, what MPI may send for `x`: all device work on it is done."""

    def incoming(self, x: Array) -> Array:
        """Return the memory into which MPI may receive data for `x`."""

    def cuts(self, x: Array) -> list[slice]:
        """Where `outgoing` cuts `x`; the best pieces for `arrived`."""

    def arrived(self, x: Array, part: slice) -> None:
        """The data for `x[part]` have arrived: begin to copy them into place."""

    def settle(self, x: Array) -> None:
        """Wait until all data that have arrived are in `x`."""


class Direct:
    """The vector itself goes to MPI, on the host or (with CUDA-aware MPI) on the device.

    The stream is synchronised first: MPI ignores streams, and without it the data would be wrong silently.
    """

    name = "direct"

    def outgoing(self, x: Array) -> Iterator[Array]:
        """Synchronise, and yield `x`."""
        synchronize(x)
        yield x

    def incoming(self, x: Array) -> Array:
        """Synchronise, since a kernel may still read the old `x`, and return `x`."""
        synchronize(x)
        return x

    def cuts(self, x: Array) -> list[slice]:
        """One piece."""
        return [slice(0, x.size)]

    def arrived(self, x: Array, part: slice) -> None:
        """Nothing to do: data arrive in place."""

    def settle(self, x: Array) -> None:
        """Nothing to do."""


class Staged:
    """Through one pinned host buffer each way, in chunks, so that copy and wire overlap; works with any MPI."""

    name = "staged"

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._out: Array | None = None
        self._in: Array | None = None
        self._events: list[Any] = []  # one for each chunk of the longest vector so far

    def outgoing(self, x: Array) -> Iterator[Array]:
        """Queue the copies of all chunks to pinned memory; yields each pinned chunk as soon as its copy is done.

        Once this has returned, work queued later on the same stream may change `x`. The chunks are valid, and must be
        consumed, until the next call.
        """
        self._out = _pinned(x, self._out)
        buffer, parts, event = self._out.view(x.dtype), self.cuts(x), namespace(x).cuda.Event
        self._events += [event(disable_timing=True) for _ in range(len(parts) - len(self._events))]
        for part, copied in zip(parts, self._events):
            x[part].get(out=buffer[part], blocking=False)  # type: ignore[attr-defined]
            copied.record()
        return self._copied(buffer, parts)

    def _copied(self, buffer: Array, parts: list[slice]) -> Iterator[Array]:
        for part, copied in zip(parts, self._events):
            copied.synchronize()
            yield buffer[part]

    def incoming(self, x: Array) -> Array:
        """Return pinned memory as long as `x`."""
        self._in = _pinned(x, self._in)
        return self._in.view(x.dtype)[: x.size]

    def cuts(self, x: Array) -> list[slice]:
        """Chunks."""
        size = max(1, self._chunk // x.dtype.itemsize)
        return [slice(at, min(at + size, x.size)) for at in range(0, x.size, size)]

    def arrived(self, x: Array, part: slice) -> None:
        """Queue the copy of the pinned chunk into `x`."""
        assert self._in is not None
        # With a stream given the copy is asynchronous.
        x[part].set(self._in.view(x.dtype)[part], stream=namespace(x).cuda.get_current_stream())  # type: ignore[attr-defined]

    def settle(self, x: Array) -> None:
        """Wait for the copies: the next receive may overwrite the pinned memory."""
        synchronize(x)


def make_wire(x: Array, name: str = "staged") -> Wire:
    """Return a new wire for vectors like `x`: `name` ("staged" or "direct") on a device, direct on the host."""
    return Direct() if on_host(x) or name == "direct" else Staged()


def cut(x: Array, nbytes: int) -> Iterator[Array]:
    """Cut `x` into pieces of at most `nbytes` bytes."""
    size = max(1, nbytes // x.dtype.itemsize)
    return (x[at : at + size] for at in range(0, x.size, size))


def _pinned(x: Array, before: Array | None) -> Array:
    """Bytes of page-locked host memory: `before`, if `x` fits, vectors and encoded ones alike; else room for `x`.

    A multiple of 8, and no more: CuPy's pool rounds up to a power of two.
    """
    if before is not None and before.size >= x.nbytes:
        return before
    nbytes = -(-x.nbytes // 8) * 8
    cuda = namespace(x).cuda
    memory: Any = cuda.PinnedMemoryPointer(cuda.PinnedMemory(nbytes), 0)
    return np.frombuffer(memory, np.uint8, nbytes)
