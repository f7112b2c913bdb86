"""agnmpi on one machine whose ranks lie on hosts that are told, by name.

mpiexec -n 5 python tests/support/pretended_hosts.py a,a,b,b,b train …
"""

import sys

import mpi4py

mpi4py.rc.thread_level = "serialized"  # as agnmpi's own command line

from agnmpi.cli.main import main  # noqa: E402
from agnmpi.cluster import setup  # noqa: E402

if __name__ == "__main__":
    setup.hosts = lambda comm: sys.argv[1].split(",")
    sys.exit(main(sys.argv[2:]))
