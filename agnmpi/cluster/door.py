"""The door of a running job: ranks of another mpiexec come in by it, as workers of the center.

A rank knocks at a TCP port that the run's directory names, and both meet in MPI_Comm_accept and MPI_Comm_connect. The
TCP connection stays as long as both do: its end says that the other side has died. MPICH 5.0 does not say so of a
process that is connected: requests to it stay pending.
"""

import hashlib
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mpi4py import MPI

from ..core.backoff import Every
from ..core.params import Layout
from ..version import mpi_library
from .placement import leave_without_finalize

Facts = Mapping[str, Any]  # what can be written as JSON
_FILE = "door.json"
_MEETING = 5  # seconds in MPI_Comm_accept, for which the center serves nobody; it takes 10 to 60 ms
_ANSWER = 60.0  # seconds until the center answers at most: it may be in a long call of the user's
_LONGEST = 1 << 20  # bytes of a line
_LAST = 10.0  # seconds for a worker to end by itself once the center has closed the door


def described(layout: Layout, data: Mapping[str, int]) -> Facts:
    """What a worker and the run must have in common: the parameters, and what determines the samples of each step."""
    return {"model": hashlib.sha256(json.dumps(layout._asdict(), default=str).encode()).hexdigest(), **data}


class _Guest:
    """A rank that has knocked; `number`: of its worker, once it is one."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        _keep_alive(connection)
        self.connection, self.received = connection, b""
        self.number: int | None = None

    def is_here(self) -> bool:
        """Receive what has arrived; False at the end of the connection."""
        try:
            received = self.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.received += received
        return bool(received) and len(self.received) < _LONGEST

    def say(self, facts: Facts) -> None:
        """Send a line; it is short, and the connection is new: it does not block."""
        with suppress(OSError):  # `is_here` sees it
            self.connection.sendall(json.dumps(facts).encode() + b"\n")


class Door:
    """At the center: lets ranks of another mpiexec in, while it is open.

    Args:
        directory: of the run, which both see.
        model: what a worker's must equal.
        facts: that a worker needs, beside its number.
        admit: called with the communicator of a rank that has come in, and its host; returns its number.
        lose: called with the number of one that has died, or has gone.

    Raises:
        ValueError: the MPI cannot connect two jobs.
        OSError: the file that names the port cannot be written.
    """

    def __init__(
        self, directory: Path, model: Facts, facts: Facts,
        admit: Callable[[MPI.Comm, str], int], lose: Callable[[int], None],
    ) -> None:  # fmt: skip
        if mpi_library().startswith("Open MPI"):
            raise ValueError(
                "joinable: with Open MPI 5.0 MPI_Comm_connect between two mpiexec waits for ever; leave it out, and "
                "use --spares with --with-ft ulfm, or MPICH"
            )
        self._model, self._facts, self._admit, self._lose = model, facts, admit, lose
        self._socket, self._token = socket.create_server(("", 0)), secrets.token_hex(16)
        self._socket.setblocking(False)
        self._guests: list[_Guest] = []
        self._look_is_due = Every(seconds=0.1)
        self._path = directory / _FILE
        where = {"host": socket.gethostname(), "port": self._socket.getsockname()[1], "token": self._token}
        self._path.unlink(missing_ok=True)
        self._path.touch(mode=0o600)  # who can read it can come in
        self._path.write_text(json.dumps(where))

    def look(self) -> None:
        """Let in who has knocked, and notice who has gone; call it again and again."""
        if not self._look_is_due():
            return
        with suppress(BlockingIOError):
            self._guests.append(_Guest(self._socket.accept()[0]))
        self.notice()
        for guest in list(self._guests):
            if guest.number is None and b"\n" in guest.received:
                self._answer(guest)

    def notice(self) -> None:
        """Notice who has gone."""
        for guest in list(self._guests):
            if not guest.is_here():
                self._dismiss(guest)

    def close(self) -> None:
        """Let nobody in any more; workers have left."""
        self._path.unlink(missing_ok=True)
        for connection in [self._socket, *(guest.connection for guest in self._guests)]:
            connection.close()
        self._guests.clear()

    def _dismiss(self, guest: _Guest) -> None:
        self._guests.remove(guest)
        guest.connection.close()
        if guest.number is not None:
            self._lose(guest.number)

    def _answer(self, guest: _Guest) -> None:
        try:
            request = json.loads(guest.received.partition(b"\n")[0])
            host, token, model = request["host"], request["token"], dict(request["model"])
            known = hmac.compare_digest(str(token), self._token)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known or model != self._model:
            differ = [name for name in self._model if model.get(name) != self._model[name]] if known else []
            guest.say({"refused": f"its {', its '.join(differ)} is not the run's" if known else "unknown token"})
            self._dismiss(guest)
            return
        port = MPI.Open_port()  # one of its own: a rank that comes too late meets nobody else
        guest.say({"port": port})
        try:
            comm = MPI.COMM_SELF.Accept(port, _within(_MEETING))
        except MPI.Exception:  # it has died
            self._dismiss(guest)
            return
        finally:
            MPI.Close_port(port)
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        guest.number = self._admit(comm, str(host))
        guest.say({**self._facts, "number": guest.number})


def knock(directory: Path, model: Facts) -> tuple[MPI.Comm, Facts, socket.socket]:
    """Come in to the job that runs in `directory`: the communicator with its center, its facts, and the connection.

    Raises:
        ValueError: nobody is let in there, or not this rank.
    """
    try:
        door = json.loads((directory / _FILE).read_text())
    except FileNotFoundError:
        raise ValueError(f"{directory} lets nobody in: no job runs there that was started with --joinable") from None
    try:
        connection = socket.create_connection((door["host"], door["port"]), timeout=_ANSWER)
        request = {"host": MPI.Get_processor_name(), "token": door["token"], "model": model}
        connection.sendall(json.dumps(request).encode() + b"\n")
        lines = connection.makefile()
        answer = _read(lines.readline())
        if "refused" in answer:
            raise ValueError(f"{directory}: this rank is refused: {answer['refused']}")
        leave_without_finalize()
        comm = MPI.COMM_SELF.Connect(answer["port"], _within(2 * _MEETING))
        facts = _read(lines.readline())
    except (OSError, MPI.Exception) as error:
        raise ValueError(f"the job in {directory} has ended, or is out of reach ({error})") from None
    connection.settimeout(None)
    _keep_alive(connection)
    return comm, facts, connection


def watch_center(connection: socket.socket, over: threading.Event, end: Callable[[str], NoReturn]) -> None:
    """End this rank if the center ends before `over` is set, soon after at the latest; from a thread."""

    def look() -> None:
        with suppress(OSError):
            connection.recv(1)
        if not over.wait(_LAST):
            end("has lost the job that it had joined")

    threading.Thread(target=look, name="watch the center", daemon=True).start()


def _read(line: str) -> dict[str, Any]:
    if not line:
        raise OSError("it has closed the connection")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _within(seconds: int) -> MPI.Info:
    info = MPI.Info.Create()
    info.Set("timeout", str(seconds))  # MPICH's
    return info


def _keep_alive(connection: socket.socket) -> None:
    """Let a host that vanishes be noticed within a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
