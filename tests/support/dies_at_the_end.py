"""`agnmpi` in which one rank dies when all work is done: DIES_AT_THE_END=center, or the index of a worker, or after.

The center as it is about to write the result, a worker as it is about to write its last state; after: worker 0, when
all is written.
"""

import os
import signal
import sys

from agnmpi.cli.main import main
from agnmpi.recovery import saver
from agnmpi.training import job

write = saver.write_worker
who = os.environ["DIES_AT_THE_END"]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_worker(run, index, steps, files):
    if str(index) == who:
        die()
    write(run, index, steps, files)


def train_and_die(*arguments, train=job.train):
    train(*arguments)
    if job.MPI.COMM_WORLD.rank == 1:
        die()


saver.write_worker = write_worker
if who == "after":
    job.train = train_and_die
if who == "center" and job.MPI.COMM_WORLD.rank == 0:
    job.finish_run = lambda *_: die()
sys.exit(main())
