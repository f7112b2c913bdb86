"""Random schedules: one fault, one rank, one moment, one transport, one launcher; each job, or its resume, is exact.

Element i of the center counts how often sample i was committed: at the end each has as many as there are epochs.

In the environment of each MPI, as often as you like: what is in FILE is not done again.

    export PYTHONPATH=.:tests/support
    python tests/support/schedules.py FILE FIRST LAST   # runs the seeds FIRST … LAST − 1 that this MPI can
    python tests/support/schedules.py FILE…             # prints the table of their outcomes
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from launcher import KNOWN_FAILURE, PROBLEMS, ROOT, ULFM, Job, has_ulfm, left_behind

from agnmpi.recovery.files import load

LIMIT, EPOCHS = 60, 8
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
    return {**schedule, "rank": rng.randrange(first, ranks), "after": round(after, 4)}


def can_run(schedule):
    """Whether this environment has its launcher."""
    return (schedule["way"] == "mpich") != has_ulfm()


def refuses(schedule):
    """Whether setup refuses this: under ULFM there are no windows, and no node centers yet."""
    return schedule["way"] == "ulfm" and schedule["transport"] in ("rma", "accumulate", "node centers")


def run(schedule):
    """Its outcome, with what was printed if that is bad."""
    with tempfile.TemporaryDirectory(prefix="agnmpi-", ignore_cleanup_errors=True) as directory:
        directory = Path(directory)
        tried = [*attempts(schedule, directory)]
        outcome = tried[-1][0]
        if len(tried) > 1 and outcome == "done":
            outcome = "resumed"
        struck = (directory / "struck").exists()
        record = {"outcome": outcome, "struck": struck, "codes": [code for _, code, _ in tried]}
        return record if is_good(record) else {**record, "output": "\n".join(output for *_, output in tried)[-20000:]}


def is_good(record):
    """Neither a hang nor a process left nor a wrong sum, and after what ended the job a resume that is exact."""
    return record["outcome"] in ("done", "resumed", "refused")


def attempts(schedule, directory):
    """The job with its fault, and if it has not ended by itself a second one, which goes on: outcome, code, output."""
    strikes = [{**schedule, "rank": -1, "moment": "never"}, schedule]
    while strikes:
        strike = strikes.pop()
        outcome, code, output = attempt(strike, directory)
        if KNOWN_FAILURE in output:
            strikes.append(strike)
            continue
        yield outcome, code, output
        if outcome != "ended":
            return


def attempt(strike, directory):
    """One job: outcome, code, output."""
    ranks, hosts, options = TRANSPORTS[strike["transport"]]
    run_directory = directory / "run"
    told = {**strike, "hosts": list(hosts), "directory": str(directory)}
    (directory / "launcher").unlink(missing_ok=True)
    printed = (directory / "output").open("w+")
    job = Job(
        ranks, sys.executable, ROOT / "tests/support/struck.py", "train", f"{PROBLEMS}:Struck", *options,
        "--epochs", EPOCHS, "--batch", 4, "--period", 3, "--checkpoint-commits", 10, "--keep-checkpoints", 2,
        "--set", "options.slow=0.01", "--set", f"options.directory={directory}",
        "--run-dir", run_directory, "--resume", "auto",
        launcher=ULFM if strike["way"] == "ulfm" else (),
        env={"STRIKE": json.dumps(told), "AGNMPI_WATCHDOG": "10", "PYTHONFAULTHANDLER": "1"},
        out=printed,
    )  # fmt: skip
    (directory / "launcher").write_text(str(job.process.pid))
    while job.process.poll() is None:
        time.sleep(0.05)
        if time.time() - Path(printed.name).stat().st_mtime > LIMIT:  # it prints each 10 s
            end(job, run_directory)
            return "hang", None, Path(printed.name).read_text()
    job.directory.cleanup()
    code, output = job.process.returncode, Path(printed.name).read_text()
    outcome = judged(strike, code, output, run_directory)
    if left := left_behind(run_directory, job):
        end(job, run_directory)
        return f"left {len(left)}", code, Path(printed.name).read_text()
    return outcome, code, output


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
    exact = np.isclose(count[:, None], expected).any(axis=1).all()
    return "done" if exact else f"wrong: {sorted(Counter(count.tolist()).items())}"


def table(records):
    """How many there were of each outcome, in all, by transport and launcher, and by fault and moment; in Markdown."""
    lines = [f"{len(records)} schedules: {counted(records)}", ""]
    for row, column in (("transport", "way"), ("fault", "moment")):
        columns = sorted({record[column] for record in records})
        lines += [f"| {row} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name in sorted({record[row] for record in records}):
            cells = [[r for r in records if (r[row], r[column]) == (name, c)] for c in columns]
            lines.append(f"| {name} | {' | '.join(map(counted, cells))} |")
        lines.append("")
    return lines


def counted(records):
    """Of each outcome how many, without the details of a wrong one."""
    counts = Counter(record["outcome"].partition(":")[0] for record in records)
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def read(*files):
    """The records of all these files."""
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


def main(file, first, last):
    """Run the seeds that are not in the file yet; returns all its records."""
    records = read(file)
    done = {record["seed"] for record in records}
    for schedule in map(draw, range(first, last)):
        if schedule["seed"] in done or not can_run(schedule):
            continue
        began = time.monotonic()
        record = {**schedule, **run(schedule), "seconds": round(time.monotonic() - began, 1)}
        with file.open("a") as out:
            print(json.dumps(record), file=out)
        print({key: value for key, value in record.items() if key != "output"}, flush=True)
        records.append(record)
    return records


if __name__ == "__main__":
    if sys.argv[2:] and sys.argv[2].isdigit():
        print("\n".join(table(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))))
    else:
        print("\n".join(table(read(*map(Path, sys.argv[1:])))))
