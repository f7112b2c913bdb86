"""A fake device: arrays whose memory is reached by get and set alone, as a GPU's is; MPI cannot read them.

This module is the array module of its vectors, as cupy is of its own. What happens is written down in `log`.
"""

from types import SimpleNamespace

import numpy as np

from agnmpi.transport.staging import Staged

log = []


class Vector:
    def __init__(self, values):
        self.memory = values if isinstance(values, np.ndarray) else np.array(values, "f4")
        self.size, self.dtype, self.nbytes = self.memory.size, self.memory.dtype, self.memory.nbytes

    def __getitem__(self, part):
        return Vector(self.memory[part])

    def __setitem__(self, part, values):
        self.memory[part] = values.memory

    def get(self, out, blocking):
        assert not blocking
        log.append(f"copy {self.size} to host")
        out[...] = self.memory

    def set(self, values, stream):
        assert stream is not None, "without a stream CuPy's set blocks"
        log.append(f"copy {self.size} to device")
        self.memory[...] = values


class _Event:
    def __init__(self, disable_timing):
        assert disable_timing, "events that take times are slower"
        log.append("make an event")

    def record(self):
        log.append("record")

    def synchronize(self):
        log.append("wait for the copy")


_stream = SimpleNamespace(synchronize=lambda: log.append("synchronize"))
cuda = SimpleNamespace(
    get_current_stream=lambda: _stream,
    Event=_Event,
    PinnedMemory=lambda nbytes: log.append(f"pin {nbytes}") or bytearray(nbytes),  # CuPy's pool would round up
    PinnedMemoryPointer=lambda memory, offset: memoryview(memory)[offset:],
)


def asnumpy(x):
    return x.memory.copy()


def asarray(x):
    return Vector(x.copy())


class OnFakeDevice:
    """A worker's end whose vectors lie on the fake device, staged; the caller's own stay on the host."""

    def __init__(self, end):
        self.end = end
        for inner in getattr(end, "ends", [end]):
            inner.wire = Staged()

    def exchange(self, commit, out):
        return _Landing(lambda there: self.end.exchange(_there(commit), there), out)

    def pull(self, out):
        return _Landing(self.end.pull, out)

    def leave(self, commit, out):
        return _Landing(lambda there: self.end.leave(commit and _there(commit), there), out)


def _there(commit):
    """`commit` with its payload on the device."""
    return commit if commit.payload is None else commit._replace(payload=Vector(np.array(commit.payload)))


class _Landing:
    def __init__(self, start, out):
        self.out, self.there = out, None if out is None else Vector(np.full_like(out, np.nan))
        self.handle = start(self.there)

    def test(self):
        return self.handle.test()

    def wait(self):
        reply = self.handle.wait()
        if self.out is not None:
            self.out[...] = self.there.memory
        return reply
