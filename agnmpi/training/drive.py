"""Several workers in one thread."""

from collections.abc import Iterator


def drive(loops: list[Iterator[int]]) -> None:
    """Run the loops of several workers in one thread, a step of each in turn."""
    while loops:
        loops = [loop for loop in loops if next(loop, None) is not None]
