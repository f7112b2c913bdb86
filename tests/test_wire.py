"""Which buffer MPI would see, and when the stream is synchronised: proved with a device made of paper."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from agnmpi import backend
from agnmpi.transport.wire import Direct, Staged


class Vector:
    """A device array: its memory is reached through get and set alone; what happens is written down."""

    def __init__(self, values, log):
        self.memory, self.log = np.array(values, "f4"), log
        self.size, self.dtype, self.nbytes = self.memory.size, self.memory.dtype, self.memory.nbytes

    def get(self, out, blocking):
        assert not blocking
        self.log.append("copy to host")
        out[...] = self.memory

    def set(self, values):
        self.log.append("copy to device")
        self.memory[...] = values


@pytest.fixture
def log(monkeypatch):
    log = []
    stream = SimpleNamespace(synchronize=lambda: log.append("synchronize"))
    paper = ModuleType("paper")
    paper.cuda = SimpleNamespace(
        get_current_stream=lambda: stream,
        alloc_pinned_memory=lambda nbytes: log.append(f"pin {nbytes}") or bytearray(nbytes),
    )
    paper.asnumpy = lambda x: x.memory.copy()
    monkeypatch.setitem(sys.modules, "paper", paper)
    monkeypatch.setattr(Vector, "__module__", "paper.core")
    return log


def test_direct_on_the_host_is_the_vector_itself():
    x = np.zeros(3)
    assert Direct().outgoing(x) is x
    assert Direct().incoming(x) is x


def test_direct_on_a_device_synchronises_and_sends_the_vector_itself(log):
    x = Vector([1, 2, 3], log)
    assert Direct().outgoing(x) is x
    assert log == ["synchronize"]
    assert Direct().incoming(x) is x
    assert log == ["synchronize"] * 2


def test_staged_sends_pinned_memory_after_the_copy_is_done(log):
    wire, x = Staged(), Vector([1, 2, 3], log)
    buffer = wire.outgoing(x)
    assert log == ["pin 12", "copy to host", "synchronize"]
    np.testing.assert_array_equal(buffer, [1, 2, 3])
    assert backend.on_host(buffer)
    x.memory[:] = 5
    assert wire.outgoing(x).ctypes.data == buffer.ctypes.data, "pinned once"
    np.testing.assert_array_equal(buffer, 5)


def test_staged_receives_into_pinned_memory_and_copies_before_it_returns(log):
    wire, x = Staged(), Vector([0, 0, 0], log)
    buffer = wire.incoming(x)
    buffer[...] = [7, 8, 9]
    assert (x.memory == 0).all()
    wire.arrived(x)
    assert log == ["pin 12", "copy to device", "synchronize"]
    np.testing.assert_array_equal(x.memory, [7, 8, 9])
    assert wire.outgoing(x).ctypes.data != buffer.ctypes.data, "one buffer each way"
    with pytest.raises(RuntimeError, match="incoming"):
        Staged().arrived(x)


def test_backend_asks_the_module_of_the_array(log):
    x = Vector([1, 2], log)
    assert not backend.on_host(x)
    assert backend.namespace(x).__name__ == "paper"
    assert list(backend.blocks(x)) == [slice(0, 2)]
    backend.synchronize(x)
    assert log == ["synchronize"]
    np.testing.assert_array_equal(backend.to_host(x), [1, 2])
    backend.synchronize(np.zeros(2))
    assert len(log) == 1
