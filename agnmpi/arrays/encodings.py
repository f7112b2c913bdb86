"""Encodings: how a vector is written on the wire, as it is or in fewer bytes; by NumPy, by numba, or on the device.

On the host the threads of `kernels.set_threads` share a long vector; bits do not depend on their number.

Pure functions of their arguments. A block of numbers is a block of bytes, one behind the other: whole blocks of the
vector are a contiguous range of the message, and may be sent, encoded and decoded piece by piece.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from . import device_encodings, host_encodings
from .backend import Array, blocks, empty, on_host
from .host_encodings import FORMATS, GOLDEN64, mix64
from .host_kernels import find_numba
from .kernels import OnBlock, all_finite, run, share


def rounding_key(seed: int, sender: int, count: int) -> int:
    """Return the 64-bit key of one message's stochastic rounding: as good as independent for each message.

    Args:
        seed: The run's.
        sender: Rank or number of the sender.
        count: The commit's sequence, or the clock of what is pulled: another one for each message of this sender.

    Source: SplitMix64 (Steele, Lea, Flood 2014), folded over the three.

    >>> rounding_key(0, 1, 2) != rounding_key(0, 2, 1)
    True
    """
    key = 0
    for part in (seed, sender, count):
        key = mix64(key + part + GOLDEN64)
    return key


@cache
def fast() -> ModuleType | None:
    """The kernels by numba; None without numba. It is imported at the first call: that takes about a second."""
    numba = find_numba("encodings")
    if numba is None or numba.config.DISABLE_JIT:  # the loops would run in the interpreter
        return None
    from . import fast_encodings

    return fast_encodings


def _kernels(x: Array) -> Any:
    """The module that encodes and decodes vectors such as `x`."""
    return (fast() or host_encodings) if on_host(x) else device_encodings


@dataclass(frozen=True)
class Encoding:
    """How a vector is written on the wire; `get` gives the one of a name.

    float32: the vector as it is, in its own dtype. bf16: the upper half of a float32, rounded to nearest, ties to
    even. int8, int4: blocks of 256 and 64 numbers, each a scale s and integer codes q:

        s = max|v|/top, rounded up to 16 or 8 significant bits;  q = round(v/s) in [−top, top];  decoded q·s

    with top = 127 and 7. int8: float32 s, then 256 codes. int4: bf16 s, then 32 bytes; the j-th holds number j in its
    lower half, number j+32 in its upper. A block shorter than others, the last, is padded with zeros. All numbers lie
    little-endian. A float64 is rounded to float32 first. A block of numbers so small that s < 2⁻¹¹⁰ is zeros.

    A number is out of range if it is NaN or infinite, or would be so when decoded: from 2¹²⁷ in int8 and int4, from
    3.396e38 in bf16. bf16 then holds NaN or infinity in its place; all of its block of int8 or int4 decodes to NaN.

    Attributes:
        name: On the wire and in options.
        block: Numbers in a block. Pieces of a vector begin at multiples of it.
        nbytes_per_block: Bytes of a block; 0 for float32: the dtype's.

    Source: Dettmers et al. 2021, arXiv:2110.02861 (blockwise scales); Douillard et al. 2025, arXiv:2501.18512 (deltas
    in 4 bits).
    """

    name: str
    block: int
    nbytes_per_block: int

    @property
    def number(self) -> int:
        """On the wire: its place in NAMES."""
        return NAMES.index(self.name)

    @property
    def exact(self) -> bool:
        """Whether the decoded numbers are the numbers."""
        return not self.nbytes_per_block

    def nbytes(self, size: int, dtype: Any = np.float32) -> int:
        """Bytes of `size` numbers of `dtype`; where a piece begins, if `size` counts the numbers before it.

        >>> get("int8").nbytes(512), get("int8").nbytes(513), get("int4").nbytes(64), get("float32").nbytes(3, "f8")
        (520, 780, 34, 24)
        """
        return -(-size // self.block) * (self.nbytes_per_block or np.dtype(dtype).itemsize)

    def prepare(self, x: Array) -> None:
        """Compile what encodes and decodes vectors such as `x` now, not at the first message.

        By numba it takes two to three seconds on a free core, and other threads wait: compiling holds the GIL.
        """
        if not self.exact:
            y, wire = empty(1, x.dtype, x), empty(self.nbytes(1), np.uint8, x)
            y[...] = 0
            self.encode(y, wire, residual=y, new_residual=y)
            self.decode(wire, y)
            self.decode_add(wire, y)

    def encode(
        self,
        x: Array,
        out: Array,
        *,
        residual: Array | None = None,
        new_residual: Array | None = None,
        key: int | None = None,
        first: int = 0,
        origin: Array | None = None,
        divisor: float = 1.0,
    ) -> bool:
        """Encode x, or x + residual with error feedback: one pass, and no temporary longer than a chunk.

            v = (x − origin)/divisor + residual;  out = encoded v;  new_residual = v − decoded v

        The sum of what is sent then stays within one residual of the sum of all x. To be able to go back, where a
        commit is refused, give two vectors, and swap them when a commit is accepted: `residual` is only read.

        Args:
            x: Vector (n,), float32 or float64; not changed.
            out: Bytes (nbytes(n, x.dtype),), uint8, where x lies; on a device aligned to 4.
            residual: What earlier messages left behind, such as x; None: no error feedback.
            new_residual: Where to write what this one leaves behind; may be `residual`. None: nowhere.
            key: Of `rounding_key`: int8 and int4 round stochastically, without bias, instead of to nearest, even. A
                step of 2⁻¹⁶·s is the finest that this sees. For senders without error feedback.
            first: Index of x[0] in the whole vector, if x is a piece of it: a multiple of `block`.
            origin: Vector such as x, on the host, where a displacement from it, and a residual, are to be encoded.
            divisor: Of the displacement, rounded to x's dtype.

        Returns:
            Whether all of v was finite and in range. If not, out is as the class says, and new_residual of no use.

        Raises:
            ValueError: For vectors or bytes of another size, dtype or layout; for a piece that begins within a block.

        Source: Seide et al. 2014, "1-bit stochastic gradient descent" (error feedback).
        """
        self._require(x, out, residual, new_residual, origin)
        if first % self.block:
            raise ValueError(
                f"encoding {self.name}: a piece begins at number {first}, not at a multiple of {self.block}"
            )
        if origin is not None and (self.exact or residual is None or not on_host(x)):
            raise ValueError(f"encoding {self.name}: a displacement is formed with a residual, on the host")
        if self.exact:
            return _copy(x, out.view(x.dtype), residual, new_residual)
        kernels = _kernels(x)

        def work(lo: int, hi: int) -> bool:
            old, new, o = (None if v is None else v[lo:hi] for v in (residual, new_residual, origin))
            given = self.name, x[lo:hi], self._bytes(out, lo, hi), old, new, key, first + lo
            return bool(kernels.encode(*given) if o is None else kernels.encode(*given, o, divisor))

        return all(share(work, [(0, x.size)], multiple=self.block)) if on_host(x) else work(0, x.size)

    def _bytes(self, wire: Array, lo: int, hi: int) -> Array:
        """The bytes of the numbers lo … hi−1: whole blocks, or to the end."""
        return wire[self.nbytes(lo) : self.nbytes(hi)]

    def decode(self, data: Array, out: Array) -> None:
        """Write the numbers of `data`, bytes (nbytes(n, out.dtype),), into `out` (n,): whole blocks, or to the end.

        Raises:
            ValueError: As for `encode`.
        """
        self._require(out, data)
        if self.exact:
            out[...] = data.view(out.dtype)
            return
        kernels = _kernels(out)

        def work(lo: int, hi: int) -> None:
            kernels.decode(self.name, self._bytes(data, lo, hi), out[lo:hi])

        if on_host(out):
            share(work, [(0, out.size)], multiple=self.block)
        else:
            work(0, out.size)

    def decode_add(self, data: Array, c: Array, weight: float = 1.0, on_block: OnBlock | None = None) -> None:
        """Add `data` to `c` (n,): c = c + weight·decoded, in one pass; equal to decoding, then adding.

        Args:
            data: Bytes (nbytes(n, c.dtype),), uint8.
            c: Vector (n,), moved in place.
            weight: Rounded to c's dtype.
            on_block: Called as `on_block(stop)`, in order, whenever c is done up to there.

        Raises:
            ValueError: As for `encode`.
        """
        self._require(c, data)
        if self.exact:
            run("add", [data.view(c.dtype)], [weight], [c], on_block=on_block)
            return
        kernels = _kernels(c)

        def work(lo: int, hi: int) -> None:
            kernels.decode_add(self.name, self._bytes(data, lo, hi), c[lo:hi], weight)

        if on_host(c):
            share(work, [(0, c.size)], on_block, self.block)
            return
        work(0, c.size)
        if on_block:
            on_block(c.size)

    def _require(self, x: Array, wire: Array, *others: Array | None) -> None:
        """Raise ValueError unless `wire` holds vectors such as x, and the others are such."""
        if x.dtype not in (np.float32, np.float64):
            raise ValueError(f"encoding {self.name}: vectors are float32 or float64, not {x.dtype}")
        expected = self.nbytes(x.size, x.dtype)
        if wire.dtype != np.uint8 or wire.shape != (expected,):
            raise ValueError(
                f"encoding {self.name}: {x.size} numbers are uint8 ({expected},), not {wire.dtype} {wire.shape}"
            )
        for other in others:
            if other is not None and (other.dtype != x.dtype or other.shape != x.shape):
                raise ValueError(
                    f"encoding {self.name}: a residual is {x.dtype} {x.shape} as its vector, "
                    f"not {other.dtype} {other.shape}"
                )
        if len(x.shape) != 1 or not all(a is None or a.flags.c_contiguous for a in (x, wire, *others)):
            raise ValueError(f"encoding {self.name}: vectors and bytes must be contiguous, of one dimension")


def _copy(x: Array, numbers: Array, residual: Array | None, new_residual: Array | None) -> bool:
    """Write x (+ residual) into `numbers`; nothing is left behind."""
    finite = True
    with np.errstate(invalid="ignore", over="ignore"):  # they are reported by the result
        for part in blocks(x):
            if residual is None:
                numbers[part] = x[part]
            else:
                np.add(x[part], residual[part], out=numbers[part])
            finite &= all_finite(numbers[part])
    if new_residual is not None:
        new_residual[...] = 0
    return finite


_ENCODINGS = {
    "float32": Encoding("float32", 1, 0),
    "bf16": Encoding("bf16", 1, 2),
    **{name: Encoding(name, form.block, form.nbytes) for name, form in FORMATS.items()},
}
NAMES = tuple(_ENCODINGS)


def sizes(size: int, dtype: Any) -> list[int]:
    """Bytes of `size` numbers of `dtype` in each encoding, by number."""
    return [encoding.nbytes(size, dtype) for encoding in _ENCODINGS.values()]


def get(name: str) -> Encoding:
    """Return the encoding of this name.

    Raises:
        ValueError: For a name that is not in NAMES.
    """
    if name not in _ENCODINGS:
        raise ValueError(f"encoding {name!r}: choose one of {', '.join(NAMES)}")
    return _ENCODINGS[name]


def encode_pull(encoding: Encoding, c: Array, out: Array, clock: int) -> None:
    """Encode the center `c` (n,) at `clock` into `out` (nbytes,): without bias, since nobody keeps its residual."""
    encoding.encode(c, out, key=rounding_key(0, 0, clock))
