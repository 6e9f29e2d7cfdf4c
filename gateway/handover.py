"""The deliveries in which the backend speaks to the client itself: `pass` and `accept`.

`pass`: the listening sockets are only watched; the first client wakes the backend, which is handed the sockets and accepts by
itself. `accept`: each connection is accepted here and becomes the stdin and stdout of an instance of its own. Counterparts:
`gateway.activation` (PassGate is one of its gates), systemd.socket(5) with Accept=no and Accept=yes. No byte of a
client is seen here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from backends.base import Backend, BackendError, Exit, PassedSocket
from backends.endpoint import Endpoint, of_socket
from backends.units import Duration
from gateway import diagnostics
from gateway.config import BackendConfig

log = logging.getLogger(__name__)

SHORTEST_LOOK, LONGEST_LOOK = 0.2, 5.0
"""Seconds between two looks at the connections of an awake backend; the kernel has no event for the last one's end."""

CAPACITY_PAUSE = 0.05  # seconds without accepting when descriptors run out
LIMIT_LOG_GAP = 1.0  # seconds between two reports that the limit is reached


class PassGate:
    """The gate of a backend that is handed its listening sockets."""

    def __init__(
        self,
        name: str,
        sockets: Sequence[PassedSocket],
        idle_after: float | None,
        wake: Callable[[str], None],
        busy: Callable[[], None],
        quiet: Callable[[float], None],
    ) -> None:
        self.sockets = sockets
        self._name = name
        self._endpoints = [of_socket(passed.socket) for passed in sockets]
        self.connections = 0
        """as of the last look"""
        self._wake, self._busy, self._quiet = wake, busy, quiet
        self._loop = asyncio.get_running_loop()
        self._armed = self._open = self._removed = False
        self._blind = False
        self._looking: asyncio.Task[None] | None = None
        self.adjust(idle_after)

    def adjust(self, idle_after: float | None) -> None:
        """The idle policy decides how closely its connections are looked at; without one (None), nobody looks."""
        self._look_gap = None if idle_after is None else min(max(idle_after / 10, SHORTEST_LOOK), LONGEST_LOOK)
        self._look_on()

    def arm(self) -> None:
        if not self._armed and not self._removed:
            self._armed = True
            for passed, endpoint in zip(self.sockets, self._endpoints, strict=True):
                self._loop.add_reader(passed.socket, self._knocked, endpoint)

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            for passed in self.sockets:
                self._loop.remove_reader(passed.socket)

    def _knocked(self, endpoint: Endpoint) -> None:
        self._disarm()  # the client stays in the backlog, the socket stays readable: one event is enough
        self._wake(f"a client at {endpoint}")

    def open(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._disarm()
        self._open = True
        self._look_on()

    async def close(self) -> int:
        """How many connections it has. The gate itself cannot be closed: the backend goes on accepting until it ends."""
        self._open = False
        self._look_on()
        left = await self._count()
        if left:
            self._busy()  # the next look, once it is open again, may be seconds away
        return left

    def reject(self, reason: str) -> None:
        """Clients stay in the backlog: they are served when the backend starts after all."""

    def remove(self) -> None:
        """Watch for clients no more."""
        self._disarm()
        self._removed = True

    async def _count(self) -> int:
        """Ask the kernel. As long as it cannot be asked, the backend counts as used: nobody must be cut off for that."""
        try:
            self.connections = await asyncio.to_thread(diagnostics.connections, self._endpoints)
            self._blind = False
        except Exception as error:  # the library meets whatever the kernel says
            if not self._blind:
                why = error if isinstance(error, OSError) else repr(error)
                log.warning("connections cannot be counted, so it stays awake: %s", why, extra={"backend": self._name})
            self._blind = True
        return max(self.connections, 1) if self._blind else self.connections

    def _look_on(self) -> None:
        """Look at the connections from now on, or no more."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        if self._open and self._look_gap is not None:
            name = f"connections of {self._name}"
            self._looking = self._loop.create_task(self._look(self._look_gap), name=name)

    async def _look(self, gap: float) -> None:
        used: bool | None = None  # not known: the first look always tells
        while True:
            before = self._loop.time()
            now = await self._count() > 0
            if now is not used:
                used = now
                if used:
                    self._busy()
                else:
                    self._quiet(before)
            await asyncio.sleep(gap)


class Instances:
    """The instances of one backend in delivery `accept`. At the limit, clients wait in the backlog."""

    def __init__(
        self, config: BackendConfig, backend: Backend, sockets: Sequence[PassedSocket], changed: Callable[[], None]
    ) -> None:
        self.config = config
        self.backend = backend
        self.sockets = sockets
        self._changed = changed
        self.total = 0
        self.last_wake = ""
        self.last_error = ""
        self._loop = asyncio.get_running_loop()
        self.since = self._loop.time()
        """when the first instance began, or the last one ended"""
        self._running: set[asyncio.Task[None]] = set()
        self._open = False
        """whether clients are let in at all"""
        self._accepting = False
        """whether one could come in now: not at the limit, not while descriptors are lacking"""
        self._pause: asyncio.TimerHandle | None = None
        self._limit_told = -LIMIT_LOG_GAP

    @property
    def count(self) -> int:
        return len(self._running)

    @property
    def _who(self) -> dict[str, Any]:
        return {"backend": self.config.name}

    def listen(self) -> None:
        """Accept from now on."""
        self._open = True
        self._resume()

    def unlisten(self) -> None:
        """Accept no more; what runs goes on."""
        self._open = False
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._hold_up()

    def adjust(self, config: BackendConfig) -> None:
        """Go on with other limits."""
        self.config = config
        self._resume()

    def _resume(self) -> None:
        self._pause = None
        if self._open and not self._accepting and len(self._running) < self.config.limits.connections:
            self._accepting = True
            for passed in self.sockets:
                self._loop.add_reader(passed.socket, self._accept, passed.socket)

    def _hold_up(self) -> None:
        """Clients wait in the backlog."""
        if self._accepting:
            self._accepting = False
            for passed in self.sockets:
                self._loop.remove_reader(passed.socket)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, peer = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("accepting is paused: %s", error.strerror, extra=self._who)
            self._hold_up()
            self._pause = self._loop.call_later(CAPACITY_PAUSE, self._resume)
            return
        connection.setblocking(True)  # what a program expects of its stdin
        self.total += 1
        self.last_wake, environment = _peer(connection, peer)
        log.info("instance for %s starts", self.last_wake, extra=self._who)
        task = self._run(partial(self.backend.serve, connection, environment), self.last_wake)
        task.add_done_callback(lambda _: connection.close())  # the driver does, but for a task that never began
        if len(self._running) >= self.config.limits.connections:
            self._hold_up()
            if self._loop.time() - self._limit_told >= LIMIT_LOG_GAP:
                self._limit_told = self._loop.time()
                log.warning("limits.connections: new clients wait in the backlog", extra=self._who)

    def resume(self, instances: Iterable[tuple[Mapping[str, str], Awaitable[Exit]]]) -> None:
        """Instances that another control plane began: their environment and their end."""
        for environment, ended in instances:
            self._run(partial(_passed_on, ended), _source(environment))
        if len(self._running) >= self.config.limits.connections:
            self._hold_up()

    def _run(self, instance: Callable[[], Awaitable[Exit]], source: str) -> asyncio.Task[None]:
        task = self._loop.create_task(self._until_ended(instance, source), name=f"{self.config.name} instance")
        if not self._running:
            self.since = self._loop.time()
        self._running.add(task)
        task.add_done_callback(self._ended)
        self._changed()
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not self._running:
            self.since = self._loop.time()
        self._changed()
        if self._pause is None:
            self._resume()

    async def _until_ended(self, instance: Callable[[], Awaitable[Exit]], source: str) -> None:
        begun = self._loop.time()
        try:
            exit = await instance()
        except (BackendError, OSError) as error:
            self.last_error = str(error)
            log.error("instance for %s: %s", source, error, extra=self._who)
        except Exception:
            log.exception("unexpected error", extra=self._who)
        else:
            took = Duration(self._loop.time() - begun)
            log.info("instance for %s ended after %s: %s", source, took, exit, extra=self._who)

    async def drained(self) -> None:
        """Wait until no instance runs."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def stop(self) -> None:
        """Kill all instances; return when they are gone."""
        for task in self._running:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.drained()


def _peer(connection: socket.socket, peer: Any) -> tuple[str, dict[str, str]]:
    """Who it is, for people, and the environment that inetd's programs know (systemd.exec(5), Accept=yes)."""
    environment: dict[str, str] = {}
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        environment = {"REMOTE_ADDR": peer[0].removeprefix("::ffff:"), "REMOTE_PORT": str(peer[1])}
    elif connection.family == socket.AF_VSOCK:
        environment = {"REMOTE_ADDR": f"vsock:{peer[0]}", "REMOTE_PORT": str(peer[1])}
    else:
        return _printable(os.fsencode(peer)) or UNKNOWN, environment
    return _source(environment), environment


def _printable(name: bytes) -> str:
    """The name of a Unix socket, which may be any bytes; an abstract one begins with @."""
    return repr(b"@" + name[1:] if name.startswith(b"\0") else name)[2:-1]


async def _passed_on(ended: Awaitable[Exit]) -> Exit:
    return await ended


UNKNOWN = "a Unix client"


def _source(environment: Mapping[str, str]) -> str:
    if "REMOTE_ADDR" not in environment:
        return UNKNOWN
    host, port = environment["REMOTE_ADDR"], environment["REMOTE_PORT"]
    return f"vsock {host.removeprefix('vsock:')}:{port}" if host.startswith("vsock:") else f"{host}:{port}"
