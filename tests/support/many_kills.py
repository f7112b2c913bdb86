"""One training through many kills, whose samples are counted; what a job killed whole costs.

    export PYTHONPATH=.:tests/support
    python tests/support/many_kills.py ranks 1500 0   # kills of ranks (Open MPI with ULFM), seed 0
    python tests/support/many_kills.py jobs 10 0      # kills of whole jobs, one each 15 s, seed 0

Ranks are killed one after the other, the center and parked spares among them, now and then the launcher; a job that
ends is resumed. Element i of `count` counts how often sample i was committed.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from launcher import KNOWN_FAILURE, PROBLEMS, ULFM, Job, left_behind, words_of
from mpi4py import MPI

from agnmpi.recovery.files import load
from agnmpi.training.config import Config
from agnmpi.training.job import train

LIMIT = 120  # seconds without a step, or to end: a hang
WORKERS, SPARES, BATCH, SAMPLES = 4, 8, 4, 240
STEPS_OF_AN_EPOCH = SAMPLES // BATCH
COMPLETE = (0, 76)


class Training:
    """A run in a directory, by one job after the other."""

    def __init__(self, directory, epochs, slow, *options, spares=0):
        self.directory, self.run, self.jobs = Path(directory), Path(directory, "run"), 0
        self.epochs, self.ranks, self.launcher = epochs, 1 + WORKERS + spares, ULFM if spares else ()
        self.arguments = [
            "-m", "agnmpi", "train", f"{PROBLEMS}:Learns", "--rule", "downpour", "--optimizer", "sgd", "--rate", "1",
            "--batch", BATCH, "--period", 3, "--epochs", epochs, "--spares", spares, "--evaluate-every", 0,
            "--set", f"options.slow={slow}", "--set", f"options.directory={directory}",
            "--run-dir", self.run, "--resume", "auto", *options,
        ]  # fmt: skip

    def start(self):
        """The next job."""
        self.jobs += 1
        self.output = (self.directory / f"output-{self.jobs}").open("w+")
        env = {"AGNMPI_WATCHDOG": "10", "PYTHONFAULTHANDLER": "1"}
        self.job = Job(self.ranks, sys.executable, *self.arguments, launcher=self.launcher, env=env, out=self.output)
        return self.job

    @property
    def steps(self):
        """Gradients computed, by all jobs."""
        file = self.directory / "steps"
        return file.stat().st_size if file.exists() else 0

    @property
    def processes(self):
        """Of the ranks that live."""
        found = [p for p in Path("/proc").glob("[0-9]*") if words_of(p).startswith(sys.executable.encode() + b"\0-m")]
        return [int(process.name) for process in found if str(self.run).encode() in words_of(process)]

    def come_to(self, steps):
        """Wait until so many gradients were computed; False if the job has ended before."""
        last, then = self.steps, time.monotonic()
        while self.steps < steps:
            if self.job.process.poll() is not None:
                return False
            if self.steps > last:
                last, then = self.steps, time.monotonic()
            if time.monotonic() - then > LIMIT:
                self.fail("hangs")
            time.sleep(0.005)
        return True

    def ended(self):
        """Wait for the job's end, and for that of all its ranks; its exit code."""
        self.come_to(sys.maxsize)
        if left := left_behind(self.run, self.job):
            self.fail(f"has left {left}")
        self.job.directory.cleanup()
        return self.job.process.returncode

    def fail(self, what):
        """Say where its ranks are, and end."""
        for number in (signal.SIGABRT, signal.SIGKILL):
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            time.sleep(2)
        with suppress(ProcessLookupError):
            os.killpg(self.job.process.pid, signal.SIGKILL)
        raise AssertionError(f"job {self.jobs} {what}; it printed:\n{self.printed()[-20000:]}")

    def printed(self):
        """What the last job has printed."""
        return Path(self.output.name).read_text()

    def complete(self):
        """Run it to its end, undisturbed."""
        while self.ended() not in COMPLETE or not self.is_complete:
            assert self.job.process.returncode != 2, self.printed()
            self.start()

    @property
    def is_complete(self):
        """Whether it has a result; where all ranks are killed Open MPI's mpiexec returns 0, too."""
        return (self.run / "result.json").exists()

    def check(self):
        """Each sample was committed as often as there are epochs; returns accuracy, and events by kind."""
        count = load(self.run / "center.safetensors")[0]["count"]
        assert np.all(count == self.epochs), count
        events = [json.loads(line)["event"] for line in (self.run / "events.jsonl").read_text().splitlines()]
        result = json.loads((self.run / "result.json").read_text())
        return result["metrics"]["accuracy"], {kind: events.count(kind) for kind in ("failover", "lost", "joined")}


def kill_ranks(kills, seed):
    """Kill so many ranks, one each twenty to sixty steps; what became of it."""
    rng, killed, launchers = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="agnmpi-", ignore_cleanup_errors=True) as directory:
        training = Training(directory, max(1, kills), 0.01, "--checkpoint-commits", 10, spares=SPARES)
        training.start()
        while killed < kills:
            if not training.come_to(training.steps + rng.randrange(20, 60)):
                code = training.ended()
                assert not training.is_complete, f"complete after {killed} kills: let it have more epochs"
                assert code != 2 or KNOWN_FAILURE in training.printed(), training.printed()
                training.start()
                continue
            victims = training.processes
            if rng.random() < 0.02:
                victims, launchers = [training.job.process.pid], launchers + 1
            with suppress(ProcessLookupError, IndexError):  # IndexError: all have ended
                os.kill(rng.choice(victims), signal.SIGKILL)
                killed += 1
        training.complete()
        accuracy, events = training.check()
        told = {"kills": killed, "of them launchers": launchers, "jobs": training.jobs, **events, "accuracy": accuracy}
        return {**told, "steps taken, of those needed": training.steps / (STEPS_OF_AN_EPOCH * training.epochs)}


def undisturbed(epochs, directory):
    """The accuracy after so many epochs with as many workers, in one process."""
    config = Config(
        f"{PROBLEMS}:Learns", options={"directory": str(directory)}, transport="local", workers=WORKERS,
        rule="downpour", optimizer="sgd", rate=1.0, batch=BATCH, period=3, epochs=epochs, keep_checkpoints=0,
        run_dir=str(Path(directory, "run")),
    )  # fmt: skip
    return train(config, MPI.COMM_SELF)["metrics"]["accuracy"]


def kill_jobs(kills, seed, every=15.0):
    """Kill a whole job each `every` seconds, and start the next at once; goodput, with start-up and without."""
    rng, start_up, trained, taken = random.Random(seed), [], 0.0, 0
    with tempfile.TemporaryDirectory(prefix="agnmpi-", ignore_cleanup_errors=True) as directory:
        epochs = int(1.2 * kills * every * WORKERS / 0.05 / STEPS_OF_AN_EPOCH)  # more than the kills leave time for
        training = Training(directory, epochs, 0.05, "--checkpoint-seconds", 2)
        began = time.monotonic()
        for kill in range(kills + 1):
            before, started = training.steps, time.monotonic()
            training.start()
            assert training.come_to(before + 1), training.printed()
            first = time.monotonic()
            start_up.append(first - started)
            if kill < kills:
                time.sleep(every * rng.uniform(0.5, 1.5))
                taken, trained = taken + training.steps - before, trained + time.monotonic() - first
                for process in [training.job.process.pid, *training.processes]:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                training.ended()
                assert not training.is_complete, "complete before the last kill: let it have more epochs"
        training.complete()
        seconds = time.monotonic() - began
        training.check()
        useful = STEPS_OF_AN_EPOCH * epochs / (taken / trained)  # seconds undisturbed
        told = {"kills": kills, "seconds of start-up, mean": sum(start_up) / len(start_up), "seconds": seconds}
        return {**told, "goodput": useful / seconds, "goodput without start-up": useful / (seconds - sum(start_up))}


if __name__ == "__main__":
    print({"ranks": kill_ranks, "jobs": kill_jobs}[sys.argv[1]](*map(int, sys.argv[2:])))
