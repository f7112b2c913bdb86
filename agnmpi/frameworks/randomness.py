"""The random generators that a loader and a model draw from without being told, as arrays that checkpoints hold."""

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.backend import Array


def state() -> dict[str, Array]:
    """Of NumPy's global generator and of Python's `random`.

    >>> before = state()
    >>> drawn = np.random.rand(), random.random()
    >>> restore(before)
    >>> drawn == (np.random.rand(), random.random())
    True
    """
    numpys = np.random.get_state(legacy=False)  # noqa: NPY002 - loaders and transforms of others draw from it
    return {"numpy": _encoded(numpys), "python": _encoded(random.getstate())}


def restore(states: Mapping[str, Array]) -> None:
    """Put back what `state` returned."""
    np.random.set_state(_decoded(states["numpy"]))  # noqa: NPY002 - as above
    version, numbers, gauss = _decoded(states["python"])
    random.setstate((version, tuple(numbers), gauss))


def _encoded(value: object) -> Array:
    text = json.dumps(value, default=lambda array: array.tolist())
    return np.frombuffer(text.encode(), np.uint8)


def _decoded(array: Array) -> Any:
    return json.loads(array.tobytes())
