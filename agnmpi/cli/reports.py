"""`runs`, a line for each run, and `report`, a page with figures. Neither needs MPI."""

from collections.abc import Sequence
from pathlib import Path

from ..recovery.files import write_atomic
from ..reporting.page import page
from ..reporting.runs import find, read, table


def runs(paths: Sequence[str]) -> int:
    """Print a line for each run in `paths`; returns the exit code. Raises ValueError if there is none."""
    found = [read(path) for path in find([Path(path) for path in paths])]
    if not found:
        raise ValueError(f"no runs in {', '.join(paths)}: give directories of runs, or one that holds them")
    for line in table(found):
        print(line)
    return 0


def report(paths: Sequence[str], target: str | None) -> int:
    """Write a page about runs; returns the exit code. Raises ValueError for what is no run."""
    found = [read(path) for given in paths for path in (list(find([Path(given)])) or [Path(given)])]
    file = Path(target) if target else (found[0].path if len(found) == 1 else found[0].path.parent) / "report.html"
    write_atomic(file, page(found).encode())
    print(f"{file}: {len(found)} run{'s' if len(found) > 1 else ''}")
    return 0
