"""Results in a file."""

from collections.abc import Callable
from pathlib import Path

from mpi4py import MPI

from ..transport.agreement import raise_on_all


def json_file(comm: MPI.Comm, path: str | None) -> Callable[[str], None]:
    """A function that writes a text to `path`, if any, on rank 0; collective.

    A file that cannot be written is refused at once, before anything is measured.

    Raises:
        ConfigError: on every rank.
    """
    file = Path(path) if path and comm.rank == 0 else None
    raise_on_all(comm, lambda: file.open("a").close() if file else None)

    def write(text: str) -> None:
        if file:
            try:
                file.write_text(text)
            except OSError as error:
                error.filename = error.filename or str(file)  # that of a full disk has none
                raise

    return write
