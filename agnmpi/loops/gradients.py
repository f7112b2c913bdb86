"""Gradients as a program gives them: by name, in order, or one by one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from ..arrays.backend import Array, Range, as_array
from ..core.params import Layout

Gradients: TypeAlias = Mapping[str, Any] | Sequence[Any]


def value_and_gradients(returned: Any, rank: int) -> tuple[Any, Gradients]:
    """Both of what a loss has returned; raises TypeError, with the rank, for anything else."""
    if not isinstance(returned, tuple | list) or len(returned) != 2 or isinstance(returned[0], Mapping | list | tuple):
        raise TypeError(f"rank {rank}: the loss must return (value, gradients), in this order, not {_told(returned)}")
    return returned[0], returned[1]


def _told(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind} of {', '.join(type(x).__name__ for x in value)}" if isinstance(value, tuple | list) else kind


def by_name(gradients: Gradients, layout: Layout) -> dict[str, Any]:
    """The gradient of each parameter, None where there is none. Raises ValueError for others than those of `layout`."""
    if isinstance(gradients, Mapping):
        unknown = set(gradients) - set(layout.names)
        if unknown:
            raise ValueError(f"gradients for {sorted(unknown)}, but the parameters are {list(layout.names)}")
        return {name: gradients.get(name) for name in layout.names}
    listed = list(gradients) if isinstance(gradients, Sequence) else [gradients]
    if len(listed) != len(layout.names):
        raise ValueError(f"{len(listed)} gradients for {len(layout.names)} parameters")
    return dict(zip(layout.names, listed))


def fill(g: Array, given: Iterable[tuple[str, Any]], layout: Layout, rank: int) -> list[Range] | None:
    """Copy gradients, each with its name, into `g` (n,); returns the ranges that are set, None where all are.

    Raises ValueError, with the rank, where one is given twice or has another shape, or where all are None.
    """
    views, ranges = layout.views(g), dict[str, Range]()
    for name, gradient in given:
        if name in ranges:
            raise ValueError(f"variable {name!r} is listed twice")
        if gradient is None:
            continue
        try:
            layout.fill(name, views[name], as_array(gradient))
        except (TypeError, ValueError) as error:
            raise type(error)(f"gradient of {name!r} on rank {rank}: {error}") from None
        ranges[name] = layout.span(name)
    if not ranges:
        raise ValueError(f"rank {rank}: no gradients: None for every variable")
    return None if len(ranges) == len(layout.names) else list(ranges.values())
