"""agnmpi in which a fault strikes one rank at one moment; see `schedules.py`.

STRIKE is a JSON object: fault, rank, moment, after (seconds), hosts (names, by rank), directory (of flags).
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

STRIKE = json.loads(os.environ["STRIKE"])
FLAGS = Path(STRIKE["directory"])
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or 0)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "signal": signal.SIGUSR1}


def reached(moment):
    """Some rank has come to this moment."""
    (FLAGS / moment).touch()


def strike():
    """Let the fault happen, here."""
    fault = STRIKE["fault"]
    reached("struck")
    if fault == "exit":
        os._exit(3)
    if fault == "exception":  # in the next call of the problem
        (FLAGS / f"raise-{RANK}").touch()
    elif fault == "launcher":
        while not (launcher := FLAGS / "launcher").exists() or not launcher.read_text():
            time.sleep(1e-3)
        os.kill(int(launcher.read_text()), signal.SIGKILL)
    else:
        if fault == "stop":  # for some seconds
            subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), SIGNALS[fault])


def wait_and_strike():
    while not (FLAGS / STRIKE["moment"]).exists():
        time.sleep(1e-3)
    time.sleep(STRIKE["after"])
    strike()


def die_first():
    """The center dies, so that there is a fail-over."""
    while not (FLAGS / "training").exists():
        time.sleep(1e-3)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def announced(function, moment):
    def call(*args, **kwargs):
        reached(moment)
        return function(*args, **kwargs)

    return call


if STRIKE["rank"] == RANK and STRIKE["moment"] == "start-up":
    if STRIKE["fault"] == "exception":
        reached("struck")
        raise ArithmeticError("struck")
    strike()

from agnmpi.cli.main import main  # noqa: E402


def prepare():
    """Announce the moments, and wait for the one to strike at."""
    from agnmpi.cluster import setup
    from agnmpi.core.worker import Worker
    from agnmpi.recovery import checkpoint, failover, saver
    from agnmpi.training.session import Session

    setup.hosts = lambda _comm: STRIKE["hosts"]
    Worker.waits_to_begin = announced(Worker.waits_to_begin, "first pull")
    checkpoint.seal = saver.seal = announced(checkpoint.seal, "checkpoint")
    failover.elect = announced(failover.elect, "fail-over")
    Session.regroup = announced(Session.regroup, "farewell")
    if STRIKE["rank"] == RANK and STRIKE["moment"] != "start-up":
        threading.Thread(target=wait_and_strike, daemon=True).start()
    if STRIKE["moment"] == "fail-over" and RANK == 0:
        threading.Thread(target=die_first, daemon=True).start()


def mpi_has_started():
    cancel()
    prepare()


if __name__ == "__main__":
    # The command line starts MPI itself, when it has its handlers and a deadline; this is what it calls then.
    cancel, faulthandler.cancel_dump_traceback_later = faulthandler.cancel_dump_traceback_later, mpi_has_started
    sys.exit(main())
