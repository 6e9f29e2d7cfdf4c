"""The control plane's side of the data plane: starts the workers, tells them what to serve, hears who waits.

Counterpart: `gateway.plane.worker`, over `gateway.plane.link`. Remembers everything that was said, so that a worker that dies
has a successor with the same listening sockets at once. Knows nothing of drivers and lives: it reports to `Reports`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from backends.base import PassedSocket
from backends.endpoint import Endpoint
from gateway.config import BackendConfig
from gateway.plane import link as say
from gateway.plane.link import Link, LinkClosed, Message, Tally

log = logging.getLogger(__name__)

ANSWER_DEADLINE = 5.0
"""Seconds that a worker may take to answer. It never waits for anything, so it is stuck when it takes longer."""

RESPAWN_GAP = 1.0
"""Seconds at least between two successors of a worker that keeps dying; the first one comes at once."""


class Reports(Protocol):
    """Who hears what the workers say. Backends are named by their numbers."""

    def wake(self, backend: int, source: str) -> None: ...
    def busy(self, backend: int) -> None: ...
    def quiet(self, backend: int, since: float) -> None: ...
    def refused(self, backend: int, error: str) -> None: ...
    def limited(self, backend: int, limit: str, count: int, source: str) -> None: ...


class WorkerLost(Exception):
    """The worker ended before it answered."""


class Worker:
    """One worker process and the link to it."""

    def __init__(self, number: int, workers: Workers) -> None:
        self.number = number
        self.workers = workers
        self.process: asyncio.subprocess.Process | None = None
        self.link: Link | None = None
        self.busy: set[int] = set()
        self.answers: dict[tuple[str, int], asyncio.Future[Any]] = {}
        self.tallies: list[Tally] = []
        self.gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._writing = False

    async def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "gateway.plane", str(theirs.fileno()),
                pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.link = Link(ours)
        self._loop.add_reader(ours, self._readable)

    def send(self, *messages: Message, fds: Sequence[int] = ()) -> None:
        if self.link is None:
            return
        try:
            self.link.send(*messages, fds=fds)
        except LinkClosed:
            return  # the reader sees it too
        if self.link.pending and not self._writing:
            self._writing = True
            self._loop.add_writer(self.link.socket, self._writable)

    async def ask(self, question: Message, answer: str, number: int) -> Any:
        """Send a question and wait for its answer. Raises WorkerLost or TimeoutError."""
        future = self.answers.get((answer, number))
        if future is None:
            future = self.answers[answer, number] = self._loop.create_future()
            self.send(question)
        async with asyncio.timeout(ANSWER_DEADLINE):
            return await asyncio.shield(future)

    def _writable(self) -> None:
        assert self.link is not None
        with contextlib.suppress(LinkClosed):
            self.link.flush()
            if self.link.pending:
                return
        self._writing = False
        self._loop.remove_writer(self.link.socket)

    def _readable(self) -> None:
        assert self.link is not None
        try:
            while (datagram := self.link.receive()) is not None:
                for message in datagram[0]:
                    self._hear(message)
        except LinkClosed:
            self._lost()

    def _hear(self, message: Any) -> None:
        reports = self.workers.reports
        match message:
            case say.Wake(backend, source):
                reports.wake(backend, source)
            case say.Busy(backend):
                self.busy.add(backend)
                reports.busy(backend)
            case say.Quiet(backend, since):
                self.busy.discard(backend)
                if not self.workers.is_busy(backend):
                    reports.quiet(backend, since)
            case say.Closed(backend, connections):
                self._answer("closed", backend, connections)
            case say.Refused(backend, error):
                reports.refused(backend, error)
            case say.Counted(serial, tallies, more):
                self.tallies += tallies
                if not more:
                    self._answer("counted", serial, self.tallies)
                    self.tallies = []
            case say.Limited(backend, limit, count, source):
                reports.limited(backend, limit, count, source)
            case say.Trouble(text):
                log.warning("worker %d: %s", self.number, text)
            case say.Hello(version, pid):
                log.debug("worker %d is up, pid %d", self.number, pid)
                if version != say.VERSION:
                    log.error("worker %d speaks version %d, not %d", self.number, version, say.VERSION)
                    self._lost()

    def _answer(self, kind: str, number: int, value: Any) -> None:
        future = self.answers.pop((kind, number), None)
        if future is not None and not future.done():
            future.set_result(value)

    def _lost(self) -> None:
        """The link ended: whatever the process is doing, it is not ours any more."""
        if self.link is None:
            return
        self._loop.remove_reader(self.link.socket)
        if self._writing:
            self._loop.remove_writer(self.link.socket)
        self.link.close()
        self.link = None
        for future in self.answers.values():
            if not future.done():
                future.set_exception(WorkerLost(f"worker {self.number} is gone"))
                future.exception()  # nobody may be waiting any more
        self.answers.clear()
        self.gone.set()

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGKILL)


class Workers:
    """All workers, seen as one data plane."""

    def __init__(self, reports: Reports) -> None:
        self.reports = reports
        self.served: dict[int, say.Serve] = {}
        self.listening: dict[int, tuple[say.Listen, socket.socket]] = {}
        self.opened: dict[int, say.Open] = {}
        self._workers: list[Worker] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._serial = 0
        self._next_listener = 0

    async def start(self) -> None:
        """Start the worker; from now on it is replaced whenever it ends."""
        worker = Worker(0, self)
        await worker.start()
        self._workers.append(worker)
        keeper = asyncio.get_running_loop().create_task(self._keep(worker), name="keeper of worker 0")
        self._keepers.append(keeper)

    async def stop(self) -> None:
        """End the workers; return when they are gone. Connections that are left are closed by that."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for worker in self._workers:
            worker.send(say.Quit())
        for worker in self._workers:
            await self._end(worker)
        self._workers.clear()

    async def _end(self, worker: Worker) -> None:
        assert worker.process is not None
        try:
            async with asyncio.timeout(ANSWER_DEADLINE):
                await worker.process.wait()
        except TimeoutError:
            log.warning("worker %d is stuck and is killed", worker.number)
            worker.kill()
            await worker.process.wait()
        worker._lost()

    async def _keep(self, worker: Worker) -> None:
        """Whenever the worker ends, start another with the same sockets."""
        loop = asyncio.get_running_loop()
        replaced = 0.0
        while True:
            await worker.gone.wait()
            assert worker.process is not None
            worker.kill()
            code = await worker.process.wait()
            log.error("worker %d ended (%s): its connections are lost, another takes its place", worker.number, code)
            await asyncio.sleep(replaced + RESPAWN_GAP - loop.time())
            replaced = loop.time()
            lost = worker.busy
            worker.busy, worker.gone = set(), asyncio.Event()
            for backend in lost:
                if not self.is_busy(backend):
                    self.reports.quiet(backend, loop.time())
            await self._restart(worker)
            self._tell_all(worker)

    async def _restart(self, worker: Worker) -> None:
        while True:
            try:
                return await worker.start()
            except OSError as error:
                log.error("worker %d cannot be started: %s", worker.number, error)
            await asyncio.sleep(RESPAWN_GAP)

    def _tell_all(self, worker: Worker) -> None:
        _send_batched(worker, self.served.values())
        self._send_listeners(worker, self.listening.values())
        _send_batched(worker, self.opened.values())

    # What is served

    def serve(self, number: int, config: BackendConfig) -> None:
        """There is this backend, or its limits changed. Its gate is closed until `open`."""
        limits = config.limits
        self.served[number] = say.Serve(
            number,
            config.name,
            limits.connections,
            limits.pending,
            float(limits.connect_timeout),
            float(limits.idle_timeout or 0),
            float(limits.flow_timeout),
            limits.flow_datagrams,
            int(limits.flow_bytes),
        )
        self._send(self.served[number])

    def listen(self, backend: int, sockets: Iterable[tuple[str, socket.socket]]) -> list[int]:
        """Accept on these sockets (by listener name) for the backend; the numbers are for `unlisten`."""
        fresh = {}
        for name, sock in sockets:
            self._next_listener += 1
            fresh[self._next_listener] = (say.Listen(self._next_listener, backend, name), sock)
        self.listening.update(fresh)
        for worker in self._workers:
            self._send_listeners(worker, fresh.values())
        return list(fresh)

    def unlisten(self, listener: int, accept_waiting: bool) -> None:
        """Stop accepting there; the clients in the backlog come in first, or are left to whoever takes the socket over."""
        self.listening.pop(listener, None)
        self._send(say.Unlisten(listener, accept_waiting))

    def open(self, number: int, endpoints: Mapping[str, Endpoint]) -> None:
        self.opened[number] = say.Open(number, {name: str(endpoint) for name, endpoint in endpoints.items()})
        self._send(self.opened[number])

    async def close(self, number: int) -> int:
        """Close the gate in all workers; how many connections are left in them. One that does not answer counts as busy."""
        self.opened.pop(number, None)
        left = 0
        for worker in self._workers:
            try:
                left += await worker.ask(say.Close(number), "closed", number)
            except WorkerLost:
                continue
            except TimeoutError:
                log.error("worker %d does not answer", worker.number)
                left += 1
        return left

    def reject(self, number: int, reason: str) -> None:
        self._send(say.Reject(number, reason))

    def cut(self, number: int, reason: str) -> None:
        """Close all connections of the backend."""
        self._send(say.Cut(number, reason))

    def forget(self, number: int) -> None:
        self.served.pop(number, None)
        self.opened.pop(number, None)
        self._send(say.Forget(number))

    def refused(self, number: int) -> None:
        """A worker closed this gate: the others must not go on."""
        if self.opened.pop(number, None) is not None:
            self._send(say.Close(number))

    # What is known

    def is_busy(self, number: int) -> bool:
        return any(number in worker.busy for worker in self._workers)

    async def count(self) -> dict[int, Tally]:
        """The counters of every backend that was ever used, summed over the workers."""
        total: dict[int, Tally] = {}
        self._serial += 1
        for worker in self._workers:
            with contextlib.suppress(WorkerLost, TimeoutError):
                for tally in await worker.ask(say.Count(self._serial), "counted", self._serial):
                    total[tally.backend] = _sum(total.get(tally.backend), tally)
        return total

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def _send(self, message: Message) -> None:
        for worker in self._workers:
            worker.send(message)

    def _send_listeners(self, worker: Worker, listeners: Iterable[tuple[say.Listen, socket.socket]]) -> None:
        batch = list(listeners)
        for start in range(0, len(batch), say.MOST_FDS):
            part = batch[start : start + say.MOST_FDS]
            worker.send(*(message for message, _ in part), fds=[sock.fileno() for _, sock in part])


def _send_batched(worker: Worker, messages: Iterable[Message]) -> None:
    batch = list(messages)
    for start in range(0, len(batch), BATCH):
        worker.send(*batch[start : start + BATCH])


BATCH = 500
"""Messages in one datagram: 500 of them stay far below `link.LARGEST`."""


def _sum(a: Tally | None, b: Tally) -> Tally:
    if a is None:
        return b
    return Tally(
        a.backend, a.connections + b.connections, a.parked + b.parked, a.total + b.total,
        a.received + b.received, a.sent + b.sent, a.refused + b.refused, a.dropped + b.dropped,
    )  # fmt: skip


class RelayGate:
    """The gate of a backend whose clients are relayed: it stands in the workers."""

    sockets: Sequence[PassedSocket] = ()

    def __init__(self, number: int, workers: Workers) -> None:
        self.number = number
        self.workers = workers

    def arm(self) -> None:
        """A closed gate in a worker is always armed."""

    def open(self, endpoints: Mapping[str, Endpoint]) -> None:
        self.workers.open(self.number, endpoints)

    async def close(self) -> int:
        return await self.workers.close(self.number)

    def reject(self, reason: str) -> None:
        self.workers.reject(self.number, reason)
