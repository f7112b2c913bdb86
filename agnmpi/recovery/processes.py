"""Processes of this machine, told apart by pid and start time, and whether they still run."""

import os
import signal
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process: its pid, when it started (in ticks since boot), and the boot and pid namespace in which that holds."""

    pid: int
    started: int
    namespace: str

    @classmethod
    def this(cls) -> "Process":
        """This process."""
        return cls(os.getpid(), _stat(os.getpid())[1], _namespace())

    @property
    def is_gone(self) -> bool:
        """Whether it has surely ended; false for one of another machine, of which nothing is known here."""
        return self._state in ("Z", "X")

    @property
    def is_stopped(self) -> bool:
        """Whether it surely is stopped, as by SIGSTOP; false for one of another machine."""
        return self._state == "T"

    def end(self) -> None:
        """Kill it, if it surely is a process of this machine that has not ended."""
        if self._state not in ("", "Z", "X"):
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    @property
    def _state(self) -> str:
        """As in /proc, "X" if it has ended; empty for one of another machine, of which nothing is known here."""
        if not self.namespace or self.namespace != _namespace():
            return ""
        state, started = _stat(self.pid)
        return state if started == self.started else "X"


@cache
def _namespace() -> str:
    with suppress(OSError):  # not readable everywhere; then nothing is known
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    return ""


def _stat(pid: int) -> tuple[str, int]:
    """The state and the start time of a process; "X", -1 where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", -1
    words = text[text.rindex(")") + 2 :].split()  # its name may hold blanks
    return words[0], int(words[19])


def command(pid: int) -> str:
    """The name of a process's program, "" if there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
