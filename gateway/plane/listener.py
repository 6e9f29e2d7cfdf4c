"""Accepts connections: in batches, through lacks of descriptors and memory, past clients that are gone already.

Counterpart: the control plane binds the socket (`gateway.listeners`) and keeps a copy; `gateway.plane.worker` gets what
is accepted. Decides nothing about a connection.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from socket import SocketType as Socket

from gateway.plane.dial import CAPACITY_ERRORS
from gateway.plane.gate import Client, Gate
from gateway.plane.link import Held, Listen
from gateway.plane.loop import Loop

BATCH = 64  # measured: below 8 new connections get slower, above 64 nothing is gained
CAPACITY_PAUSE = 0.05  # seconds without accepting when descriptors or memory run out
RESERVE = 300
"""Descriptors that clients do not get, if so many are allowed at all: orders bring some, and each client needs one more for
its backend, and pipes."""

ABORTED = (ConnectionAbortedError, InterruptedError, PermissionError, TimeoutError, ConnectionResetError)
"""The client is gone, or a firewall rule said no (accept(2)): nothing is wrong with the listener."""


class Room:
    """The descriptors that clients may take, shared by all listeners of a process that may have `limit`.

    The kernel gives out the lowest number that is free: so the number of an accepted socket tells how many are taken.
    """

    def __init__(self, loop: Loop, limit: int) -> None:
        self.loop = loop
        self.most = limit - min(RESERVE, limit // 4)
        self.full = False
        self._waiting: list[Callable[[], None]] = []

    def wait(self, resume: Callable[[], None]) -> None:
        """There is no room: call back when there is."""
        self.full = True
        self._waiting.append(resume)
        if len(self._waiting) == 1:
            self.loop.later(CAPACITY_PAUSE, self._look)

    def _look(self) -> None:
        try:
            fd = os.eventfd(0)
        except OSError:
            fd = self.most
        else:
            os.close(fd)
        if fd >= self.most:
            self.loop.later(CAPACITY_PAUSE, self._look)
            return
        self.full = False
        waiting, self._waiting = self._waiting, []
        for resume in waiting:
            resume()


class Listener:
    """One listening socket of this worker. Owns its descriptor."""

    __slots__ = ("_accept", "_family", "admit", "closed", "gate", "held", "loop", "name", "room", "sock", "trouble")

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        gate: Gate,
        order: Listen,
        room: Room,
        admit: Callable[[Client], None],
        trouble: Callable[[str], None],
    ) -> None:
        self.loop = loop
        self.sock = sock
        self.gate = gate
        self.name = order.name
        self.held = Held(order.listener, order.backend, order.name, order.address)
        self.room = room
        self.admit = admit
        self.trouble = trouble
        self.closed = False
        self._accept = self.sock._accept  # type: ignore[attr-defined]  # without making a Python-level socket each time
        self._family = self.sock.family
        # Level triggered: what a full batch leaves is reported again.
        loop.add(sock.fileno(), self, select.EPOLLIN)

    def event(self, mask: int) -> None:
        if self.room.full:
            self._wait_for_room()
        else:
            self._accept_batch()

    def _accept_batch(self) -> bool:
        """Whether there may be more."""
        accept, family, gate, name, admit = self._accept, self._family, self.gate, self.name, self.admit
        most = self.room.most
        for _ in range(BATCH):
            try:
                fd, peer = accept()
            except BlockingIOError:
                return False
            except ABORTED:
                continue
            except OSError as error:
                if error.errno not in CAPACITY_ERRORS:
                    raise
                self._pause(CAPACITY_PAUSE)
                self.trouble(f"accepting is paused: {error.strerror}")
                return False
            os.set_blocking(fd, False)
            admit(Client(gate, name, Socket(family, socket.SOCK_STREAM, 0, fd), peer))
            if fd >= most:
                self._wait_for_room()
                return False
        return True

    def _wait_for_room(self) -> None:
        self.loop.remove(self.sock.fileno())
        self.room.wait(self._resume)
        self.trouble("accepting is paused: few descriptors are left")

    def abort(self) -> None:
        """The loop met an unexpected error here, and has told it. The listener stays, but does not spin."""
        self._pause(1.0)

    def _pause(self, seconds: float) -> None:
        """Waiting clients stay in the backlog; level-triggered readiness would spin meanwhile."""
        self.loop.remove(self.sock.fileno())
        self.loop.later(seconds, self._resume)

    def _resume(self) -> None:
        if not self.closed:
            self.loop.add(self.sock.fileno(), self, select.EPOLLIN)

    def close(self, accept_waiting: bool) -> None:
        """Stop accepting. Clients in the backlog come in first, or are left to whoever else has the socket."""
        while accept_waiting and self._accept_batch():
            pass
        self.closed = True
        self.loop.discard(self.sock)
