"""Finding the workers that a former control plane left behind, and hearing from them what there is.

Counterpart: `gateway.plane.rendezvous`; a worker waits there for `gateway.orphan_time`. `gateway.workers` goes on with what
is found. A worker that speaks another version gives its listening sockets and is left to finish what it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from backends.offspring import Offspring
from gateway.plane import link as say
from gateway.plane.link import Link, LinkClosed, NotUnderstood
from gateway.worker_process import ANSWER_DEADLINE, Worker

log = logging.getLogger(__name__)

BACKLOG = 4
RETRY = 0.02  # seconds until a worker is asked again that has not seen the end of its old link yet


@dataclass
class Found:
    """A worker, and what it said."""

    worker: Worker
    serving: list[say.Serving] = field(default_factory=list)
    held: list[tuple[say.Held, socket.socket]] = field(default_factory=list)


class Rendezvous:
    """The socket at which a worker can be found that is about to start; see `gateway.plane.rendezvous`.

    It is there before the worker is, so that there is no moment in which the worker could not be found. A context manager:
    afterwards it belongs to the worker, or is gone.
    """

    def __init__(self, directory: Path) -> None:
        """Raises OSError."""
        self.path = directory / f"{secrets.token_hex(8)}.sock"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            _at(self.path, self.socket.bind)
        except BaseException:
            self.socket.close()
            raise
        self.socket.listen(BACKLOG)

    def __enter__(self) -> Self:
        return self

    def belongs_to(self, pid: int) -> None:
        self.path = self.path.rename(self.path.with_name(f"{pid}.sock"))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.socket.close()
        if kind is not None:
            self.path.unlink()


async def find(directory: Path, drain: float, hear: Callable[[Worker, Any], None]) -> list[Found]:
    """All workers that wait in the directory, at once. It is made; files behind which nobody waits are removed.

    `drain`: seconds that a worker of another version gets for its connections.
    """
    paths = await asyncio.to_thread(_look, directory)
    answers = await asyncio.gather(*(_meet(path, number, drain, hear) for number, path in enumerate(paths)))
    return [found for found in answers if found is not None]


def _look(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):  # which is said when a worker starts
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return sorted(directory.glob("*.sock"))


async def _meet(path: Path, number: int, drain: float, hear: Callable[[Worker, Any], None]) -> Found | None:
    with contextlib.ExitStack() as undo:
        try:
            async with asyncio.timeout(ANSWER_DEADLINE):
                met = await _greet(path)
                if met is None:
                    return None
                link, hello = met
                undo.callback(link.close)
                foreign = hello.version != say.VERSION
                link.send(say.Retire(drain, sockets=True) if foreign else say.Tell())
                serving, held, retiring = await _hear_out(link, foreign, undo)
                worker = Worker(number, Offspring(hello.pid), link, hear)
        except (OSError, LinkClosed, TimeoutError) as error:
            log.error("the worker at %s cannot be taken over and is ended: %s", path, str(error) or "no answer")
            await asyncio.to_thread(_end, path)
            return None
        undo.pop_all()
    worker.foreign, worker.retiring = foreign, retiring
    return Found(worker, serving, held)


def _end(path: Path) -> None:
    """Kill a worker that is stuck: it would keep the listening sockets from those who could serve them."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(path.stem)
        pidfd = os.pidfd_open(pid)
        try:
            if b"gateway.plane" in Path(f"/proc/{pid}/cmdline").read_bytes():
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], ANSWER_DEADLINE)
        finally:
            os.close(pidfd)
    path.unlink(missing_ok=True)


async def _greet(path: Path) -> tuple[Link, say.Hello] | None:
    """The link to a worker and its first message; None when nobody is there. Raises OSError, LinkClosed."""
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        link = Link(sock)
        try:
            _at(path, sock.connect)
            (hello, *_), _ = await _next(link)
        except (ConnectionRefusedError, FileNotFoundError):
            link.close()
            await asyncio.to_thread(path.unlink, missing_ok=True)
            return None
        except LinkClosed:
            link.close()
            await asyncio.sleep(RETRY)
        except BaseException:
            link.close()
            raise
        else:
            return link, hello


def _at(path: Path, call: Callable[[str], None]) -> None:
    """By way of the folder's descriptor: the path may be longer than the 107 bytes that a Unix address takes."""
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        call(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


async def _hear_out(
    link: Link, foreign: bool, undo: contextlib.ExitStack
) -> tuple[list[say.Serving], list[tuple[say.Held, socket.socket]], bool]:
    """Everything until Told or Retired, and whether it is retiring. Raises LinkClosed."""
    serving, held = [], []
    while True:
        try:
            messages, fds = await _next(link)
        except NotUnderstood:
            if not foreign:
                raise
            continue
        for message in messages:
            if isinstance(message, say.Serving):
                serving.append(message)
            elif isinstance(message, say.Held):
                sock = undo.enter_context(socket.socket(fileno=fds.pop(0)))
                held.append((message, sock))
            elif isinstance(message, (say.Told, say.Retired)):
                return serving, held, isinstance(message, say.Retired) or message.retiring


async def _next(link: Link) -> tuple[list[Any], list[int]]:
    """The next datagram."""
    loop = asyncio.get_running_loop()
    while (datagram := link.receive()) is None:
        readable = loop.create_future()
        loop.add_reader(link.socket, readable.set_result, None)
        try:
            await readable
        finally:
            loop.remove_reader(link.socket)
    return datagram
