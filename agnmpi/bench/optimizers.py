"""Optimizers against the bandwidth of a copy in the same run: on the host memcpy, on a device its own copy.

The sides alternate in short rounds, so that noise of the machine affects all of them; medians are compared.
"""

import importlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..arrays.backend import Array, choose, empty_like, full_like
from ..core import optimizers, rules
from .exchanges import timed

Row = dict[str, Any]
Timer = Callable[[Callable[[], Any]], float]

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


def _rows(sides: dict[str, tuple[Callable[[], Any], int]], rounds: int, timer: Timer, n: int, copy: str) -> list[Row]:
    """Time the sides alternately, each with its words per parameter; the ratio is to the side `copy`."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, (call, _words) in sides.items():
            times[name].append(timer(call))
    # The first round only warms up.
    rates = {name: 4 * n * sides[name][1] / statistics.median(seconds[1:]) for name, seconds in times.items()}
    return [
        {"name": name, "n": n, "bytes_per_second": rate, "ratio": rate / rates[copy]} for name, rate in rates.items()
    ]


def optimizer_bandwidth(n: int, rounds: int = 9) -> list[Row]:
    """Bytes per second of host optimizers on n float32 parameters, counting the bytes each must touch.

    Rows of name, n, bytes_per_second and ratio to memcpy.
    """
    x, g = _vectors(n, np)
    y = empty_like(x)
    sides: dict[str, tuple[Callable[[], Any], int]] = {"memcpy": (partial(np.copyto, y, x), 2)}
    for name, (optimizer, words) in _TRIED.items():
        sides[name] = _stepper(optimizer, x, g), words
    return _rows(sides, rounds, timed, n, "memcpy")


def device_bandwidth(n: int, rounds: int = 20) -> list[Row]:
    """Bytes per second of the fused kernels on n float32 parameters on the GPU, and of PyTorch's fused optimizers.

    Rows as of `optimizer_bandwidth`, the ratio to a copy from device to device; "torch …" where PyTorch with CUDA is
    installed. It needs 9 vectors of n on the device. Raises ValueError without a device.
    """
    xp: Any = choose("gpu", 0)
    x, g = _vectors(n, xp)
    c = full_like(x, x)
    sides: dict[str, tuple[Callable[[], Any], int]] = {"device copy": (partial(xp.copyto, c, x), 2)}
    for name, (optimizer, words) in _TRIED.items():
        sides[name] = _stepper(optimizer, x, g), words
    sides["center add"] = partial(rules.center_step, c, g, 0.5, None, None), 3
    sides["agn delta"] = partial(rules.agn().delta, x, g, g, 10, c), 3
    sides |= torch_steps(x, g)

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


def torch_steps(x: Array, g: Array) -> dict[str, tuple[Callable[[], Any], int]]:
    """Steps of PyTorch's fused optimizers on x with gradient g, sharing their memory, and the words of each.

    Empty where PyTorch is not installed, or has no CUDA for a device vector. Its stream, as CuPy's, is the device's
    default stream.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
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
