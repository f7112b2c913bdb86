"""Reductions of a whole vector: its norm, and whether all of it is finite. One pass, no temporary of its length."""

from collections.abc import Sequence
from math import isfinite, sqrt

import numpy as np

from .backend import Array, blocks, joined, on_host
from .device_kernels import partial_results

# Elements of a block that is widened to float64: it stays in the cache of one core.
_WIDENED = 1 << 14


def all_finite(x: Array) -> bool:
    """Whether `x` (n,) holds neither NaN nor infinity; on a device this waits for the answer."""
    if not on_host(x):
        return bool(partial_results("finite", x).all())
    for part in blocks(x):
        block = x[part]
        # A dot product is several times faster than isfinite; where it overflows, check each element.
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(block @ block)
        if not isfinite(squares) and not bool(np.isfinite(block).all()):
            return False
    return True


def global_norm(g: Array, ranges: Sequence[tuple[int, int]]) -> float:
    """‖g‖₂ over `ranges` of `g` (n,), summed in float64: float32 gradients above 1.8e19 have a finite norm, too.

    On a device this waits for the answer, once.
    """
    if on_host(g):
        return sqrt(sum(_sum_of_squares(g, lo, hi) for lo, hi in ranges))
    sums = [partial_results("squares", g[lo:hi]).sum() for lo, hi in joined(ranges)]
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
