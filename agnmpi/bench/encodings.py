"""Which encoding pays on which link: what encoding and decoding take here, against the bytes that they save."""

import time
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from ..arrays.encodings import NAMES, encode_pull, fast, get
from ..arrays.kernels import threads

_NUMBERS = 1 << 20
LINKS = (0.1, 1.0, 10.0, 100.0)  # Gbit/s


def seconds_per_number(name: str, numbers: int = _NUMBERS, rounds: int = 5) -> float:
    """What an exchange in this encoding takes on the host besides its bytes: to encode and decode commit and pull.

    Args:
        name: of the encoding.
        numbers: of the vector, float32.
        rounds: the median of these.
    """
    encoding, x = get(name), np.random.default_rng(0).normal(size=numbers).astype(np.float32)
    if encoding.exact:
        return 0.0
    encoding.prepare(x)
    wire, residual, out = np.empty(encoding.nbytes(numbers), np.uint8), np.zeros_like(x), np.empty_like(x)
    taken = []
    for clock in range(rounds):
        start = time.perf_counter()
        encoding.encode(x, wire, residual=residual, new_residual=residual)
        encoding.decode_add(wire, out)
        encode_pull(encoding, x, wire, clock)
        encoding.decode(wire, out)
        taken.append((time.perf_counter() - start) / numbers)
    return median(taken)


def seconds(name: str, cost: float, gigabits: float, numbers: int = _NUMBERS) -> float:
    """An exchange of `numbers` float32 both ways over a link of `gigabits` Gbit/s, where a number costs `cost` seconds.

    >>> round(seconds("float32", 0.0, 1.0, 1_000_000), 3), round(seconds("int8", 1e-8, 1.0, 1_000_000), 3)
    (0.064, 0.026)
    """
    return 2 * get(name).nbytes(numbers) * 8 / (gigabits * 1e9) + cost * numbers


def pays_below(name: str, cost: float) -> float:
    """The Gbit/s of a link below which an exchange in this encoding takes less time than in float32.

    >>> round(pays_below("bf16", 1e-9), 1)
    32.0
    """
    saved = 8 * 2 * (get("float32").nbytes(_NUMBERS) - get(name).nbytes(_NUMBERS)) / _NUMBERS
    return saved / (cost * 1e9)


def advice(costs: Mapping[str, float], links: Sequence[float] = LINKS) -> list[str]:
    """In words: below which bandwidth each encoding pays, and what an exchange takes on such `links`, in Gbit/s."""
    how = f"by {'numba' if fast() else 'NumPy alone (numba is faster: the extra fast)'}, {threads()} thread"
    limits = [f"{name} below {pays_below(name, cost):.3g} Gbit/s" for name, cost in costs.items() if cost]
    lines = [
        f"encodings ({how}{'s' if threads() > 1 else ''}): against float32 they save time on a link "
        f"{', '.join(limits)}, if nothing else shares it; fewer bytes round more"
    ]
    for link in links:
        taken = {name: seconds(name, cost, link) for name, cost in costs.items()}
        listed = ", ".join(f"{name} {1e3 * took:.3g} ms" for name, took in taken.items())
        lines.append(f"  at {link:g} Gbit/s 1 M numbers take {listed}: {min(taken, key=lambda name: taken[name])}")
    return lines


def measured_costs() -> dict[str, float]:
    """`seconds_per_number` of each encoding."""
    return {name: seconds_per_number(name) for name in NAMES}
