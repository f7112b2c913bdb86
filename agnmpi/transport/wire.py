"""The buffer that MPI sees: the vector itself, pinned host memory (staged), or the device pointer (direct).

A wire is a buffer, not a transport: each transport holds one and asks it before and after every transfer.
"""

from typing import Protocol

import numpy as np

from ..backend import Array, namespace, synchronize


class Wire(Protocol):
    """Between a vector and the transfers of it."""

    name: str

    def outgoing(self, x: Array) -> Array:
        """Return what MPI may send for `x`: all device work on it is done."""

    def incoming(self, x: Array) -> Array:
        """Return where MPI may receive what is meant for `x`."""

    def arrived(self, x: Array) -> None:
        """Put what has arrived into `x`."""


class Direct:
    """The vector itself goes to MPI, on the host or (with CUDA-aware MPI) on the device.

    The stream is synchronised first: MPI knows nothing of streams, and the failure is silent wrong data.
    """

    name = "direct"

    def outgoing(self, x: Array) -> Array:
        """Synchronise, and return `x`."""
        synchronize(x)
        return x

    def incoming(self, x: Array) -> Array:
        """Synchronise, lest a kernel still reads the old `x`, and return `x`."""
        synchronize(x)
        return x

    def arrived(self, x: Array) -> None:
        """Nothing to do: it arrived in place."""


class Staged:
    """Through one pinned host buffer each way; works with any MPI."""

    name = "staged"

    def __init__(self) -> None:
        self._out: Array | None = None
        self._in: Array | None = None

    def outgoing(self, x: Array) -> Array:
        """Copy `x` to pinned memory, wait for the copy, and return the pinned copy."""
        if self._out is None or self._out.size < x.size:
            self._out = _pinned(x)
        buffer = self._out[: x.size]
        x.get(out=buffer, blocking=False)  # type: ignore[attr-defined]
        synchronize(x)
        return buffer

    def incoming(self, x: Array) -> Array:
        """Return pinned memory as long as `x`."""
        if self._in is None or self._in.size < x.size:
            self._in = _pinned(x)
        return self._in[: x.size]

    def arrived(self, x: Array) -> None:
        """Copy the pinned memory into `x`, and wait: the next receive may overwrite it."""
        if self._in is None:
            raise RuntimeError("arrived() without incoming()")
        x.set(self._in[: x.size])  # type: ignore[attr-defined]
        synchronize(x)


def _pinned(x: Array) -> Array:
    """Allocate page-locked host memory like `x`."""
    memory = namespace(x).cuda.alloc_pinned_memory(x.nbytes)
    return np.frombuffer(memory, x.dtype, x.size)
