"""A worker process of the data plane, driven over its link: the tests play the control plane."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from backends.endpoint import Endpoint, bind, of_socket, parse
from gateway.plane import link as say
from gateway.plane.link import Link
from tests.running import PATIENCE

M = TypeVar("M", bound=say.Message)

LIMITS: dict[str, Any] = {
    "connections": 10000, "pending": 10000, "connect_timeout": 5.0, "idle_timeout": 0.0,
    "flow_timeout": 30.0, "flow_datagrams": 16, "flow_bytes": 1 << 20,
}  # fmt: skip


class Plane:
    """One worker. `hear` waits for a message of a type, and keeps the others for later."""

    def __init__(self, directory: str, limit: int | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gateway.plane", str(theirs.fileno()), "-1", directory, "0"],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))),
            )
        self.link = Link(ours)
        self.heard: list[Any] = []
        self.listening: list[socket.socket] = []
        self.hello = self.hear(say.Hello)
        self.count()  # once it answers, it has all the descriptors that it has at rest

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, *messages: say.Message, fds: list[int] | None = None) -> None:
        self.link.send(*messages, fds=fds or [])
        assert not self.link.pending

    def hear(self, kind: type[M], timeout: float = PATIENCE) -> M:
        deadline = time.monotonic() + timeout
        while True:
            for index, message in enumerate(self.heard):
                if isinstance(message, kind):
                    del self.heard[index]
                    return message
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.link], [], [], left)[0]:
                raise AssertionError(f"no {kind.__name__} within {timeout} s; heard {self.heard}")
            self._receive()

    def said_nothing_of(self, kind: type[say.Message]) -> bool:
        """After a question and its answer: everything that was said before the answer is here."""
        self.count()
        return not any(isinstance(message, kind) for message in self.heard)

    def _receive(self) -> None:
        while (datagram := self.link.receive()) is not None:
            messages, fds = datagram
            self.heard += messages
            self.listening += [socket.socket(fileno=fd) for fd in fds]

    def count(self) -> dict[int, say.Tally]:
        self.send(say.Count(1))
        return {tally.backend: tally for tally in self.hear(say.Counted).tallies}

    def serve(self, backend: int = 1, listen: str = "tcp://127.0.0.1:0", name: str = "", **limits: Any) -> Endpoint:
        """A backend with one listener; where that listens."""
        self.send(say.Serve(backend, f"backend-{backend}", "", **{**LIMITS, **limits}))
        return self.listen(backend, listen, name, 100 + backend)

    def listen(self, backend: int, listen: str, name: str, listener: int) -> Endpoint:
        """One more listener of a backend; where it listens."""
        sock = bind(parse(listen))
        self.listening.append(sock)
        self.send(say.Listen(listener, backend, name, listen), fds=[sock.fileno()])
        self.count()  # once it answers, it has taken the orders before
        return of_socket(sock)

    def open(self, backend: int, endpoint: Endpoint | str) -> None:
        self.send(say.Open(backend, {"": str(endpoint)}))

    def close(self) -> None:
        for sock in self.listening:
            sock.close()
        self.link.close()
        assert self.process.wait(PATIENCE) == 0


@contextlib.contextmanager
def plane(limit: int | None = None) -> Iterator[Plane]:
    """`limit`: how many descriptors the worker may have."""
    with tempfile.TemporaryDirectory() as directory:
        running = Plane(directory, limit)
        try:
            yield running
            running.close()
        finally:
            if running.process.poll() is None:
                running.process.kill()
                running.process.wait()


def connect(address: Endpoint, timeout: float = PATIENCE) -> socket.socket:
    assert not isinstance(address, str)
    sock = socket.socket(address.family, socket.SOCK_STREAM)  # type: ignore[union-attr]
    sock.settimeout(timeout)
    try:
        sock.connect(address.sockaddr)  # type: ignore[union-attr]
    except OSError:
        sock.close()
        raise
    return sock


class Upstream:
    """A listening socket that plays the backend."""

    def __init__(self, address: str = "tcp://127.0.0.1:0", backlog: int = 512) -> None:
        self.socket = bind(parse(address), backlog)
        self.socket.settimeout(PATIENCE)
        self.endpoint = of_socket(self.socket)

    def accept(self) -> socket.socket:
        sock, _ = self.socket.accept()
        sock.settimeout(PATIENCE)
        return sock

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
