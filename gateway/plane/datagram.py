"""Relays datagrams, UDP and Unix: a flow for each client, so that each answer finds its way back.

    a datagram -> its flow is let in: send it upstream
               -> the gate is closed: keep it, wake; when it opens: deliver what was kept, in order
    an answer  -> back to the client, from the address that was asked

Counterparts: `gateway.plane.worker` makes a `DatagramListener` of each datagram socket; `gateway.plane.flow` is one client's
part; the gate (`gateway.plane.gate`) counts flows as connections, wakes the backend, and says when it opens. What cannot be
delivered is dropped and counted. Nothing is repeated, put together or looked at, and no datagram is passed on in part.

Events are level-triggered: what a batch leaves is reported again.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from gateway.plane.flow import BATCH, BURST, FLAGS, IP_PKTINFO, SIZE, Flow, buffer, view
from gateway.plane.gate import Gate
from gateway.plane.link import Held, Listen
from gateway.plane.loop import Loop, Timer

PAUSE, LONG_PAUSE = 0.02, 0.05
"""Seconds without an answer until more of what was kept is delivered: to a backend that has not answered so far, and to one
that has, which tells by its answers how fast it reads."""

SWEEPS = 4
"""Looks without news after which a flow has ended. No datagram costs a look at the clock."""

LAST_ANSWERS = 1.0
"""Seconds of silence after which a flow has ended when its client cannot ask any more, because the listener is closed."""

WAITING_BATCHES = 64  # taken in from a listener that closes; more than its buffer holds, and not without end
CONTROL = 128  # bytes for the address that was asked, and whatever an inherited socket is set to tell


class DatagramListener:
    """One datagram socket of this worker and its flows. Owns its descriptor; the flows answer through it."""

    __slots__ = (
        "_answered", "_answers", "_credit", "_pause", "_sweep_timer", "_take", "closed", "flows", "gate", "held", "loop",
        "name", "sock", "waiting", "wildcard",
    )  # fmt: skip

    def __init__(self, loop: Loop, sock: socket.socket, gate: Gate, order: Listen) -> None:
        self.loop = loop
        self.sock = sock
        self.gate = gate
        self.name = order.name
        self.held = Held(order.listener, order.backend, order.name, order.address)
        self.closed = False
        self.flows: dict[Any, Flow] = {}
        self.waiting: dict[Flow, None] = {}
        """flows with datagrams to deliver once the gate is open, or as soon as the backend takes more; the first comes first"""
        self.wildcard = _is_wildcard(sock)
        self._credit = BURST
        self._answers = self._answered = False  # since the gate opened, since the pause began
        self._pause: Timer | None = None
        self._sweep_timer: Timer | None = None
        self._take: Callable[[], tuple[int, Any]] = partial(sock.recvfrom_into, buffer, 0, FLAGS)
        if self.wildcard:
            self._take = self._take_from_any
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        gate.doors += (self,)
        loop.add(sock.fileno(), self, select.EPOLLIN)

    # Clients ask

    def event(self, mask: int) -> None:
        self._receive_batch()

    def _receive_batch(self) -> bool:
        """Whether there may be more."""
        take, flows, gate, received = self._take, self.flows, self.gate, 0
        for _ in range(BATCH):
            try:
                size, origin = take()
            except BlockingIOError:
                gate.received += received
                return False
            if size > SIZE:
                gate.dropped += 1
                continue
            flow = flows.get(origin)
            if flow is None:
                flow = flows[origin] = Flow(self, origin)
            flow.active = True
            if flow.endpoints is gate.endpoints:
                try:
                    received += flow.sock.send(view[:size])  # type: ignore[union-attr]  # it is let in: it has one
                except OSError as error:
                    flow.not_sent(bytes(view[:size]), error)
            else:
                flow.admit(bytes(view[:size]))
        gate.received += received
        return True

    def _take_from_any(self) -> tuple[int, Any]:
        """A datagram's size and its origin: the client, and the address that it asked."""
        size, control, _, peer = self.sock.recvmsg_into([buffer], CONTROL, FLAGS)
        for level, kind, data in control:
            if kind == IP_PKTINFO and level == socket.IPPROTO_IP:
                # The address to answer from; unknown when it came in before the option was set, then the one in its head.
                local = data[4:8]
                return size, (peer, local if any(local) else data[8:12])
            if kind == socket.IPV6_PKTINFO and level == socket.IPPROTO_IPV6:
                # The interface belongs to link-local addresses only: others may be reached over several.
                return size, (peer, data if data[0] == 0xFE and data[1] & 0xC0 == 0x80 else data[:16])
        return size, (peer, b"")

    def abort(self) -> None:
        """The loop met an unexpected error here, and has told it. The listener stays, but does not spin."""
        self.loop.remove(self.sock.fileno())
        self.loop.later(1.0, self._resume)

    def _resume(self) -> None:
        if not self.closed and self.sock.fileno() not in self.loop.table:
            self.loop.add(self.sock.fileno(), self, select.EPOLLIN)

    # What was kept is delivered

    @property
    def last(self) -> Flow | None:
        """The flow that began to wait last."""
        return next(reversed(self.waiting), None)

    def release(self) -> None:
        """The gate has opened."""
        self._answers = self._answered = False
        self.go_on()

    def go_on(self) -> None:
        """The backend should have room by now."""
        self._credit = BURST
        self._deliver()

    def answered(self, count: int) -> None:
        """The backend has read what it answers."""
        self._answers = self._answered = True
        self._credit = min(BURST, self._credit + count)
        self._deliver()

    def _deliver(self) -> None:
        while self.waiting and self._credit > 0 and self.gate.endpoints is not None:
            self._credit -= next(iter(self.waiting)).deliver()
        self.pace()

    def pace(self) -> None:
        """Go on after a pause, if there is something to go on with."""
        if self.waiting and self._pause is None and self.gate.endpoints is not None:
            self._answered = False
            self._pause = self.loop.later(LONG_PAUSE if self._answers else PAUSE, self._pause_over)

    def _pause_over(self) -> None:
        self._pause = None
        if self._answered:
            self.pace()  # by its answers it goes on faster
        else:
            self.go_on()

    def make_room(self, most: int, flow: Flow) -> bool:
        """Drop what others have kept for longest, until all of it is no more than so many bytes."""
        while self.gate.kept > most:
            longest = next((other for other in self.waiting if other is not flow), None)
            if longest is None:
                return False
            longest.drop_oldest()
        return True

    # Flows end

    def sweep_on(self) -> None:
        if self._sweep_timer is None:
            timeout = self.gate.limits.flow_timeout
            gap = (min(timeout, LAST_ANSWERS) if self.closed else timeout) / SWEEPS
            self._sweep_timer = self.loop.later(gap, self._sweep)

    def timeout_changed(self) -> None:
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
            self.sweep_on()

    def _sweep(self) -> None:
        """End the flows that had no datagram for `limits.flow_timeout`. Those that wait are not silent by themselves."""
        self._sweep_timer = None
        let_in = False
        for flow in list(self.flows.values()):
            if flow.sock is None:
                continue
            let_in = True
            if flow.active or flow in self.waiting:
                flow.active = False
                flow.quiet = 0
            else:
                flow.quiet += 1
                if flow.quiet >= SWEEPS:
                    flow.end()
        if let_in:
            self.sweep_on()

    def reject(self) -> None:
        """The start failed: what was kept is dropped, the next datagram wakes anew."""
        for flow in list(self.waiting):
            flow.drop_kept()

    def move(self, heir: Gate) -> None:
        """What waits belongs to another backend now, if that listens at the same address: no other could answer."""
        address = self.sock.getsockname()
        for door in heir.doors:
            if isinstance(door, DatagramListener) and door.sock.getsockname() == address:
                for flow in list(self.waiting):
                    door._take_in(flow.origin, flow.take_kept())

    def _take_in(self, origin: Any, kept: Iterable[bytes]) -> None:
        """What a client sent before, to a door that is no more."""
        for data in kept:
            flow = self.flows.get(origin)
            if flow is None:
                flow = self.flows[origin] = Flow(self, origin)
            flow.active = True
            flow.admit(data)

    def cut(self) -> None:
        for flow in list(self.flows.values()):
            flow.end()

    def close(self, accept_waiting: bool) -> None:
        """Take nothing in any more. What the kernel holds comes in first, or is left to whoever else has the socket.

        The socket stays until the last flow has ended: answers leave by it.
        """
        for _ in range(WAITING_BATCHES if accept_waiting else 0):
            if not self._receive_batch():
                break
        self.closed = True
        self.loop.remove(self.sock.fileno())
        self.timeout_changed()  # no client can ask any more
        self.flow_ended()

    def flow_ended(self) -> None:
        if self.closed and not self.flows and self in self.gate.doors:
            self.gate.doors = tuple(door for door in self.gate.doors if door is not self)
            self.loop.discard(self.sock)


def _is_wildcard(sock: socket.socket) -> bool:
    """Whether it is bound to all addresses of the machine, so that each datagram has to be asked which one it came to."""
    return sock.family != socket.AF_UNIX and sock.getsockname()[0] in ("0.0.0.0", "::")
