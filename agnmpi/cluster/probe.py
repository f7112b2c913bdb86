"""Whether this MPI accepts device pointers: found out by a trial in two separate ranks.

No query can be trusted (MPIX_Query_cuda_support, ompi_info and mpi_memory_alloc_kinds all err). A trial that crashes
or hangs counts as no. It is run by `agnmpi doctor`, and its result is cached for each host and MPI; without a result
vectors on a device are staged through pinned host memory.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, choose, device_count, full_like, namespace, on_host, synchronize, to_host
from ..core.backoff import wait_until
from ..transport.agreement import ConfigError, allgather
from ..version import mpi_library

_SIZE = 1 << 20  # float32 numbers: 4 MB, beyond every eager limit
# Of the launcher's variables only these are kept: a child process that inherits the others hangs or aborts.
_KEPT = {
    "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "PRTE_MCA_rmaps_default_mapping_policy",
    "PRTE_MCA_hwloc_default_binding_policy", "OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_osc", "OMPI_MCA_pml",
    "OMPI_MCA_opal_common_ucx_tls", "OMPI_MCA_opal_common_ucx_devices",
}  # fmt: skip
_LAUNCHERS = ("PMI", "PRTE", "OMPI_", "SLURM_", "HYDI_", "HYDRA_", "MPI_LOCAL")  # PMI: also PMIX


class Answer(NamedTuple):
    """Whether device pointers work, and on what evidence."""

    direct: bool
    why: str


def stripped(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that a launcher has set for its ranks."""
    kept = {k: v for k, v in environment.items() if k in _KEPT or not k.startswith(_LAUNCHERS)}
    # Two ranks may be more than there are cores, and a user who is root has accepted that.
    defaults = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    if os.geteuid() == 0:
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return defaults | kept


def run(command: Sequence[str] | None = None, timeout: float = 60.0) -> Answer:
    """Try device pointers in a two-rank mpiexec; never raises. `command`: another one; `timeout`: in seconds."""
    if command is None:
        bin_dir = str(Path(sys.executable).parent)
        mpiexec = shutil.which("mpiexec", path=bin_dir) or shutil.which("mpiexec")
        if mpiexec is None:
            return Answer(False, "there is no mpiexec to try it with")
        command = [mpiexec, "-n", "2", sys.executable, "-m", "agnmpi.cluster.probe"]
    try:
        trial = subprocess.Popen(
            command, env=stripped(os.environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Answer(False, f"the trial could not be run: {error}")
    try:
        output, errors = trial.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(trial.pid, signal.SIGKILL)  # the ranks, too
        trial.communicate()
        return Answer(False, f"the trial hung for {timeout:g} s")
    for line in output.splitlines():
        if line.startswith("agnmpi.probe "):
            direct, why = json.loads(line.partition(" ")[2])
            return Answer(bool(direct) and trial.returncode == 0, why)
    if trial.returncode < 0 or trial.returncode > 128:
        return Answer(False, f"the trial was killed by signal {abs(trial.returncode) % 128}")
    lines = [line for line in errors.splitlines() if re.search(r"\w", line)] or ["it said nothing"]
    return Answer(False, f"the trial failed with code {trial.returncode}: {lines[-1][:200]}")


def cache_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the answer for this host, this MPI and its parameters is cached."""
    root = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parameters = [f"{k}={v}" for k, v in sorted(environment.items()) if k.startswith("OMPI_MCA_") and k in _KEPT]
    key = "\n".join([platform.node(), MPI.Get_library_version(), environment.get("LD_LIBRARY_PATH", ""), *parameters])
    return root / "agnmpi" / f"direct-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def remember(answer: Answer) -> None:
    """Cache `answer` for later runs; raises OSError if it cannot be written."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answer))  # an incomplete file is read as no answer


def recall() -> Answer | None:
    """The cached answer; None if there is none that can be read."""
    try:
        direct, why = json.loads(cache_file().read_text())
        return Answer(bool(direct), str(why))
    except (OSError, ValueError, TypeError):
        return None


def resolve(wire: str, environment: Mapping[str, str] = os.environ) -> Answer:
    """What `wire` ("auto", "staged" or "direct") means here, and why. Raises ValueError for any other value."""
    if wire in ("staged", "direct"):
        return Answer(wire == "direct", "as asked for")
    if wire != "auto":
        raise ValueError(f"wire must be auto, staged or direct, not {wire!r}")
    forced = environment.get("AGNMPI_CUDA_AWARE", "")
    if forced not in ("", "0", "1"):
        raise ValueError(f"AGNMPI_CUDA_AWARE must be 0 or 1, not {forced!r}")
    if forced:
        return Answer(forced == "1", f"AGNMPI_CUDA_AWARE={forced}")
    return recall() or Answer(False, "not tried on this host yet; type: python -m agnmpi doctor")


def choose_wire(comm: MPI.Comm, x: Array, wire: str) -> str:
    """The wire for vectors like `x`, the same on all ranks; collective. Rank 0 prints the choice and the reason.

    Direct is chosen if all ranks with a device want it; then a vector with known numbers is sent and checked
    first. Raises ConfigError on all ranks if it arrives wrong.
    """
    try:
        choice = [not on_host(x), *resolve(wire), ""]
    except ValueError as error:
        choice = [False, False, "", str(error)]
    choices = [json.loads(text) for text in allgather(comm, json.dumps(choice))]
    errors = [text for *_, text in choices if text]
    if errors:
        raise ConfigError(errors[0])
    on_device = [(direct, why) for device, direct, why, _ in choices if device]
    if not on_device:
        return "staged"
    direct, why = min(on_device)
    if comm.rank == 0:
        print(f"agnmpi: wire {'direct' if direct else 'staged'}: {why}", file=sys.stderr, flush=True)
    if not direct:
        return "staged"
    wrong = [text for text in allgather(comm, try_out(comm, namespace(x))) if text]
    if wrong:
        raise ConfigError(f"wire direct gives wrong numbers ({wrong[0]}); use --wire staged, or AGNMPI_CUDA_AWARE=0")
    return "direct"


def try_out(comm: MPI.Comm, xp: ModuleType) -> str:
    """Send known numbers from `xp` memory of every rank to rank 0, and back; collective.

    Two-sided to host memory and, where rank 0 has a device, to that; then one-sided. The vectors are allocated as
    those of a run. Returns which transfer went wrong, or an empty string.
    """
    sent = (np.arange(_SIZE) % 1021 + comm.rank).astype(np.float32)
    x = full_like(xp.empty(_SIZE, np.float32), xp.asarray(sent))
    y = full_like(x, 0)
    synchronize(x)
    wrong = ""
    win = MPI.Win.Allocate(4 * _SIZE if comm.rank == 0 else 0, 1, MPI.INFO_NULL, comm)  # type: ignore[arg-type]
    for target in (np.empty(_SIZE, np.float32), y):
        for source in range(1, comm.size):
            if comm.rank == 0:
                comm.Recv(target, source, 1)
                if not np.array_equal(to_host(target), np.arange(_SIZE) % 1021 + source):
                    wrong = wrong or f"Recv from rank {source}"
                target += 0.5
                synchronize(target)
                comm.Send(target, source, 2)
            elif comm.rank == source:
                comm.Send(x, 0, 1)
                comm.Recv(y, 0, 2)
                if not bool((y == x + 0.5).all()):
                    wrong = wrong or f"Recv on rank {comm.rank}"
    win.Lock_all()
    for source in range(1, comm.size):  # one after the other: there is memory for one
        if comm.rank == source:
            y[...] = 0
            synchronize(y)
            win.Put(x, 0, 0)
            win.Flush(0)
            win.Get(y, 0, 0)
            win.Flush(0)
            if not bool((y == x).all()):
                wrong = wrong or f"Put and Get on rank {comm.rank}"
        wait_until(comm.Ibarrier().Test)
    win.Unlock_all()
    win.Free()
    return wrong


def main() -> None:
    """One of the two ranks of a trial; rank 0 prints the answer."""
    comm = MPI.COMM_WORLD
    if not device_count():
        answer = Answer(False, "no CUDA device that CuPy can use")
    elif comm.size != 2:
        answer = Answer(False, f"mpiexec gave {comm.size} ranks, not 2: it is of another MPI")
    else:
        wrong = [text for text in allgather(comm, try_out(comm, choose("gpu", comm.rank))) if text]
        answer = Answer(not wrong, f"tried on {platform.node()}: " + (wrong[0] if wrong else f"{mpi_library()} passed"))
    if comm.rank == 0:
        print("agnmpi.probe", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
