"""Encodings on a GPU against its own copy, and with the copy to the host:   python tests/support/gpu_encodings.py [N]

Checks the bytes against the host's, then times each over N float32 numbers (default 100 M). What is staged is copied to
pinned memory: float32 as it is, or what was encoded before the copy.
"""

import sys

import cupy as cp
import numpy as np
from gpu_reductions import milliseconds

from agnmpi.arrays.backend import empty, empty_like, full_like
from agnmpi.arrays.encodings import NAMES, get


def pinned(nbytes):
    return np.frombuffer(cp.cuda.PinnedMemoryPointer(cp.cuda.PinnedMemory(nbytes), 0), np.uint8, nbytes)


def main(n=100_000_000):
    small = np.random.default_rng(0).normal(size=100_001).astype("f4")
    there = cp.asarray(small)
    for name in NAMES[1:]:
        form = get(name)
        here, wire = np.empty(form.nbytes(small.size), "u1"), empty(form.nbytes(small.size), "u1", there)
        form.encode(small, here, key=3)
        form.encode(there, wire, key=3)
        np.testing.assert_array_equal(cp.asnumpy(wire), here)
    x = cp.random.default_rng(0).random(n, dtype=np.float32)
    y, residual = empty_like(x), full_like(x, 0)
    copy = milliseconds(lambda: cp.copyto(y, x))
    host = pinned(4 * n)
    raw = milliseconds(lambda: x.view("u1").get(out=host, blocking=False))
    print(f"float32: to pinned memory {raw:.2f} ms, a copy on the device {copy:.2f} ms, {n:,} numbers")
    for name in NAMES[1:]:
        form = get(name)
        wire, small_host = empty(form.nbytes(n), "u1", x), host[: form.nbytes(n)]

        def staged(form=form, wire=wire, small_host=small_host):
            form.encode(x, wire, residual=residual, new_residual=residual)
            wire.get(out=small_host, blocking=False)

        encode = milliseconds(lambda form=form, wire=wire: form.encode(x, wire, residual=residual, new_residual=y))
        decode = milliseconds(lambda form=form, wire=wire: form.decode_add(wire, y))
        total = milliseconds(staged)
        print(
            f"{name:>7}: encode {encode / copy:.2f}, decode and add {decode / copy:.2f} copies; encoded and to pinned "
            f"memory {total:.2f} ms, {raw / total:.2f} times as fast as float32"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
