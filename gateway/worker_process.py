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
from pathlib import Path
from typing import Any

from backends.offspring import Offspring, run_python
from gateway.plane import link as say
from gateway.plane.link import Link, LinkClosed, Message, Tally

log = logging.getLogger(__name__)

ANSWER_DEADLINE = 5.0
"""Seconds that a worker may take to answer. It never waits for anything, so it is stuck when it takes longer."""

MOST_UNANSWERED = 3
"""Questions in a row."""


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
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._serial = 0
        self._unanswered = 0
        self._tallies: list[Tally] = []
        self._loop = asyncio.get_running_loop()
        self._writing = False

    @classmethod
    def start(
        cls, number: int, rendezvous: int, directory: Path, orphan_time: float, hear: Callable[[Worker, Any], None]
    ) -> Worker:
        """A new process, to be found at this listening socket (-1: not at all). Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fds = [theirs.fileno(), *([rendezvous] if rendezvous >= 0 else [])]
            arguments = ["-m", "gateway.plane", str(theirs.fileno()), str(rendezvous), str(directory), str(orphan_time)]
            try:
                process = run_python(arguments, fds)
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

    def send(self, message: Message, fd: int | None = None) -> None:
        self.send_all((message,), () if fd is None else (fd,))

    def send_all(self, messages: Iterable[Message], fds: Sequence[int] = ()) -> None:
        """Any number of messages; `fds` is empty, or has one for each."""
        if self.link is None or self.foreign:
            return
        try:
            self.link.send_all(messages, fds)
        except LinkClosed as error:
            log.debug("worker %d: %s", self.number, error)
            self._loop.call_soon(self._hang_up)
            return
        if self.link.pending and not self._writing:
            self._writing = True
            self._loop.add_writer(self.link.socket, self._writable)

    async def ask(self, question: Callable[[int], Message]) -> Any:
        """Send a question, made with a serial of its own, and wait for its answer. Raises WorkerLost or TimeoutError.

        A worker that leaves several unanswered is stuck and is killed.
        """
        if self.link is None:
            raise WorkerLost(f"worker {self.number} is gone")
        self._serial += 1
        serial, answer = self._serial, self._loop.create_future()
        self._answers[serial] = answer
        self.send(question(serial))
        try:
            async with asyncio.timeout(ANSWER_DEADLINE):
                result = await answer
        except TimeoutError:
            self._unanswered += 1
            log.error("worker %d does not answer", self.number)
            if self._unanswered >= MOST_UNANSWERED:
                self.process.kill()
            raise
        finally:
            del self._answers[serial]
        self._unanswered = 0
        return result

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
            case say.Closed(serial, connections):
                self._answer(serial, connections)
            case say.Counted(serial, tallies, more):
                self._tallies += tallies
                if not more:
                    self.counted, self._tallies = self._tallies, []
                    self._answer(serial, self.counted)
            case say.Hello(version, pid):
                log.debug("worker %d is up, pid %d", self.number, pid)
                if version != say.VERSION:
                    log.error("worker %d speaks version %d, not %d", self.number, version, say.VERSION)
                    self.lose()
            case _:
                self.hear(self, message)

    def _answer(self, serial: int, value: Any) -> None:
        answer = self._answers.get(serial)
        if answer is not None and not answer.done():
            answer.set_result(value)

    # The end

    def _hang_up(self) -> None:
        """It takes no orders any more, but may have had a last word."""
        self._readable()
        self.lose()

    def lose(self) -> None:
        """The link ended: whatever the process is doing, it is not ours any more. Idempotent."""
        if self.link is None:
            return
        self._loop.remove_reader(self.link.socket)
        if self._writing:
            self._loop.remove_writer(self.link.socket)
        self.link.close()
        self.link = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerLost(f"worker {self.number} is gone"))
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
