"""Optimizers against the bandwidth of a copy in the same run: on the host memcpy, on a device its own copy.

The sides alternate in short rounds, so that noise of the machine affects all of them; medians are compared.
"""

import importlib
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ..arrays import kernels
from ..arrays.backend import Array, choose, empty_like, full_like
from ..core import optimizers, rules
from .exchanges import timed

Row = dict[str, Any]
Timer = Callable[[Callable[[], Any]], float]
Sides = dict[str, tuple[Callable[[], Any], int]]  # what is timed, and the words that it touches for each parameter

# Optimizer, and the words that it must read and write per parameter.
_TRIED = {
    "sgd": (optimizers.sgd(1e-3), 3),
    "momentum": (optimizers.momentum(1e-3), 5),
    "adam": (optimizers.adam(1e-3), 7),
}


def _vectors(n: int, xp: Any) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    x, g = (xp.asarray(rng.random(n, np.float32)) for _ in range(2))
    return full_like(x, x), full_like(g, g)  # aligned as the library's vectors


def _stepper(optimizer: optimizers.Optimizer, x: Array, g: Array) -> Callable[[], None]:
    """A call that takes the next step."""
    state = optimizer.init(x)

    def step() -> None:
        nonlocal state
        state = optimizer.update(g, state, x)

    return step


def _rows(sides: Sides, rounds: int, timer: Timer, n: int, copy: str) -> list[Row]:
    """Time the sides alternately, each with its words per parameter; the ratio is to the side `copy`."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, (call, _words) in sides.items():
            times[name].append(timer(call))
    # The first round only warms up.
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    rates = {name: 4 * n * sides[name][1] / median for name, median in medians.items()}
    rows = []
    for name, rate in rates.items():
        row = {"name": name, "n": n, "bytes_per_second": rate, "ratio": rate / rates[copy]}
        if f"torch {name}" in medians:
            row["times_torch"] = medians[name] / medians[f"torch {name}"]
        rows.append(row)
    return rows


def _sides(x: Array, g: Array, out: Array) -> Sides:
    """Our optimizers, what an exchange adds to them, and PyTorch's optimizers where that is installed."""
    sides: Sides = {name: (_stepper(optimizer, x, g), words) for name, (optimizer, words) in _TRIED.items()}
    sides["center add"] = partial(rules.center_step, out, g, 0.5, None, None), 3
    sides["agn delta"] = partial(rules.agn().delta, x, g, g, 10, out), 3
    return sides | torch_steps(x, g)


def optimizer_bandwidth(n: int, threads: int = 1, rounds: int = 15) -> list[Row]:
    """Bytes per second of host kernels on n float32 parameters, counting the bytes that each must touch.

    Rows of name, n, bytes_per_second, ratio to memcpy, times_torch (seconds over those of PyTorch's fused optimizer,
    where that is installed), threads, and the library of our kernels. All sides have the same number of `threads`.
    """
    x, g = _vectors(n, np)
    out = empty_like(x)
    edges = [n * i // threads for i in range(threads + 1)]
    before = kernels.threads()
    kernels.set_threads(threads)
    with ThreadPoolExecutor(threads) as pool, torch_threads(threads):

        def memcpy() -> None:
            wait([pool.submit(np.copyto, out[lo:hi], x[lo:hi]) for lo, hi in pairwise(edges)])

        copy = partial(np.copyto, out, x) if threads == 1 else memcpy
        rows = _rows({"memcpy": (copy, 2), **_sides(x, g, out)}, rounds, timed, n, "memcpy")
    kernels.set_threads(before)
    return [row | {"threads": threads, "library": kernels.library(x)} for row in rows]


def device_bandwidth(n: int, rounds: int = 20) -> list[Row]:
    """Bytes per second of the fused kernels on n float32 parameters on the GPU, and of PyTorch's fused optimizers.

    Rows as of `optimizer_bandwidth`, the ratio to a copy from device to device; "torch …" where PyTorch with CUDA is
    installed. It needs 9 vectors of n on the device. Raises ValueError without a device.
    """
    xp: Any = choose("gpu", 0)
    x, g = _vectors(n, xp)
    out = full_like(x, x)
    sides: Sides = {"device copy": (partial(xp.copyto, out, x), 2), **_sides(x, g, out)}

    def events(call: Callable[[], Any]) -> float:
        # Several calls between the events, so that the device never waits for Python.
        calls, start, end = 5, xp.cuda.Event(), xp.cuda.Event()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(xp.cuda.get_elapsed_time(start, end)) / 1e3 / calls

    return _rows(sides, rounds, events, n, "device copy")


def _torch() -> Any:
    """PyTorch, or None where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch, if it is installed, use `count` threads meanwhile."""
    torch = _torch()
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(count)
    yield
    if torch:
        torch.set_num_threads(before)


def torch_steps(x: Array, g: Array) -> Sides:
    """Steps of PyTorch's fused optimizers on x with gradient g, sharing their memory, and the words of each.

    Empty where PyTorch is not installed, or has no CUDA for a device vector. Its stream, as CuPy's, is the device's
    default stream.
    """
    torch = _torch()
    if torch is None:
        return {}
    if not (isinstance(x, np.ndarray) or torch.cuda.is_available()):
        return {}
    makers: dict[str, Callable[[Any], Any]] = {
        "sgd": lambda p: torch.optim.SGD([p], lr=1e-3, fused=True),
        "momentum": lambda p: torch.optim.SGD([p], lr=1e-3, momentum=0.9, fused=True),
        "adam": lambda p: torch.optim.Adam([p], lr=1e-3, fused=True),
    }
    steps = {}
    for kind, make in makers.items():
        p = torch.nn.Parameter(torch.from_dlpack(x))
        p.grad = torch.from_dlpack(g)
        steps[f"torch {kind}"] = make(p).step, _TRIED[kind][1]
    return steps
