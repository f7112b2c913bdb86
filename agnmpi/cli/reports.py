"""`runs`, a line for each run, and `report`, a page with figures. Neither needs MPI."""

from collections.abc import Sequence
from pathlib import Path

from ..recovery.files import write_atomic
from ..reporting.page import page
from ..reporting.picture import picture
from ..reporting.runs import find, read, table


def runs(paths: Sequence[str]) -> int:
    """Print a line for each run in `paths`; returns the exit code. Raises ValueError if there is none."""
    found = [read(path) for path in find([Path(path) for path in paths])]
    if not found:
        raise ValueError(f"no runs in {', '.join(paths)}: give directories of runs, or one that holds them")
    for line in table(found):
        print(line)
    return 0


def report(paths: Sequence[str], target: str | None, png: bool = False) -> int:
    """Write a page about runs, and its picture if `png`; returns the exit code.

    Raises ValueError for what is no run, and where nothing can draw the picture.
    """
    found = [read(path) for given in paths for path in (list(find([Path(given)])) or [Path(given)])]
    file = Path(target) if target else (found[0].path if len(found) == 1 else found[0].path.parent) / "report.html"
    html = page(found)
    write_atomic(file, html.encode())
    print(f"{file}: {len(found)} run{'s' if len(found) > 1 else ''}")
    if png:
        write_atomic(drawn := file.with_suffix(".png"), picture(html, file.parent))
        print(drawn)
    return 0
