"""The processes of a job: whether MPI survives a lost rank, and how to identify ranks on a host."""

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def fault_tolerant(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this MPI goes on when a rank dies: Open MPI's `mpiexec --with-ft ulfm`, or AGNMPI_FT=1 for others."""
    return "1" in (environment.get("OMPI_MCA_mpi_ft_enable"), environment.get("AGNMPI_FT"))


def process() -> tuple[int, int, str]:
    """Identify this process: its pid, its parent's, and the boot and pid namespace in which these are valid."""
    namespace = ""
    with suppress(OSError):  # not readable everywhere; then no process counts as a sibling
        namespace = Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    return os.getpid(), os.getppid(), namespace


def end_sibling(pid: int, parent: int, namespace: str) -> None:
    """Kill a rank that hangs, if it runs here under the same launcher.

    With ULFM, Open MPI's MPI_Abort may leave it running; without ULFM, MPI_Abort is better: it sets the exit code.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return  # on another host, or already ended
    actual_parent = int(stat[stat.rindex(")") + 2 :].split()[1])
    if namespace and (actual_parent, parent, namespace) == (os.getppid(), os.getppid(), process()[2]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
