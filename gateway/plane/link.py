"""The messages between the two planes, and the socket that carries them.

Both sides use this file: the control plane (`gateway.workers`) says what is served and which gates are open; a worker
(`gateway.plane.worker`) says who waits and what is in use. A datagram of the SEQPACKET socket is one msgpack array of
messages; descriptors travel beside it by SCM_RIGHTS, one for each `Listen` in it, in order. Nothing here waits: what the
socket does not take is queued, and the owner calls `flush` when it is writable.

A worker outlives its control plane. The next one connects to it (`gateway.plane.rendezvous`), hears Hello, and asks by Tell
for everything that it needs to go on. One of another VERSION understands only Hello, Retire, Held and Retired, which never
change: it takes the listening sockets and leaves the worker to finish what it has.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

VERSION = 4
"""Changes with every change of a message. A worker that speaks another version is told to retire and nothing else."""

LARGEST = 128 << 10  # bytes in a datagram; the default send buffer of Linux takes 208 KiB
MOST_MESSAGES = 1000  # in a datagram: taking them must not hold up the connections
FRAME = 5  # bytes of them around the messages
MOST_FDS = 250  # in a datagram; the kernel takes 253 (SCM_MAX_FD)


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages. Backends and listeners are numbers that the control plane gives out."""


# The control plane says:


class Serve(Message, frozen=True):
    """There is this backend; its gate is closed. For a known number: only the limits change."""

    backend: int
    name: str
    digest: str
    """what the configuration says of it, in short: another control plane can see whether it means the same"""
    connections: int
    pending: int
    connect_timeout: float
    """seconds"""
    idle_timeout: float
    """seconds; 0: never"""
    flow_timeout: float
    """seconds"""
    flow_datagrams: int
    flow_bytes: int


class Listen(Message, frozen=True):
    """Serve the socket that comes along, for this backend: accept on it, or relay its datagrams.

    Nothing happens for a number that is known.
    """

    listener: int
    backend: int
    name: str
    """the listener's own name: which of the backend's endpoints is meant"""
    address: str
    """as it is configured, for Held"""


class Unlisten(Message, frozen=True):
    """Stop accepting there. What it accepted lives on."""

    listener: int
    accept_waiting: bool
    """take the clients that are in the backlog now; not when somebody else goes on accepting there"""


class Open(Message, frozen=True):
    """The backend answers at these endpoints (listener name -> address; `""` for the others). Let clients through."""

    backend: int
    endpoints: dict[str, str]


class Close(Message, frozen=True):
    """Park new clients from now on; answer with Closed."""

    backend: int
    serial: int


class Reject(Message, frozen=True):
    """The backend could not be started: close the clients that are parked. The gate stays closed."""

    backend: int


class Move(Message, frozen=True):
    """Who waits for this backend waits for that one from now on. What is connected stays where it is."""

    backend: int
    heir: int


class Cut(Message, frozen=True):
    """Close every connection and parked client of the backend now."""

    backend: int


class Forget(Message, frozen=True):
    """The backend is no longer configured: when its last connection is gone, nothing of it is kept."""

    backend: int


class Count(Message, frozen=True):
    """Answer with Counted."""

    serial: int


class Tell(Message, frozen=True):
    """Answer with Serving for each backend, Held for each listening socket, and Told."""


class Retire(Message, frozen=True):
    """Stop accepting, end with the last connection, or after so many seconds. Never changes.

    With `sockets`: answer with Held for each listening socket, and Retired.
    """

    drain: float
    sockets: bool


class Patience(Message, frozen=True):
    """This control plane is about to be replaced: go on for at least so many seconds without one."""

    seconds: float


class Quit(Message, frozen=True):
    """End now."""


# A worker says:


class Hello(Message, frozen=True):
    """The first message on a link, alone in its datagram. Never changes."""

    version: int
    pid: int


class Wake(Message, frozen=True):
    """A client is parked at this closed gate. Said once until the gate opens or its clients are rejected."""

    backend: int
    source: str
    """who it is, for the log"""


class Busy(Message, frozen=True):
    """It has connections, after Quiet or after it was opened."""

    backend: int


class Quiet(Message, frozen=True):
    """It has had no connection since then (CLOCK_MONOTONIC, seconds)."""

    backend: int
    since: float


class Closed(Message, frozen=True):
    """The gate is closed and so many connections are left; if there are some, Busy came before."""

    serial: int
    connections: int


class Refused(Message, frozen=True):
    """Nobody answers at the endpoint of an open gate. The worker has closed the gate; the client is parked."""

    backend: int
    error: str


class Serving(Message, frozen=True):
    """What there is of a backend here, in answer to Tell; see Serve and Open. Busy and Wake follow where they apply."""

    backend: int
    name: str
    digest: str
    endpoints: dict[str, str] | None
    """None: its gate is closed"""


class Held(Message, frozen=True):
    """A listening socket, which comes along; see Listen. Never changes."""

    listener: int
    backend: int
    name: str
    address: str


class Told(Message, frozen=True):
    """The end of the answer to Tell."""

    retiring: bool


class Retired(Message, frozen=True):
    """It does not accept any more, and all its sockets have been sent. Never changes."""


class Tally(msgspec.Struct, frozen=True, array_like=True):
    """The counters of one backend in one worker."""

    backend: int
    connections: int
    parked: int
    total: int
    """connections since the worker started"""
    received: int
    """bytes from clients, of finished and live connections"""
    sent: int
    """bytes to clients"""
    refused: int
    """clients that a limit turned away"""
    dropped: int = 0
    """datagrams that were not delivered"""


class Counted(Message, frozen=True):
    """Counters of the backends that were ever used; the last message of an answer has `more` False.

    Unasked, with serial 0: the last counters of a worker that ends.
    """

    serial: int
    tallies: list[Tally]
    more: bool = False


class Limited(Message, frozen=True):
    """A limit turned clients away or cut connections. Said at most once a second for each limit of a backend."""

    backend: int
    limit: str
    """the name of the limit in the configuration"""
    count: int
    source: str
    """the last client"""


class Trouble(Message, frozen=True):
    """Something for the log that is nobody's limit: no descriptors left, an unexpected error."""

    text: str


AnyMessage = (
    Serve | Listen | Unlisten | Open | Close | Reject | Move | Cut | Forget | Count | Tell | Retire | Patience | Quit
    | Hello | Wake | Busy | Quiet | Closed | Refused | Counted | Limited | Trouble | Serving | Held | Told | Retired
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[AnyMessage])


class LinkClosed(Exception):
    """The other side is gone, or might as well be."""


class NotUnderstood(LinkClosed):
    """A datagram is no message of this version; the next one may be."""


class Link:
    """One end of the link. Owns its socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._queue: deque[tuple[bytes, list[int]]] = deque()

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether something waits for the socket to become writable."""
        return bool(self._queue)

    def send(self, *messages: Message, fds: Sequence[int] = ()) -> None:
        """Send messages in one datagram, or queue them with copies of the descriptors. Raises LinkClosed."""
        self._post(_encoder.encode(messages), fds)

    def _post(self, data: bytes, fds: Sequence[int]) -> None:
        if self._queue or not self._sent(data, fds):
            self._queue.append((data, [os.dup(fd) for fd in fds]))

    def send_all(self, messages: Iterable[Message], fds: Sequence[int] = ()) -> None:
        """Send any number of messages in as few datagrams as will do; `fds` is empty, or has one for each message.

        Raises LinkClosed.
        """
        batch: list[bytes] = []
        size = sent = 0
        for data in map(_encoder.encode, messages):
            if batch and (size + len(data) > LARGEST - FRAME or len(batch) == (MOST_FDS if fds else MOST_MESSAGES)):
                self._post(_array(batch), fds[sent : sent + len(batch)])
                sent += len(batch)
                size = 0
                batch.clear()
            batch.append(data)
            size += len(data)
        if batch:
            self._post(_array(batch), fds[sent : sent + len(batch)])

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it. Raises LinkClosed."""
        while self._queue and self._sent(*self._queue[0]):
            _close_all(self._queue.popleft()[1])

    def _sent(self, data: bytes, fds: Sequence[int]) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.socket.sendmsg([data], rights)
        except BlockingIOError:
            return False
        except OSError as error:
            raise LinkClosed(str(error)) from error
        return True

    def receive(self) -> tuple[list[Any], list[int]] | None:
        """The messages of one datagram and its descriptors, which the caller owns; None when there is none now.

        Raises LinkClosed at the end, and for a datagram that is not understood.
        """
        try:
            data, rights, flags, _ = self.socket.recvmsg(
                LARGEST, socket.CMSG_SPACE(MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # It ended without having read everything. The kernel says that once, before what it had said itself.
            return self.receive()
        except OSError as error:
            raise LinkClosed(str(error)) from error
        fds = array.array("i")
        for level, kind, body in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
        try:
            if not data:
                raise LinkClosed("end of file")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise LinkClosed("a message was cut off")
            return _decoder.decode(data), list(fds)
        except msgspec.MsgspecError as error:
            _close_all(fds)
            raise NotUnderstood(f"a message was not understood: {error}") from error
        except LinkClosed:
            _close_all(fds)
            raise

    def close(self) -> None:
        self.socket.close()
        while self._queue:
            _close_all(self._queue.popleft()[1])


def _array(encoded: Sequence[bytes]) -> bytes:
    """A msgpack array of values that are encoded already: array 32 of the msgpack specification."""
    return b"\xdd" + len(encoded).to_bytes(4, "big") + b"".join(encoded)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
