"""Named parameters as views of one flat vector."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..arrays.backend import Array, as_array, bring, empty, namespace, on_host


def named(params: Any) -> dict[str, Array]:
    """Return `params` as a dict: a mapping as it is, a sequence or one array under the names "0", "1", …

    Raises TypeError for what is not an array, or of a dtype that NumPy lacks (bfloat16); ValueError if there is
    nothing, or for an array on another device than this rank's.

    >>> list(named([np.zeros(2), np.zeros(3)]))
    ['0', '1']
    """
    if isinstance(params, Mapping):
        items = dict(params)
    elif isinstance(params, Sequence) and not isinstance(params, str | bytes):
        items = {str(i): value for i, value in enumerate(params)}
    else:
        items = {"0": params}
    if not items:
        raise ValueError("there are no parameters: give a mapping from name to array")
    arrays = {}
    for name, value in items.items():
        if not isinstance(name, str):
            raise TypeError(f"parameter names are strings, not {name!r}")
        try:
            arrays[name] = as_array(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"parameter {name!r}: {error}") from None
    return arrays


class Layout(NamedTuple):
    """Where each named parameter lies in the flat vector.

    >>> layout = Layout.of({"w": np.zeros((2, 3)), "b": np.zeros(3)})
    >>> layout.size
    9
    >>> x = layout.pack({"w": np.ones((2, 3)), "b": np.zeros(3)})
    >>> layout.views(x)["w"][1, 2] = 7
    >>> x
    array([1., 1., 1., 1., 1., 7., 0., 0., 0.])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # one more than names: the last is the size
    dtype: str
    buffers: int = 0  # elements at the end that are buffers (see Rule.buffers)

    @property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return self.offsets[-1]

    @classmethod
    def of(cls, params: Any, buffers: Collection[str] = (), mixed: bool = False) -> "Layout":
        """Read the layout of `params`, those named in `buffers` last.

        `mixed`: they may have several dtypes, float16 among them; the vector is float64 where all are, else float32.

        Raises ValueError for a buffer that is not there, and for other dtypes.
        """
        items = named(params)
        if unknown := sorted(set(buffers) - set(items)):
            raise ValueError(f"buffers {unknown} are not among the parameters, which are {list(items)}")
        items = dict(sorted(items.items(), key=lambda item: item[0] in buffers))  # stable
        dtypes = {name: value.dtype for name, value in items.items()}
        for name, dtype in dtypes.items():
            if dtype not in (np.dtype(np.float32), np.dtype(np.float64)) and not (mixed and dtype == np.float16):
                raise ValueError(
                    f"parameters must be float32 or float64, but {name!r} is {dtype}; convert it with astype "
                    "(PyTorch: tensor.float())"
                )
        if len(set(dtypes.values())) > 1 and not mixed:
            listed = ", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items())
            raise ValueError(f"parameters must share one dtype, but {listed}; convert them with astype")
        dtype = np.dtype(np.float64 if set(dtypes.values()) == {np.dtype(np.float64)} else np.float32)
        shapes = tuple(value.shape for value in items.values())
        offsets = (0, *np.cumsum([prod(shape) for shape in shapes]).tolist())
        if not offsets[-1]:
            raise ValueError("the parameters have no elements")
        return cls(tuple(items), shapes, offsets, dtype.name, offsets[-1] - offsets[len(items) - len(set(buffers))])

    def span(self, name: str) -> tuple[int, int]:
        """First element of `name` in the flat vector, and one past its last."""
        i = self.names.index(name)
        return self.offsets[i], self.offsets[i + 1]

    def views(self, x: Array) -> dict[str, Array]:
        """Name the pieces of `x`, shape (size,), as views of it."""
        return {
            name: x[lo:hi].reshape(shape)
            for name, shape, lo, hi in zip(self.names, self.shapes, self.offsets, self.offsets[1:])
        }

    def pack(self, params: Any, out: Array | None = None) -> Array:
        """Copy `params` into the flat vector `out` (a new one if None) and return it.

        Raises ValueError if names or shapes differ from the layout.
        """
        items = named(params)
        if set(items) != set(self.names):
            missing, unknown = (
                ", ".join(sorted(names)) for names in (set(self.names) - set(items), set(items) - set(self.names))
            )
            parts = [f"missing {missing}"] * bool(missing) + [f"unknown {unknown}"] * bool(unknown)
            raise ValueError(f"{', '.join(parts)}; the parameters are named {', '.join(self.names[:20])}")
        if out is None:
            out = empty(self.size, self.dtype, items[self.names[0]])
        if not on_host(out) and not any(on_host(value) for value in items.values()):
            for name, shape in zip(self.names, self.shapes):
                self.check(name, shape, items[name])
            # CuPy copies many small arrays in one launch.
            namespace(out).concatenate([items[name].reshape(-1) for name in self.names], out=out)
            return out
        for name, view in self.views(out).items():
            self.fill(name, view, items[name])
        return out

    @staticmethod
    def check(name: str, shape: tuple[int, ...], value: Array) -> None:
        """Raise ValueError unless `value`, meant for `name`, has `shape`."""
        if value.shape != shape:
            raise ValueError(f"{name!r} has shape {value.shape}, expected {shape}")

    @classmethod
    def fill(cls, name: str, view: Array, value: Array) -> None:
        """Copy `value` into the view of `name`; raises ValueError for another shape."""
        cls.check(name, view.shape, value)
        view[...] = bring(value, view)


def parts(size: int, count: int) -> Iterator[slice]:
    """Cut a vector into `count` contiguous blocks of nearly equal size, for shards.

    >>> [(p.start, p.stop) for p in parts(10, 4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    for i in range(count):
        base, extra = divmod(size, count)
        start = i * base + min(i, extra)
        yield slice(start, start + base + (i < extra))
