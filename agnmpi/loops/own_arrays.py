"""The arrays of a caller who moves them itself (optimizer=None), beside the flat vector that is exchanged."""

from typing import Any

from ..arrays.backend import Array, bring, namespace, on_host
from ..core.params import Layout, named


class OwnArrays:
    """The caller's arrays, which are copied to the flat vector and back at exchanges, or are that vector itself.

    Args:
        params: as the caller gave them. They are looked at again each time: what was rebound would be trained alone.
        layout: of the flat vector.
        x: the flat vector (n,).
    """

    def __init__(self, params: Any, layout: Layout, x: Array) -> None:
        self._params, self._layout, self._x = params, layout, x
        self.arrays = named(params)
        self._seen = {name: _place(array) for name, array in self.arrays.items()}
        self._shared = _place(x)[0] in [place[0] for place in self._seen.values()]
        # Of arrays with fewer digits than x: what rounding has added to the numbers that were last copied to them.
        self._narrow = [name for name, array in self.arrays.items() if array.dtype.itemsize < x.dtype.itemsize]
        self._error = namespace(x).zeros_like(x) if self._narrow else None

    def pack(self) -> None:
        """Copy them into the flat vector. Raises ValueError, with the name, where one was replaced."""
        now = named(self._params)
        for name, before in self._seen.items():
            if name not in now:
                raise ValueError(f"parameter {name!r} is gone; there are {list(now)}")
            place = before if now[name] is self.arrays[name] else _place(now[name])
            if place != before:
                changes = "; ".join(f"{b}, not {a}" for a, b in zip(before[1:], place[1:]) if a != b)
                raise ValueError(
                    f"parameter {name!r} is not the array that it was: {changes or 'its memory is another'}. "
                    "Move arrays in place (w -= …, PyTorch: w.copy_(…)), or make another AGNOptimizer"
                )
        if not self._shared:
            self._layout.pack(self.arrays, out=self._x)
        if self._error is None:
            return
        views, errors = self._layout.views(self._x), self._layout.views(self._error)
        for name in self._narrow:
            x, own = views[name], bring(self.arrays[name], views[name])
            x -= errors[name]
            # Numbers that were written anew, not moved by steps, are what they are.
            namespace(x).copyto(x, own.astype(x.dtype), where=x.astype(own.dtype) != own)

    def unpack(self) -> None:
        """Copy the flat vector into them."""
        if not self._shared:
            views = self._layout.views(self._x)
            for name, array in self.arrays.items():
                array[...] = bring(views[name], array)
        if self._error is not None:
            self._layout.pack(self.arrays, out=self._error)
            self._error -= self._x


def one_vector(params: Any, layout: Layout) -> Array:
    """The flat vector (n,) in which `params` lie one after the other, in the order of `layout`; copies nothing.

    Raises ValueError, with the first name, where they do not.
    """
    arrays = [(name, array) for name, array in named(params).items() if array.size]
    arrays.sort(key=lambda item: layout.names.index(item[0]))
    first = arrays[0][1]
    at = _place(first)[0]
    for name, array in arrays:
        if not (array.flags.c_contiguous and getattr(array.flags, "writeable", True) and _place(array)[0] == at):
            raise ValueError(
                f"copy=False: {name!r} of shape {array.shape} is not a contiguous, writeable array that lies "
                f"{'in one vector behind the one before' if array is not first else 'in one vector'}; copy them into "
                "views of one vector of yours, or leave copy on"
            )
        at += array.nbytes
    if first.shape == (layout.size,):
        return first
    vector: Array = namespace(first).lib.stride_tricks.as_strided(first.reshape(-1), (layout.size,), (first.itemsize,))
    return vector


def _place(array: Array) -> tuple[int, str, str, str]:
    """Address, dtype, shape and device of `array`."""
    device: Any = array  # NumPy's is not known to have one
    address = array.__array_interface__["data"][0] if on_host(array) else device.data.ptr
    where = "on the host" if on_host(array) else f"on device {device.device.id}"
    return address, str(array.dtype), f"of shape {array.shape}", where
