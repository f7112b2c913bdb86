"""One job in a run's directory: a lock that ends with the process that has it, however that ends."""

import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

NAME = "lock"
_held: dict[Path, int] = {}  # descriptors, by directory


def lock(directory: Path) -> None:
    """Take the lock of a run's directory, until `unlock_all` or the end of this process; again is no error.

    A POSIX lock: the kernel frees it when its process dies, and forked children do not inherit it. The file says who
    has it. On a file system without locks nothing is locked.

    Raises:
        OSError: another process has it, or the file cannot be opened.
    """
    directory = directory.resolve()
    if directory in _held:
        return
    descriptor = os.open(directory / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = _read(descriptor)
        os.close(descriptor)
        raise FileExistsError(
            f"{directory} is in use by another job ({holder}): wait for its end, or give another directory (--run-dir)"
        ) from error
    except OSError:
        os.close(descriptor)
        return
    _held[directory] = descriptor
    with suppress(OSError):  # a full disk: it is locked all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_who()).encode(), 0)


def unlock_all() -> None:
    """Give back all locks that this process has."""
    while _held:
        _, descriptor = _held.popitem()
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _who() -> dict[str, str]:
    jobs = [os.environ.get(name) for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")]
    job = next(filter(None, jobs), None)
    return {"host": socket.gethostname(), "process": str(os.getpid()), **({"job": job} if job else {})}


def _read(descriptor: int) -> str:
    with suppress(OSError, ValueError, AttributeError):
        return ", ".join(f"{name} {value}" for name, value in json.loads(os.pread(descriptor, 4096, 0)).items())
    return "unknown"
