"""Tables on a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()
) -> None:
    """Print a table; columns are aligned to the right but those in `left`, and closer where they would not fit."""
    console.print(title, style="italic", markup=False)  # a Table's own title is wrapped to its width
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    gap = 1 if sum(widths) + 2 * (len(widths) - 1) > console.width else 2
    grid = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for column in columns:
        grid.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def milliseconds(seconds: float) -> str:
    """Three digits, in a unit that stays the same in a column.

    >>> milliseconds(0.01234), milliseconds(0.0001234), milliseconds(1.5)
    ('12.3 ms', '0.123 ms', '1,500 ms')
    """
    value = 1e3 * seconds
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} ms"


def percent(share: float | None) -> str:
    """One digit after the point; nothing to say is a dash.

    >>> percent(0.9876), percent(None)
    ('98.8 %', '-')
    """
    return "-" if share is None else f"{100 * share:.1f} %"


def size(nbytes: float) -> str:
    """Bytes in the unit that fits.

    >>> size(512), size(8e6), size(24.64e6)
    ('512 B', '8 MB', '24.6 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"
