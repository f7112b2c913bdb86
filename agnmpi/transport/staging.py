"""The buffer that MPI sees: the vector itself (direct), or pinned host memory (staged).

A wire is a buffer, not a transport: each transport holds one and asks it before and after every transfer.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ..arrays.backend import Array, namespace, on_host, synchronize

CHUNK = 4 << 20  # bytes of a staged copy: one is copied while the one before is on the wire


class Wire(Protocol):
    """Between a vector and the transfers of it."""

    name: str

    def outgoing(self, x: Array) -> Iterator[Array]:
        """Yield, piece by piece and in order, what MPI may send for `x`: all device work on it is done."""

    def incoming(self, x: Array) -> Array:
        """Return where MPI may receive what is meant for `x`."""

    def cuts(self, x: Array) -> list[slice]:
        """Where `outgoing` cuts `x`; the pieces in which `arrived` is best told."""

    def arrived(self, x: Array, part: slice) -> None:
        """What is meant for `x[part]` is there: begin to put it in place."""

    def settle(self, x: Array) -> None:
        """Wait until all that has arrived is in `x`."""


class Direct:
    """The vector itself goes to MPI, on the host or (with CUDA-aware MPI) on the device.

    The stream is synchronised first: MPI knows nothing of streams, and the failure is silent wrong data.
    """

    name = "direct"

    def outgoing(self, x: Array) -> Iterator[Array]:
        """Synchronise, and yield `x`."""
        synchronize(x)
        yield x

    def incoming(self, x: Array) -> Array:
        """Synchronise, lest a kernel still reads the old `x`, and return `x`."""
        synchronize(x)
        return x

    def cuts(self, x: Array) -> list[slice]:
        """One piece."""
        return [slice(0, x.size)]

    def arrived(self, x: Array, part: slice) -> None:
        """Nothing to do: it arrived in place."""

    def settle(self, x: Array) -> None:
        """Nothing to do."""


class Staged:
    """Through one pinned host buffer each way, in chunks, so that copy and wire overlap; works with any MPI."""

    name = "staged"

    def __init__(self) -> None:
        self._out: Array | None = None
        self._in: Array | None = None

    def outgoing(self, x: Array) -> Iterator[Array]:
        """Queue the copies of all chunks to pinned memory, and yield each pinned chunk as soon as its copy is done."""
        if self._out is None or self._out.size < x.size:
            self._out = _pinned(x)
        buffer, events = self._out, []
        for part in self.cuts(x):
            x[part].get(out=buffer[part], blocking=False)  # type: ignore[attr-defined]
            event = namespace(x).cuda.Event()
            event.record()
            events.append((part, event))
        for part, event in events:
            event.synchronize()
            yield buffer[part]

    def incoming(self, x: Array) -> Array:
        """Return pinned memory as long as `x`."""
        if self._in is None or self._in.size < x.size:
            self._in = _pinned(x)
        return self._in[: x.size]

    def cuts(self, x: Array) -> list[slice]:
        """Chunks."""
        size = max(1, CHUNK // x.dtype.itemsize)
        return [slice(at, min(at + size, x.size)) for at in range(0, x.size, size)]

    def arrived(self, x: Array, part: slice) -> None:
        """Queue the copy of the pinned chunk into `x`."""
        assert self._in is not None
        # With a stream given the copy is asynchronous.
        x[part].set(self._in[part], stream=namespace(x).cuda.get_current_stream())  # type: ignore[attr-defined]

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


def _pinned(x: Array) -> Array:
    """Allocate page-locked host memory like `x`."""
    memory: Any = namespace(x).cuda.alloc_pinned_memory(x.nbytes)
    return np.frombuffer(memory, x.dtype, x.size)
