"""Which exit code mpiexec says of ranks that end with 75 once it is sent USR1: bare mpi4py, without agnmpi.

python tests/support/code_after_usr1.py 120   # Debian's MPICH 4.0.2: "75: 117 times, 0: 3 times"
"""

import collections
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = """
import signal, sys, time
from mpi4py import MPI
signalled = []
signal.signal(signal.SIGUSR1, lambda *_: signalled.append(True))
MPI.COMM_WORLD.Barrier()
if MPI.COMM_WORLD.rank == 0:
    print("ready", flush=True)
while not signalled:
    time.sleep(1e-3)
MPI.COMM_WORLD.Barrier()
sys.exit(75)
"""

mpiexec, codes = Path(sys.executable).with_name("mpiexec"), collections.Counter()
for i in range(int(sys.argv[1])):
    job = subprocess.Popen([mpiexec, "-n", "3", sys.executable, "-c", RANK], stdout=subprocess.PIPE)
    job.stdout.readline()
    time.sleep(0.002 * (i % 20))
    job.send_signal(signal.SIGUSR1)
    codes[job.wait(60)] += 1
print(", ".join(f"{code}: {count} times" for code, count in codes.most_common()))
