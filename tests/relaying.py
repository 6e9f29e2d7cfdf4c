"""Test support: a process that relays, and what one has to know about it from outside.

`relayed` is the only place that knows which process that is. For now it is the sketch at the end of this file, which
accepts, connects and joins, and knows no gates: `python -m tests.relaying LISTEN TARGET`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backends.endpoint import Tcp, Unix, bind, of_socket, parse
from gateway.plane.loop import Loop
from gateway.plane.relay import End, join, pipes

DEADLINE = 20.0  # seconds; a read that takes longer is broken


Address = Tcp | Unix


def stream(text: str) -> Address:
    """The address of a stream socket of this machine."""
    endpoint = parse(text)
    assert isinstance(endpoint, Address)
    return endpoint


@dataclass(frozen=True)
class Relayed:
    """A relaying process, where it listens, and where it connects to."""

    pid: int
    listen: Address
    target: Address

    def connect(self) -> socket.socket:
        """A client of it."""
        client = socket.socket(self.listen.family)
        client.settimeout(DEADLINE)
        client.connect(self.listen.sockaddr)
        return client

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def highest_descriptor(self) -> int:
        return max(map(int, os.listdir(f"/proc/{self.pid}/fd")))

    def resident(self) -> int:
        """Memory in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10

    def cpu(self) -> float:
        """Seconds of CPU that it used so far."""
        return time.clock_gettime(~self.pid << 3 | 2)  # what clock_getcpuclockid(3) makes of a pid

    def load(self, seconds: float = 0.3) -> float:
        """Which part of a CPU it uses during the next moment. It must not die in it."""
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            before = self.cpu()
            assert not poll.poll(seconds * 1000), "the relay died"
            return (self.cpu() - before) / seconds
        finally:
            os.close(pidfd)


@contextlib.contextmanager
def relayed(listen: str, target: Address) -> Iterator[Relayed]:
    """A relay process from `listen` to `target`. At the end it must be alive and must not have complained."""
    command = [sys.executable, "-m", "tests.relaying", listen, str(target)]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints)
        assert process.stdin is not None and process.stdout is not None
        try:
            where = process.stdout.readline().decode().strip()
            if where:
                yield Relayed(process.pid, stream(where), target)
            process.stdin.close()
            status = process.wait(DEADLINE)
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        complaints.seek(0)
        text = complaints.read().decode()
        assert not text, text
        assert status == 0 and where


# The sketch


class Connecting:
    """A client whose target does not answer at once."""

    def __init__(self, acceptor: Acceptor, client: socket.socket) -> None:
        self.acceptor = acceptor
        self.client = client
        self.upstream = socket.socket(acceptor.target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if isinstance(acceptor.target, Tcp):
            self.upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.attempt()

    def attempt(self) -> None:
        code = self.upstream.connect_ex(self.acceptor.target.sockaddr)
        if code == 0:
            self.stands()
        elif code == errno.EINPROGRESS:
            self.acceptor.loop.add(self.upstream.fileno(), self, select.EPOLLOUT)
        elif code == errno.EAGAIN:  # the backlog of a Unix socket is full
            self.acceptor.loop.later(0.002, self.attempt)
        else:
            self.failed()

    def event(self, mask: int) -> None:
        self.acceptor.loop.remove(self.upstream.fileno())
        if self.upstream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.failed()
        else:
            self.stands()

    def stands(self) -> None:
        join(self.acceptor.loop, self.client, self.upstream, self.acceptor)

    def failed(self) -> None:
        self.acceptor.loop.discard(self.client)
        self.acceptor.loop.discard(self.upstream)


class Acceptor:
    """The listening socket."""

    def __init__(self, loop: Loop, sock: socket.socket, target: Address) -> None:
        self.loop = loop
        self.sock = sock
        self.target = target
        self.resume()

    def resume(self) -> None:
        self.loop.add(self.sock.fileno(), self, select.EPOLLIN)

    def event(self, mask: int) -> None:
        while True:
            try:
                client, _ = self.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self.pause(error)
                return
            client.setblocking(False)
            try:
                Connecting(self, client)
            except OSError as error:
                client.close()
                self.pause(error)
                return

    def pause(self, error: OSError) -> None:
        if error.errno != errno.EMFILE:
            raise error
        self.loop.remove(self.sock.fileno())
        self.loop.later(0.05, self.resume)

    def ended(self, end: End) -> None:
        pass


class Parent:
    """Standard input: the end of file is the order to leave."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def event(self, mask: int) -> None:
        self.loop.stop()


def main() -> None:
    loop = Loop()
    sock = bind(parse(sys.argv[1]))
    Acceptor(loop, sock, stream(sys.argv[2]))
    loop.add(0, Parent(loop), select.EPOLLIN)
    print(of_socket(sock), flush=True)
    loop.run()
    loop.close()
    pipes.close()


if __name__ == "__main__":
    main()
