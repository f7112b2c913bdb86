"""Whether this MPI connects two jobs, and a job with what it has spawned, in bare mpi4py; prints what has worked.

python tests/support/two_jobs.py connect   # two mpiexec on this host meet in MPI_Comm_accept and MPI_Comm_connect
python tests/support/two_jobs.py join      # in MPI_Comm_join, over a TCP connection
python tests/support/two_jobs.py dead      # in MPI_Comm_accept; then one is killed: does the other hear of it?
python tests/support/two_jobs.py absent    # one is killed before it connects: does MPI_Comm_accept return in 5 s?
python tests/support/two_jobs.py spawn     # MPI_Comm_spawn; with --with-ft ulfm behind it: after a rank has died
"""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

PATIENCE = 20  # seconds; then it hangs


def first(kind, directory):
    """The job that runs, on two ranks, of which the first acts."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.rank:
        if kind == "spawn" and "ulfm" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        world.recv(source=0)
        return
    then = time.monotonic()
    if kind == "spawn":
        time.sleep(1)
        comm = MPI.COMM_SELF.Spawn(sys.executable, [__file__, "second", kind, directory])
    elif kind == "join":
        listener = socket.create_server(("127.0.0.1", 0))
        tell(directory, str(listener.getsockname()[1]))
        connection = listener.accept()[0]
        comm = MPI.Comm.Join(connection.fileno())
    else:
        port, info = MPI.Open_port(), MPI.Info.Create()
        info.Set("timeout", "5")
        tell(directory, port)
        try:
            comm = MPI.COMM_SELF.Accept(port, info)
        except MPI.Exception:
            print(f"MPI_Comm_accept has given up after {time.monotonic() - then:.0f} s", flush=True)
            os._exit(0)
    print(f"met in {time.monotonic() - then:.2f} s, and received {comm.recv(source=0)}", flush=True)
    if kind == "dead":
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        request, then = comm.irecv(source=0), time.monotonic()
        while time.monotonic() - then < 5:
            request.Test()
        print("nothing is reported of its death in 5 s", flush=True)
    os._exit(0)  # MPI_Finalize would wait for the dead


def second(kind, directory):
    """The rank that comes."""
    if kind == "absent":
        heard(directory)
        os.kill(os.getpid(), signal.SIGKILL)
    from mpi4py import MPI

    if kind == "spawn":
        comm = MPI.Comm.Get_parent()
    elif kind == "join":
        connection = socket.create_connection(("127.0.0.1", int(heard(directory))))
        comm = MPI.Comm.Join(connection.fileno())
    else:
        comm = MPI.COMM_SELF.Connect(heard(directory))
    comm.send("hello", 0)
    time.sleep(1)
    if kind == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)


def tell(directory, text):
    Path(directory, "new").write_text(text)
    Path(directory, "new").rename(Path(directory, "port"))


def heard(directory):
    while not Path(directory, "port").exists():
        time.sleep(0.01)
    return Path(directory, "port").read_text()


def main(kind, *options):
    from launcher import Job

    with tempfile.TemporaryDirectory() as directory:
        jobs = [Job(2, sys.executable, __file__, "first", kind, directory, *options, launcher=options)]
        jobs += [] if kind == "spawn" else [Job(1, sys.executable, __file__, "second", kind, directory)]
        print(*(job.finish(2 * PATIENCE)[1] for job in jobs))


if __name__ == "__main__":
    role = {"first": first, "second": second}.get(sys.argv[1])
    if role is None:
        main(*sys.argv[1:])
    else:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        role(*sys.argv[2:4])
