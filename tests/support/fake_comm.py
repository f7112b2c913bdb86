"""Ranks as threads of this process, with the collective calls that agreeing uses; each counts what it sends and holds.

MPI itself is not used, so there may be a thousand of them.
"""

import threading

import numpy as np


class _Done:
    def Test(self):
        return True


class FakeComm:
    """A rank's communicator. `nbytes`: of all buffers that it has given to a call."""

    def __init__(self, world, rank):
        self._world, self.rank, self.size, self.nbytes = world, rank, world.size, 0

    def Iallreduce(self, _in_place, numbers, _max):
        """The greatest of each number, in place."""
        self.nbytes += numbers.nbytes
        numbers[...] = self._world.meet(self.rank, numbers.copy(), lambda all_of: np.max(all_of, axis=0))
        return _Done()

    def Iallgather(self, mine, everything):
        """What each rank gives, by rank."""
        self.nbytes += mine.nbytes + everything.nbytes
        gathered = self._world.meet(self.rank, mine.copy(), np.stack)
        everything[...] = gathered.reshape(everything.shape)
        return _Done()

    def Ibcast(self, words, root):
        """What `root` gives."""
        self.nbytes += words.nbytes
        words[...] = self._world.meet(self.rank, words.copy(), lambda all_of: all_of[root])
        return _Done()


class FakeWorld:
    """`size` ranks."""

    def __init__(self, size):
        self.size = size
        self._given = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def meet(self, rank, value, combine):
        """Wait for the values of all; one rank combines them for all."""
        self._given[rank] = value
        if self._barrier.wait() == 0:
            self._made = combine(self._given)
        self._barrier.wait()
        return self._made

    def run(self, call):
        """Call `call(comm)` on all ranks; returns (what each returned or raised, the bytes that each has used)."""
        comms, results = [FakeComm(self, rank) for rank in range(self.size)], [None] * self.size

        def act(comm):
            try:
                results[comm.rank] = call(comm)
            except Exception as error:
                results[comm.rank] = error

        threads = [threading.Thread(target=act, args=(comm,)) for comm in comms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results, [comm.nbytes for comm in comms]
