"""A program that starts MPI by itself, as a solver does, may import this package before."""

import os
import subprocess
import sys

from launcher import INHERITED, ROOT

CODE = """
import mpi4py
mpi4py.rc.initialize = False
import agnmpi, numpy as np
for name in agnmpi.__all__:
    getattr(agnmpi, name)
from mpi4py import MPI
assert not MPI.Is_initialized(), "by an import"
MPI.Init_thread()
opt = agnmpi.AGNOptimizer(agnmpi.sgd(0.1), np.zeros(2), MPI.COMM_SELF, 2, transport="local")
for _ in opt.steps(4):
    opt.minimize(lambda _p: (0.0, [-np.ones(2)]))
opt.close()
print(opt.center["0"])
MPI.Finalize()
"""


def test_no_import_starts_mpi_where_mpi4py_is_told_not_to():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(INHERITED)} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[0.2 0.2]\n"), done
