"""Encodings: exact bytes, bounds of the error, error feedback, unbiased rounding; NumPy, numba and CUDA's C agree."""

import re
import shutil
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agnmpi.arrays import device_encodings, encodings, host_encodings, kernels
from agnmpi.arrays.encodings import get, rounding_key
from agnmpi.arrays.host_encodings import CHUNK, FORMATS, mix64

LOSSY = ("bf16", "int8", "int4")
INTEGERS = ("int8", "int4")
SIDES = ("numpy", "numba", "device")
SIZES = (1, 63, 64, 65, 255, 256, 257, 1000)
# The fixtures hold for all examples of a test.
examples = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def require_numba():
    if encodings.fast() is None:
        pytest.skip("numba is not installed (pip install 'agnmpi[fast]')")


def device_side(library, patch):
    """How to bring an array to the fake device."""
    device = fake_cuda.device(library)
    patch.setitem(sys.modules, fake_cuda.MODULE, device)
    return SimpleNamespace(name="device", put=device.array, log=device.log)


def host_side(name, patch):
    if name == "numpy":
        patch.setattr(encodings, "fast", lambda: None)
    return SimpleNamespace(name=name, put=np.array, log=[])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_cuda.compile_host(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=SIDES)
def side(request, monkeypatch):
    """The implementation that `get`'s encodings use in this test."""
    if request.param == "device":
        return device_side(request.getfixturevalue("library"), monkeypatch)
    if request.param == "numba":
        require_numba()
    return host_side(request.param, monkeypatch)


def encode(side, name, x, residual=None, key=None, first=0):
    """(finite, bytes, new residual), on the host; x and residual must not have changed."""
    encoding = get(name)
    x_there, out = side.put(x), side.put(np.full(encoding.nbytes(x.size, x.dtype), 0xAB, np.uint8))
    old = None if residual is None else side.put(residual)
    new = side.put(np.full_like(x, 7))
    finite = encoding.encode(x_there, out, residual=old, new_residual=new, key=key, first=first)
    np.testing.assert_array_equal(fake_cuda.plain(x_there), x)
    if residual is not None:
        np.testing.assert_array_equal(fake_cuda.plain(old), residual)
    return finite, fake_cuda.plain(out), fake_cuda.plain(new)


def decode(side, name, data, size, dtype="f4"):
    out = side.put(np.full(size, 7, dtype))
    get(name).decode(side.put(data), out)
    return fake_cuda.plain(out)


def scales(name, data):
    """The scale of each block, read as the format says."""
    rows = data.reshape(-1, FORMATS[name].nbytes)
    if name == "int8":
        return np.array([struct.unpack("<f", bytes(row[:4]))[0] for row in rows])
    return np.array([struct.unpack("<f", b"\0\0" + bytes(row[:2]))[0] for row in rows])


def scale_of_each(name, data, size):
    return np.repeat(scales(name, data), get(name).block)[:size]


def mixed(size, dtype="f4", seed=0):
    """Numbers of all magnitudes, some of them 0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size) * np.exp(4 * rng.normal(size=size))
    return np.where(rng.random(size) < 0.1, 0, x).astype(dtype)


def vectors(largest=2.0**126):
    """Vectors of 1 to 600 numbers, float32 or float64, subnormal ones among them."""
    return st.sampled_from((32, 64)).flatmap(
        lambda width: arrays(
            f"f{width // 8}",
            st.integers(1, 600),
            elements=st.floats(-largest, largest, width=width) | st.floats(-8, 8, width=width),
        )
    )


# What the format is


def test_names_sizes_and_blocks():
    assert encodings.NAMES == ("float32", "bf16", "int8", "int4")
    assert [get(name).exact for name in encodings.NAMES] == [True, False, False, False]
    assert get("int8") is get("int8")
    for name, per_block in (("int8", 260), ("int4", 34)):
        block = get(name).block
        assert [get(name).nbytes(n) for n in (0, 1, block, block + 1)] == [0, per_block, per_block, 2 * per_block]
    assert [get("bf16").nbytes(3), get("float32").nbytes(3), get("float32").nbytes(3, "f8")] == [6, 12, 24]
    with pytest.raises(ValueError, match="'int7': choose one of float32, bf16, int8, int4"):
        get("int7")


def test_int8_by_hand(side):
    """Scale 1, ties to even, zeros behind the end."""
    x = np.array([127, -127, 1, 0.5, 1.5, 2.5, -0.5, -2.5, 0.75], "f4")
    codes = [127, 256 - 127, 1, 0, 2, 2, 0, 256 - 2, 1]
    finite, data, new = encode(side, "int8", x)
    assert finite
    assert data.tolist() == [0, 0, 0x80, 0x3F, *codes, *[0] * 247]
    assert new.tolist() == [0, 0, 0, 0.5, -0.5, 0.5, -0.5, -0.5, -0.25]


def test_int4_by_hand(side):
    """Scale 1 as bf16; byte j holds number j below and number j+32 above."""
    x = np.zeros(64, "f4")
    x[:6], x[32:37] = [7, -7, 1, 0.5, 2.5, 0], [-1, 3, 0.5, -6, -1.5]
    low, high = [7, 9, 1, 0, 2, 0], [15, 3, 0, 10, 14, 0]  # in two's complement
    _, data, _ = encode(side, "int4", x)
    assert data.tolist() == [0x80, 0x3F, *[a | b << 4 for a, b in zip(low, high)], *[0] * 26]


@pytest.mark.parametrize(
    ("name", "scale"),
    [("int8", 0x3C010300), ("int4", 0x3E130000)],  # 1/127 = 0x3C010204 and 1/7 = 0x3E124925, rounded up
)
def test_a_scale_is_rounded_up(side, name, scale):
    _, data, _ = encode(side, name, np.array([1, -1], "f4"))
    assert scales(name, data).astype("f4").view("u4").tolist() == [scale]
    top = FORMATS[name].top
    assert decode(side, name, data, 2).tolist() == [top * scales(name, data)[0], -top * scales(name, data)[0]]


@pytest.mark.parametrize("name", INTEGERS)
def test_each_scale_is_taken_for_top_times_it_and_the_next_one_for_more(side, name):
    """All scales of one binade: no quotient is rounded to a scale that is too small."""
    form = FORMATS[name]
    s = np.arange(1, 2, 2.0 ** (form.cut - 23), dtype="f4")
    x = np.zeros((s.size, form.block), "f4")
    x[:, 1] = -form.top * s
    np.testing.assert_array_equal(scales(name, encode(side, name, x.ravel())[1]), s)
    x[:, 1] = np.nextafter(x[:, 1], np.float32(-np.inf))
    following = s + 2.0 ** (form.cut - 23)
    np.testing.assert_array_equal(scales(name, encode(side, name, x.ravel())[1]), following)


def test_bf16_by_hand(side):
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2, np.inf, -np.inf, 0, -0.0], "f4")
    _, data, _ = encode(side, "bf16", x)
    assert data.view("<u2").tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xC000, 0x7F80, 0xFF80, 0, 0x8000]


def test_bf16_holds_all_its_numbers_and_rounds_what_lies_between(side):
    every = np.arange(1 << 16, dtype="u4") << 16
    x = every.view("f4")
    _, data, _ = encode(side, "bf16", x)
    back = decode(side, "bf16", data, x.size)
    np.testing.assert_array_equal(back, x)  # NaN where NaN was
    number = np.isfinite(x)
    assert (back.view("u4") == every)[number].all(), "zeros keep their sign"
    for add, up in ((0x7FFF, 0), (0x8000, 1), (0x8001, 2)):  # below, at and above the middle
        _, data, _ = encode(side, "bf16", (every[number] | np.uint32(add)).view("f4"))
        odd = (every[number] >> 16) & 1
        expected = (every[number] >> 16) + {0: 0, 1: odd, 2: 1}[up]
        np.testing.assert_array_equal(data.view("<u2"), expected)


def test_each_nan_stays_one_in_bf16(side):
    patterns = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF], "u4")
    finite, data, _ = encode(side, "bf16", patterns.view("f4"))
    assert not finite
    assert np.isnan(decode(side, "bf16", data, 6)).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_the_tail_is_padded_with_zeros(side, name):
    block = get(name).block
    x = mixed(block + 3)
    padded = np.concatenate([x, np.zeros(block - 3, "f4")])
    np.testing.assert_array_equal(encode(side, name, x)[1], encode(side, name, padded)[1])


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("key", [None, 3])
def test_zeros_are_zero_bytes(side, name, key):
    finite, data, new = encode(side, name, np.zeros(300, "f4"), key=key)
    assert finite
    assert not data.any()
    assert not new.any()


# How far decoded numbers are from the numbers


@pytest.mark.parametrize("name", INTEGERS)
@examples
@given(x=vectors(), key=st.none() | st.integers(0, 2**64 - 1))
@example(x=np.full(3, 2.0**-149, "f4"), key=None)
@example(x=np.array([2.0**-110 * 127, 2.0**-110 * 7, 2.0**-126], "f4"), key=1)
@example(x=np.array([1.7e38, -1.7e38, 1, 0], "f8"), key=None)
def test_the_error_is_half_a_step_or_less_than_one_if_stochastic(side, name, x, key):
    form = FORMATS[name]
    finite, data, new = encode(side, name, x, key=key)
    assert finite
    single = x.astype("f4")
    step = scales(name, data)
    blocks = np.zeros(step.size * form.block)
    blocks[: x.size] = np.abs(single)
    exact = blocks.reshape(-1, form.block).max(axis=1) / form.top
    assert (step <= exact * (1 + 2.0 ** (form.cut - 23))).all()
    assert ((step >= exact) | (step == 0)).all()
    assert (exact[step == 0] < 2.0**-109).all()

    back = decode(side, name, data, x.size, x.dtype)
    assert np.isfinite(back).all()
    at = scale_of_each(name, data, x.size)
    bound = np.where(at > 0, at * (0.5 if key is None else 1) * (1 + 2**-15), form.top * 2.0**-109)
    error = np.abs(back.astype("f8") - x)
    assert (error <= bound + np.abs(x) * 2.0**-24).all()
    if key is not None:
        assert (back[single == 0] == 0).all()
    np.testing.assert_array_equal(new, x - back)


@examples
@given(x=vectors(float(np.float32(3.3e38))))
def test_bf16_is_off_by_half_of_its_last_place(side, x):
    finite, data, new = encode(side, "bf16", x)
    assert finite
    back = decode(side, "bf16", data, x.size, x.dtype)
    assert (np.abs(back - x) <= np.maximum(np.abs(x) * (2.0**-8 + 2.0**-23), 2.0**-134 + 2.0**-149)).all()
    np.testing.assert_array_equal(new, x - back)


@pytest.mark.parametrize("name", LOSSY)
@examples
@given(x=arrays("f4", 70, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_decoded_and_residual_make_up_the_number(side, name, x):
    """Nothing is lost by rounding: what is sent and what stays behind add up to what there was, exactly."""
    _, data, new = encode(side, name, x)
    back = decode(side, name, data, x.size)
    assert all(Fraction(float(a)) + Fraction(float(b)) == Fraction(float(v)) for a, b, v in zip(back, new, x))


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("key", [None, 5])
def test_subnormal_numbers_stay_behind(side, name, key):
    x = np.full(10, 2.0**-140, "f4")
    finite, data, new = encode(side, name, x, key=key)
    assert finite
    assert not data.any()
    np.testing.assert_array_equal(new, x)


# What is not finite


LIMITS = {"bf16": np.uint32(0x7F7F8000).view("f4"), "int8": np.float32(2.0**127), "int4": np.float32(2.0**127)}


@pytest.mark.parametrize("key", [None, 5])
@pytest.mark.parametrize("name", LOSSY)
def test_the_largest_numbers_stay_finite_and_larger_ones_are_reported(side, name, key):
    below = np.nextafter(LIMITS[name], np.float32(0))
    for sign in (1, -1):
        x = np.array([1, sign * below], "f4")
        finite, data, _ = encode(side, name, x, key=key)
        assert finite
        assert np.isfinite(decode(side, name, data, 2)).all()
        x[1] = sign * LIMITS[name]
        finite, data, _ = encode(side, name, x, key=key)
        assert not finite
        assert not np.isfinite(decode(side, name, data, 2)[1])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", encodings.NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_reported_and_seen_by_the_receiver(side, name, dtype, bad):
    block = get(name).block if name in INTEGERS else 1
    for at in (0, 300, 599):
        for key in (None, 5):
            x = mixed(600, dtype)
            x[at] = bad
            finite, data, _ = encode(side, name, x, key=key)
            assert not finite
            back = decode(side, name, data, x.size, dtype)
            inside = np.arange(600) // block == at // block
            assert not np.isfinite(back[inside]).any()
            x[inside] = 0
            np.testing.assert_array_equal(
                back[~inside], decode(side, name, encode(side, name, x, key=key)[1], 600, dtype)[~inside]
            )


@pytest.mark.parametrize("name", encodings.NAMES)
def test_what_is_not_finite_in_a_residual_or_in_the_sum_is_reported(side, name):
    x, residual = mixed(300), np.zeros(300, "f4")
    assert encode(side, name, x, residual)[0]
    residual[299] = np.nan
    assert not encode(side, name, x, residual)[0]
    x[299] = residual[299] = np.float32(3e38)
    assert not encode(side, name, x, residual)[0]
    x[299], residual[299] = np.inf, -np.inf
    assert not encode(side, name, x, residual)[0]


@pytest.mark.parametrize("name", LOSSY)
def test_a_float64_beyond_float32_is_reported(side, name):
    assert not encode(side, name, np.array([1.0, 1e300]))[0]
    assert get("float32").encode(np.array([1e300]), np.empty(8, np.uint8))


# Pieces


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("key", [None, 77])
@pytest.mark.parametrize("name", encodings.NAMES)
def test_pieces_are_the_whole(side, name, key, dtype):
    """Cut at blocks, encoded and decoded one by one into ranges of the same bytes; nothing else is written."""
    encoding, size = get(name), 2 * CHUNK + 1001
    x, residual = mixed(size, dtype), mixed(size, dtype, seed=1)
    _, whole, left = encode(side, name, x, residual, key)
    guarded, new = side.put(np.full(whole.size + 8, 0xAB, np.uint8)), side.put(np.zeros(size, dtype))
    cuts = [0, 256, 1024, 1024, 1024 + CHUNK, size]
    x_there, residual_there = side.put(x), side.put(residual)
    out = side.put(np.full(size + 8, 7, dtype))
    for lo, hi in pairwise(cuts):
        a, b = encoding.nbytes(lo, dtype), encoding.nbytes(hi, dtype)
        encoding.encode(
            x_there[lo:hi], guarded[a:b], residual=residual_there[lo:hi], new_residual=new[lo:hi], key=key, first=lo
        )
        encoding.decode(guarded[a:b], out[lo:hi])
    host, decoded = fake_cuda.plain(guarded), fake_cuda.plain(out)
    np.testing.assert_array_equal(host[:-8], whole)
    assert (host[-8:] == 0xAB).all()
    np.testing.assert_array_equal(fake_cuda.plain(new), left)
    np.testing.assert_array_equal(decoded[:size], decode(side, name, whole, size, dtype))
    assert (decoded[size:] == 7).all()


def test_a_piece_begins_with_a_block():
    x, out = np.zeros(10, "f4"), np.empty(260, np.uint8)
    with pytest.raises(ValueError, match="begins at number 100, not at a multiple of 256"):
        get("int8").encode(x, out, first=100)


@pytest.mark.parametrize("name", LOSSY)
def test_bytes_on_the_host_may_lie_at_any_address(name):
    """As behind a header: bf16 then crosses the borders of words."""
    x = mixed(300)
    nbytes = get(name).nbytes(300)
    straight, memory = np.empty(nbytes, np.uint8), np.empty(nbytes + 1, np.uint8)
    get(name).encode(x, straight)
    get(name).encode(x, memory[1:])
    np.testing.assert_array_equal(memory[1:], straight)
    out, back = np.empty_like(x), np.empty_like(x)
    get(name).decode(memory[1:], out)
    get(name).decode(straight, back)
    np.testing.assert_array_equal(out, back)


# Error feedback


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", LOSSY)
def test_with_error_feedback_the_sum_of_what_is_sent_follows_the_sum(side, name, dtype):
    """It is off by what is still left behind, at most half a step, however many rounds there were."""
    rng = np.random.default_rng(0)
    bias = rng.normal(size=500)
    total, sent, plain = np.zeros(500), np.zeros(500), np.zeros(500)
    residual = np.zeros(500, dtype)
    for _ in range(200):
        x = (bias + 0.1 * rng.normal(size=500)).astype(dtype)
        _, data, residual = encode(side, name, x, residual)
        total += x
        sent += decode(side, name, data, 500, dtype)
        plain += decode(side, name, encode(side, name, x)[1], 500, dtype)
        step = 2.0**-7 * np.abs(x) + 2.0**-7 if name == "bf16" else scale_of_each(name, data, 500)
        assert (np.abs(sent - total) <= step * 0.5001 + 2e-5).all()
    assert np.abs(sent - total).max() < np.abs(plain - total).max() / 5


@pytest.mark.parametrize("name", LOSSY)
def test_a_residual_may_be_moved_in_place(side, name):
    x, residual = mixed(1000), mixed(1000, seed=1)
    _, data, new = encode(side, name, x, residual)
    there, out = side.put(residual), side.put(np.zeros_like(data))
    get(name).encode(side.put(x), out, residual=there, new_residual=there)
    np.testing.assert_array_equal(fake_cuda.plain(out), data)
    np.testing.assert_array_equal(fake_cuda.plain(there), new)


def test_a_residual_is_sent_once_where_the_encoding_is_exact(side):
    """As after a resume with another encoding."""
    x, residual = mixed(100), mixed(100, seed=1)
    finite, data, new = encode(side, "float32", x, residual)
    assert finite
    np.testing.assert_array_equal(data.view("f4"), x + residual)
    assert not new.any()


# Stochastic rounding


def test_the_mixes_are_those_of_their_sources():
    """SplitMix64's stream from 1234567; MurmurHash3 of nothing with seed 1."""
    golden = host_encodings.GOLDEN64
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix64(1234567 + k * golden) for k in (1, 2, 3)] == first
    assert murmur(1) == 0x514E28B7


def murmur(h):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> shift) * factor % 2**32
    return h


@pytest.mark.parametrize("name", INTEGERS)
def test_stochastic_codes_by_hand(side, name):
    """Scale 1. The two halves of a block share a hash; blocks are counted from the start of the whole vector."""
    form, key, first_block = FORMATS[name], 2**63 + 12345, 5
    x = np.random.default_rng(0).uniform(-form.top, form.top, 3 * form.block).astype("f4")
    x[:: form.block] = form.top
    _, data, _ = encode(side, name, x, key=key, first=first_block * form.block)
    assert (scales(name, data) == 1).all()
    back, half = decode(side, name, data, x.size), form.block // 2
    for i, v in enumerate(x):
        b, j = divmod(i, form.block)
        seed = mix64(key + (first_block + b + 1) * host_encodings.GOLDEN64) >> 32
        h = murmur((seed + j % half) % 2**32)
        noise = h % 2**16 if j < half else h >> 16
        assert back[i] == (int(float(v) * 2**16) + noise) // 2**16


@pytest.mark.parametrize("name", INTEGERS)
def test_stochastic_rounding_has_no_bias(side, name):
    top, keys = FORMATS[name].top, 2000
    x = np.linspace(-top, top, 64).astype("f4")
    x[:5] = [top, -top, 3, 0, -1]  # integers stay what they are
    total = np.zeros(64)
    for count in range(keys):
        data = encode(side, name, x, key=rounding_key(1, 2, count))[1]
        back = decode(side, name, data, 64)
        assert back[:5].tolist() == x[:5].tolist()
        total += back
    fraction = x - np.floor(x)
    standard_error = np.sqrt(fraction * (1 - fraction) / keys)
    assert (np.abs(total / keys - x) <= 4.5 * standard_error + 2**-15).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_numbers_are_rounded_independently(side, name):
    """Neighbours, the halves of a block that share a hash, and neighbouring blocks are uncorrelated."""
    form = FORMATS[name]
    x = np.full((4096, form.block), 0.5, "f4")
    x[:, 0] = form.top
    up = decode(side, name, encode(side, name, x.ravel(), key=99)[1], x.size).reshape(x.shape)[:, 1:] - 0.5
    pairs = {
        "neighbours": up[:, :-1] * up[:, 1:],
        "halves": up[:, : form.block // 2 - 1] * up[:, form.block // 2 :],
        "blocks": up[:-1] * up[1:],
    }
    assert abs(up.mean()) < 4.5 * 0.5 / np.sqrt(up.size)
    for what, products in pairs.items():
        assert abs(products.mean()) < 4.5 * 0.25 / np.sqrt(products.size), what


def test_rounding_repeats_for_a_key_and_differs_for_another(side):
    x = mixed(1000)
    keys = {rounding_key(*given) for given in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63, 5, 7), (-1, 0, 0))}
    assert len(keys) == 6
    assert all(0 <= key < 2**64 for key in keys)
    data = {encode(side, "int8", x, key=key)[1].tobytes() for key in keys for _ in range(2)}
    data |= {encode(side, "int8", x, key=min(keys), first=256)[1].tobytes()}
    assert len(data) == 7


# Adding


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("weight", [1, 1 / 3, -0.5])
@pytest.mark.parametrize("name", encodings.NAMES)
def test_decode_add_is_decoding_then_adding(side, name, weight, dtype):
    for size in (*SIZES, CHUNK + 300):
        x, c = mixed(size, dtype), mixed(size, dtype, seed=1)
        data = encode(side, name, x)[1]
        there = side.put(c)
        get(name).decode_add(side.put(data), there, weight)
        expected = c + c.dtype.type(weight) * decode(side, name, data, size, dtype)
        np.testing.assert_array_equal(fake_cuda.plain(there), expected)


# NumPy, numba and the device


@pytest.mark.parametrize("other", ["numba", "device"])
@pytest.mark.parametrize("name", LOSSY)
@examples
@given(
    x=vectors(2.0**127),
    key=st.none() | st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    with_residual=st.booleans(),
)
def test_numba_and_the_device_give_numpys_bytes(library, name, other, x, key, first, with_residual):
    residual = mixed(x.size, x.dtype) if with_residual else None

    def results(side):
        finite, data, new = encode(side, name, x, residual, key, first * get(name).block)
        return finite, data, new, decode(side, name, data, x.size, x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        if other == "numba":
            require_numba()
            got = results(host_side("numba", patch))
        else:
            got = results(device_side(library, patch))
    with pytest.MonkeyPatch.context() as patch:
        expected = results(host_side("numpy", patch))
    assert got[0] == expected[0]
    for there, here in zip(got[1:], expected[1:]):
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("divisor", [1, 3])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("library", ["numpy", "numba"])
def test_a_displacement_is_encoded_as_if_it_were_formed_before(library, name, dtype, divisor, monkeypatch):
    if library == "numba":
        require_numba()
    side, encoding = host_side(library, monkeypatch), get(name)
    monkeypatch.setattr(kernels, "PIECE", 1 << 15)
    x, o, residual = (mixed(70_013, dtype, seed) for seed in range(3))
    for bad in (0, np.inf, np.nan):
        x[69_000] += bad
        with np.errstate(invalid="ignore"):
            expected = encode(side, name, (x - o) / x.dtype.type(divisor), residual)
        data, new = np.zeros_like(expected[1]), np.zeros_like(x)
        finite = encoding.encode(x, data, residual=residual, new_residual=new, origin=o, divisor=divisor)
        assert finite == expected[0] == (bad == 0)
        np.testing.assert_array_equal(data, expected[1])
        np.testing.assert_array_equal(new, expected[2])
    for other in (get("float32"), encoding):
        data = np.empty(other.nbytes(x.size, x.dtype), np.uint8)
        with pytest.raises(ValueError, match="with a residual, on the host"):
            other.encode(x, data, origin=o)


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_threads_do_not_share_scratch(name, monkeypatch):
    if name == "numba":
        require_numba()
    side = host_side(name, monkeypatch)
    xs = [mixed(200_000, seed=seed) for seed in range(4)]

    def bytes_of(x):
        return encode(side, "int8", x, x, key=1)[1]

    expected = [bytes_of(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(bytes_of, xs), expected):
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", LOSSY)
def test_several_threads_give_the_bytes_of_one(side, name, monkeypatch):
    """With pieces of 1000 numbers, no multiple of a block, and a last block that is not whole."""
    monkeypatch.setattr(kernels, "PIECE", 1000)
    encoding, x = get(name), mixed(7 * 1000 + 13)
    workers = set()

    def results():
        data = encode(side, name, x, x, key=3, first=encoding.block * 5)
        c, stops = side.put(x.copy()), []
        encoding.decode_add(side.put(data[1]), c, 0.3, stops.append)
        workers.update(t.name for t in threading.enumerate() if t.name.startswith("agnmpi-kernels"))
        assert stops == sorted(set(stops))
        assert stops[-1] == x.size
        return *data, decode(side, name, data[1], x.size), fake_cuda.plain(c)

    kernels.set_threads(1)
    one = results()
    assert not workers
    kernels.set_threads(3)
    try:
        for got, expected in zip(results(), one):
            np.testing.assert_array_equal(got, expected)
        assert len(workers) == (2 if side.name != "device" else 0)
    finally:
        kernels.set_threads(1)


def test_on_a_device_each_is_one_launch(library, monkeypatch):
    side = device_side(library, monkeypatch)
    x, c, out = side.put(mixed(300)), side.put(mixed(300)), side.put(np.zeros(520, np.uint8))
    int8 = get("int8")
    int8.prepare(x)
    side.log.clear()
    assert int8.encode(x, out, residual=c, new_residual=c, key=1) is True
    int8.decode(out, x)
    int8.decode_add(out, c, 0.5)
    assert side.log == ["encode", "any", "synchronize", "decode", "decode_add"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LOSSY)
def test_device_code_compiles_and_neither_fuses_nor_widens(tmp_path, name, dtype):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    (tmp_path / "kernels.cu").write_text(device_encodings.source(name, dtype))
    command = [nvcc, "-ptx", "--fmad=false", "kernels.cu"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    if made.returncode and "host compiler" in made.stderr:
        pytest.skip(f"nvcc cannot work here: {made.stderr.strip().splitlines()[0]}")
    assert made.returncode == 0, made.stderr
    code = (tmp_path / "kernels.ptx").read_text()
    assert set(re.findall(r"\.entry (\w+)", code)) == {"encode", "decode", "decode_add"}
    assert "fma" not in code
    assert ("f64" in code) == (dtype == "float64")
    if name != "bf16":
        assert set(re.findall(r"div\.\S+\.f32", code)) == {"div.rn.f32"}


# Which of them is used


def test_numba_is_imported_by_the_first_encoding_that_is_not_exact():
    code = (
        "import sys, numpy as np; from agnmpi.arrays.encodings import get; x = np.ones(3, 'f4');"
        "get('float32').encode(x, np.empty(12, 'u1')); print('numba' in sys.modules);"
        "get('bf16').encode(x, np.empty(6, 'u1')); print('numba' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", str(encodings.fast() is not None)]


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", encodings.NAMES)
def test_prepare_changes_nothing(side, name, dtype):
    x = mixed(10, dtype)
    there = side.put(x)
    get(name).prepare(there)
    np.testing.assert_array_equal(fake_cuda.plain(there), x)


def test_without_numba_numpy_does_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)  # as not installed
    encodings.fast.cache_clear()
    try:
        assert encodings.fast() is None
    finally:
        encodings.fast.cache_clear()


def test_a_numba_that_cannot_be_used_is_named(monkeypatch, tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.0 or less')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    encodings.fast.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Numba needs NumPy 2.0 or less"):
            assert encodings.fast() is None
    finally:
        encodings.fast.cache_clear()


# What is refused


def test_what_does_not_fit_is_refused(side):
    def put(size, dtype="f4"):
        return side.put(np.zeros(size, dtype))

    int8, x, out = get("int8"), put(300), put(520, "u1")
    with pytest.raises(ValueError, match=r"300 numbers are uint8 \(520,\), not uint8 \(519,\)"):
        int8.encode(x, put(519, "u1"))
    with pytest.raises(ValueError, match=r"300 numbers are uint8 \(520,\), not int8"):
        int8.decode(put(520, "i1"), x)
    with pytest.raises(ValueError, match="float32 or float64, not float16"):
        int8.decode_add(out, put(300, "f2"))
    with pytest.raises(ValueError, match=r"a residual is float32 \(300,\) as its vector, not float64 \(300,\)"):
        int8.encode(x, out, residual=put(300, "f8"))
    with pytest.raises(ValueError, match="contiguous"):
        int8.encode(put(600)[::2], out)
    with pytest.raises(ValueError, match="contiguous"):
        int8.encode(x, put(1040, "u1")[::2])
