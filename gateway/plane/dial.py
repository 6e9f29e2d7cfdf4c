"""Connects a client to a backend: a non-blocking connect with a deadline, and retries where the kernel wakes nobody.

Counterpart: `gateway.plane.worker` asks for it and gets the connected socket or the reason why not. What the client has said
so far stays with it, so one whose dial failed can be parked again as if nothing had been.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import select
import socket
from collections.abc import Callable
from socket import SocketType as Socket
from typing import Any, NamedTuple

from backends.endpoint import Endpoint, Inet, Inherited, Tcp, VsockMux
from gateway.plane.gate import Client
from gateway.plane.loop import Loop, Timer
from gateway.plane.relay import RESET

TRIES = 3
"""How often a client is dialled in before it is closed. Each time its backend had answered a probe a moment ago."""

CAPACITY_ERRORS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC, errno.EADDRNOTAVAIL}
)
"""This machine has no descriptor, memory or port left; that passes, and says nothing of the backend."""

GONE = frozenset({errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET})
"""Nobody listens there. All else may be a backend that is alive, but slow or far."""

FIRST_RETRY = 0.002  # seconds
LONGEST_RETRY = 0.05
ESTABLISHED = (1, 8)  # TCP_ESTABLISHED and TCP_CLOSE_WAIT of <linux/tcp.h>; 8: the backend has closed already
EINPROGRESS = errno.EINPROGRESS
TCP, NODELAY, QUICKACK = socket.IPPROTO_TCP, socket.TCP_NODELAY, socket.TCP_QUICKACK
STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class Failure(NamedTuple):
    why: str
    gone: bool
    """nobody listens there"""


TOO_SLOW = Failure("limits.connect_timeout", False)

Outcome = Callable[[Client, "Socket | None", "Failure | None"], None]
"""Gets the client and the connected socket, or why there is none."""


class Target(NamedTuple):
    """What is needed to dial an endpoint, worked out once, when the gate opens."""

    family: int
    address: Any
    stream: bool
    """else datagrams go there (`gateway.plane.datagram`)"""
    tcp: bool
    near: bool
    """on this machine"""
    mux_port: int | None
    """the guest's port to ask for, vsock-mux"""
    may_meet_itself: bool
    """when nobody listens, the kernel may take this very port as our own and connect us to ourselves, tcp(7)"""


def target(endpoint: Endpoint) -> Target:
    """Raises ValueError or OSError for an endpoint that cannot be dialled."""
    if isinstance(endpoint, Inherited):
        raise ValueError(f"{endpoint} cannot be dialled")
    near = isinstance(endpoint, Inet) and (endpoint.host.startswith("127.") or endpoint.host == "::1")
    mux_port = endpoint.port if isinstance(endpoint, VsockMux) else None
    may_meet_itself = near and isinstance(endpoint, Inet) and endpoint.port in own_ports()
    stream = endpoint.type == socket.SOCK_STREAM
    return Target(
        endpoint.family, endpoint.sockaddr, stream, isinstance(endpoint, Tcp), near, mux_port, may_meet_itself
    )


@functools.cache
def own_ports() -> range:
    """The ports that the kernel gives to sockets that connect, ip(7). Read once: later there may be no descriptor for it."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first, last = map(int, file.read().split())
    return range(first, last + 1)


def dial(loop: Loop, client: Client, where: Target, outcome: Outcome) -> None:
    """Connect; on the same machine the outcome usually comes before this returns."""
    sock, code, client.taken = attempt(where, client.said)
    if code == 0 and where.mux_port is None:
        outcome(client, sock, None)
    else:
        Dial(loop, client, where, outcome).attempted(sock, code)


def attempt(where: Target, said: bytes) -> tuple[Socket | None, int, int]:
    """One connect(2): a socket and 0 (it stands) or EINPROGRESS, or no socket and the errno; and how much of what the client
    `said` is sent already.

    The last packet of the handshake waits for what was said, and the backend is woken once, by a client and its request. If
    nothing was, the kernel would hold that packet back for 40 ms, and a backend that speaks first would see its client late.
    """
    try:
        sock = Socket(where.family, STREAM)
    except OSError as error:
        return None, error.errno or errno.ENOBUFS, 0
    if where.tcp:
        sock.setsockopt(TCP, NODELAY, 1)
        if said:
            sock.setsockopt(TCP, QUICKACK, 0)
    code, sent = sock.connect_ex(where.address), 0
    if said and where.mux_port is None and (code == 0 or (code == EINPROGRESS and where.tcp)):
        code, sent = send(sock, said, code)
    elif code == EINPROGRESS and (established(sock) if where.tcp else connected(sock)):
        code = 0
    if code == 0 and where.may_meet_itself and sock.getsockname() == sock.getpeername():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)  # TIME_WAIT would keep the backend off its port
        code = errno.ECONNREFUSED
    if code and code != EINPROGRESS:
        sock.close()
        return None, code, 0
    return sock, code, sent


def send(sock: Socket, said: bytes, code: int) -> tuple[int, int]:
    """Send the first bytes: 0 and how many went, if the connection stands; else what connect(2) said, or what is wrong."""
    try:
        return 0, sock.send(said)
    except (BlockingIOError, BrokenPipeError):  # the latter: it has had its last word already, which the relay hears
        return code, 0
    except OSError as error:
        return error.errno or errno.ENOTCONN, 0


def established(sock: Socket) -> bool:
    """On loopback the handshake is over when connect(2) says EINPROGRESS: a look saves a turn of the loop.

    The first byte of TCP_INFO is the state. `connected` would tell as well, but writes out an address that nobody reads.
    """
    return sock.getsockopt(TCP, socket.TCP_INFO, 1)[0] in ESTABLISHED


def connected(sock: Socket) -> bool:
    """The same, of any family."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


class Dial:
    """A connect that did not succeed at once. Ends in exactly one outcome."""

    __slots__ = ("asked", "client", "deadline", "gap", "loop", "outcome", "sock", "timer", "where")

    def __init__(self, loop: Loop, client: Client, where: Target, outcome: Outcome) -> None:
        self.loop = loop
        self.client = client
        self.where = where
        self.outcome: Outcome | None = outcome
        self.sock: Socket | None = None
        self.asked = False
        self.deadline = loop.now() + client.gate.limits.connect_timeout
        self.gap = FIRST_RETRY
        self.timer: Timer | None = None
        client.gate.dials.add(self)

    def attempted(self, sock: Socket | None, code: int) -> None:
        if sock is None:
            self._failed(code)
        elif code == 0:
            self._stands(sock)
        else:
            # On this machine only a full backlog makes the handshake wait, and the kernel would try again after a whole
            # second: so dial anew after a moment.
            self._watch(sock, select.EPOLLOUT, self._next_gap() if self.where.near else self._left())

    def event(self, mask: int) -> None:
        assert self.sock is not None
        if self.asked:
            self._read_answer(self.sock)
            return
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        sock = self._release()
        if code == 0 and connected(sock):
            self._stands(sock)
        else:
            self.loop.discard(sock)
            self._failed(code or errno.ENOTCONN)

    def cancel(self) -> Client:
        """There will be no outcome: the client is the caller's again."""
        self._give_up()
        self.outcome = None
        self.client.gate.dials.discard(self)
        return self.client

    def abort(self) -> None:
        self._give_up()
        self._finish(None, Failure("internal error", False))

    def _stands(self, sock: Socket) -> None:
        if self.where.mux_port is None:
            self._finish(sock, None)
            return
        # vsock-mux: ask for the port, and wait for the line that says OK. The request fits any socket buffer.
        self.asked = True
        try:
            sock.send(b"CONNECT %d\n" % self.where.mux_port)
        except OSError as error:
            sock.close()
            self._failed(error.errno or 0)
            return
        # Edge-triggered: half an answer stays in the socket and would be reported again and again.
        self._watch(sock, select.EPOLLIN | select.EPOLLET, self._left())

    def _read_answer(self, sock: Socket) -> None:
        """Take the line `OK <number>` and not a byte more: what follows belongs to the client."""
        try:
            seen = sock.recv(64, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        line, newline, _ = seen.partition(b"\n")
        if newline and re.fullmatch(rb"OK \d+", line):
            sock.recv(len(line) + 1)
            self._finish(self._release(), None)
        elif newline or not seen or not b"OK ".startswith(seen[:3]) or len(seen) == 64:
            self.loop.discard(self._release())
            self._finish(None, Failure("the vsock multiplexer did not answer OK", True))

    def _failed(self, code: int) -> None:
        """Full backlogs and a lack of descriptors pass; nobody wakes us then, so a timer does."""
        if code in CAPACITY_ERRORS or (code == errno.EAGAIN and self.where.family == socket.AF_UNIX):
            self.timer = self.loop.later(min(self._next_gap(), self._left()), self._retry)
        else:
            self._finish(None, Failure(os.strerror(code), code in GONE))

    def _give_up(self) -> None:
        if self.sock is not None:
            self.loop.discard(self._release())
        elif self.timer is not None:
            self.timer.cancel()

    def _retry(self) -> None:
        self._give_up()
        if self._left() <= 0:
            self._finish(None, TOO_SLOW)
        else:
            self.asked = False
            sock, code, self.client.taken = attempt(self.where, self.client.said)
            self.attempted(sock, code)

    def _finish(self, sock: Socket | None, failure: Failure | None) -> None:
        outcome, self.outcome = self.outcome, None
        if outcome is not None:  # `abort` may come after it
            self.client.gate.dials.discard(self)
            outcome(self.client, sock, failure)

    def _watch(self, sock: Socket, mask: int, patience: float) -> None:
        try:
            self.loop.add(sock.fileno(), self, mask)
        except OSError as error:
            sock.close()
            self._failed(error.errno or errno.ENOMEM)
            return
        self.sock = sock
        self.timer = self.loop.later(patience, self._retry)

    def _release(self) -> Socket:
        sock, self.sock = self.sock, None
        assert sock is not None
        if self.timer is not None:
            self.timer.cancel()
        self.loop.remove(sock.fileno())
        return sock

    def _next_gap(self) -> float:
        gap, self.gap = self.gap, min(2 * self.gap, LONGEST_RETRY)
        return min(gap, self._left())

    def _left(self) -> float:
        return max(0.0, self.deadline - self.loop.now())
