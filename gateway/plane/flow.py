"""The datagrams of one client: from it to an upstream socket of its own, and back.

Counterpart: `gateway.plane.datagram` finds the flow of each datagram, lets flows wait for their turn, and ends those that
are silent. A flow has no timer, and does not know the time.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections import deque
from socket import SocketType as Socket
from typing import TYPE_CHECKING, Any

from gateway.plane.dial import CAPACITY_ERRORS, TRIES, Target
from gateway.plane.gate import inet_name
from gateway.plane.link import Refused

if TYPE_CHECKING:
    from gateway.plane.datagram import DatagramListener

SIZE = 64 << 10
"""Bytes of the shared buffer: more than any UDP datagram. A Unix one may be larger; it is dropped."""

BATCH = 64
"""Datagrams that one socket may move before the others have their turn."""

BURST = 32
"""What was kept is delivered so much at a time (a datagram counts 1, and 1 more for each KiB), then the backend has to answer
or time to pass: nothing pushes back, and by default its socket has room for 256 small datagrams, of all workers."""

FLAGS = socket.MSG_DONTWAIT | socket.MSG_TRUNC  # TRUNC: the answer is the true size
DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
IP_PKTINFO = 8  # ip(7); Python names it from 3.12 on
MULTICAST = 0xFF  # first byte of the IPv6 addresses that nobody can answer from
LACKING = CAPACITY_ERRORS | {errno.ENOSPC}  # the latter: fs.epoll.max_user_watches
READ, WRITE = select.EPOLLIN, select.EPOLLOUT

NOTHING: deque[bytes] = deque(maxlen=0)
NOWHERE: dict[str, Any] = {}
"""The endpoints of no open gate."""

buffer = bytearray(SIZE)
view = memoryview(buffer)


class Flow:
    """One client of one listener.

    It is let in (`endpoints` are the open gate's), or it has kept datagrams and waits (for the gate, for its turn, or for
    a full socket), or it needs a look at the gate first.
    """

    __slots__ = (
        "_blocked", "_connected_to", "_connected_under", "_listener", "_new", "_tries", "active", "control", "endpoints",
        "kept", "origin", "peer", "quiet", "sock",
    )  # fmt: skip

    def __init__(self, listener: DatagramListener, origin: Any) -> None:
        self._listener = listener
        self.origin = origin
        self.peer = origin
        self.control: list[tuple[int, int, bytes]] | None = None
        if listener.wildcard:
            self.peer, local = origin
            self.control = _from_address(local)
        self.kept = NOTHING
        self.sock: Socket | None = None
        self.endpoints = NOWHERE
        """under which each datagram goes straight on"""
        self.active = True
        """there was a datagram since the last look"""
        self.quiet = 0
        """looks without news"""
        self._connected_to: Target | None = None
        self._connected_under = NOWHERE
        self._new = True  # nothing was sent by this socket under this opening
        self._blocked = False  # waits for its socket to become writable
        self._tries = 0  # in a row in which nobody was there

    @property
    def source(self) -> str:
        """Who it is, for people."""
        if self._listener.sock.family != socket.AF_UNIX:
            return inet_name(self.peer)
        if not self.peer:
            return "unnamed Unix clients"
        name = self.peer.decode(errors="replace") if isinstance(self.peer, bytes) else str(self.peer)
        return name.replace("\0", "@", 1)

    # client -> backend

    def admit(self, data: bytes) -> None:
        """A datagram of a flow that is not let in, as far as it knows."""
        gate = self._listener.gate
        if gate.endpoints is None or self.kept:
            self._keep(data)
        else:
            self._put(data)
            self.deliver()

    def not_sent(self, data: bytes, error: OSError) -> None:
        """The upstream socket did not take a datagram."""
        if isinstance(error, ConnectionRefusedError):
            self._put(data)
            self._refused(error)
        elif isinstance(error, BlockingIOError) and self._to_unix:
            # Between Unix sockets a full queue makes the sender wait; nothing is lost there that keeps to the bounds.
            self._block()
            self._keep(data)
        else:
            self._listener.gate.dropped += 1

    def deliver(self) -> int:
        """The gate is open: send the oldest that was kept. Returns what that takes of the listener's credit."""
        if not self._connect():
            return 1
        assert self.sock is not None
        data, gate = self.kept[0], self._listener.gate
        try:
            self.sock.send(data)
            self._look_for_refusal(self.sock)
        except BlockingIOError:
            self._block()
            return BURST
        except ConnectionRefusedError as error:
            self._refused(error)
            return 1
        except OSError:
            self.drop_oldest()
            return 1
        self._take_oldest()
        gate.received += len(data)
        if not self.kept:
            self._leave_queue()
            self.endpoints = gate.endpoints or NOWHERE
        return 1 + (len(data) >> 10)

    def _look_for_refusal(self, sock: Socket) -> None:
        """On this machine the answer that nobody is there has come by now; so the first datagram is not lost by that."""
        if self._new:
            self._new = False
            if self._connected_to and self._connected_to.near:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))

    def _connect(self) -> bool:
        """Have a socket to where the open gate leads; else the flow has ended or waits again."""
        listener, gate = self._listener, self._listener.gate
        assert gate.endpoints is not None
        where = gate.leads_to(listener.name)
        if self.sock is not None:
            if where == self._connected_to:
                self._trust(self.sock, gate.endpoints)
                return True
            self._disconnect()  # it has another address this time
        if where is None or where.stream:
            self._turn_away(f"endpoints: none for listener {listener.name!r}")
            return False
        if gate.connections >= gate.limits.connections:
            self._turn_away("limits.connections")
            return False
        try:
            sock = _upstream(where)
            listener.loop.add(sock.fileno(), self, READ)
        except OSError as error:
            if error.errno in LACKING:
                self._turn_away(f"no upstream socket: {error.strerror}")
            else:
                self._connected_under = gate.endpoints
                self._refused(error)
            return False
        self.sock, self._new = sock, True
        self._connected_to, self._connected_under = where, gate.endpoints
        gate.enter()
        gate.total += 1
        listener.sweep_on()
        return True

    def _trust(self, sock: Socket, endpoints: dict[str, Any]) -> None:
        """Go on with the socket of an earlier opening. A Unix one is not trusted: it may still lead to a dead backend."""
        if self._connected_under is not endpoints and not self._to_unix:
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # clears what it was told of the backend before
            self._connected_under = endpoints
            self._new = True

    def _refused(self, error: OSError) -> None:
        """Nobody is there. What was kept must not be lost by that: it waits while the control plane looks.

        A socket that was connected under an earlier opening proves nothing; the next one may.
        """
        gate = self._listener.gate
        why = os.strerror(error.errno or errno.ECONNREFUSED)
        current = self._connected_under is gate.endpoints
        self._disconnect()
        if current:
            self._tries += 1
            if self._tries >= TRIES:
                self._turn_away(why)
                return
            gate.close()
            gate.tell(Refused(gate.number, why))
        self._wait_or_end()

    def _disconnect(self) -> None:
        self.endpoints = self._connected_under = NOWHERE
        self._blocked = False
        if self.sock is not None:
            self._listener.loop.discard(self.sock)
            self.sock = None
            self._listener.gate.leave()

    @property
    def _to_unix(self) -> bool:
        return self._connected_to is not None and self._connected_to.family == socket.AF_UNIX

    def _block(self) -> None:
        """Its socket is full: go on when it is writable."""
        assert self.sock is not None
        self._blocked = True
        self.endpoints = NOWHERE
        self._leave_queue()
        self._listener.loop.modify(self.sock.fileno(), READ | WRITE)

    def _unblock(self) -> None:
        assert self.sock is not None
        self._blocked = False
        self._listener.loop.modify(self.sock.fileno(), READ)
        if self.kept:
            self._wait_or_end()
            self._listener.go_on()

    # backend -> client

    def event(self, mask: int) -> None:
        """epoll reported the upstream socket."""
        if mask & WRITE and self._blocked:
            self._unblock()
        listener, sock, peer, control = self._listener, self.sock, self.peer, self.control
        if sock is None:
            return
        answers = sent = 0
        for _ in range(BATCH):
            try:
                size = sock.recv_into(buffer, 0, FLAGS)
            except BlockingIOError:
                break
            except ConnectionRefusedError as error:
                self._refused(error)
                break
            except OSError:
                continue  # unreachable, for now
            answers += 1
            if size > SIZE or peer is None:
                listener.gate.dropped += 1
                continue
            try:
                if control is None:
                    sent += listener.sock.sendto(view[:size], socket.MSG_DONTWAIT, peer)
                else:
                    sent += listener.sock.sendmsg((view[:size],), control, socket.MSG_DONTWAIT, peer)
            except OSError:
                listener.gate.dropped += 1
        if answers:
            self.active = True
            self._tries = 0
            listener.gate.sent += sent
            if listener.waiting:
                listener.answered(answers)

    # What is kept

    def _keep(self, data: bytes) -> None:
        """Keep a datagram until it can be delivered. Without room the oldest go: its own first, then those of others."""
        gate, limits = self._listener.gate, self._listener.gate.limits
        most = limits.flow_bytes - len(data)
        fits = most >= 0
        while fits and self.kept and (len(self.kept) >= limits.flow_datagrams or gate.kept > most):
            self._take_oldest()
            gate.dropped += 1
        if fits and self._listener.make_room(most, self):
            self._put(data)
            if not self._blocked:
                self._wait_or_end()
        else:
            gate.dropped += 1
            if not self.kept:
                self._nothing_kept()

    def _put(self, data: bytes) -> None:
        if not self.kept:
            self.kept = deque()
        self.kept.append(data)
        self._listener.gate.kept += len(data)

    def _take_oldest(self) -> None:
        self._listener.gate.kept -= len(self.kept.popleft())
        if not self.kept:
            self.kept = NOTHING

    def take_kept(self) -> list[bytes]:
        """What it has kept is the caller's. A flow that has no upstream socket has ended by that."""
        kept = list(self.kept)
        while self.kept:
            self._take_oldest()
        self._nothing_kept()
        return kept

    def drop_oldest(self) -> None:
        self._take_oldest()
        self._listener.gate.dropped += 1
        if not self.kept:
            self._nothing_kept()

    def drop_kept(self) -> None:
        """The start failed. A flow that has no upstream socket has ended by that."""
        while self.kept:
            self._take_oldest()
            self._listener.gate.dropped += 1
        self._nothing_kept()

    def _nothing_kept(self) -> None:
        self._leave_queue()
        if self.sock is None:
            self.end()

    def _wait_or_end(self) -> None:
        listener, gate = self._listener, self._listener.gate
        if not self.kept:
            self.end()
        elif gate.endpoints is None and self not in listener.waiting and gate.full:
            self._turn_away("limits.pending")
        else:
            if self not in listener.waiting:
                listener.waiting[self] = None
                gate.waiting += 1
            gate.wake(self)
            listener.pace()

    def _leave_queue(self) -> None:
        if self in self._listener.waiting:
            del self._listener.waiting[self]
            self._listener.gate.waiting -= 1

    # The end

    def _turn_away(self, limit: str) -> None:
        """It cannot go on because of a limit, which is named in the log."""
        gate = self._listener.gate
        gate.refused += 1
        gate.limited(limit, self.source)
        self.end()

    def end(self) -> None:
        """Nothing is left of it. Idempotent."""
        while self.kept:
            self._take_oldest()
            self._listener.gate.dropped += 1
        self._leave_queue()
        self._disconnect()
        if self._listener.flows.pop(self.origin, None) is not None:
            self._listener.flow_ended()
            self._listener.gate.emptied()

    def abort(self) -> None:
        """The loop met an unexpected error here."""
        self.end()


def _upstream(where: Target) -> Socket:
    """A connected socket. Raises OSError."""
    sock = Socket(where.family, DATAGRAM)
    try:
        if where.family == socket.AF_UNIX:
            sock.bind("")  # a name that the kernel chooses: what has none cannot be answered
        sock.connect(where.address)
        if where.may_meet_itself and sock.getsockname() == sock.getpeername():
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    except OSError:
        sock.close()
        raise
    return sock


def _from_address(local: bytes) -> list[tuple[int, int, bytes]]:
    """What sendmsg(2) needs to answer from an address of this machine: an in_pktinfo or in6_pktinfo."""
    if len(local) == 4:
        return [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("I4s4x", 0, local))]
    if len(local) in (16, 20) and local[0] != MULTICAST:
        return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, local.ljust(20, b"\0"))]
    return []  # the kernel chooses
