"""Arrays on the host or on a device: namespace, cache-sized blocks, stream readiness, copies."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]  # or a cupy.ndarray, which takes the same ufuncs
Range: TypeAlias = tuple[int, int]  # [start, stop) of a vector

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

    A tensor on a device is ready for the current stream of CuPy, whatever stream its owner has used: DLPack makes the
    owner order it.

    Raises TypeError for what is no array, or has a dtype that NumPy lacks; ValueError for one on another device than
    the current one.
    """
    if isinstance(value, np.generic):
        return np.asarray(value)
    if hasattr(value, "detach"):  # PyTorch's tensors with a history refuse to be exported
        value = value.detach()
    if isinstance(value, np.ndarray) or type(value).__module__.startswith("cupy"):
        return value  # type: ignore[no-any-return]
    if hasattr(value, "__dlpack_device__"):
        return _by_dlpack(value)
    if hasattr(value, "__cuda_array_interface__"):
        import cupy

        array: Any = cupy.asarray(value)
        address = value.__cuda_array_interface__["data"][0]
        if array.size and array.data.ptr != address:  # CuPy has copied: a write to one is not seen in the other
            raise ValueError(_ELSEWHERE.format(cupy.cuda.Device().id))
        return array  # type: ignore[no-any-return]
    raise TypeError(f"{type(value).__name__} is no array: it has neither NumPy's, CUDA's nor DLPack's interface")


_CUDA, _ROCM, _CUDA_MANAGED = 2, 10, 13  # DLPack's numbers for kinds of memory
_ELSEWHERE = (
    "the array lies on another device than this rank's, {}: move it there (PyTorch: tensor.cuda(k)), or choose its "
    "device before (cupy.cuda.Device(k).use())"
)


def _by_dlpack(value: Any) -> Array:
    kind, index = value.__dlpack_device__()
    try:
        if kind not in (_CUDA, _ROCM, _CUDA_MANAGED):
            return np.from_dlpack(value)
        import cupy

        current = cupy.cuda.Device().id
        if kind != _CUDA_MANAGED and index != current:  # managed memory lies on all of them
            raise ValueError(_ELSEWHERE.format(current))
        return cupy.from_dlpack(value)  # type: ignore[no-any-return]
    except (BufferError, RuntimeError, TypeError) as error:  # each library has its own
        raise TypeError(
            f"an array of {getattr(value, 'dtype', 'unknown dtype')} cannot be shared ({error}): "
            "convert it to float32 first (PyTorch: tensor.float())"
        ) from error


def blocks(x: Array, start: int = 0, stop: int | None = None, size: int | None = None) -> Iterator[slice]:
    """Cut [start, stop) of `x` into slices of `size` (default: cache-sized) on the host, into one on a device."""
    stop = x.size if stop is None else stop
    if not on_host(x):
        yield slice(start, stop)
        return
    size = size or BLOCK
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def joined(ranges: Sequence[Range]) -> list[Range]:
    """`ranges`, adjacent ones merged: fewer launches.

    >>> joined([(0, 3), (3, 5), (7, 9)])
    [(0, 5), (7, 9)]
    """
    merged: list[Range] = []
    for lo, hi in ranges:
        if merged and merged[-1][1] == lo:
            lo = merged.pop()[0]
        merged.append((lo, hi))
    return merged


def empty(size: int, dtype: Any, like: Array) -> Array:
    """Allocate a vector (size,) where `like` lies, suitable for MPI.

    On the host it is page-aligned. The copies of MPI between processes slow down by half or worse on AMD Zen where
    source and destination start at slightly different places of a page (its `rep movsb`): with
    page-aligned vectors at both ends they never do. NumPy too is faster on it: malloc's large blocks begin 16 bytes
    into a cache line.

    On a device it is one dedicated cudaMalloc. MPI maps the whole allocation behind a pointer into the other process
    (CUDA IPC) and may keep the mapping: in a chunk of CuPy's pool other arrays would share the mapping, and be
    freed and reused under it. Memory of cudaMallocAsync, which an allocator set by the user may give, cannot be mapped
    at all.
    """
    dtype = np.dtype(dtype)
    if not on_host(like):
        xp, nbytes = namespace(like), size * dtype.itemsize
        try:
            memory = xp.cuda.Memory(nbytes)
        except xp.cuda.runtime.CUDARuntimeError:  # CuPy's pool may hold unused memory
            xp.get_default_memory_pool().free_all_blocks()
            memory = xp.cuda.Memory(nbytes)
        return xp.ndarray((size,), dtype, xp.cuda.MemoryPointer(memory, 0))  # type: ignore[no-any-return]
    return _on_a_page(np.empty, size, dtype)


def _on_a_page(allocate: Callable[[int, type], Array], size: int, dtype: np.dtype[Any]) -> Array:
    nbytes = size * dtype.itemsize
    raw = allocate(nbytes + _PAGE, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start : start + nbytes].view(dtype)


def empty_like(x: Array) -> Array:
    """Allocate a vector like `x` (n,), as `empty` does."""
    return empty(x.size, x.dtype, x)


def zeros_like(x: Array) -> Array:
    """Allocate as `empty_like`, zeros; on the host it takes no memory before it is written, unlike NumPy's."""
    return _on_a_page(np.zeros, x.size, x.dtype) if on_host(x) else full_like(x, 0)


def full_like(x: Array, value: Any) -> Array:
    """Allocate as `empty_like`, filled with `value` (a number, or a vector to copy)."""
    filled = empty_like(x)
    filled[...] = value
    return filled


def synchronize(x: Array) -> None:
    """Wait until the work queued on the device for `x` is done; nothing to do on the host."""
    if not on_host(x):
        namespace(x).cuda.get_current_stream().synchronize()


def to_host(x: Array) -> Array:
    """Return `x` itself if it lies on the host, else a host copy."""
    return x if on_host(x) else namespace(x).asnumpy(x)


def host_copy(x: Array) -> Array:
    """Return a copy of `x` on the host, independent of x: one memory copy, and none on a device."""
    return x.copy() if on_host(x) else to_host(x)


def bring(x: Array, like: Array) -> Array:
    """`x` where `like` lies; x itself if it lies there."""
    moved: Array = to_host(x) if on_host(like) else namespace(like).asarray(x)
    return moved


def current(x: Array) -> AbstractContextManager[Any]:
    """Make the device of `x` the current one of this thread (CUDA keeps one for each); nothing on the host."""
    array: Any = x  # NumPy's is not known to have a device before 2.0
    return nullcontext() if on_host(x) else array.device


def device_count() -> int:
    """Count the CUDA devices that CuPy can use here; 0 without CuPy or without a driver.

    Warns of a CuPy that cannot be used: half installed, or a directory of that name where Python looks first.
    """
    try:
        import cupy

        runtime = cupy.cuda.runtime
        no_driver = runtime.CUDARuntimeError
    except ModuleNotFoundError:
        return 0
    except (ImportError, AttributeError) as error:
        warnings.warn(f"CuPy cannot be used, so there is no device: {error}{_where('cupy')}", RuntimeWarning, 2)
        return 0
    try:
        return int(runtime.getDeviceCount())
    except no_driver:  # or an old one: CuPy 13's is_available() raises, too
        return 0


def _where(name: str) -> str:
    path = getattr(sys.modules.get(name), "__path__", None)
    return f" (it was found in {', '.join(path)})" if path else ""


def choose(device: str, local_index: int) -> ModuleType:
    """Choose the array module for a rank, and its device: number `local_index` modulo the node's device count.

    `device`: "cpu", "gpu" or "auto"; `local_index`: index among the workers of this node. Must run before
    the first CUDA call of the process. Raises ValueError if "gpu" was asked for and there is none.

    MPI has been initialised by then. A library that binds to a device in MPI_Init (MVAPICH2-GDR, Cray MPICH) would take
    device 0 on every rank: make only its own device visible to each rank, by the launcher (`srun --gpus-per-task=1`) or
    by a line such as `CUDA_VISIBLE_DEVICES=$MV2_COMM_WORLD_LOCAL_RANK` before the program.
    """
    count = device_count() if device in ("gpu", "auto") else 0
    if count:
        import cupy

        cupy.cuda.Device(local_index % count).use()
        return cupy  # type: ignore[no-any-return]
    if device == "gpu":
        raise ValueError("device 'gpu': CuPy finds no CUDA device here; pip install cupy-cuda12x, or use 'cpu'")
    return np
