"""What a p2p center knows of each worker, and how it hears of them."""

from collections import OrderedDict, deque
from enum import Enum, auto
from typing import NamedTuple

from mpi4py import MPI

from ..core.messages import COMMIT_BYTES, Commit
from .buffers import Buffer
from .chunks import Stream

HEADER, DELTA, REPLY, CENTER_VARIABLE = range(1, 5)  # tags, on a communicator of our own


def gone(error: MPI.Exception) -> bool:
    """Whether `error` tells of a dead peer (ULFM)."""
    found: int = error.Get_error_class()
    names = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
    return found in [getattr(MPI, name) for name in names if hasattr(MPI, name)]


class State(Enum):
    """Where a worker's message is; one at a time, what comes behind it waits in `Peer.inbox`."""

    LISTENING = auto()  # nothing has come
    QUEUED = auto()  # the header is here, the delta waits for a buffer
    RECEIVING = auto()  # the delta is coming
    READY = auto()  # it is whole
    PARKED = auto()  # it asks for work, and is answered when there is some
    ANSWERING = auto()  # it is being applied, or its reply is on its way
    LEFT = auto()  # it was a farewell, which is answered when all have left
    LOST = auto()  # its worker is dead


class Answer(NamedTuple):
    """A reply under way; `stream`: c, read from `buffer`."""

    header: bytes
    request: MPI.Request
    stream: Stream | None
    buffer: Buffer

    def test(self) -> bool:
        """Make progress; whether it is out."""
        return self.request.Test() and (self.stream is None or self.stream.test())


class Peer:
    """A worker at the center: its rank in a communicator, and what is under way with it.

    A lost one keeps its vectors and requests for good: MPI may still write there.
    """

    def __init__(self, index: int, comm: MPI.Comm, rank: int) -> None:
        self.index, self.comm, self.rank = index, comm, rank
        self.state = State.LISTENING
        self.inbox: deque[Commit] = deque()  # headers behind the message of now
        self.commit = Commit(index)  # the message of now
        self.buffer: Buffer | None = None  # its delta, until it is applied
        self.delta: Stream | None = None
        self.out: Stream | None = None  # c on its way, block by block, while the delta is applied
        self.answer: Answer | None = None

    @property
    def held(self) -> set[Buffer]:
        """The vectors that wait for this worker."""
        held = {self.buffer} if self.buffer else set()
        return held | {self.answer.buffer} if self.answer and self.answer.stream else held


class Peers:
    """The workers of a center by state, in each state in the order in which they came to it."""

    def __init__(self, peers: list[Peer]) -> None:
        self.all = peers
        self._by_state: dict[State, OrderedDict[Peer, None]] = {state: OrderedDict() for state in State}
        for peer in peers:
            self._by_state[peer.state][peer] = None

    def move(self, peer: Peer, state: State) -> None:
        """Bring `peer` to a state, behind those that are there."""
        del self._by_state[peer.state][peer]
        peer.state = state
        self._by_state[state][peer] = None

    def first(self, state: State) -> Peer | None:
        """The one that has been in this state for longest."""
        return next(iter(self._by_state[state]), None)

    def at(self, state: State) -> list[Peer]:
        """Those in this state; the list does not change when they do."""
        return list(self._by_state[state])


class Listener:
    """Takes headers, one after the other, from whichever worker of a communicator.

    One probe, so that hearing that nothing has come costs the same whatever the number of workers. With ULFM it fails
    once for each death, and goes on: so a worker that dies while nothing is under way with it is noticed, too.
    """

    # Other ways, as tried with Open MPI 5.0.11 and ULFM. A receive from any source that has once told of a death, and
    # completes before it is tested again, fails at each test for ever: its header is lost. Testsome on a receive for
    # each worker takes 50-80 µs for 1,000, and where it raises, hides which others are done.

    def __init__(self, comm: MPI.Comm, peers: list[Peer]) -> None:
        self._comm, self._peers = comm, {peer.rank: peer for peer in peers}
        self._header, self._status = bytearray(COMMIT_BYTES), MPI.Status()

    def hear(self) -> tuple[Peer, Commit] | None:
        """Return the next header that has come, as its worker wrote it."""
        message = self._comm.Improbe(MPI.ANY_SOURCE, HEADER, self._status)
        if message is None:
            return None
        message.Recv(self._header)  # so small that it came with its envelope
        return self._peers[self._status.Get_source()], Commit.decode(self._header)

    def dead(self) -> list[Peer]:
        """Who has died, once `hear` has failed; from now on the others are heard again (ULFM)."""
        failed, group = self._comm.Get_failed(), self._comm.Get_group()
        ranks = failed.Translate_ranks(list(range(failed.size)), group)
        self._comm.Ack_failed(failed.size)
        failed.Free()
        group.Free()
        return [self._peers[rank] for rank in ranks]
