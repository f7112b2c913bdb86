"""The floor of an exchange: the same bytes by bare mpi4py calls, in the straightforward way."""

import os
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

import numpy as np
from mpi4py import MPI

from ..arrays.backend import Array, empty_like, full_like
from ..core.backoff import wait_until
from ..transport.chunks import INLINE


class Floor(ABC):
    """Created on every rank with `x`, the delta (n,) in host memory; rank 0 is the center."""

    def __init__(self, comm: MPI.Comm, x: Array) -> None:
        self.comm, self.x, self.out = comm, x, empty_like(x)
        self.wins: list[MPI.Win] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:  # else the job ends, and Free would wait for the others
            for win in self.wins:
                win.Free()

    @abstractmethod
    def exchanges(self, count: int) -> list[float]:
        """Seconds of each of `count` exchanges of this worker; the center serves meanwhile."""

    @abstractmethod
    def exchange(self) -> None:
        """One of them."""

    def window(self, nbytes: int) -> MPI.Win:
        """Allocate a window at the center."""
        size = nbytes if self.comm.rank == 0 else 0
        self.wins.append(MPI.Win.Allocate(size, 1, MPI.INFO_NULL, self.comm))  # type: ignore[arg-type]
        return self.wins[-1]

    def timed(self, count: int) -> list[float]:
        """Seconds of each of `count` exchanges."""
        times = []
        for _ in range(count):
            start = MPI.Wtime()
            self.exchange()
            times.append(MPI.Wtime() - start)
        return times


class TwoSided(Floor):
    """Recv, add, Send: one message each way, whatever the length."""

    def exchanges(self, count: int) -> list[float]:
        """A center that blocks in Recv."""
        comm, x = self.comm, self.x
        if comm.rank:
            return self.timed(count)
        c, status = full_like(x, 0), MPI.Status()
        for _ in range(count * (comm.size - 1)):
            comm.Recv(x, MPI.ANY_SOURCE, 1, status)
            np.add(c, x, out=c)
            comm.Send(c, status.source, 2)
        return []

    def exchange(self) -> None:
        """Send, Recv."""
        self.comm.Send(self.x, 0, 1)
        self.comm.Recv(self.out, 0, 2)


class Mailbox(Floor):
    """Lock Put Unlock, flag, add at the center, flag, Lock Get Unlock."""

    def __init__(self, comm: MPI.Comm, x: Array) -> None:
        super().__init__(comm, x)
        workers = comm.size - 1
        self.center, self.slots = self.window(x.nbytes), self.window(workers * x.nbytes)
        self.control = self.window(16 * workers)  # posted, served
        self.flag, self.seen = np.zeros(1, np.int64), np.empty(1, np.int64)
        if comm.rank == 0:
            np.asarray(self.center.tomemory())[:] = 0
            np.asarray(self.control.tomemory())[:] = 0
        comm.Barrier()

    def exchanges(self, count: int) -> list[float]:
        """A center that polls the flags and adds."""
        comm, x = self.comm, self.x
        if comm.rank:
            return self.timed(count)
        c = np.asarray(self.center.tomemory())[: x.nbytes].view(x.dtype)
        slots = np.asarray(self.slots.tomemory())
        flags = np.asarray(self.control.tomemory()).view(np.int64).reshape(-1, 2)
        left = count * (comm.size - 1)
        while left:
            comm.Iprobe()
            # Shared: over TCP Open MPI never grants an exclusive lock while three workers poll; a flag has one writer.
            self.control.Lock(0, MPI.LOCK_SHARED)
            waiting = np.flatnonzero(flags[:, 0] != flags[:, 1])
            self.control.Unlock(0)
            for worker in waiting:
                self.slots.Lock(0)
                self.center.Lock(0)
                c += slots[worker * x.nbytes :][: x.nbytes].view(x.dtype)
                self.center.Unlock(0)
                self.slots.Unlock(0)
                self.control.Lock(0, MPI.LOCK_SHARED)
                flags[worker, 1] = flags[worker, 0]
                self.control.Unlock(0)
                left -= 1
        return []

    def exchange(self) -> None:
        """Put, flag, wait for the flag, Get."""
        worker = self.comm.rank - 1
        self.slots.Lock(0, MPI.LOCK_SHARED)
        self.slots.Put(self.x, 0, worker * self.x.nbytes)
        self.slots.Unlock(0)
        self.flag += 1
        self.control.Lock(0, MPI.LOCK_SHARED)
        self.control.Accumulate(self.flag, 0, 16 * worker, MPI.REPLACE)
        self.control.Unlock(0)
        self.seen[0] = -1
        while self.seen[0] != self.flag[0]:
            self.control.Lock(0, MPI.LOCK_SHARED)
            self.control.Fetch_and_op(self.flag, self.seen, 0, 16 * worker + 8, MPI.NO_OP)
            self.control.Unlock(0)
        self.center.Lock(0, MPI.LOCK_SHARED)
        self.center.Get(self.out, 0, 0)
        self.center.Unlock(0)


class ShortMailbox(Floor):
    """One message each way: Put of delta and number, add at the center, Get of c and number; locked throughout.

    The number is the last word of its record, and a floor takes it for granted that it arrives last. MPI does not
    promise that; a transport must not rely on it, and pays for a flag. Polls yield the core: with more busy processes
    than cores the floor would be slower than what it bounds.
    """

    def __init__(self, comm: MPI.Comm, x: Array) -> None:
        super().__init__(comm, x)
        self.stride = -(-x.nbytes // 8) * 8 + 8
        self.posted, self.served = (self.window((comm.size - 1) * self.stride) for _ in range(2))
        self.sent, self.seen = (np.zeros(self.stride, np.uint8) for _ in range(2))
        self.count, self.last = self.sent[-8:].view(np.int64), self.seen[-8:].view(np.int64)
        if comm.rank == 0:
            for win in self.wins:
                np.asarray(win.tomemory())[:] = 0
        comm.Barrier()
        for win in self.wins:  # MPICH's Lock waits for the target to enter MPI
            win.Lock_all()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            for win in self.wins:
                win.Unlock_all()
        super().__exit__(kind, error, tb)

    def exchanges(self, count: int) -> list[float]:
        """A center that polls the numbers and adds."""
        comm, x = self.comm, self.x
        if comm.rank:
            return self.timed(count)
        c = full_like(x, 0)
        posted, served = (np.asarray(win.tomemory()).reshape(-1, self.stride) for win in self.wins)
        (posted_numbers,), (served_numbers,) = (records[:, -8:].view(np.int64).T for records in (posted, served))
        left = count * (comm.size - 1)
        while left:
            comm.Iprobe()
            self.posted.Sync()
            waiting = np.flatnonzero(posted_numbers != served_numbers)
            for worker in waiting:
                c += posted[worker, : x.nbytes].view(x.dtype)
                served[worker, : x.nbytes].view(x.dtype)[:] = c
                served_numbers[worker] = posted_numbers[worker]
            self.served.Sync()
            left -= waiting.size
            if not waiting.size:
                os.sched_yield()
        return []

    def exchange(self) -> None:
        """Put, Get until the number comes back."""
        at = (self.comm.rank - 1) * self.stride
        self.sent[: self.x.nbytes].view(self.x.dtype)[:] = self.x
        self.count += 1
        self.posted.Put(self.sent, 0, at)
        self.posted.Flush(0)
        while True:
            self.served.Get(self.seen, 0, at)
            self.served.Flush(0)
            if self.last[0] == self.count[0]:
                break
            os.sched_yield()
        self.out[:] = self.seen[: self.x.nbytes].view(self.x.dtype)


class Sums(Floor):
    """Lock Accumulate Get Unlock."""

    def __init__(self, comm: MPI.Comm, x: Array) -> None:
        super().__init__(comm, x)
        self.center = self.window(x.nbytes)
        if comm.rank == 0:
            np.asarray(self.center.tomemory())[:] = 0
        comm.Barrier()

    def exchanges(self, count: int) -> list[float]:
        """A center that waits in MPI."""
        times = self.timed(count) if self.comm.rank else []
        wait_until(self.comm.Ibarrier().Test)
        return times

    def exchange(self) -> None:
        """Accumulate, flush, Get."""
        self.center.Lock(0, MPI.LOCK_SHARED)
        self.center.Accumulate(self.x, 0, 0, MPI.SUM)
        self.center.Flush(0)
        self.center.Get(self.out, 0, 0)
        self.center.Unlock(0)


class Allreduce(Floor):
    """Allreduce, add."""

    def exchanges(self, count: int) -> list[float]:
        """Every rank takes part."""
        self.c = full_like(self.x, 0)
        return self.timed(count)

    def exchange(self) -> None:
        """Allreduce, add the mean."""
        self.comm.Allreduce(self.x, self.out)
        self.out *= 1 / self.comm.size
        self.c += self.out


# By `Transport.floor`: of a vector that travels with its header, and of a longer one.
_FLOORS: dict[str, tuple[type[Floor], type[Floor]]] = {
    "two-sided": (TwoSided, TwoSided),
    "mailbox": (ShortMailbox, Mailbox),
    "sum": (Sums, Sums),
    "allreduce": (Allreduce, Allreduce),
}


def make_floor(name: str, comm: MPI.Comm, x: Array) -> Floor:
    """The floor of that name for vectors like x (n,); collective."""
    short, long = _FLOORS[name]
    return (short if x.nbytes <= INLINE else long)(comm, x)
