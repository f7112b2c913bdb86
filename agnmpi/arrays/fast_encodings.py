"""Encodings on the host by numba: one pass, each block in the first-level cache; the same bytes as `host_encodings`.

The GIL is released: a thread encodes while another computes.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from .backend import Array
from .host_encodings import (
    BF16_LIMIT,
    BLOCK_LIMIT,
    FORMATS,
    GOLDEN64,
    INFINITE,
    MAGNITUDE,
    MIX32,
    MIX64,
    NAN,
    SMALLEST_SCALE,
)

_SINGLE, _DOUBLE = np.float32, np.float64
_BF16_BLOCK = 256

# Compiled code is kept in files only where the user names a folder for them. Numba's own choice is beside this module
# or in the home folder: often one NFS, where hundreds of ranks would write and read the same index at once. Compiling
# takes each rank two to three seconds (`Encoding.prepare`).
_compile: Callable[[Any], Any] = numba.njit(
    nogil=True,
    error_model="numpy",  # no check for a division by zero in the loops
    cache="NUMBA_CACHE_DIR" in os.environ,
)


@cache
def _encoder(name: str, real: Any) -> Any:
    form = FORMATS[name]
    block, half, is_int8, is_double = form.block, form.block // 2, form.scale_bytes == 4, real is _DOUBLE
    nbytes, head = form.nbytes, form.scale_bytes
    top_code, below = _SINGLE(form.top), np.uint32((1 << form.cut) - 1)
    magnitude, limit, smallest = np.uint32(MAGNITUDE), np.uint32(BLOCK_LIMIT), np.uint32(SMALLEST_SCALE)
    not_a_number, fraction = np.uint32(NAN), _SINGLE(2**-16)
    golden, factor0, factor1 = np.uint64(GOLDEN64), np.uint64(MIX64[0]), np.uint64(MIX64[1])
    mix0, mix1 = np.uint32(MIX32[0]), np.uint32(MIX32[1])
    # Adding and subtracting 1.5·2²³ rounds to nearest, even: the sum has no bits for fractions.
    rounder = _SINGLE(12582912)

    @_compile
    def encode(  # type: ignore[no-untyped-def]
        x, out, origin, divisor, residual, after, has_origin, has_residual, has_after, stochastic, key, first_block
    ):
        size, finite = x.size, True
        v, number = np.empty(block, np.float32), np.empty(1, np.float32)
        exact = np.empty(block, np.float64) if is_double else v
        bits, word = v.view(np.uint32), number.view(np.uint32)
        codes = np.empty(block, np.int32)
        for b in range((size + block - 1) // block):
            lo, at = b * block, b * nbytes  # not slices: each would count references to its array
            count = min(block, size - lo)
            if has_origin:  # and a residual
                for j in range(count):
                    exact[j] = (x[lo + j] - origin[lo + j]) / divisor + residual[lo + j]
            elif has_residual:
                for j in range(count):
                    exact[j] = x[lo + j] + residual[lo + j]
            else:
                for j in range(count):
                    exact[j] = x[lo + j]
            for j in range(count, block):
                exact[j] = 0
            if is_double:
                for j in range(block):
                    v[j] = exact[j]

            top = np.uint32(0)
            for j in range(block):
                top = max(top, np.uint32(bits[j] & magnitude))
            word[0] = top
            number[0] = number[0] / top_code
            word[0] = (word[0] + below) & ~below
            if word[0] < smallest:
                word[0] = 0
            if top >= limit:
                word[0] = not_a_number
                finite = False
            scale, scale_bits = number[0], word[0]
            step = scale if scale > 0 else _SINGLE(1)

            if top >= limit:
                codes[:] = 0
            elif stochastic:
                step *= fraction
                z = key + np.uint64(first_block + b + 1) * golden
                z = (z ^ (z >> np.uint64(30))) * factor0
                z = (z ^ (z >> np.uint64(27))) * factor1
                seed = np.uint32((z ^ (z >> np.uint64(31))) >> np.uint64(32))
                for j in range(half):
                    h = np.uint32(seed + np.uint32(j))
                    h ^= h >> np.uint32(16)
                    h = np.uint32(h * mix0)
                    h ^= h >> np.uint32(13)
                    h = np.uint32(h * mix1)
                    h ^= h >> np.uint32(16)
                    codes[j] = np.int32(np.int32(v[j] / step) + np.int32(h & np.uint32(0xFFFF))) >> 16
                    codes[j + half] = np.int32(np.int32(v[j + half] / step) + np.int32(h >> np.uint32(16))) >> 16
            else:
                for j in range(block):
                    codes[j] = np.int32(v[j] / step + rounder - rounder)

            if is_int8:
                out[at + 0], out[at + 1] = scale_bits & 255, (scale_bits >> 8) & 255
                out[at + 2], out[at + 3] = (scale_bits >> 16) & 255, scale_bits >> 24
                for j in range(block):
                    out[at + head + j] = codes[j] & 255
            else:
                out[at + 0], out[at + 1] = (scale_bits >> 16) & 255, scale_bits >> 24
                for j in range(half):
                    out[at + head + j] = (codes[j] & 15) | ((codes[j + half] & 15) << 4)
            if has_after:
                for j in range(count):  # `after` may be `residual`, which is read no more
                    after[lo + j] = exact[j] - real(_SINGLE(codes[j]) * scale)
        return finite

    return encode


@cache
def _decoder(name: str, real: Any, add: bool) -> Any:
    form = FORMATS[name]
    block, half, is_int8 = form.block, form.block // 2, form.scale_bytes == 4
    nbytes, head = form.nbytes, form.scale_bytes

    @_compile
    def decode(data, out, weight):  # type: ignore[no-untyped-def]
        size = out.size
        number = np.empty(1, np.float32)
        word = number.view(np.uint32)
        numbers = np.empty(block, real)
        for b in range((size + block - 1) // block):
            lo, hi = b * block, min((b + 1) * block, size)
            row, there = data[b * nbytes : (b + 1) * nbytes], out[lo:hi]
            body = row[head:]
            if is_int8:
                word[0] = row[0] | (row[1] << 8) | (row[2] << 16) | (row[3] << 24)
                scale = real(number[0])
                for j in range(block):
                    numbers[j] = real(np.int8(body[j])) * scale
            else:
                word[0] = (row[0] << 16) | (row[1] << 24)
                scale = real(number[0])
                for j in range(half):
                    numbers[j] = real(np.int8(body[j] << 4) >> 4) * scale
                    numbers[j + half] = real(np.int8(body[j]) >> 4) * scale
            if add:
                for j in range(hi - lo):
                    there[j] += numbers[j] * weight
            else:
                for j in range(hi - lo):
                    there[j] = numbers[j]

    return decode


@cache
def _bf16_encoder(real: Any) -> Any:
    magnitude, limit, infinite = np.uint32(MAGNITUDE), np.uint32(BF16_LIMIT), np.uint32(INFINITE)
    almost_half, one, quiet, sixteen = np.uint32(0x7FFF), np.uint32(1), np.uint32(0x400000), np.uint32(16)

    @_compile
    def encode(  # type: ignore[no-untyped-def]
        x, wire, origin, divisor, residual, after, has_origin, has_residual, has_after
    ):
        size, largest = x.size, np.uint32(0)
        exact = np.empty(_BF16_BLOCK, real)
        v, decoded = np.empty(_BF16_BLOCK, np.float32), np.empty(_BF16_BLOCK, np.float32)
        bits, wide = v.view(np.uint32), decoded.view(np.uint32)
        for lo in range(0, size, _BF16_BLOCK):
            hi = min(lo + _BF16_BLOCK, size)
            here, old, row = x[lo:hi], residual[lo:hi], wire[lo:hi]
            if has_origin:  # and a residual
                there = origin[lo:hi]
                for j in range(hi - lo):
                    exact[j] = (here[j] - there[j]) / divisor + old[j]
            elif has_residual:
                for j in range(hi - lo):
                    exact[j] = here[j] + old[j]
            else:
                for j in range(hi - lo):
                    exact[j] = here[j]
            for j in range(hi - lo):
                v[j] = exact[j]
            top = np.uint32(0)
            for j in range(hi - lo):
                top = max(top, np.uint32(bits[j] & magnitude))
                wide[j] = (bits[j] + almost_half + ((bits[j] >> sixteen) & one)) >> sixteen
            if top > infinite:
                for j in range(hi - lo):
                    if (bits[j] & magnitude) > infinite:
                        wide[j] = (bits[j] | quiet) >> sixteen
            largest = max(largest, top)
            for j in range(hi - lo):
                row[j] = wide[j]
            if has_after:
                new = after[lo:hi]
                for j in range(hi - lo):
                    wide[j] <<= sixteen
                for j in range(hi - lo):  # it may be `old`, which is read no more
                    new[j] = exact[j] - real(decoded[j])
        return largest < limit

    return encode


@cache
def _bf16_decoder(real: Any, add: bool) -> Any:
    sixteen = np.uint32(16)

    @_compile
    def decode(wire, out, weight):  # type: ignore[no-untyped-def]
        decoded = np.empty(_BF16_BLOCK, np.float32)
        wide = decoded.view(np.uint32)
        for lo in range(0, out.size, _BF16_BLOCK):
            hi = min(lo + _BF16_BLOCK, out.size)
            row, there = wire[lo:hi], out[lo:hi]
            for j in range(hi - lo):
                wide[j] = np.uint32(row[j]) << sixteen
            if add:
                for j in range(hi - lo):
                    there[j] += real(decoded[j]) * weight
            else:
                for j in range(hi - lo):
                    there[j] = real(decoded[j])

    return decode


def encode(
    name: str, x: Array, out: Array, residual: Array | None, after: Array | None, key: int | None, first: int,
    origin: Array | None = None, divisor: float = 1.0,
) -> bool:  # fmt: skip
    """Encode `x` (n,) as `Encoding.encode` says; returns whether all of it is finite and in range."""
    real: Any = x.dtype.type
    vectors = origin, residual, after
    first_of, *others = (x if vector is None else vector for vector in vectors)
    given = first_of, real(divisor), *others, *(vector is not None for vector in vectors)
    if name == "bf16":
        return bool(_bf16_encoder(real)(x, out.view(np.uint16), *given))
    rounding = (key is not None, np.uint64(key or 0), np.int64(first // FORMATS[name].block))
    return bool(_encoder(name, real)(x, out, *given, *rounding))


def decode(name: str, data: Array, out: Array) -> None:
    """Write the numbers of `data` into `out` (n,)."""
    _run_decoder(name, data, out, 1.0, False)


def decode_add(name: str, data: Array, c: Array, weight: float) -> None:
    """Add weight·(the numbers of `data`) to `c` (n,), in place."""
    _run_decoder(name, data, c, weight, True)


def _run_decoder(name: str, data: Array, out: Array, weight: float, add: bool) -> None:
    real: Any = out.dtype.type
    if name == "bf16":
        _bf16_decoder(real, add)(data.view(np.uint16), out, real(weight))
    else:
        _decoder(name, real, add)(data, out, real(weight))
