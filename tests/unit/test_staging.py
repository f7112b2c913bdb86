"""Which buffer MPI would see, and when the stream is synchronised: proved with a fake device."""

import fake_device
import numpy as np
import pytest
from fake_device import Vector

from agnmpi.arrays import backend
from agnmpi.transport.peers import Buffer, Buffers
from agnmpi.transport.staging import Direct, Staged, cut, make_wire


@pytest.fixture
def log():
    fake_device.log.clear()
    return fake_device.log


def test_direct_on_the_host_is_the_vector_itself():
    x = np.zeros(3)
    assert next(iter(Direct().outgoing(x))) is x
    assert Direct().incoming(x) is x
    assert make_wire(x, "staged").name == "direct"


def test_direct_on_a_device_synchronises_and_sends_the_vector_itself(log):
    x = Vector([1, 2, 3])
    assert next(Direct().outgoing(x)) is x
    assert log == ["synchronize"]
    assert Direct().incoming(x) is x
    assert log == ["synchronize"] * 2
    assert make_wire(x, "direct").name == "direct"
    assert make_wire(x, "staged").name == "staged"


def test_staged_sends_pinned_memory_after_the_copy_is_done(log):
    staged, x = Staged(), Vector([1, 2, 3])
    (buffer,) = staged.outgoing(x)
    assert log == ["pin 16", "make an event", "copy 3 to host", "record", "wait for the copy"]
    np.testing.assert_array_equal(buffer, [1, 2, 3])
    assert backend.on_host(buffer)
    x.memory[:] = 5
    (again,) = staged.outgoing(x)
    assert again.ctypes.data == buffer.ctypes.data, "pinned once"
    np.testing.assert_array_equal(buffer, 5)


def test_staged_copies_the_next_chunks_while_one_is_on_the_wire(log):
    x = Vector([1, 2, 3, 4, 5])
    for sent, chunk in enumerate(Staged(chunk=8).outgoing(x)):
        assert log.count("wait for the copy") == sent + 1, "each chunk is waited for alone"
        assert [line for line in log if line.startswith("copy")] == ["copy 2 to host"] * 2 + ["copy 1 to host"]
        np.testing.assert_array_equal(chunk, x.memory[2 * sent : 2 * sent + 2])


def test_staged_queues_the_copies_at_once_and_waits_for_none_of_them(log):
    """Who asks for the chunks later finds the vector as it was: what is queued behind the copies may change it."""
    x = Vector([1, 2, 3, 4, 5])
    chunks = Staged(chunk=8).outgoing(x)
    assert log.count("record") == 3
    assert "wait for the copy" not in log
    x.memory[:] = 0
    assert np.concatenate(list(chunks)).tolist() == [1, 2, 3, 4, 5]


def test_staged_carries_vectors_of_several_dtypes_as_a_wire_does_with_encodings(log):
    staged = Staged(chunk=8)
    for values in (np.arange(20, dtype="u1"), np.arange(10, dtype="f4"), np.arange(7, dtype="u1")):
        x, there = Vector(values.copy()), Vector(np.zeros_like(values))
        chunks = np.concatenate(list(staged.outgoing(x)))
        np.testing.assert_array_equal(chunks, values, strict=True)
        arriving = staged.incoming(there)
        assert (arriving.dtype, arriving.size) == (values.dtype, values.size)
        arriving[...] = values
        for part in staged.cuts(there):
            staged.arrived(there, part)
        np.testing.assert_array_equal(there.memory, values)
    assert [line for line in log if line.startswith("pin")] == ["pin 24", "pin 24", "pin 40", "pin 40"]


def test_staged_makes_its_events_once(log):
    staged = Staged(chunk=8)
    for size, events in ((5, 3), (5, 3), (2, 3), (8, 4)):
        x = Vector(range(size))
        assert np.concatenate(list(staged.outgoing(x))).tolist() == list(range(size))
        assert log.count("make an event") == events


def test_a_buffer_that_several_read_is_copied_once_and_waited_for_chunk_by_chunk(log):
    x = Vector(range(5))
    buffer = Buffer(x, Staged(chunk=8), Buffers(x, 1, "staged"))
    first = buffer.outgoing()
    assert log.count("record") == 3
    assert "wait for the copy" not in log, "c may be sent while later chunks are still copied"
    buffer.readers = 1
    assert next(first).tolist() == [0, 1]
    assert log.count("wait for the copy") == 1
    assert np.concatenate(list(buffer.outgoing())).tolist() == [0, 1, 2, 3, 4]
    assert np.concatenate(list(first)).tolist() == [2, 3, 4]
    assert log.count("wait for the copy") == 3, "each is waited for once"
    assert log.count("record") == 3, "the second reader reads the same copies"


def test_staged_receives_into_pinned_memory_and_copies_before_it_returns(log):
    staged, x = Staged(), Vector([0, 0, 0])
    buffer = staged.incoming(x)
    buffer[...] = [7, 8, 9]
    assert (x.memory == 0).all()
    staged.arrived(x, slice(0, 2))
    staged.arrived(x, slice(2, 3))
    staged.settle(x)
    assert log == ["pin 16", "copy 2 to device", "copy 1 to device", "synchronize"]
    np.testing.assert_array_equal(x.memory, [7, 8, 9])
    assert next(staged.outgoing(x)).ctypes.data != buffer.ctypes.data, "one buffer each way"


def test_cut():
    assert [piece.size for piece in cut(np.zeros(10), 32)] == [4, 4, 2]
    assert list(cut(np.zeros(0), 32)) == []


def test_backend_asks_the_module_of_the_array(log):
    x = Vector([1, 2])
    assert not backend.on_host(x)
    assert backend.namespace(x).__name__ == "fake_device"
    assert list(backend.blocks(x)) == [slice(0, 2)]
    backend.synchronize(x)
    assert log == ["synchronize"]
    np.testing.assert_array_equal(backend.to_host(x), [1, 2])
    backend.synchronize(np.zeros(2))
    assert len(log) == 1
