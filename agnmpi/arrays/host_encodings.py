"""Encodings on the host by NumPy, chunk by chunk in the cache; the definition that the other two give bit for bit.

A block of int8 or int4 is its scale s and then its codes q. Two rules make every machine give the same bytes, and the
same residual, whether its compiler fuses a product and a sum into one rounding or not:

- s has so few significant bits (16 in int8, 8 in int4) that q·s is exact in float32;
- s is absmax/top rounded up, so that v/s never leaves [−top, top].

Random bits are a function of key, block and place in the block: no state, no order of calls.
"""

from typing import Any, NamedTuple

import numpy as np

from .backend import BLOCK, Array

# Numbers in a chunk, a multiple of both blocks. At half of it NumPy's forty calls already cost a fifth more.
CHUNK = BLOCK

MAGNITUDE = 0x7FFFFFFF  # the bits of a float32 without its sign: ordered as the magnitudes, infinity and NaN above all
INFINITE = 0x7F800000
BF16_LIMIT = 0x7F7F8000  # the smallest magnitude that rounds to infinity in bf16
BLOCK_LIMIT = 0x7F000000  # 2¹²⁷: below it top·s is finite, though s was rounded up
# 2⁻¹¹⁰. A block with a smaller scale is written as zeros: s·2⁻¹⁶ stays a normal number, on devices that flush, too.
SMALLEST_SCALE = 17 << 23
NAN = 0x7FC00000


class BlockFormat(NamedTuple):
    """What a block of integer codes is."""

    block: int  # numbers
    top: int  # the largest code
    scale_bytes: int  # float32, or its upper half, bf16
    cut: int  # bits of a float32 that the scale does without
    nbytes: int


FORMATS = {"int8": BlockFormat(256, 127, 4, 8, 260), "int4": BlockFormat(64, 7, 2, 16, 34)}

_MASK64 = (1 << 64) - 1
_LOWER = np.uint64(0x0F0F0F0F0F0F0F0F)
GOLDEN64 = 0x9E3779B97F4A7C15
MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of SplitMix64
MIX32 = (0x85EBCA6B, 0xC2B2AE35)  # of MurmurHash3's finalizer


def mix64(z: int) -> int:
    """Mix the 64 bits of `z`: SplitMix64's output for the state z.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (variant 13 of Stafford).
    """
    z &= _MASK64
    z = (z ^ (z >> 30)) * MIX64[0] & _MASK64
    z = (z ^ (z >> 27)) * MIX64[1] & _MASK64
    return z ^ (z >> 31)


def _block_seeds(key: int, first: int, count: int) -> Array:
    """32 random bits for each of the blocks first … first+count−1: SplitMix64 of `key`, its upper halves."""
    z = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    z *= np.uint64(GOLDEN64)
    z += np.uint64(key)
    for shift, factor in zip((30, 27), MIX64):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(32)).astype(np.uint32)


def _mix32(h: Array, scratch: Array) -> None:
    """Mix each of `h`, in place: the finalizer of MurmurHash3 (Appleby, public domain)."""
    for shift, factor in ((16, MIX32[0]), (13, MIX32[1]), (16, None)):
        h ^= np.right_shift(h, np.uint32(shift), out=scratch)
        if factor:
            h *= np.uint32(factor)


class _Scratch:
    """Work arrays as long as one chunk; `blocks` rows of a block each."""

    def __init__(self, form: BlockFormat, size: int, dtype: Any, stochastic: bool) -> None:
        blocks = min(-(-size // form.block), CHUNK // form.block)
        shape, half = (blocks, form.block), (blocks, form.block // 2)
        self.sum = np.empty(shape, dtype)
        self.single = self.sum if dtype == np.float32 else np.empty(shape, np.float32)
        self.steps = np.empty(shape, np.float32)
        self.codes = np.empty(shape, np.int8)
        self.starts = np.arange(0, blocks * form.block, form.block)
        if stochastic:
            self.whole = np.empty(shape, np.int32)
            self.places = np.arange(form.block // 2, dtype=np.uint32)
            self.noise, self.mixing = np.empty(half, np.uint32), np.empty(half, np.uint32)


def _scales(top: Array, form: BlockFormat) -> Array:
    """Scales (blocks,) for the magnitudes `top`, as bits; NaN where something is not finite or too large."""
    # The quotient is rounded, too, but never down to a scale that is too small: where s has no bits below the cut,
    # top·s is a float32, and the next larger absmax already exceeds it by more than half a last place of s, times top.
    scale = (top.view(np.float32) / np.float32(form.top)).view(np.uint32)
    below = np.uint32((1 << form.cut) - 1)
    scale += below
    scale &= ~below
    scale[scale < SMALLEST_SCALE] = 0
    scale[top >= BLOCK_LIMIT] = NAN
    return scale


def _store(scale: Array, codes: Array, rows: Array, form: BlockFormat) -> None:
    """Write scales and codes (blocks, block) into the bytes of their blocks, `rows`."""
    if form.scale_bytes == 4:
        rows[:, :4] = scale.view(np.uint8).reshape(-1, 4)
        rows[:, 4:] = codes.view(np.uint8)
        return
    rows[:, :2] = (scale >> np.uint32(16)).astype(np.uint16).view(np.uint8).reshape(-1, 2)
    eights = codes.view(np.uint64)  # eight codes at once
    eights &= _LOWER
    quarter = eights.shape[1] // 2
    rows[:, 2:] = (eights[:, :quarter] | (eights[:, quarter:] << np.uint64(4))).view(np.uint8)


def _load(rows: Array, out: Array, form: BlockFormat, codes: Array) -> None:
    """Decode the bytes of whole blocks, `rows`, into `out` (blocks, block)."""
    if form.scale_bytes == 4:
        scale = np.ascontiguousarray(rows[:, :4]).view(np.float32)
        np.copyto(out, rows[:, 4:].view(np.int8))
    else:
        scale = (np.ascontiguousarray(rows[:, :2]).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        pairs, eights = np.ascontiguousarray(rows[:, 2:]).view(np.uint64), codes.view(np.uint64)
        quarter = pairs.shape[1]
        np.bitwise_and(pairs, _LOWER, out=eights[:, :quarter])
        np.bitwise_and(pairs >> np.uint64(4), _LOWER, out=eights[:, quarter:])
        codes ^= np.int8(8)  # and −8: four bits with a sign become eight
        codes -= np.int8(8)
        np.copyto(out, codes)
    out *= scale  # (blocks, 1)


def _encode_chunk(
    v: Array, rows: Array, form: BlockFormat, scratch: _Scratch, seeds: Array | None, decode: bool
) -> bool:
    """Encode float32 `v` (blocks, block) into `rows`; with `decode`, leave the decoded numbers in scratch.steps."""
    blocks = len(v)
    steps, codes = scratch.steps[:blocks], scratch.codes[:blocks]
    magnitudes = np.bitwise_and(v.view(np.uint32), np.uint32(MAGNITUDE), out=steps.view(np.uint32))
    top = np.maximum.reduceat(magnitudes.ravel(), scratch.starts[:blocks])
    scale_bits = _scales(top, form)
    finite = not bool((top >= BLOCK_LIMIT).any())
    scale = scale_bits.view(np.float32)[:, None]
    divisor = np.where(scale > 0, scale, np.float32(1))
    if seeds is not None:
        divisor *= np.float32(2**-16)
    np.divide(v, divisor, out=steps)
    if not finite:
        steps[top >= BLOCK_LIMIT] = 0
    if seeds is None:
        np.rint(steps, out=steps)
        np.copyto(codes, steps, casting="unsafe")
    else:
        # ⌊(2¹⁶·v/s + 16 random bits)/2¹⁶⌋: rounds up as often as the fraction says, and an integer never.
        whole, noise, half = scratch.whole[:blocks], scratch.noise[:blocks], form.block // 2
        np.copyto(whole, steps, casting="unsafe")
        np.add(seeds[:, None], scratch.places, out=noise)
        _mix32(noise, scratch.mixing[:blocks])
        whole[:, :half] += np.bitwise_and(noise, np.uint32(0xFFFF), out=scratch.mixing[:blocks]).view(np.int32)
        whole[:, half:] += np.right_shift(noise, np.uint32(16), out=noise).view(np.int32)
        whole >>= np.int32(16)
        np.copyto(codes, whole, casting="unsafe")
        if decode:
            np.copyto(steps, codes)
    _store(scale_bits, codes, rows, form)
    if decode:
        steps *= scale
    return finite


def _encode_blocks(
    form: BlockFormat, x: Array, out: Array, residual: Array | None, after: Array | None, key: int | None, first: int
) -> bool:
    size, block, finite = x.size, form.block, True
    scratch = _Scratch(form, size, x.dtype, key is not None)
    rows = out.reshape(-1, form.nbytes)
    for lo in range(0, size, CHUNK):
        hi = min(lo + CHUNK, size)
        blocks = -(-(hi - lo) // block)
        start = lo // block
        padded = blocks * block != hi - lo
        if residual is None and not padded and x.dtype == np.float32:
            exact = v = x[lo:hi].reshape(blocks, block)  # nothing to add: encode where it lies
        else:
            exact, v = scratch.sum[:blocks], scratch.single[:blocks]
            flat = exact.reshape(-1)
            if residual is None:
                flat[: hi - lo] = x[lo:hi]
            else:
                np.add(x[lo:hi], residual[lo:hi], out=flat[: hi - lo])
            flat[hi - lo :] = 0
            if v is not exact and x.dtype != np.float32:
                v[...] = exact
        seeds = None if key is None else _block_seeds(key, first // block + start, blocks)
        finite &= _encode_chunk(v, rows[start : start + blocks], form, scratch, seeds, after is not None)
        if after is not None:
            there = scratch.steps[:blocks].reshape(-1)[: hi - lo]
            np.subtract(exact.reshape(-1)[: hi - lo], there, out=after[lo:hi])
    return finite


def _encode_bf16(x: Array, out: Array, residual: Array | None, after: Array | None) -> bool:
    wire, size, finite = out.view(np.uint16), x.size, True
    total = np.empty(min(size, CHUNK), x.dtype)
    single = np.empty(total.size, np.float32)
    scratch = np.empty(total.size, np.uint32)
    for lo in range(0, size, CHUNK):
        hi = min(lo + CHUNK, size)
        exact = x[lo:hi] if residual is None else np.add(x[lo:hi], residual[lo:hi], out=total[: hi - lo])
        v = exact
        if x.dtype != np.float32:
            v = single[: hi - lo]
            v[...] = exact
        bits, rounded = v.view(np.uint32), scratch[: hi - lo]
        finite &= bool(np.bitwise_and(bits, np.uint32(MAGNITUDE), out=rounded).max() < BF16_LIMIT)
        np.right_shift(bits, np.uint32(16), out=rounded)
        rounded &= np.uint32(1)  # a tie goes to the even neighbour
        rounded += np.uint32(0x7FFF)
        rounded += bits
        if not finite:  # a NaN must not be carried over into infinity or zero
            nan = np.isnan(v)
            rounded[nan] = bits[nan] | np.uint32(0x400000)
        rounded >>= np.uint32(16)
        np.copyto(wire[lo:hi], rounded, casting="unsafe")
        if after is not None:
            rounded <<= np.uint32(16)
            np.subtract(exact, rounded.view(np.float32), out=after[lo:hi])
    return finite


def encode(
    name: str, x: Array, out: Array, residual: Array | None, after: Array | None, key: int | None, first: int,
    origin: Array | None = None, divisor: float = 1.0,
) -> bool:  # fmt: skip
    """Encode `x` (n,) as `Encoding.encode` says; returns whether all of it is finite and within range."""
    if origin is not None:
        return _encode_displacement(name, x, out, residual, after, key, first, origin, divisor)
    with np.errstate(invalid="ignore", over="ignore"):  # they are reported by the result
        if name == "bf16":
            return _encode_bf16(x, out, residual, after)
        return _encode_blocks(FORMATS[name], x, out, residual, after, key, first)


def _encode_displacement(
    name: str, x: Array, out: Array, residual: Array | None, after: Array | None, key: int | None, first: int,
    origin: Array, divisor: float,
) -> bool:  # fmt: skip
    """Encode (x − origin)/divisor, chunk by chunk, so that it stays in the cache."""
    block, nbytes = (1, 2) if name == "bf16" else (FORMATS[name].block, FORMATS[name].nbytes)
    chunk, finite = np.empty(min(x.size, CHUNK), x.dtype), True
    for lo in range(0, x.size, CHUNK):
        hi = min(lo + CHUNK, x.size)
        with np.errstate(invalid="ignore", over="ignore"):  # they are reported by the result
            moved = np.subtract(x[lo:hi], origin[lo:hi], out=chunk[: hi - lo])
            if divisor != 1:
                moved /= x.dtype.type(divisor)
        old, new = (None if v is None else v[lo:hi] for v in (residual, after))
        data = out[lo // block * nbytes : -(-hi // block) * nbytes]
        finite &= encode(name, moved, data, old, new, key, first + lo)
    return finite


def _decode_chunk(name: str, data: Array, lo: int, out: Array, codes: Array) -> None:
    """Decode into `out`, the numbers from `lo` on: whole blocks, but for the end of the vector."""
    if name == "bf16":
        wide = data.view(np.uint16)[lo : lo + out.size].astype(np.uint32)
        wide <<= np.uint32(16)
        out[...] = wide.view(np.float32)
        return
    form = FORMATS[name]
    start, blocks, rest = lo // form.block, out.size // form.block, out.size % form.block
    rows = data.reshape(-1, form.nbytes)[start:]
    if blocks:
        there = out[: out.size - rest].reshape(blocks, form.block)
        _load(rows[:blocks], there, form, codes.reshape(-1, form.block)[:blocks])
    if rest:
        last = np.empty((1, form.block), out.dtype)
        _load(rows[blocks : blocks + 1], last, form, np.empty((1, form.block), np.int8))
        out[out.size - rest :] = last[0, :rest]


def decode(name: str, data: Array, out: Array) -> None:
    """Write the numbers of `data` into `out` (n,)."""
    codes = np.empty(CHUNK, np.int8)
    with np.errstate(invalid="ignore"):
        for lo in range(0, out.size, CHUNK):
            _decode_chunk(name, data, lo, out[lo : lo + CHUNK], codes)


def decode_add(name: str, data: Array, c: Array, weight: float) -> None:
    """Add weight·(the numbers of `data`) to `c` (n,), in place."""
    codes, decoded = np.empty(CHUNK, np.int8), np.empty(min(c.size, CHUNK), c.dtype)
    factor = c.dtype.type(weight)
    with np.errstate(invalid="ignore", over="ignore"):
        for lo in range(0, c.size, CHUNK):
            there = c[lo : lo + CHUNK]
            term = decoded[: there.size]
            _decode_chunk(name, data, lo, term, codes)
            if factor != 1:
                term *= factor
            there += term
