"""The terminal of rank 0: its width, and the progress bar."""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text


def terminal() -> tuple[bool, int]:
    """Whether rank 0's output goes to a terminal, and its width.

    mpiexec gives its ranks pipes (MPICH) or a pseudo-terminal (Open MPI) whatever its own output is, so the
    output of the nearest launcher above this process counts.
    """
    redirected = sys.stdout is not sys.__stdout__  # to a file, or a notebook
    if redirected:
        return False, 100
    path = _launcher_output()
    if path is None:
        # Under Open MPI's daemon on another node the pseudo-terminal does not show where the output goes.
        live = sys.stdout.isatty() and "PMIX_RANK" not in os.environ
        return live, (os.get_terminal_size(1).columns if live else 100) or 80
    if not re.match(r"/dev/(pts/|tty)", path):
        return False, 100
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False, 100
    try:
        return True, os.get_terminal_size(descriptor).columns or 80
    finally:
        os.close(descriptor)


def console() -> Console:
    """A console for rank 0's output."""
    live, width = terminal()
    return Console(force_terminal=live, width=width, highlight=False)


def _launcher_output() -> str | None:
    """Where the standard output of the launcher above this process goes; None if there is none on this host."""
    process, output = os.getppid(), None
    while process > 1:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
            name = stat[stat.index("(") + 1 : stat.rindex(")")]
            if re.match(r"mpiexec|mpirun|prterun|orterun|srun", name):
                output = str(Path(f"/proc/{process}/fd/1").readlink())
            process = int(stat[stat.rindex(")") + 2 :].split()[1])
        except (OSError, ValueError):
            return output
    return output


class Bar(Progress):
    """A progress bar with a status line under it.

    A frame ends with a newline, since Open MPI 5.0's mpiexec forwards whole lines only.
    """

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar of each task, its status line, and an empty line."""
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["facts"], no_wrap=True, overflow="ellipsis")
        yield Text("")
