"""Random schedules: one fault, one rank, one moment, one transport, one launcher; each job, or its resume, is exact.

Element i of the center counts how often sample i was committed: at the end each has as many as there are epochs.

In the environment of each MPI, as often as you like: what is in FILE is not done again.

    export PYTHONPATH=.:tests/support
    python tests/support/schedules.py FILE FIRST LAST   # runs the seeds FIRST … LAST − 1 that this MPI can
    python tests/support/schedules.py FILE again        # runs once more what went wrong, or was silent for a minute
    python tests/support/schedules.py FILE…             # prints the table of their outcomes

Seeds from 1000 on vary encodings, overlap and spares, too. A job is silent while it prints nothing (it prints each
10 s); time in which this process was stopped itself does not count. One that is silent for a minute is noted, with what
its processes do, and is a hang after three: what only a loaded machine holds up ends before, and is told apart.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from launcher import KNOWN_FAILURE, PROBLEMS, ROOT, ULFM, Job, has_ulfm, left_behind

from agnmpi.recovery.files import load

LIMIT, HANG, EPOCHS = 60, 180, 8  # seconds of silence that are noted, and that are a hang
FAULTS = ("kill", "stop", "launcher", "exit", "exception", "signal")
MOMENTS = ("start-up", "first pull", "training", "checkpoint", "evaluation", "fail-over", "farewell")
WAYS = ("ulfm", "plain", "mpich")
COUNTED = ["--rule", "downpour", "--optimizer", "sgd", "--rate", "1"]
TRANSPORTS = {  # ranks, hosts, options
    "p2p": (5, "aaaaa", [*COUNTED, "--stall-limit", "2", "--drop-stalled"]),
    "rma": (5, "aaaaa", [*COUNTED, "--transport", "rma"]),
    "accumulate": (5, "aaaaa", [*COUNTED, "--transport", "accumulate"]),
    "allreduce": (4, "aaaa", ["--rule", "synchronous", "--optimizer", "sgd", "--rate", "4"]),  # c + mean of four
    "centers 2": (5, "aaaaa", [*COUNTED, "--centers", "2"]),
    "node centers": (5, "aabbb", [*COUNTED, "--node-centers"]),
}
OVERLAP, INT8 = ["--overlap"], ["--encoding", "int8"]
BOTH_WAYS = [*INT8, "--pull-encoding", "int8"]
VARIATIONS = {  # of these
    "p2p": [OVERLAP, [*OVERLAP, "--no-wait"], INT8, [*OVERLAP, *INT8], ["--pull-encoding", "bf16"], ["--spares", "1"]],
    "rma": [OVERLAP, INT8, [*OVERLAP, *BOTH_WAYS]],
    "accumulate": [OVERLAP],
    "allreduce": [OVERLAP],
    "centers 2": [OVERLAP, INT8, [*OVERLAP, *BOTH_WAYS]],
    "node centers": [OVERLAP, BOTH_WAYS, [*OVERLAP, *INT8]],
}


def draw(seed):
    """The schedule of this seed."""
    rng = random.Random(seed)
    schedule = {
        "seed": seed,
        "way": rng.choice(WAYS),
        "transport": rng.choice(list(TRANSPORTS)),
        "fault": rng.choice(FAULTS),
        "moment": rng.choice(MOMENTS),
    }
    ranks = TRANSPORTS[schedule["transport"]][0]
    first = int(schedule["moment"] == "fail-over")  # there rank 0 has died already
    after = rng.uniform(0, 1.5) if schedule["moment"] == "training" else rng.choice([0, rng.uniform(0, 0.02)])
    schedule |= {"rank": rng.randrange(first, ranks), "after": round(after, 4)}
    return {**schedule, "options": rng.choice(VARIATIONS[schedule["transport"]]) if seed >= 1000 else []}


def can_run(schedule):
    """Whether this environment has its launcher."""
    return (schedule["way"] == "mpich") != has_ulfm()


def refuses(schedule):
    """Whether setup refuses this: under ULFM there are no windows, and no node centers yet."""
    ulfm = schedule["way"] == "ulfm"
    return schedule["transport"] in ("rma", "accumulate", "node centers") if ulfm else "--spares" in schedule["options"]


def run(schedule):
    """Its outcome, with what was printed if that is bad."""
    with tempfile.TemporaryDirectory(prefix="agnmpi-", ignore_cleanup_errors=True) as directory:
        directory = Path(directory)
        tried = [*attempts(schedule, directory)]
        outcome = tried[-1][0]
        if len(tried) > 1 and outcome == "done":
            outcome = "resumed"
        struck = (directory / "struck").exists()
        record = {"outcome": outcome, "struck": struck, "codes": [code for _, code, *_ in tried]}
        if silences := [silence for *_, silence in tried if silence]:
            record["silences"] = silences
        return record if is_good(record) else {**record, "output": "\n".join(each[2] for each in tried)[-20000:]}


def is_good(record):
    """Neither a hang nor a process left nor a wrong sum, and after what ended the job a resume that is exact."""
    return record["outcome"] in ("done", "resumed", "refused")


def attempts(schedule, directory):
    """The job with its fault, and if it has not ended by itself a second one, which goes on: as `attempt`."""
    strikes = [{**schedule, "rank": -1, "moment": "never"}, schedule]
    while strikes:
        strike = strikes.pop()
        tried = attempt(strike, directory)
        if KNOWN_FAILURE in tried[2]:
            strikes.append(strike)
            continue
        yield tried
        if tried[0] != "ended":
            return


def attempt(strike, directory):
    """One job: outcome, code, output, and what it did when it was silent for a minute, if it was."""
    ranks, hosts, options = TRANSPORTS[strike["transport"]]
    run_directory = directory / "run"
    told = {**strike, "hosts": list(hosts), "directory": str(directory)}
    (directory / "launcher").unlink(missing_ok=True)
    printed = (directory / "output").open("w+")
    job = Job(
        ranks, sys.executable, ROOT / "tests/support/struck.py", "train", f"{PROBLEMS}:Struck", *options,
        *strike["options"], "--epochs", EPOCHS, "--batch", 4, "--period", 3, "--checkpoint-commits", 10,
        "--keep-checkpoints", 2, "--set", "options.slow=0.01", "--set", f"options.directory={directory}",
        "--run-dir", run_directory, "--resume", "auto",
        launcher=ULFM if strike["way"] == "ulfm" else (),
        env={"STRIKE": json.dumps(told), "AGNMPI_WATCHDOG": "5", "PYTHONFAULTHANDLER": "1"},
        out=printed,
    )  # fmt: skip
    (directory / "launcher").write_text(str(job.process.pid))
    silence, noted = Silence(printed.name), None
    while job.process.poll() is None:
        time.sleep(0.05)
        silent = silence.look()
        if silent > LIMIT and noted is None:
            noted = {"after": round(time.monotonic() - silence.began), **at_work(run_directory, job)}
        if silent > HANG:
            end(job, run_directory)
            return "hang", None, Path(printed.name).read_text(), noted
    job.directory.cleanup()
    code, output = job.process.returncode, Path(printed.name).read_text()
    outcome = judged(strike, code, output, run_directory)
    if noted is not None:
        noted["seconds"] = round(silence.longest)
    if left := left_behind(run_directory, job):
        end(job, run_directory)
        return f"left {len(left)}", code, Path(printed.name).read_text(), noted
    return outcome, code, output, noted


class Silence:
    """For how long a file has not grown, in seconds; not counted is time in which this process did not run either."""

    def __init__(self, name):
        self.name, self.size, self.seconds, self.longest = name, 0, 0.0, 0.0
        self.began = self.then = time.monotonic()

    def look(self):
        """The seconds so far; to be called several times a second."""
        size, now = Path(self.name).stat().st_size, time.monotonic()
        self.seconds = self.seconds + min(now - self.then, 1.0) if size == self.size else 0.0
        self.size, self.then, self.longest = size, now, max(self.longest, self.seconds)
        return self.seconds


def at_work(run_directory, job, seconds=5):
    """The load, and of each process of a job: state, where it sleeps, time on a core and in want of one, in seconds."""
    processes = [Path(each) for each in left_behind(run_directory, job, seconds=0) if each.startswith("/proc")]

    def times(process):
        with suppress(OSError):
            return [int(text) / 1e9 for text in (process / "schedstat").read_text().split()[:2]]
        return [0.0, 0.0]

    before = [*map(times, processes)]
    time.sleep(seconds)
    told = {"load": os.getloadavg()[0], "launcher": stack(job.process.pid), "processes": []}
    for process, (ran, wanted) in zip(processes, before):
        with suppress(OSError):
            state, where = (process / "stat").read_text().rpartition(")")[2].split()[0], (process / "wchan").read_text()
            now_ran, now_wanted = times(process)
            told["processes"].append(
                [process.name, state, where, round(now_ran - ran, 2), round(now_wanted - wanted, 2)]
            )
    return told


def stack(process):
    """Where the threads of a process are, if gdb can say so."""
    command = ["gdb", "-p", str(process), "-batch", "-nx", "-ex", "thread apply all backtrace 12"]
    with suppress(OSError, subprocess.TimeoutExpired):
        printed = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=20
        ).stdout
        return [line for line in printed.splitlines() if line.startswith(("Thread", "#"))]
    return []


def end(job, run_directory):
    """Let what is left of a job say where it is, and kill it."""
    left = [int(name) for each in left_behind(run_directory, job, seconds=0) if (name := Path(each).name).isdigit()]
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, number)
                os.kill(process, signal.SIGCONT)
        time.sleep(1)
    with suppress(ProcessLookupError):
        os.killpg(job.process.pid, signal.SIGKILL)
    job.process.wait()
    job.directory.cleanup()


def judged(strike, code, output, run_directory):
    """What a job's end is: done, wrong, refused, or ended, to be resumed."""
    if code == 2:
        return "refused" if refuses(strike) else "refused, and should not be"
    if code not in (0, 76, 77) or not (run_directory / "result.json").exists():
        return "ended" if strike["moment"] != "never" else f"resume ended with code {code}"
    count, expected = load(run_directory / "center.safetensors")[0]["count"], [EPOCHS]
    if strike["transport"] == "allreduce":  # the last round before a job ends may be one of fewer ranks: their mean
        expected += [EPOCHS - 1 + 4 / ranks for ranks in (1, 2, 3)]
    tolerance = 0.1 if "--encoding" in strike["options"] else 1e-4  # of what was rounded the last is not sent
    exact = (abs(count[:, None] - expected) < tolerance).any(axis=1).all()
    return "done" if exact else f"wrong: {sorted(Counter(count.tolist()).items())}"


def table(records):
    """How many there were of each outcome, in all, by transport and launcher, and by fault and moment; in Markdown."""
    records, again = [r for r in records if "again" not in r], [r for r in records if "again" in r]
    lines = [f"{len(records)} schedules: {counted(records)}", ""]
    for row, column in (("transport", "way"), ("fault", "moment")):
        columns = sorted({record[column] for record in records})
        lines += [f"| {row} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name in sorted({record[row] for record in records}):
            cells = [[r for r in records if (r[row], r[column]) == (name, c)] for c in columns]
            lines.append(f"| {name} | {' | '.join(map(counted, cells))} |")
        lines.append("")
    for record in filter(is_noted, records):
        what = ", ".join(str(record[name]) for name in ("transport", "way", "fault", "moment", "rank"))
        silent = [f"silent for {each.get('seconds', HANG)} s at load {each['load']:.0f}" for each in silences(record)]
        runs = counted([each for each in again if each["seed"] == record["seed"]]) or "not yet"
        lines.append(f"- seed {record['seed']} ({what}): {', '.join([record['outcome'], *silent])}; run again: {runs}")
    return lines


def is_noted(record):
    """Whether it is to be run again: it went wrong, or was silent for a minute."""
    return not is_good(record) or bool(silences(record))


def silences(record):
    """The silences of more than a minute."""
    return record.get("silences", [])


def counted(records):
    """Of each outcome how many, without the details of a wrong one."""
    counts = Counter(record["outcome"].partition(":")[0] for record in records)
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def read(*files):
    """The records of all these files."""
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


def main(file, first, last):
    """Run the seeds that are not in the file yet; returns all its records."""
    done = {record["seed"] for record in read(file)}
    for schedule in map(draw, range(first, last)):
        if schedule["seed"] not in done and can_run(schedule):
            add(file, schedule)
    return read(file)


def again(file):
    """Run once more, of this file, what is noted; returns all its records."""
    seeds = [each["seed"] for each in read(file) if "again" not in each and is_noted(each)]
    for schedule in map(draw, seeds):
        add(file, {**schedule, "again": True})
    return read(file)


def add(file, schedule):
    """Run it, and add what came of it to the file."""
    began = time.monotonic()
    told = {**schedule, **run(schedule), "seconds": round(time.monotonic() - began, 1)}
    with file.open("a") as out:
        print(json.dumps(told), file=out)
    print({key: value for key, value in told.items() if key != "output"}, flush=True)


if __name__ == "__main__":
    file, *which = sys.argv[1:]
    if which == ["again"]:
        records = again(Path(file))
    elif which and which[0].isdigit():
        records = main(Path(file), *map(int, which))
    else:
        records = read(*map(Path, sys.argv[1:]))
    print("\n".join(table(records)))
