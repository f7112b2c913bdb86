"""Whether this MPI accepts device pointers: found out by a trial in two separate ranks.

No query can be trusted (MPIX_Query_cuda_support, ompi_info and mpi_memory_alloc_kinds all err). Messages and windows
are tried one after the other: over UCX with CUDA Open MPI 5.0.11 sends messages from a device, and crashes in a Put
unless its windows are UCX's, too (`OMPI_MCA_osc=ucx`). A trial that crashes or hangs counts as no. It is run by `agnmpi
doctor`, and its result is cached for each host and MPI; without a result vectors on a device are staged through pinned
host memory.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, choose, device_count, full_like, namespace, on_host, synchronize, to_host
from ..core.backoff import wait_until
from ..transport.agreement import ConfigError, allgather
from ..transport.registry import Transport
from ..version import mpi_library

_SIZE = 1 << 20  # float32 numbers: 4 MB, beyond every eager limit
# Of the launcher's variables only these are kept: a child process that inherits the others hangs or aborts.
_KEPT = {
    "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "PRTE_MCA_rmaps_default_mapping_policy",
    "PRTE_MCA_hwloc_default_binding_policy", "OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_osc", "OMPI_MCA_pml",
    "OMPI_MCA_opal_common_ucx_tls", "OMPI_MCA_opal_common_ucx_devices",
}  # fmt: skip
_LAUNCHERS = ("PMI", "PRTE", "OMPI_", "SLURM_", "HYDI_", "HYDRA_", "MPI_LOCAL")  # PMI: also PMIX


class Found(NamedTuple):
    """What the trial says of messages, then of windows."""

    works: bool
    why: str


class Answer(NamedTuple):
    """Whether device pointers work in messages and in one-sided calls on windows, and on what evidence."""

    messages: bool
    windows: bool
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
            return Answer(False, False, "there is no mpiexec to try it with")
        command = [mpiexec, "-n", "2", sys.executable, "-m", "agnmpi.cluster.probe"]
    try:
        trial = subprocess.Popen(
            command, env=stripped(os.environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Answer(False, False, f"the trial could not be run: {error}")
    try:
        output, errors = trial.communicate(timeout=timeout)
        end = _end(trial.returncode, errors)
    except subprocess.TimeoutExpired:
        os.killpg(trial.pid, signal.SIGKILL)  # the ranks, too
        output, _ = trial.communicate()
        end = f"the trial hung for {timeout:g} s"
    found = [json.loads(line.partition(" ")[2]) for line in output.splitlines() if line.startswith("agnmpi.probe ")]
    if not found:
        return Answer(False, False, end)
    messages, *windows = map(Found._make, found)
    if not windows and messages.works:
        windows = [Found(False, f"windows: {end}")]
    whys = [each.why for each in (messages, *windows)]
    return Answer(messages.works, bool(windows) and windows[0].works, f"tried on {platform.node()}: {'; '.join(whys)}")


def _end(code: int, errors: str) -> str:
    if code < 0 or code > 128:
        return f"the trial was killed by signal {abs(code) % 128}"
    lines = [line for line in errors.splitlines() if re.search(r"\w", line)] or ["it said nothing"]
    return f"the trial failed with code {code}: {lines[-1][:200]}"


def cache_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the answer for this host, this MPI, the libraries below it and their parameters is cached."""
    root = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # No others: what only the launcher reads (PRTE_MCA_…) does not reach its ranks.
    parameters = [
        f"{k}={v}"
        for k, v in sorted(environment.items())
        if (k in _KEPT and k.startswith("OMPI_MCA_")) or k.startswith(("UCX_", "MPIR_CVAR_"))
    ]
    key = "\n".join([platform.node(), MPI.Get_library_version(), *_libraries(), *parameters])
    return root / "agnmpi" / f"direct-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _libraries() -> list[str]:
    """The files of MPI and UCX that this process has loaded. Not LD_LIBRARY_PATH: Open MPI's mpiexec adds to it."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*/lib(?:mpi|ucp)\.so\S*", mapped)))


def remember(answer: Answer) -> None:
    """Cache `answer` for later runs; raises OSError if it cannot be written."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answer))  # an incomplete file is read as no answer


def recall() -> Answer | None:
    """The cached answer; None if there is none that can be read."""
    try:
        messages, windows, why = json.loads(cache_file().read_text())
        return Answer(bool(messages), bool(windows), str(why))
    except (OSError, ValueError, TypeError):
        return None


def resolve(wire: str, environment: Mapping[str, str] = os.environ) -> Answer:
    """What `wire` ("auto", "staged" or "direct") means here, and why. Raises ValueError for any other value."""
    if wire in ("staged", "direct"):
        return Answer(wire == "direct", wire == "direct", "as asked for")
    if wire != "auto":
        raise ValueError(f"wire must be auto, staged or direct, not {wire!r}")
    forced = environment.get("AGNMPI_CUDA_AWARE", "")
    if forced not in ("", "0", "1"):
        raise ValueError(f"AGNMPI_CUDA_AWARE must be 0 or 1, not {forced!r}")
    if forced:
        return Answer(forced == "1", forced == "1", f"AGNMPI_CUDA_AWARE={forced}")
    return recall() or Answer(False, False, "not tried on this host yet; type: python -m agnmpi doctor")


def choose_wire(comm: MPI.Comm, x: Array, transport: Transport) -> str:
    """The wire of `transport` for vectors like `x`, the same on all ranks; collective. Rank 0 prints it, and why.

    Direct is chosen if all ranks with a device want it, and the transport can; then vectors with known numbers are sent
    and checked first. Raises ConfigError on all ranks if one arrives wrong.
    """
    can = transport.capabilities
    try:
        answer, error = resolve(transport.wire), ""
    except ValueError as refused:
        answer, error = Answer(False, False, ""), str(refused)
    if not can.direct:
        answer = Answer(False, False, f"with transport {transport.name} MPI itself adds the numbers, in host memory")
    direct = answer.windows if can.windows else answer.messages
    choices = [json.loads(text) for text in allgather(comm, json.dumps([not on_host(x), direct, answer.why, error]))]
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
    trial = try_windows if can.windows else try_messages
    wrong = [text for text in allgather(comm, trial(comm, namespace(x))) if text]
    if wrong:
        raise ConfigError(f"wire direct gives wrong numbers ({wrong[0]}); use --wire staged, or AGNMPI_CUDA_AWARE=0")
    return "direct"


def _vectors(comm: MPI.Comm, xp: ModuleType) -> tuple[Array, Array]:
    """Known numbers in `xp` memory, and room for them; allocated as the vectors of a run."""
    sent = (np.arange(_SIZE) % 1021 + comm.rank).astype(np.float32)
    x = full_like(xp.empty(_SIZE, np.float32), xp.asarray(sent))
    y = full_like(x, 0)
    synchronize(x)
    return x, y


def try_messages(comm: MPI.Comm, xp: ModuleType) -> str:
    """Send known numbers from `xp` memory of every rank to rank 0, and back; collective.

    To host memory and, where rank 0 has a device, to that. Returns which transfer went wrong, or an empty string.
    """
    x, y = _vectors(comm, xp)
    wrong = ""
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
    return wrong


def try_windows(comm: MPI.Comm, xp: ModuleType) -> str:
    """Put known numbers from `xp` memory of every rank into host memory of rank 0, and get them; as `try_messages`."""
    x, y = _vectors(comm, xp)
    wrong = ""
    win = MPI.Win.Allocate(4 * _SIZE if comm.rank == 0 else 0, 1, MPI.INFO_NULL, comm)  # type: ignore[arg-type]
    win.Lock_all()
    for source in range(1, comm.size):  # one after the other: there is memory for one
        if comm.rank == source:
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
    """One of the two ranks of a trial; rank 0 prints what it finds, one after the other: the next may crash."""
    comm = MPI.COMM_WORLD

    def say(works: bool, why: str) -> bool:
        if comm.rank == 0:
            print("agnmpi.probe", json.dumps(Found(works, why)), flush=True)
        return works

    def tried(name: str, trial: Callable[[MPI.Comm, ModuleType], str]) -> bool:
        wrong = [text for text in allgather(comm, trial(comm, xp)) if text]
        return say(not wrong, f"{name}: {wrong[0]} wrong" if wrong else f"{name} passed")

    if not device_count():
        say(False, "no CUDA device that CuPy can use")
    elif comm.size != 2:
        say(False, f"mpiexec gave {comm.size} ranks, not 2: it is of another MPI")
    else:
        xp = choose("gpu", comm.rank)
        if tried(f"{mpi_library()}: messages", try_messages):
            tried("windows", try_windows)


if __name__ == "__main__":
    main()
