"""Faults that tests inject into a run."""

import os
import re
import signal
import time
from math import nan
from typing import NamedTuple

from ..arrays.backend import Array
from ..core.ends import Handle, WorkerEnd
from ..core.messages import Commit


class Fault(NamedTuple):
    """One injected fault; `at`: local steps (exchanges, for "cut" and "drop") of that rank before it."""

    kind: str
    rank: int
    at: int
    seconds: float = 0.0


def read_faults(text: str) -> list[Fault]:
    """Read `KIND:RANK@AT[:SECONDS],…`.

    Kinds: kill, cut (killed in an exchange), stall, slow, corrupt, drop (a commit that never arrives).

    >>> read_faults("kill:2@40,slow:1@0:0.01")
    [Fault(kind='kill', rank=2, at=40, seconds=0.0), Fault(kind='slow', rank=1, at=0, seconds=0.01)]
    """
    faults = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"(kill|cut|stall|slow|corrupt|drop):(\d+)@(\d+)(?::([\d.]+))?", item)
        if match is None:
            raise ValueError(f"fault {item!r}: give KIND:RANK@AT[:SECONDS], such as kill:2@40")
        kind, rank, at, seconds = match.groups()
        faults.append(Fault(kind, int(rank), int(at), float(seconds or 0)))
    return faults


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Injection:
    """The faults of one rank, for tests."""

    def __init__(self, faults: list[Fault], rank: int) -> None:
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._steps = 0

    def step(self) -> None:
        """Call it before each local step (on a center rank: before each commit)."""
        for fault in self._faults:
            if fault.kind == "kill" and fault.at == self._steps:
                _die()
            elif (fault.kind == "stall" and fault.at == self._steps) or (
                fault.kind == "slow" and fault.at <= self._steps
            ):
                time.sleep(fault.seconds)
        self._steps += 1

    def wrap(self, end: WorkerEnd) -> WorkerEnd:
        """An end in whose exchanges this rank dies, or loses its commit, where a fault requires it."""
        faults = [fault for fault in self._faults if fault.kind in ("cut", "drop")]
        return _FaultyEnd(end, faults) if faults and not isinstance(end, _FaultyEnd) else end

    def corrupt(self, g: Array) -> None:
        """Call it with the gradient of the step."""
        if any(fault.kind == "corrupt" and fault.at == self._steps - 1 for fault in self._faults):
            g[0] = nan


class _FaultyEnd(WorkerEnd):
    def __init__(self, end: WorkerEnd, faults: list[Fault]) -> None:
        self._end, self._faults, self._exchanges, self._total = end, faults, 0, -1

    def exchange(self, commit: Commit, out: Array | None) -> Handle:
        if commit.payload is None:
            self._total = commit.total
            return self._end.exchange(commit, out)
        kinds = {fault.kind for fault in self._faults if fault.at == self._exchanges}
        self._exchanges += 1
        if "drop" in kinds:  # as if it had never been sent; the steps stay leased until this worker leaves
            commit = Commit(commit.worker, total=self._total, requests=commit.requests)
        handle = self._end.exchange(commit, out)
        if "cut" in kinds:
            handle.test()
            _die()
        return handle

    def pull(self, out: Array) -> Handle:
        return self._end.pull(out)

    def leave(self, commit: Commit | None, out: Array | None) -> Handle:
        return self._end.leave(commit, out)

    def close(self) -> None:
        self._end.close()
