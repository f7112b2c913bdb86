"""Arrays on the host or on a device: namespace, cache-sized blocks, stream readiness, copies."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]  # or a cupy.ndarray, which answers to the same ufuncs

# Elements in a block: long enough that NumPy's calls cost nothing, short enough that a block stays in cache.
BLOCK = 1 << 16
_PAGE = 4096


def on_host(x: Array) -> bool:
    """Whether `x` lies in host memory."""
    return isinstance(x, np.ndarray)


def namespace(x: Array) -> ModuleType:
    """Return the array module of `x`: numpy, or the one that made it (cupy)."""
    return np if on_host(x) else sys.modules[type(x).__module__.partition(".")[0]]


def as_array(value: Any) -> Array:
    """Return `value` as an array that shares its memory: itself, or by DLPack (PyTorch, JAX).

    Raises TypeError for what is no array, ValueError for one on another device than the current one.
    """
    if isinstance(value, np.generic):
        return np.asarray(value)
    if hasattr(value, "detach"):  # PyTorch's tensors with a history refuse to be anything else
        value = value.detach()
    if isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__"):
        if isinstance(value, np.ndarray) or type(value).__module__.startswith("cupy"):
            return value  # type: ignore[no-any-return]
        import cupy

        made: Any = cupy.asarray(value)
        there = value.__cuda_array_interface__["data"][0]
        if made.size and made.data.ptr != there:  # CuPy has copied: what is done to one is not seen in the other
            raise ValueError(
                f"the array lies on another device than this rank's, {cupy.cuda.Device().id}: move it there "
                "(PyTorch: tensor.cuda(k)), or choose its device before (cupy.cuda.Device(k).use())"
            )
        return made  # type: ignore[no-any-return]
    if not hasattr(value, "__dlpack__"):
        raise TypeError(f"{type(value).__name__} is no array: it has neither NumPy's, CUDA's nor DLPack's interface")
    return np.from_dlpack(value)


def blocks(x: Array, start: int = 0, stop: int | None = None, size: int | None = None) -> Iterator[slice]:
    """Cut [start, stop) of `x` into slices of `size` (default: cache-sized) on the host, into one on a device."""
    stop = x.size if stop is None else stop
    if not on_host(x):
        yield slice(start, stop)
        return
    size = size or BLOCK
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def empty(size: int, dtype: Any, like: Array) -> Array:
    """Allocate a vector (size,) where `like` lies, fit to be handed to MPI.

    On the host it begins with a page. The copies of MPI between processes slow down by half or worse on AMD Zen where
    source and destination start at slightly different places of a page (its `rep movsb`): with vectors of ours at
    both ends they never do. NumPy too is faster on it: malloc's large blocks begin 16 bytes into a cache line.

    On a device it is one dedicated cudaMalloc. MPI maps the whole allocation behind a pointer into the other process
    (CUDA IPC) and may keep the mapping: in a chunk of CuPy's pool other arrays would lie there too, and come and go
    under it. Memory of cudaMallocAsync, which an allocator set by the user may give, cannot be mapped at all.
    """
    dtype = np.dtype(dtype)
    nbytes = size * dtype.itemsize
    if not on_host(like):
        xp = namespace(like)
        try:
            memory = xp.cuda.Memory(nbytes)
        except xp.cuda.runtime.CUDARuntimeError:  # CuPy's pool may hold what it does not use
            xp.get_default_memory_pool().free_all_blocks()
            memory = xp.cuda.Memory(nbytes)
        return xp.ndarray((size,), dtype, xp.cuda.MemoryPointer(memory, 0))  # type: ignore[no-any-return]
    raw = np.empty(nbytes + _PAGE, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start : start + nbytes].view(dtype)


def empty_like(x: Array) -> Array:
    """Allocate a vector like `x` (n,), as `empty` does."""
    return empty(x.size, x.dtype, x)


def full_like(x: Array, value: Any) -> Array:
    """Allocate as `empty_like`, filled with `value` (a number, or a vector to copy)."""
    filled = empty_like(x)
    filled[...] = value
    return filled


def scratch(x: Array, count: int) -> list[Array]:
    """Allocate `count` work arrays as long as one block of `x`."""
    size = min(x.size, BLOCK) if on_host(x) else x.size
    return [empty(size, x.dtype, x) for _ in range(count)]


def all_finite(x: Array) -> bool:
    """Whether `x` (n,) holds neither NaN nor infinity; one pass, from block to block on the host."""
    for part in blocks(x):
        block = x[part]
        # A dot product is several times faster than isfinite; where it overflows, look closely.
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(block @ block)
        if not isfinite(squares) and not bool(namespace(x).isfinite(block).all()):
            return False
    return True


def synchronize(x: Array) -> None:
    """Wait until the work queued on the device for `x` is done; nothing to do on the host."""
    if not on_host(x):
        namespace(x).cuda.get_current_stream().synchronize()


def to_host(x: Array) -> Array:
    """Return `x` itself if it lies on the host, else a host copy."""
    return x if on_host(x) else namespace(x).asnumpy(x)


def host_copy(x: Array) -> Array:
    """Return a copy of `x` on the host, whatever becomes of x: one memory copy, and none on a device."""
    return x.copy() if on_host(x) else to_host(x)


def bring(x: Array, like: Array) -> Array:
    """`x` where `like` lies; x itself if it lies there."""
    there: Array = to_host(x) if on_host(like) else namespace(like).asarray(x)
    return there


def current(x: Array) -> AbstractContextManager[Any]:
    """Make the device of `x` the current one of this thread (CUDA keeps one for each); nothing on the host."""
    there: Any = x
    return nullcontext() if on_host(x) else there.device


def device_count() -> int:
    """Count the CUDA devices that CuPy can use here; 0 without CuPy or without a driver."""
    try:
        import cupy
    except ImportError:
        return 0
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver, or an old one: CuPy 13's is_available() raises, too
        return 0


def choose(device: str, local_index: int) -> ModuleType:
    """Choose the array module for a rank, and its device.

    `device`: "cpu", "gpu" or "auto"; `local_index`: index among the workers of this node. Must run before
    the first CUDA call of the process. Raises ValueError if "gpu" was asked for and there is none.
    """
    count = device_count() if device in ("gpu", "auto") else 0
    if count:
        import cupy

        cupy.cuda.Device(local_index % count).use()
        return cupy  # type: ignore[no-any-return]
    if device == "gpu":
        raise ValueError("device 'gpu': CuPy finds no CUDA device here; pip install cupy-cuda12x, or use 'cpu'")
    return np
