"""What encoding and decoding cost, in copies of the float32 vector:

cd tests/support && python encoding_times.py [MILLIONS …]

CPU time of one thread; all sides take turns, and medians of the ratios within a round are printed. "feedback": with a
residual; "stochastic": without, as pulls are encoded.
"""

import statistics
import sys
import time

import numpy as np

from agnmpi.arrays import encodings, host_encodings
from agnmpi.arrays.backend import empty


def seconds(call):
    start = time.thread_time()
    call()
    return time.thread_time() - start


def sides(kernels, name, x, y, residual, following):
    wire = empty(encodings.get(name).nbytes(x.size), np.uint8, x)
    return {
        "memcpy": lambda: np.copyto(y, x),
        "encode": lambda: kernels.encode(name, x, wire, None, None, None, 0),
        "feedback": lambda: kernels.encode(name, x, wire, residual, following, None, 0),
        "stochastic": lambda: kernels.encode(name, x, wire, None, None, 7, 0),
        "decode": lambda: kernels.decode(name, wire, y),
        "decode and add": lambda: kernels.decode_add(name, wire, y, 0.5),
    }


def measure(n, rounds):
    like = np.empty(0, "f4")
    x, y, residual, following = (empty(n, "f4", like) for _ in range(4))
    x[:] = np.random.default_rng(0).standard_normal(n, "f4") * 1e-3
    for vector in (y, residual, following):
        vector[:] = 0
    for library, kernels in (("numba", encodings.fast()), ("NumPy", host_encodings)):
        for name in encodings.NAMES[1:] if kernels else ():
            calls = sides(kernels, name, x, y, residual, following)
            times = {side: [] for side in calls}
            for _ in range(rounds + 1):
                for side, call in calls.items():
                    times[side].append(seconds(call))
            copies = times["memcpy"][1:]  # the first round warms up
            ratios = {s: statistics.median(a / b for a, b in zip(t[1:], copies)) for s, t in times.items()}
            row = ", ".join(f"{side} {ratio:.2f}" for side, ratio in ratios.items() if side != "memcpy")
            print(f"{n:,} numbers, {library}, {name}: {row}  (memcpy {statistics.median(copies) * 1e3:.1f} ms)")


if __name__ == "__main__":
    for millions in sys.argv[1:] or ["5", "50"]:
        count = int(float(millions) * 1e6)
        measure(count, 15 if count < 2e7 else 5)
