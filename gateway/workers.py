"""The control plane's side of the data plane: starts the workers, tells them what to serve, hears who waits.

Counterpart: `gateway.plane.worker`, over `gateway.plane.link`. All workers serve all backends; each connection is in one of
them. Remembers everything that was said, so that a worker that dies has a successor with the same listening sockets at
once. Knows nothing of drivers and lives: it reports to `Reports`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from backends.base import PassedSocket
from backends.endpoint import Endpoint
from backends.offspring import NOT_OURS
from gateway import adoption
from gateway.config import BackendConfig, GatewayOptions
from gateway.plane import link as say
from gateway.plane.link import Message, Tally
from gateway.worker_process import ANSWER_DEADLINE, Worker, WorkerLost

log = logging.getLogger(__name__)

RESPAWN_GAP = 1.0
"""Seconds at least between two successors of a worker that keeps dying; the first one comes at once."""

SPREAD_FROM = 16
"""Each worker has its share of `limits.connections`. Below so many for each, one worker serves the backend alone: the
kernel's choice of a worker is not that even."""


class Reports(Protocol):
    """Who hears what the workers say. Backends are named by their numbers."""

    def wake(self, backend: int, source: str) -> None: ...
    def busy(self, backend: int) -> None: ...
    def quiet(self, backend: int, since: float) -> None: ...
    def refused(self, backend: int, error: str) -> None: ...
    def limited(self, backend: int, limit: str, count: int, source: str) -> None: ...


class Ear(NamedTuple):
    """One listening socket of the workers."""

    message: say.Listen
    socket: socket.socket
    worker: int | None
    """the place of the one that has it; None: all of them"""


@dataclass
class Adopted:
    """What the workers of a former control plane serve."""

    gates: dict[int, say.Serving] = field(default_factory=dict)
    """by number; what differs between them counts as closed"""
    ears: dict[int, tuple[say.Held, socket.socket]] = field(default_factory=dict)
    holders: dict[int, list[Worker]] = field(default_factory=dict)
    """number of a listener -> who accepts there"""
    differing: set[int] = field(default_factory=set)
    """gates that are open in one worker and not so in another"""
    meanings: dict[tuple[str, str], int] = field(default_factory=dict)
    """name and digest -> number of the backend"""
    numbers: dict[tuple[int, socket.socket], int] = field(default_factory=dict)
    """backend and socket -> number of the listener"""

    def gate(self, config: BackendConfig) -> say.Serving | None:
        """What is served of this backend, if it still means the same."""
        number = self.meanings.get((config.name, config.digest))
        return None if number is None else self.gates[number]

    def add(self, found: adoption.Found) -> None:
        for gate in found.serving:
            known = self.gates.setdefault(gate.backend, gate)
            meaning = (gate.name, gate.digest)
            self.meanings[meaning] = max(gate.backend, self.meanings.get(meaning, 0))  # the latest: others are drained
            if known.endpoints != gate.endpoints:
                self.differing.add(gate.backend)
                self.gates[gate.backend] = say.Serving(gate.backend, gate.name, gate.digest, None)
        for held, sock in found.held:
            self.holders.setdefault(held.listener, []).append(found.worker)
            if held.listener in self.ears:
                sock.close()
            else:
                self.ears[held.listener] = (held, sock)
                self.numbers[held.backend, sock] = held.listener


class Workers:
    """All workers, seen as one data plane."""

    def __init__(self, reports: Reports, options: GatewayOptions) -> None:
        self.reports = reports
        self.options = options
        self.size = options.workers if isinstance(options.workers, int) else len(os.sched_getaffinity(0))
        self.directory = Path(f"{options.admin}.workers")
        self.served: dict[int, say.Serve] = {}
        self.opened: dict[int, say.Open] = {}
        self.adopted = Adopted()
        self._ears: dict[int, Ear] = {}
        self._places: list[Worker] = []
        """those that accept; a place has a successor when its worker dies"""
        self._leaving: list[Worker] = []
        """those that finish what they have"""
        self._latest: dict[str, int] = {}
        """name -> number of the backend that is configured so now; those before it are being drained"""
        self._past: dict[int, Tally] = {}
        """what workers that ended had counted"""
        self._replace = False
        self._found: set[Worker] = set()
        """those that were taken over and are not heard yet"""
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_listener = 0

    # The processes

    async def find(self, replace: bool) -> None:
        """Take over the workers of a former control plane; with `replace`, they only finish what they have.

        Without it, their listening sockets (`adopted.ears`) are the caller's, who has no others.
        """
        self._replace = replace
        for found in await adoption.find(self.directory, float(self.options.drain), self._hear):
            self.adopted.add(found)
            if found.worker.retiring or replace or len(self._places) >= self.size:
                self._leaving.append(found.worker)
            else:
                self._places.append(found.worker)
            self._found.add(found.worker)
            log.info("found worker %d, pid %d", found.worker.number, found.worker.pid)
        for number in self.adopted.differing:
            self._send(say.Close(number, 0))
        numbers = [held.listener for held, _ in self.adopted.ears.values()]
        self._next_listener = max(numbers, default=0)

    def start(self) -> None:
        """Start workers in the places that are empty; from now on each is replaced whenever it ends. Raises OSError."""
        while len(self._places) < self.size:
            worker = self._launch(len(self._places))
            self._places.append(worker)
        for place in range(self.size):
            self._spawn(self._keep(place), f"keeper of worker {place}")

    async def can_be_found(self) -> bool:
        """Whether another control plane would find all of them."""
        files = [self._file(worker) for worker in self._places]
        return await asyncio.to_thread(lambda: all(file.exists() for file in files))

    def be_patient(self, seconds: float) -> None:
        """Go on for at least so long without this control plane, which is about to be replaced."""
        self._send(say.Patience(seconds))

    def settle(self) -> None:
        """Everything that is served has been told: hear the workers that were taken over, and let go of what is not
        served any more."""
        for worker in self._all:
            if worker in self._found:
                worker.attach()
        self._found.clear()
        for worker in self._leaving:
            if not worker.retiring:
                worker.send(say.Retire(float(self.options.drain), sockets=False))
                worker.retiring = True
            self._spawn(self._see_off(worker), f"end of worker {worker.number}")
        for listener, holders in self.adopted.holders.items():
            ear = self._ears.get(listener)
            for worker in holders:
                # Its place may be another one than in the former control plane.
                if ear is None or (ear.worker is not None and self._places[ear.worker] is not worker):
                    worker.send(say.Unlisten(listener, accept_waiting=False))
        if self._replace:
            for _, sock in self.adopted.ears.values():
                sock.close()
        for number, gate in self.adopted.gates.items():
            if number not in self.served:
                if gate.name in self._latest:
                    self._send(say.Move(number, self._latest[gate.name]))
                self._send(say.Forget(number))
        self.adopted = Adopted()

    async def stop(self) -> None:
        """End the workers; return when they are gone. Connections that are left are closed by that."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._all:
            worker.send(say.Quit())
        await asyncio.gather(*(worker.end() for worker in self._all))
        self._places.clear()
        self._leaving.clear()
        with contextlib.suppress(OSError):  # not empty: a worker could not be taken over
            await asyncio.to_thread(self.directory.rmdir)

    def _launch(self, number: int) -> Worker:
        start = partial(Worker.start, number, directory=self.directory, hear=self._hear)
        try:
            rendezvous = adoption.Rendezvous(self.directory)
        except OSError as error:
            log.warning("%s: %s; another control plane will not find worker %d", self.directory, error.strerror, number)
            return start(rendezvous=-1, orphan_time=0.0)
        with rendezvous:
            worker = start(rendezvous=rendezvous.socket.fileno(), orphan_time=float(self.options.orphan_time))
            rendezvous.belongs_to(worker.pid)
        return worker

    async def _keep(self, place: int) -> None:
        """Whenever the worker in this place ends, start another with the same sockets."""
        clock = asyncio.get_running_loop().time
        replaced = -RESPAWN_GAP
        while True:
            worker = self._places[place]
            await worker.gone.wait()
            worker.process.kill()
            code = await worker.process.wait()
            log.error("worker %d ended (%s): its connections are lost, another takes its place", place, code)
            self._count_in(worker)
            await asyncio.to_thread(self._forget_file, worker)
            await asyncio.sleep(replaced + RESPAWN_GAP - clock())
            replaced = clock()
            successor = await self._succeed(place)
            self._places[place] = successor
            self._tell_all(successor, place)
            self._forget_busy(worker)

    async def _succeed(self, place: int) -> Worker:
        while True:
            try:
                return self._launch(place)
            except OSError as error:
                log.error("worker %d cannot be started: %s", place, error)
            await asyncio.sleep(RESPAWN_GAP)

    async def _see_off(self, worker: Worker) -> None:
        """A worker that finishes what it has, and ends by itself after `gateway.drain` at the latest."""
        await worker.gone.wait()
        # The link to one of another version may be over long before.
        code = await worker.end(ANSWER_DEADLINE + (self.options.drain if worker.foreign else 0.0))
        left = sum(tally.connections for tally in worker.counted)
        self._leaving.remove(worker)
        await asyncio.to_thread(self._forget_file, worker)
        self._count_in(worker)
        self._forget_busy(worker)
        if code not in (0, NOT_OURS):
            log.error("old worker with pid %d ended (%s): its connections are lost", worker.pid, code)
        elif left:
            log.warning(
                "gateway.drain: cutting %d connection%s of the old worker with pid %d",
                left,
                "s" * (left != 1),
                worker.pid,
            )
        else:
            log.info("old worker with pid %d has finished", worker.pid)

    def _forget_file(self, worker: Worker) -> None:
        """One that was killed left it behind."""
        self._file(worker).unlink(missing_ok=True)

    def _file(self, worker: Worker) -> Path:
        return self.directory / f"{worker.pid}.sock"

    def _forget_busy(self, worker: Worker) -> None:
        """It is gone, and its connections with it."""
        lost, worker.busy = worker.busy, set()
        for backend in lost:
            if not self.is_busy(backend):
                self.reports.quiet(backend, asyncio.get_running_loop().time())

    def _count_in(self, worker: Worker) -> None:
        for tally in worker.counted:
            if tally.backend in self.served:
                self.count_past(tally.backend, tally)
        worker.counted = []

    def count_past(self, number: int, tally: Tally) -> None:
        """What was counted of a backend by somebody who is gone."""
        self._past[number] = _sum(self._past.get(number), _over(tally, number))

    def past(self, number: int) -> Tally | None:
        return self._past.get(number)

    def _tell_all(self, worker: Worker, place: int) -> None:
        worker.send_all(self.served.values())
        ears = [ear for ear in self._ears.values() if ear.worker in (None, place)]
        worker.send_all((ear.message for ear in ears), [ear.socket.fileno() for ear in ears])
        worker.send_all(self.opened.values())

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What is served

    def spread(self, config: BackendConfig) -> int:
        """Over how many workers the connections of a backend are spread."""
        return 1 if config.limits.connections < SPREAD_FROM * self.size else self.size

    def serve(self, number: int, config: BackendConfig) -> None:
        """There is this backend, or its limits changed. Its gate is closed until `open`."""
        limits, spread = config.limits, self.spread(config)
        self.served[number] = say.Serve(
            number, config.name, config.digest, math.ceil(limits.connections / spread), math.ceil(limits.pending / spread),
            float(limits.connect_timeout), float(limits.idle_timeout or 0),
            float(limits.flow_timeout), limits.flow_datagrams, math.ceil(limits.flow_bytes / spread),
        )  # fmt: skip
        self._latest[config.name] = max(number, self._latest.get(config.name, 0))
        self._send(self.served[number])

    def listen(self, backend: int, name: str, address: str, sockets: Sequence[socket.socket], spread: int) -> list[int]:
        """Accept on these sockets for a listener of the backend; the numbers are for `unlisten`.

        `address` says which listener it is to another control plane. One socket is shared by the workers, or belongs to
        one of them if the backend is not spread; of several, each has its own. A single datagram socket is not shared: all
        datagrams of a client must come to the same worker.
        """
        numbers = []
        for index, sock in enumerate(sockets):
            number = self.adopted.numbers.get((backend, sock))
            if number is None:
                number = self._next_listener = self._next_listener + 1
            alone = spread == 1 or (len(sockets) == 1 and sock.type == socket.SOCK_DGRAM)
            shared = len(sockets) == 1 and not alone
            place = None if shared else (backend if alone else index) % self.size
            ear = Ear(say.Listen(number, backend, name, address), sock, place)
            self._ears[number] = ear
            numbers.append(number)
            for place, worker in enumerate(self._places):
                if ear.worker in (None, place):
                    worker.send(ear.message, sock.fileno())
        return numbers

    def unlisten(self, numbers: Iterable[int], accept_waiting: bool) -> None:
        """Stop accepting there; the clients in the backlog come in first, or are left to whoever takes the socket over."""
        for number in numbers:
            self._ears.pop(number, None)
            self._send(say.Unlisten(number, accept_waiting))

    def open(self, number: int, endpoints: Mapping[str, Endpoint]) -> None:
        self.opened[number] = say.Open(number, {name: str(endpoint) for name, endpoint in endpoints.items()})
        self._send(self.opened[number])

    async def close(self, number: int) -> int:
        """Close the gate in all workers; how many connections are left in them.

        A worker that does not answer counts as busy, and so does one of another version.
        """
        self.opened.pop(number, None)
        return sum(await asyncio.gather(*(self._close(worker, number) for worker in self._all)))

    async def _close(self, worker: Worker, number: int) -> int:
        if worker.foreign:
            return int(not worker.gone.is_set())
        try:
            left: int = await worker.ask(partial(say.Close, number))
        except WorkerLost:
            return 0
        except TimeoutError:
            return 1
        return left

    def reject(self, number: int) -> None:
        """Close the clients that wait, or let them wait for the backend that has taken this one's place."""
        heir = self._heir(number)
        self._send(say.Move(number, heir) if heir else say.Reject(number))

    def cut(self, number: int) -> None:
        """Close all connections of the backend; who only waits goes to the one that has taken its place."""
        if heir := self._heir(number):
            self._send(say.Move(number, heir))
        self._send(say.Cut(number))

    def _heir(self, number: int) -> int | None:
        served = self.served.get(number)
        latest = self._latest.get(served.name) if served else None
        return None if latest == number else latest

    def forget(self, number: int) -> None:
        served = self.served.pop(number, None)
        if served is not None and self._latest.get(served.name) == number:
            del self._latest[served.name]
        self.opened.pop(number, None)
        self._past.pop(number, None)
        self._send(say.Forget(number))

    # What is said and known

    def _hear(self, worker: Worker, message: Any) -> None:
        match message:
            case say.Wake(backend, source):
                self.reports.wake(backend, source)
            case say.Busy(backend):
                worker.busy.add(backend)
                self.reports.busy(backend)
            case say.Quiet(backend, since):
                worker.busy.discard(backend)
                if not self.is_busy(backend):
                    self.reports.quiet(backend, since)
            case say.Refused(backend, error):
                # One worker closed this gate: the others must not go on.
                if self.opened.pop(backend, None) is not None:
                    self._send(say.Close(backend, 0))
                self.reports.refused(backend, error)
            case say.Limited(backend, limit, count, source):
                self.reports.limited(backend, limit, count, source)
            case say.Trouble(text):
                log.warning("worker %d: %s", worker.number, text)

    def is_busy(self, number: int) -> bool:
        return any(number in worker.busy for worker in self._all)

    async def count(self) -> dict[int, Tally]:
        """The counters of every backend that was ever used, summed over the workers."""
        total = dict(self._past)
        for tallies in await asyncio.gather(*(self._count(worker) for worker in self._all)):
            for tally in tallies:
                total[tally.backend] = _sum(total.get(tally.backend), tally)
        return total

    async def _count(self, worker: Worker) -> list[Tally]:
        """What it counts; what it counted last where it does not answer."""
        if not worker.foreign:
            try:
                counted: list[Tally] = await worker.ask(say.Count)
                return counted
            except (WorkerLost, TimeoutError):
                pass
        return [_over(tally, tally.backend) for tally in worker.counted]

    @property
    def pids(self) -> list[int]:
        """Of those that accept."""
        return [worker.pid for worker in self._places]

    @property
    def all_pids(self) -> list[int]:
        return [worker.pid for worker in self._all]

    @property
    def _all(self) -> list[Worker]:
        return [*self._places, *self._leaving]

    def _send(self, message: Message) -> None:
        for worker in self._all:
            worker.send(message)


def _sum(a: Tally | None, b: Tally) -> Tally:
    if a is None:
        return b
    return Tally(
        a.backend, a.connections + b.connections, a.parked + b.parked, a.total + b.total,
        a.received + b.received, a.sent + b.sent, a.refused + b.refused, a.dropped + b.dropped,
    )  # fmt: skip


def _over(tally: Tally, number: int) -> Tally:
    """Of a worker whose connections are gone; the number that the backend has now."""
    return msgspec.structs.replace(tally, backend=number, connections=0, parked=0)


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
        self.workers.reject(self.number)
