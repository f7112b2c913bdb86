"""Reductions on a GPU against its own copy, and CuPy's:   python tests/support/gpu_reductions.py [N]

Checks the results against the host, then times each over N float32 numbers (default 100 M).
"""

import statistics
import sys

import cupy as cp
import numpy as np

from agnmpi.arrays.kernels import all_finite, global_norm

FINITE = cp.ReductionKernel("T x", "bool y", "isfinite(x)", "a && b", "y = a", "true", "theirs_finite")
SQUARES = cp.ReductionKernel("T x", "float64 y", "(double)x * x", "a + b", "y = a", "0", "theirs_squares")


def milliseconds(call, rounds=20):
    times = []
    for _ in range(rounds + 1):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end))
    return statistics.median(times[1:])


def main(n=100_000_000):
    small = cp.asarray(np.random.default_rng(0).normal(size=100_001).astype("f4"))
    np.testing.assert_allclose(global_norm(small, [(0, small.size)]), np.linalg.norm(cp.asnumpy(small)), rtol=1e-6)
    for at in (0, 65_535, 65_536, 100_000):
        for bad in (np.nan, np.inf):
            broken = small.copy()
            broken[at] = bad
            assert all_finite(small)
            assert not all_finite(broken)
    x = cp.random.default_rng(0).random(n, dtype=np.float32)
    y = cp.empty_like(x)
    copy = milliseconds(lambda: cp.copyto(y, x)) / 2  # one read
    for name, call in {
        "all_finite": lambda: all_finite(x),
        "global_norm": lambda: global_norm(x, [(0, n)]),
        "ReductionKernel, finite": lambda: bool(FINITE(x)),
        "ReductionKernel, squares": lambda: float(SQUARES(x)),
        "x @ x": lambda: float(x @ x),
    }.items():
        taken = milliseconds(call)
        print(f"{name:>26}: {taken:.3f} ms, {taken / copy:.2f} x half a copy of {n:,} numbers")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
