"""Encodings on devices: fused CUDA kernels by CuPy, one launch each; the same bytes as `host_encodings`.

A warp encodes a block of numbers: its lanes find the largest magnitude together, then write codes side by side. The
source says what each lane and each thread does, by the macros of `CUDA`; the tests give them as plain loops.
"""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from .backend import Array, namespace
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

_THREADS = 256  # of a thread block
_WARP = 32

CUDA = """
#define KERNEL extern "C" __global__ void
#define DEVICE __device__ inline
#define INDEX (blockIdx.x * (long long)blockDim.x + threadIdx.x)
#define EACH_THREAD(i, count) const i64 i = INDEX; if (i < count)
#define EACH_WARP(b, count) const i64 b = INDEX / 32; const int lane = threadIdx.x % 32; if (b < count)
#define EACH_LANE
#define MAX_OVER_LANES(top, magnitude) const u32 top = warp_max(magnitude);
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
DEVICE u32 bits_of(float f) { return __float_as_uint(f); }
DEVICE float float_of(u32 b) { return __uint_as_float(b); }
DEVICE u32 warp_max(u32 m) {
    for (int step = 16; step; step >>= 1) m = max(m, __shfl_xor_sync(0xffffffffu, m, step));
    return m;
}
"""

_COMMON = """
DEVICE T sum(const T* x, const T* residual, int has_residual, i64 i) {
    return has_residual ? x[i] + residual[i] : x[i];
}
"""

_BF16 = """
KERNEL encode(const T* x, const T* residual, T* after, unsigned short* out, i64 size, int has_residual, int has_after,
              bool* bad) {
    EACH_THREAD(i, size) {
        const T exact = sum(x, residual, has_residual, i);
        const u32 bits = bits_of((float)exact), magnitude = bits & MAGNITUDE;
        if (magnitude >= BF16_LIMIT) *bad = true;
        const u32 code = (magnitude > INFINITE ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        out[i] = (unsigned short)code;
        if (has_after) after[i] = exact - (T)float_of(code << 16);
    }
}
DEVICE T decoded(const unsigned char* data, i64 i) {
    return (T)float_of((u32)((const unsigned short*)data)[i] << 16);
}
"""

_BLOCKS = """
DEVICE u32 block_seed(u64 key, i64 block) {
    u64 z = key + (u64)(block + 1) * GOLDEN64;
    z = (z ^ (z >> 30)) * MIX64_0;
    z = (z ^ (z >> 27)) * MIX64_1;
    return (u32)((z ^ (z >> 31)) >> 32);
}
DEVICE u32 mix32(u32 h) {
    h = (h ^ (h >> 16)) * MIX32_0;
    h = (h ^ (h >> 13)) * MIX32_1;
    return h ^ (h >> 16);
}
DEVICE u32 largest(const T* x, const T* residual, int has_residual, i64 start, i64 size, int lane) {
    u32 top = 0;
    for (int j = lane; j < BLOCK; j += 32) {
        if (start + j >= size) break;
        const u32 magnitude = bits_of((float)sum(x, residual, has_residual, start + j)) & MAGNITUDE;
        top = magnitude > top ? magnitude : top;
    }
    return top;
}
DEVICE u32 scale_bits(u32 top) {
    if (top >= BLOCK_LIMIT) return NOT_A_NUMBER;
    const u32 scale = (bits_of(float_of(top) / TOP) + BELOW) & ~BELOW;
    return scale < SMALLEST_SCALE ? 0u : scale;
}
// Reads x[i], which may lie behind the end; writes what its code leaves behind.
DEVICE int code_of(const T* x, const T* residual, T* after, int has_residual, int has_after, i64 i, i64 size,
                   float scale, float divisor, int stochastic, u32 noise, bool finite) {
    if (i >= size) return 0;
    const T exact = sum(x, residual, has_residual, i);
    const float step = (float)exact / divisor;
    const int code = !finite ? 0 : stochastic ? ((int)step + (int)noise) >> 16 : (int)rintf(step);
    if (has_after) after[i] = exact - (T)((float)code * scale);
    return code;
}
KERNEL encode(const T* x, const T* residual, T* after, unsigned char* out, i64 size, int has_residual, int has_after,
              bool* bad, int stochastic, u64 key, i64 first_block) {
    EACH_WARP(b, (size + BLOCK - 1) / BLOCK) {
        const i64 start = b * BLOCK;
        unsigned char* row = out + b * NBYTES;
        MAX_OVER_LANES(top, largest(x, residual, has_residual, start, size, lane))
        const u32 bits = scale_bits(top);
        const bool finite = top < BLOCK_LIMIT;
        const float scale = float_of(bits);
        const float divisor = (scale > 0.0f ? scale : 1.0f) * (stochastic ? 1.0f / 65536 : 1.0f);
        const u32 seed = stochastic ? block_seed(key, first_block + b) : 0u;
        EACH_LANE {
            if (lane == 0) {
                STORE_SCALE;
                if (!finite) *bad = true;
            }
            for (int j = lane; j < HALF; j += 32) {
                const u32 noise = stochastic ? mix32(seed + (u32)j) : 0u;
                const int p = code_of(x, residual, after, has_residual, has_after, start + j, size, scale, divisor,
                                      stochastic, noise & 0xffffu, finite);
                const int q = code_of(x, residual, after, has_residual, has_after, start + j + HALF, size, scale,
                                      divisor, stochastic, noise >> 16, finite);
                STORE_CODES;
            }
        }
    }
}
DEVICE T decoded(const unsigned char* data, i64 i) {
    const unsigned char* row = data + i / BLOCK * NBYTES;
    const int j = (int)(i % BLOCK);
    return (T)(LOAD_CODE) * (T)(LOAD_SCALE);
}
"""

_DECODE = """
KERNEL decode(const unsigned char* data, T* out, i64 size) {
    EACH_THREAD(i, size) { out[i] = decoded(data, i); }
}
KERNEL decode_add(const unsigned char* data, T* c, i64 size, T weight) {
    EACH_THREAD(i, size) { c[i] = c[i] + decoded(data, i) * weight; }
}
"""

# A scale lies at a multiple of its own size: 260 is one of 4, 34 of 2.
_STORED = {
    "int8": {
        "STORE_SCALE": "*(u32*)row = bits",
        "STORE_CODES": "row[4 + j] = (unsigned char)p; row[4 + j + HALF] = (unsigned char)q",
        "LOAD_CODE": "(signed char)row[4 + j]",
        "LOAD_SCALE": "float_of(*(const u32*)row)",
    },
    "int4": {
        "STORE_SCALE": "*(unsigned short*)row = (unsigned short)(bits >> 16)",
        "STORE_CODES": "row[2 + j] = (unsigned char)((p & 15) | (q & 15) << 4)",
        "LOAD_CODE": "(int)((u32)row[2 + j % HALF] << (j < HALF ? 28 : 24)) >> 28",
        "LOAD_SCALE": "float_of((u32)*(const unsigned short*)row << 16)",
    },
}


def source(name: str, dtype: Any, machine: str = CUDA) -> str:
    """C of the kernels encode, decode and decode_add for this encoding and dtype, on what `machine` defines."""
    numbers: dict[str, int] = {"MAGNITUDE": MAGNITUDE, "INFINITE": INFINITE, "BF16_LIMIT": BF16_LIMIT}
    words: dict[str, str] = {"T": {"float32": "float", "float64": "double"}[np.dtype(dtype).name]}
    if name != "bf16":
        form = FORMATS[name]
        numbers |= {"BLOCK_LIMIT": BLOCK_LIMIT, "SMALLEST_SCALE": SMALLEST_SCALE, "NOT_A_NUMBER": NAN}
        numbers |= {"MIX32_0": MIX32[0], "MIX32_1": MIX32[1], "BELOW": (1 << form.cut) - 1}
        words |= {"GOLDEN64": f"{GOLDEN64}ull", "MIX64_0": f"{MIX64[0]}ull", "MIX64_1": f"{MIX64[1]}ull"}
        words |= {"BLOCK": str(form.block), "HALF": str(form.block // 2), "NBYTES": str(form.nbytes)}
        words |= {"TOP": f"{form.top}.0f"} | _STORED[name]
    words |= {word: f"{value}u" for word, value in numbers.items()}
    defined = "".join(f"#define {word} {text}\n" for word, text in words.items())
    return defined + machine + _COMMON + (_BF16 if name == "bf16" else _BLOCKS) + _DECODE


@cache
def _module(xp: ModuleType, name: str, dtype: str) -> Any:
    # A product and a sum are two roundings, as on the host.
    return xp.RawModule(code=source(name, dtype), options=("--fmad=false",))


def _launch(kernel: str, name: str, x: Array, threads: int, arguments: tuple[Any, ...]) -> None:
    function = _module(namespace(x), name, x.dtype.name).get_function(kernel)
    if threads:
        function((-(-threads // _THREADS),), (_THREADS,), arguments)


def encode(
    name: str, x: Array, out: Array, residual: Array | None, after: Array | None, key: int | None, first: int
) -> bool:
    """Encode `x` (n,) as `Encoding.encode` says, and wait; returns whether all of it is finite and in range."""
    bad = namespace(x).zeros(1, np.bool_)
    given = (
        x, x if residual is None else residual, x if after is None else after, out, np.int64(x.size),
        np.int32(residual is not None), np.int32(after is not None), bad,
    )  # fmt: skip
    if name == "bf16":
        _launch("encode", name, x, x.size, given)
    else:
        block = FORMATS[name].block
        rounding = (np.int32(key is not None), np.uint64(key or 0), np.int64(first // block))
        _launch("encode", name, x, -(-x.size // block) * _WARP, given + rounding)
    return not bool(bad.any())


def decode(name: str, data: Array, out: Array) -> None:
    """Write the numbers of `data` into `out` (n,): one launch, no wait."""
    _launch("decode", name, out, out.size, (data, out, np.int64(out.size)))


def decode_add(name: str, data: Array, c: Array, weight: float) -> None:
    """Add weight·(the numbers of `data`) to `c` (n,), in place: one launch, no wait."""
    _launch("decode_add", name, c, c.size, (data, c, np.int64(c.size), c.dtype.type(weight)))
