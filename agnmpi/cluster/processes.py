"""Facts of the processes of a job: whether MPI survives a loss, and who is who on a host."""

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def fault_tolerant(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this MPI goes on when a rank dies: Open MPI's `mpiexec --with-ft ulfm`, or AGNMPI_FT=1 for others."""
    return "1" in (environment.get("OMPI_MCA_mpi_ft_enable"), environment.get("AGNMPI_FT"))


def process() -> tuple[int, int, str]:
    """What tells this process from all others: its number, its parent's, and where these numbers hold."""
    where = ""
    with suppress(OSError):  # not everywhere to be read; then nobody is taken for a sibling
        where = Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    return os.getpid(), os.getppid(), where


def end_sibling(pid: int, parent: int, where: str) -> None:
    """Kill a rank that hangs, if it runs here under the same launcher.

    With ULFM, Open MPI's MPI_Abort may spare it; without, MPI_Abort is better: the exit code is ours.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return  # it is of another host, or has ended
    theirs = int(stat[stat.rindex(")") + 2 :].split()[1])
    if where and (theirs, parent, where) == (os.getppid(), os.getppid(), process()[2]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
