"""agnmpi, but the main thread of rank 0 is away, outside MPI, for AWAY seconds after 20 commits.

mpiexec -n 4 python tests/support/busy_center.py AWAY train …
"""

import sys
import time

import mpi4py

mpi4py.rc.thread_level = "serialized"  # as agnmpi's own command line

from agnmpi.cli.main import main  # noqa: E402
from agnmpi.training.monitor import Monitor  # noqa: E402


def go_away(seconds, after):
    """Let rank 0 sleep when it comes by, once, as soon as `after` commits are counted."""
    tick, left = Monitor.tick, [after]

    def late(self):
        if left and self.evaluations.role.center.clock >= left[0]:
            self.say(f"rank 0 is away after {left.pop()} commits")
            time.sleep(seconds)
        tick(self)

    Monitor.tick = late


if __name__ == "__main__":
    go_away(float(sys.argv[1]), after=20)
    sys.exit(main(sys.argv[2:]))
