"""One worker as the control plane sees it: its process, the link to it, what it was asked and what it said.

Counterpart: `gateway.plane.worker` is the other end. `gateway.workers` decides what is said to which worker, and hears what
is not an answer. Knows no backend and no socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from backends.offspring import Offspring, run_python
from gateway.plane import link as say
from gateway.plane.link import Link, LinkClosed, Message, Tally

log = logging.getLogger(__name__)

ANSWER_DEADLINE = 5.0
"""Seconds that a worker may take to answer. It never waits for anything, so it is stuck when it takes longer."""

MESSAGES_IN_A_DATAGRAM = 300
"""Far below `link.LARGEST`."""

Sockets = Sequence[tuple[Message, int]]
"""Messages and the descriptor that goes along with each."""


class WorkerLost(Exception):
    """The worker ended before it answered."""


class Worker:
    """`hear` gets every message that is not an answer, once it is attached.

    Made by `start`, or by `gateway.adoption` for a process that is there already.
    """

    def __init__(self, number: int, process: Offspring, link: Link, hear: Callable[[Worker, Any], None]) -> None:
        self.number = number
        self.process = process
        self.hear = hear
        self.retiring = False
        """It accepts no more, and will not be replaced."""
        self.foreign = False
        """It speaks another version: nothing is known of it but that it lives."""
        self.busy: set[int] = set()
        """the backends that have connections here"""
        self.counted: list[Tally] = []
        """what it counted when it was asked last, or when it ended"""
        self.gone = asyncio.Event()
        self.link: Link | None = link
        self._answers: dict[tuple[str, int], asyncio.Future[Any]] = {}
        self._tallies: list[Tally] = []
        self._loop = asyncio.get_running_loop()
        self._writing = False

    @classmethod
    def start(cls, number: int, directory: str, orphan_time: float, hear: Callable[[Worker, Any], None]) -> Worker:
        """A new process. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = ["-m", "gateway.plane", str(theirs.fileno()), directory, str(float(orphan_time))]
            try:
                process = run_python(arguments, theirs.fileno())
            except BaseException:
                ours.close()
                raise
        worker = cls(number, process, Link(ours), hear)
        worker.attach()
        return worker

    def attach(self) -> None:
        """Read what it says from now on."""
        if self.link is not None:
            self._loop.add_reader(self.link.socket, self._readable)

    @property
    def pid(self) -> int:
        return self.process.pid

    # Saying

    def send(self, *messages: Message, fds: Sequence[int] = ()) -> None:
        if self.link is None or self.foreign:
            return
        try:
            self.link.send(*messages, fds=fds)
        except LinkClosed:
            return  # the reader sees it too
        if self.link.pending and not self._writing:
            self._writing = True
            self._loop.add_writer(self.link.socket, self._writable)

    def send_all(self, messages: Iterable[Message]) -> None:
        """Any number of messages."""
        batch = list(messages)
        for start in range(0, len(batch), MESSAGES_IN_A_DATAGRAM):
            self.send(*batch[start : start + MESSAGES_IN_A_DATAGRAM])

    def send_sockets(self, sockets: Sockets) -> None:
        """Any number of messages with a descriptor each."""
        for start in range(0, len(sockets), say.MOST_FDS):
            part = sockets[start : start + say.MOST_FDS]
            self.send(*(message for message, _ in part), fds=[fd for _, fd in part])

    async def ask(self, question: Message, answer: str, number: int) -> Any:
        """Send a question and wait for its answer; who asks the same meanwhile gets the same answer.

        Raises WorkerLost or TimeoutError.
        """
        if self.link is None:
            raise WorkerLost(f"worker {self.number} is gone")
        future = self._answers.get((answer, number))
        if future is None:
            future = self._answers[answer, number] = self._loop.create_future()
            self.send(question)
        async with asyncio.timeout(ANSWER_DEADLINE):
            return await asyncio.shield(future)

    # Hearing

    def _writable(self) -> None:
        assert self.link is not None
        with contextlib.suppress(LinkClosed):
            self.link.flush()
            if self.link.pending:
                return
        self._writing = False
        self._loop.remove_writer(self.link.socket)

    def _readable(self) -> None:
        try:
            while self.link is not None and (datagram := self.link.receive()) is not None:
                messages, fds = datagram
                for message in messages:
                    self._take(message)
                _close_all(fds)  # none belongs to anything that a worker says by itself
        except LinkClosed:
            self.lose()

    def _take(self, message: Any) -> None:
        match message:
            case say.Closed(backend, connections):
                self._answer("closed", backend, connections)
            case say.Counted(serial, tallies, more):
                self._tallies += tallies
                if not more:
                    self.counted, self._tallies = self._tallies, []
                    self._answer("counted", serial, self.counted)
            case say.Hello(version, pid):
                log.debug("worker %d is up, pid %d", self.number, pid)
                if version != say.VERSION:
                    log.error("worker %d speaks version %d, not %d", self.number, version, say.VERSION)
                    self.lose()
            case _:
                self.hear(self, message)

    def _answer(self, kind: str, number: int, value: Any) -> None:
        future = self._answers.pop((kind, number), None)
        if future is not None and not future.done():
            future.set_result(value)

    # The end

    def lose(self) -> None:
        """The link ended: whatever the process is doing, it is not ours any more. Idempotent."""
        if self.link is None:
            return
        self._loop.remove_reader(self.link.socket)
        if self._writing:
            self._loop.remove_writer(self.link.socket)
        self.link.close()
        self.link = None
        for future in self._answers.values():
            if not future.done():
                future.set_exception(WorkerLost(f"worker {self.number} is gone"))
                future.exception()  # nobody may be waiting any more
        self._answers.clear()
        self.gone.set()

    async def end(self, patience: float = ANSWER_DEADLINE) -> int:
        """Wait for the end of the process, after `patience` seconds kill it; its exit status. The link is lost."""
        try:
            async with asyncio.timeout(patience):
                return await self.process.wait()
        except TimeoutError:
            log.warning("worker %d is stuck and is killed", self.number)
            self.process.kill()
            return await self.process.wait()
        finally:
            self.lose()


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)

