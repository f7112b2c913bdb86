"""Whether a Put is seen at its target while that does not enter MPI: bare mpi4py, without agnmpi.

mpiexec -n 2 python tests/support/absent_target.py   # "seen after 0.1 ms", or "not seen in 1 s"
"""

import time

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
win = MPI.Win.Allocate(8 if comm.rank == 0 else 0, 1, MPI.INFO_NULL, comm)
word = np.asarray(win.tomemory()).view(np.int64) if comm.rank == 0 else np.empty(1, np.int64)
word[:] = 0
win.Lock_all()
win.Sync()
comm.Barrier()
if comm.rank == 1:
    win.Put(np.ones(1, np.int64), 0)
    win.Flush(0)
begin = time.monotonic()
while comm.rank == 0 and not word[0] and time.monotonic() < begin + 1:
    time.sleep(1e-4)
if comm.rank == 0:
    print(f"seen after {1e3 * (time.monotonic() - begin):.1f} ms" if word[0] else "not seen in 1 s", flush=True)
comm.Barrier()
win.Unlock_all()
win.Free()
