"""The gate of one backend in one worker: open with endpoints, or closed with clients parked before it.

Counterpart: `gateway.activation` orders it open and closed; `gateway.plane.worker` leads clients to it. The gate counts and
tells; it never starts, dials or judges anything. A parked client is not read: its bytes stay in the kernel, but for what it
said before a dial that was refused. Flows of datagrams wait at their `Door` (`gateway.plane.datagram`); the gate counts them.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Sequence
from socket import SocketType as Socket
from typing import Any, Protocol

from gateway.plane.link import Busy, Limited, Message, Quiet, Serve, Serving, Tally, Wake
from gateway.plane.loop import Loop, Timer
from gateway.plane.relay import End, Owner, cut

SETTLE = 0.1
"""Seconds that a gate must be quiet before it is said, so that short connections in a row cost the control plane nothing."""

LIMIT_LOG_GAP = 1.0
"""Seconds between two reports of one limit."""


class Waiting(Protocol):
    """Who waits for a backend."""

    @property
    def source(self) -> str:
        """Who it is, for people."""


class Dialling(Protocol):
    """A connect that is under way."""

    def cancel(self) -> Client:
        """Stop it; whose it was."""


class Door(Protocol):
    """A datagram socket, with the flows of its clients."""

    @property
    def last(self) -> Waiting | None:
        """The flow that began to wait last."""

    def release(self) -> None:
        """The gate has opened: deliver what waits."""

    def reject(self) -> None:
        """The start failed: drop what waits."""

    def move(self, heir: Gate) -> None:
        """Let what waits wait for another backend."""

    def cut(self) -> None:
        """End all flows."""

    def timeout_changed(self) -> None:
        """`limits.flow_timeout` is another one from now on."""


def inet_name(peer: Any) -> str:
    """A socket address of IPv4 or IPv6, for people."""
    host, port = peer[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Client:
    """An accepted connection that is not relayed yet. Parked, it waits for nothing but being hung up."""

    __slots__ = ("dialled_under", "fd", "gate", "listener", "peer", "said", "sock", "taken", "tries")

    def __init__(self, gate: Gate, listener: str, sock: Socket, peer: Any) -> None:
        self.gate = gate
        self.listener = listener
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.dialled_under: dict[str, Any] | None = None
        """the gate's endpoints at the last try"""
        self.said = b""
        """what was read of it before it was dialled in"""
        self.taken = 0
        """bytes of that which the backend has"""
        self.tries = 0

    def event(self, mask: int) -> None:
        # Only HUP and ERR come here (see park): both directions are gone. A client that merely ended its sending waits
        # for an answer and is served.
        if mask & (select.EPOLLHUP | select.EPOLLERR):
            self.abort()

    def move(self, gate: Gate) -> None:
        """It comes anew, to another gate; it is not parked."""
        self.gate = gate
        self.dialled_under = None
        self.tries = 0

    def abort(self) -> None:
        gate = self.gate
        gate.parked.pop(self.fd, None)
        gate.loop.discard(self.sock)
        gate.emptied()

    @property
    def source(self) -> str:
        """Who it is, for people."""
        if self.sock.family in (socket.AF_INET, socket.AF_INET6):
            return inet_name(self.peer)
        if self.sock.family == socket.AF_UNIX:
            try:
                pid, uid, _ = struct.unpack("iII", self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            except OSError:
                return "unix"
            return f"pid {pid} uid {uid}"
        return f"vsock {self.peer[0]}:{self.peer[1]}"


class Gate:
    """See the module. `tell` sends a message to the control plane."""

    __slots__ = (
        "_idle", "_limited", "_limited_timer", "_sweep", "_told_busy", "_woke", "connections", "dials", "doors", "dropped",
        "endpoints", "forgotten", "kept", "limits", "loop", "opened", "parked", "quiet_since", "received", "refused", "sent",
        "settling", "tell", "total", "waiting",
    )  # fmt: skip

    def __init__(self, loop: Loop, limits: Serve, tell: Callable[[Message], None], settling: Settling) -> None:
        self.loop = loop
        self.limits = limits
        self.tell = tell
        self.settling = settling
        self.endpoints: dict[str, Any] | None = None
        self.opened: dict[str, str] = {}
        self.parked: dict[int, Client] = {}
        self.doors: tuple[Door, ...] = ()
        """the datagram sockets before it"""
        self.waiting = 0
        """flows of datagrams that wait at the doors"""
        self.kept = 0
        """bytes of the datagrams that are kept for them"""
        self.connections = 0
        self.dials: set[Dialling] = set()
        """connects that did not succeed at once"""
        self.total = self.received = self.sent = self.refused = self.dropped = 0
        self.quiet_since = 0.0
        self.forgotten = False
        self._told_busy = False
        self._woke = False
        self._idle: dict[End, tuple[int, float]] = {}
        self._sweep: Timer | None = None
        self._limited: dict[str, tuple[int, str]] | None = None
        self._limited_timer = False

    @property
    def number(self) -> int:
        return self.limits.backend

    # Clients

    @property
    def full(self) -> bool:
        """Whether no more may wait."""
        return self.awaited >= self.limits.pending

    def park(self, client: Client) -> None:
        """Keep the client unread until the gate opens; the first one wakes the backend."""
        if self.full:
            self.turn_away(client, "limits.pending")
            return
        self.loop.add(client.fd, client, select.EPOLLET)
        self.parked[client.fd] = client
        self.wake(client)

    def wake(self, waiting: Waiting) -> None:
        """Somebody waits: say so, once until the gate opens."""
        if self.endpoints is None and not self._woke:
            self._woke = True
            self.tell(Wake(self.number, waiting.source))

    def turn_away(self, client: Client, limit: str) -> None:
        """Close a client because of a limit, which is named in the log."""
        self.refused += 1
        self.limited(limit, client.source)
        self.loop.discard(client.sock)

    def limited(self, limit: str, source: str) -> None:
        """Say that a limit cut; the first time at once, then once for many."""
        if self._limited_timer:
            assert self._limited is not None
            count, _ = self._limited.get(limit, (0, ""))
            self._limited[limit] = (count + 1, source)
            return
        self.tell(Limited(self.number, limit, 1, source))
        self._limited = {}
        self._limited_timer = True
        self.loop.later(LIMIT_LOG_GAP, self._tell_limited)

    def _tell_limited(self) -> None:
        self._limited_timer = False
        limited, self._limited = self._limited or {}, None
        for limit, (count, source) in limited.items():
            self.tell(Limited(self.number, limit, count, source))

    # Orders

    def limit(self, limits: Serve) -> None:
        """Other limits from now on, also for who is here already."""
        before, self.limits = self.limits, limits
        if limits.idle_timeout != before.idle_timeout:
            if self._sweep is not None:
                self._sweep.cancel()
                self._sweep = None
            if self.connections:
                self._arm_sweep()
        if limits.flow_timeout != before.flow_timeout:
            for door in self.doors:
                door.timeout_changed()

    def open(self, endpoints: dict[str, Any], opened: dict[str, str]) -> None:
        """Open it; the caller connects the clients that are parked. `opened`: the endpoints as they were ordered."""
        self.endpoints = endpoints
        self.opened = opened
        self._woke = False
        for door in self.doors:
            door.release()

    def leads_to(self, listener: str) -> Any:
        """The target of a listener's clients, of the open gate; None where there is none."""
        assert self.endpoints is not None
        return self.endpoints[listener] if listener in self.endpoints else self.endpoints.get("")

    def unpark(self) -> Client:
        """The client that has waited for longest. It is not watched: whoever dials for it finds out that it hung up."""
        client = self.parked.pop(next(iter(self.parked)))
        self.loop.remove(client.fd)
        return client

    def close(self) -> None:
        self.endpoints = None

    def call(self) -> None:
        """Wake the backend if somebody waits for it."""
        last = [next(reversed(self.parked.values()), None), *(door.last for door in self.doors)]
        for waiting in filter(None, last):
            self.wake(waiting)

    def reject(self) -> None:
        """The start failed: close who is parked; the next client wakes anew."""
        self._woke = False
        parked, self.parked = self.parked, {}
        for client in parked.values():
            self.loop.discard(client.sock)
        for door in self.doors:
            door.reject()
        self.emptied()

    def cut(self) -> None:
        """Close everything that is parked, dialled in or relayed here."""
        self.reject()
        for dial in tuple(self.dials):
            self.loop.discard(dial.cancel().sock)
            self.leave()
        for end in self.live():
            cut(end)
        for door in self.doors:
            door.cut()

    def live(self) -> list[End]:
        """The client side of each relayed connection. Looks through the table: for rare use."""
        return [end for end in self.loop.table.values() if isinstance(end, End) and end.owner is self and end.client]

    # Counts

    def enter(self) -> None:
        """A connection begins: from then on that it is let in."""
        self.connections += 1
        if self.connections == 1:
            self.settling.discard(self)
            if not self._told_busy:
                self.tell_busy()
            self._arm_sweep()

    def leave(self) -> None:
        """A connection is over, or was never made."""
        self.connections -= 1
        self.emptied()

    def emptied(self) -> None:
        """Somebody is gone; perhaps it was the last one."""
        if not self.connections:
            self.quiet_since = self.loop.now()
            self.settling.add(self)

    def ended(self, end: End) -> None:
        """The relay is done with a pair (called by the relay, once)."""
        self.received += end.moved
        self.sent += end.peer_moved
        if self._idle:
            self._idle.pop(end, None)
        self.leave()

    def tell_busy(self) -> None:
        self._told_busy = True
        self.tell(Busy(self.number))

    def say_quiet(self) -> None:
        """Nobody came back for a while."""
        if self._told_busy:
            self._told_busy = False
            self.tell(Quiet(self.number, self.quiet_since))

    @property
    def used(self) -> bool:
        """Whether there is anything to count."""
        return bool(self.total or self.connections or self.awaited or self.refused or self.dropped)

    @property
    def awaited(self) -> int:
        """Clients and flows that wait."""
        return len(self.parked) + self.waiting

    def serving(self) -> Serving:
        """What there is of it, for the next control plane."""
        opened = None if self.endpoints is None else self.opened
        return Serving(self.number, self.limits.name, self.limits.digest, opened)

    def tell_again(self) -> None:
        """What a control plane is told when it happens, to one that was not there then."""
        self._told_busy = False
        if self.connections:
            self.tell_busy()
        self._woke = False
        self.call()

    def tally(self, live: Sequence[End]) -> Tally:
        """Its counters; `live`: its part of `live_by_gate`."""
        received = self.received + sum(end.moved for end in live)
        sent = self.sent + sum(end.peer_moved for end in live)
        return Tally(
            self.number, self.connections, self.awaited, self.total, received, sent, self.refused,
            self.dropped,
        )  # fmt: skip

    # limits.idle_timeout: no timestamp is taken in the data path; a sweep compares what was moved.

    def _arm_sweep(self) -> None:
        if self._sweep is None and self.limits.idle_timeout:
            self._sweep = self.loop.later(self.limits.idle_timeout / 4, self._cut_idle)

    def _cut_idle(self) -> None:
        self._sweep = None
        now = self.loop.now()
        for end in self.live():
            moved = end.moved + end.peer_moved
            before, since = self._idle.get(end, (-1, now))
            if moved != before:
                self._idle[end] = (moved, now)
            elif self.limits.idle_timeout and now - since >= self.limits.idle_timeout:
                self.limited("limits.idle_timeout", "")
                cut(end)
        if self.connections and self.limits.idle_timeout:
            self._arm_sweep()
        else:
            self._idle.clear()


def live_by_gate(loop: Loop) -> dict[Owner, list[End]]:
    """The client sides of all relayed connections, in one look through the table."""
    found: dict[Owner, list[End]] = {}
    for end in loop.table.values():
        if isinstance(end, End) and end.client:
            found.setdefault(end.owner, []).append(end)
    return found


class Settling:
    """The gates that lost their last connection a moment ago. Its timer runs only while there are some."""

    def __init__(self, loop: Loop, settled: Callable[[Gate], None]) -> None:
        self.loop = loop
        self.settled = settled
        self._gates: set[Gate] = set()
        self._armed = False

    def add(self, gate: Gate) -> None:
        self._gates.add(gate)
        if not self._armed:
            self._armed = True
            self.loop.later(SETTLE, self._look)

    def discard(self, gate: Gate) -> None:
        self._gates.discard(gate)

    def _look(self) -> None:
        self._armed = False
        latest = self.loop.now() - SETTLE
        for gate in list(self._gates):
            if gate.quiet_since <= latest:
                self._gates.discard(gate)
                self.settled(gate)
        if self._gates and not self._armed:
            self._armed = True
            self.loop.later(SETTLE, self._look)
