"""The arithmetic on whole vectors, wherever they lie: steps of optimizers, deltas of rules, norms.

On a device a kernel is one launch. On the host a vector is cut into pieces that the threads of `set_threads` share; a
piece is moved by numba, where that is installed and the vector is long, else by NumPy (`host_kernels`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import pairwise
from math import sqrt
from typing import TypeAlias, TypeVar

import numpy as np

from . import backend
from .backend import Array, Range, blocks, joined, on_host, to_host
from .device_kernels import launch, reduced
from .host_kernels import block_is_finite, compiled, move_block

OnBlock: TypeAlias = Callable[[int], None]
Result = TypeVar("Result")

# Elements of a piece, a fraction of a millisecond: what is no longer has one thread, because to wake another takes as
# long as it would save.
PIECE = 1 << 18
# Elements from which a vector is left to numba (and, when it is longer than a piece, to threads): NumPy's step of Adam
# takes 0.25 ms longer there. Below, the import of numba and its compiler, half a second, would hardly pay.
LONG = 1 << 17
# Bytes of a vector on a device up to which the host looks at a copy: a reduction is a launch, and copies its answer.
SHORT = 4096
# Elements of a block that is widened to float64: it stays in the cache of one core, and OpenBLAS keeps to one thread
# (above 10,000 it took two, which took seven times as long).
_WIDENED = 1 << 13

_threads = 1
_pool: ThreadPoolExecutor | None = None


def set_threads(count: int) -> None:
    """Let the host kernels of this process use `count` threads, at least 1 (the default); bits do not depend on it."""
    global _threads
    if count < 1:
        raise ValueError(f"the number of threads must be at least 1, not {count}")
    if _pool is not None:
        _pool.shutdown()
    _threads = count
    _start_pool()


def _start_pool() -> None:
    global _pool
    _pool = ThreadPoolExecutor(_threads - 1, "agnmpi-kernels") if _threads > 1 else None


os.register_at_fork(after_in_child=_start_pool)  # a child has none of the threads


def threads() -> int:
    """Count the threads that the host kernels may use."""
    return _threads


def _pieces(ranges: Sequence[Range], multiple: int) -> Iterator[Range]:
    """Cut each range into equal pieces of about PIECE: how, does not depend on the number of threads."""
    for lo, hi in ranges:
        count = -(-(hi - lo) // PIECE)
        ends = [lo + (hi - lo) * i // count // multiple * multiple for i in range(count)] + [hi]
        yield from pairwise(ends)


def share(
    work: Callable[[int, int], Result], ranges: Sequence[Range], on_block: OnBlock | None = None, multiple: int = 1
) -> list[Result]:
    """Do `work(start, stop)` for the pieces of `ranges` on all threads; returns the results in order.

    Pieces begin at multiples of `multiple` from the start of their range. Several threads may call this at once.

    `on_block(stop)` is called by this thread, in order, when all pieces up to there are done.
    """
    helpers = min(_threads, -(-sum(hi - lo for lo, hi in ranges) // PIECE)) - 1
    if _pool is None or helpers < 1:
        return [_report(work(lo, hi), hi, on_block) for lo, hi in _pieces(ranges, multiple)]
    pieces = list(_pieces(ranges, multiple))
    waiting = iter(enumerate(pieces))  # whoever is free takes the next: a thread that is held up takes fewer
    results: dict[int, Result] = {}
    reported = 0

    def help_out() -> None:
        for i, piece in waiting:
            results[i] = work(*piece)

    def report() -> None:
        nonlocal reported
        while reported in results:
            _report(None, pieces[reported][1], on_block)
            reported += 1

    others = list[Future[None]]()
    try:
        with suppress(
            RuntimeError
        ):  # the interpreter ends, and starts no threads; a loop that was not closed still can
            others += [_pool.submit(help_out) for _ in range(helpers)]
        for i, piece in waiting:
            results[i] = work(*piece)
            report()
    finally:
        # Those that are still busy for another caller are not waited for. Whatever was raised here: nobody writes to
        # the vectors any more.
        others = [other for other in others if not other.cancel()]
        wait(others)
    for other in others:
        other.result()
    report()
    return [results[i] for i in range(len(pieces))]


def _report(result: Result, stop: int, on_block: OnBlock | None) -> Result:
    if on_block:
        on_block(stop)
    return result


def run(
    name: str,
    inputs: Sequence[Array],
    scalars: Sequence[float],
    moved: Sequence[Array],
    ranges: Sequence[Range] | None = None,
    on_block: OnBlock | None = None,
) -> bool | None:
    """Run a kernel on vectors (n,) that all lie on the host or on one device.

    Args:
        name: In `device_kernels.KERNELS`.
        inputs: The vectors that it reads.
        scalars: Its numbers, rounded to the dtype of the vectors.
        moved: The vectors that it moves in place, or writes.
        ranges: What to move, pieces (start, stop) in order (None, the default: all).
        on_block: Called as `on_block(stop)` whenever everything up to there has been moved, or launched.

    Returns:
        Whether the delta that a rule's kernel has written is finite; None where nobody has looked.
    """
    x = moved[0]
    if ranges is None and x.size < LONG and on_host(x):  # nothing here is worth a thread
        return _report(_by_numpy(name, inputs, scalars, moved, 0, x.size), x.size, on_block)
    ranges = [(0, x.size)] if ranges is None else joined(ranges)
    if not on_host(x):
        for lo, hi in ranges:
            launch(name, *(v[lo:hi] for v in inputs), *scalars, *(v[lo:hi] for v in moved))
            _report(None, hi, on_block)
        return None
    kernel = compiled(name) if _is_for_numba(x, *inputs, *moved) else None
    numbers = [x.dtype.type(scalar) for scalar in scalars]

    def work(lo: int, hi: int) -> bool | None:
        if kernel is None:
            return _by_numpy(name, inputs, scalars, moved, lo, hi)
        finite: bool | None = kernel(*(v[lo:hi] for v in inputs), *numbers, *(v[lo:hi] for v in moved))
        return finite

    return _all_known(share(work, ranges, on_block))


def _by_numpy(
    name: str, inputs: Sequence[Array], scalars: Sequence[float], moved: Sequence[Array], lo: int, hi: int
) -> bool | None:
    if hi - lo == moved[0].size <= backend.BLOCK:  # a small model: spare it the slices
        return move_block(name, inputs, scalars, moved)
    return _all_known([
        move_block(name, [v[block] for v in inputs], scalars, [v[block] for v in moved])
        for block in blocks(moved[0], lo, hi)
    ])  # fmt: skip


def _all_known(answers: Sequence[bool | None]) -> bool | None:
    """Whether all are true; None if one is not known."""
    return None if None in answers else all(answers)


def _is_for_numba(x: Array, *others: Array) -> bool:
    """Whether `x` is long, and all are of one dtype that numba has, and of one shape, which it does not check."""
    fit = x.size >= LONG and x.dtype in (np.float32, np.float64)
    return fit and all(v.dtype == x.dtype and v.shape == x.shape for v in others)


def library(x: Array) -> str:
    """The library that moves vectors like `x` (n,) on the host: "numba" or "NumPy"."""
    return "numba" if _is_for_numba(x) and compiled("add") else "NumPy"


def all_finite(x: Array) -> bool:
    """Whether `x` (n,) holds neither NaN nor infinity; on a device this waits for the answer."""
    if not on_host(x):
        return block_is_finite(to_host(x)) if x.nbytes <= SHORT else bool(reduced("finite", x))
    if _is_for_numba(x) and (kernel := compiled("finite")):
        return all(share(lambda lo, hi: bool(kernel(x[lo:hi])), [(0, x.size)]))
    return all(block_is_finite(x[part]) for part in blocks(x))


def global_norm(g: Array, ranges: Sequence[Range]) -> float:
    """‖g‖₂ over `ranges` of `g` (n,), summed in float64: float32 gradients above 1.8e19 have a finite norm, too.

    On a device this waits for the answer, once.
    """
    ranges = joined(ranges)
    if on_host(g):
        kernel = compiled("squares") if _is_for_numba(g) else None
        if kernel is None:  # in one thread: calls of NumPy that are this short only wait for each other
            return sqrt(sum(_sum_of_squares(g, lo, hi) for lo, hi in ranges))
        return sqrt(sum(share(lambda lo, hi: float(kernel(g[lo:hi])), ranges)))
    sums = [reduced("squares", g[lo:hi]) for lo, hi in ranges]
    return sqrt(float(sum(sums[1:], sums[0]))) if sums else 0.0


def _sum_of_squares(g: Array, start: int, stop: int) -> float:
    wide = np.empty(min(_WIDENED, stop - start))
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite norm is a valid result
        for part in blocks(g, start, stop, _WIDENED):
            block = wide[: part.stop - part.start]
            block[...] = g[part]
            total += float(block @ block)
    return total
