"""Exit codes of a run other than 0 and 1."""

# The exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL).
INTERRUPTED = 75
# The exit code of a run that was completed, but lost workers.
DEGRADED = 76


class Interrupted(Exception):
    """The run was asked to stop; all commits are in its newest checkpoint.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, abort: bool) -> None:
        super().__init__(f"exit code {INTERRUPTED}")
        self.abort = abort


class Degraded(Exception):
    """Ranks were lost, and MPI cannot be finalized any more; leave with exit code `code`.

    `abort`: other ranks hang, and must be ended, too.
    """

    def __init__(self, code: int, abort: bool) -> None:
        super().__init__(f"exit code {code}")
        self.code, self.abort = code, abort
