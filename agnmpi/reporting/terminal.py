"""The terminal of rank 0: its width, and the progress bar."""

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text


def terminal(stream: str = "stdout") -> tuple[bool, int]:
    """Whether rank 0's output, or its standard error ("stderr"), goes to a terminal, and its width.

    mpiexec gives its ranks pipes (MPICH) or a pseudo-terminal (Open MPI) whatever its own output is, so the
    output of the nearest launcher above this process counts.
    """
    number = ("stdout", "stderr").index(stream) + 1
    redirected = getattr(sys, stream) is not getattr(sys, f"__{stream}__")  # to a file, or a notebook
    if redirected:
        return False, 100
    path = _launcher_output(number)
    if path is None:
        # Under Open MPI's daemon on another node the pseudo-terminal does not show where the output goes.
        live = os.isatty(number) and "PMIX_RANK" not in os.environ
        return live, (os.get_terminal_size(number).columns if live else 100) or 80
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


def terminals() -> list[str]:
    """Which of rank 0's streams go to the terminal where it shows a bar: none, "stdout", or "stderr", too."""
    return [stream for stream in ("stdout", "stderr") if terminal(stream)[0]] if terminal()[0] else []


def _launcher_output(number: int) -> str | None:
    """Where a stream (1 or 2) of the launcher above this process goes; None if there is none on this host."""
    process, output = os.getppid(), None
    while process > 1:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
            name = stat[stat.index("(") + 1 : stat.rindex(")")]
            if re.match(r"mpiexec|mpirun|prterun|orterun|srun", name):
                output = str(Path(f"/proc/{process}/fd/{number}").readlink())
            process = int(stat[stat.rindex(")") + 2 :].split()[1])
        except (OSError, ValueError):
            return output
    return output


ROWS = 2  # of a frame of the bar; the cursor stands below


class AboveBar(io.TextIOBase):
    """Writes whole lines above the bar that rank 0 shows on the same terminal.

    What a line covers of the bar comes again with its next frame; the cursor stays where that expects it.

    Args:
        file: leads to the terminal.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._rest = file, ""

    def write(self, text: str) -> int:
        """Write the lines that are whole now, in one write."""
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._file.write(f"\r\x1b[{ROWS}A\x1b[J{lines}\n" + "\n" * ROWS)
            self._file.flush()
        return len(text)

    def close(self) -> None:
        """Write the rest."""
        if self._rest:
            self.write("\n")


@contextmanager
def above_bar(*streams: str) -> Iterator[None]:
    """While in it, what this rank prints to these streams ("stdout", "stderr") goes above the bar of rank 0."""
    with ExitStack() as stack:
        for name in streams:
            above = stack.enter_context(closing(AboveBar(getattr(sys, name))))
            stack.enter_context({"stdout": redirect_stdout, "stderr": redirect_stderr}[name](above))
        yield


class Bar(Progress):
    """A progress bar with a status line under it.

    A frame ends with a newline, since Open MPI 5.0's mpiexec forwards whole lines only.
    """

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, its status line, and an empty line."""
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["facts"], no_wrap=True, overflow="ellipsis")
        yield Text("")
