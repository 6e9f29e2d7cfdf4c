"""Sleeping backends: from the client's connect to its first byte, beside the backend's own time from exec to first byte.

The backend is busybox httpd: it answers a millisecond after exec, so what a gateway adds is what one sees. All are
measured by the same client (FirstBytes), in turns. `alone`: the program is started and asked until it answers.
`socket-activate`: what people build of systemd's parts: systemd-socket-activate holds the socket; the first client makes
it start a script, which starts the backend, waits for its port in a tight loop and becomes systemd-socket-proxyd.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench import peers
from tests.bench.peers import Peer
from tests.bench.processes import Address, end
from tests.bench.results import Result, Sample, percentile
from tests.bench.rounds import Bench
from tests.running import Gateway, eventually, free_port

NAMES = ("cold.one", "cold.many")
CHUNK = 10
"""Starts of one peer in a row, which are one sample."""

PATIENCE = 10.0
WAVE_RETRY = 0.001
"""Seconds between two tries of a client whose backend does not listen yet, where many would keep the CPU from starting."""

QUIET = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
REQUEST = b"GET /k HTTP/1.0\r\n\r\n"


def run(bench: Bench) -> None:
    plan = bench.plan
    for name, count, rounds, chunk in (
        ("cold.one", 1, max(1, plan.starts // CHUNK), min(CHUNK, plan.starts)),
        ("cold.many", plan.wave, plan.rounds, 1),
    ):
        if bench.wants(name):
            with bench.scenario(name):
                scenario(bench, name, count, rounds, chunk)


def scenario(bench: Bench, name: str, count: int, rounds: int, chunk: int) -> None:
    title = "cold start" if count == 1 else f"cold start of {count} at once"
    result = Result(
        name,
        f"{title}: connect to first byte",
        "ms",
        reference="socket-activate",
        baseline="alone",
        less_is_better=True,
    )
    directory = bench.directory / name
    directory.mkdir(exist_ok=True)
    with ExitStack() as stack:
        contexts = {
            "alone": alone(directory, count),
            "socket-activate": socket_activate(directory, count),
            "dormant": dormant(directory, count),
        }
        contexts |= {
            f"dormant@{checkout.name}": dormant(directory, count, f"dormant@{checkout.name}", checkout.absolute())
            for checkout in bench.plan.compare
        }
        bench.alternate(result, peers.start(stack, contexts), partial(measure, chunk=chunk), rounds)
    for peer in result.samples:
        middle, high = result.added(peer, ranked=count > 1)
        if peer != "alone" and not math.isnan(middle):
            result.notes[peer] = f"adds {middle:.2f} ms at p50, {high:.2f} ms at p99"


def measure(peer: Peer, chunk: int) -> Sample:
    """So many starts; `tools` of the peer makes one, and gives the seconds of each client."""
    times = [1000 * took for _ in range(chunk) for took in peer.tools()]
    return Sample(
        statistics.median(times), 1000 * percentile(times, 0.5), 1000 * percentile(times, 0.99), times=tuple(times)
    )


class FirstBytes:
    """Clients that ask for a page, as many at a time as there are ports, and note when its first byte comes."""

    def __init__(self, retry: float) -> None:
        self.retry = retry
        """seconds until a refused client tries again"""
        self.took: list[float] = []
        self._begun = time.monotonic()
        self._waiting: list[tuple[float, int]] = []
        """clients that were refused: when they try again, and their port"""
        self._asked: dict[int, tuple[socket.socket, int]] = {}
        self._poll = select.epoll()

    def begin(self) -> None:
        """The times count from now on."""
        self._begun = time.monotonic()

    def ask(self, port: int) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        code = sock.connect_ex(("127.0.0.1", port))
        # On loopback the handshake, or the refusal, is over by now.
        if code == errno.EINPROGRESS:
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            with contextlib.suppress(BlockingIOError):
                sock.send(REQUEST)
                self._asked[sock.fileno()] = (sock, port)
                self._poll.register(sock, select.EPOLLIN)
                return
        sock.close()
        if code not in (0, errno.ECONNREFUSED):
            raise OSError(code, os.strerror(code))
        self._waiting.append((time.monotonic() + self.retry, port))

    def turn(self, timeout: float) -> None:
        """Take what came; ask anew where it is time."""
        for fd, _ in self._poll.poll(timeout):
            sock, port = self._asked.pop(fd)
            with sock:
                self._poll.unregister(fd)
                if not sock.recv(1):
                    raise AssertionError(f"port {port} closed the connection without a byte")
            self.took.append(time.monotonic() - self._begun)
        now = time.monotonic()
        due = [port for when, port in self._waiting if when <= now]
        self._waiting = [(when, port) for when, port in self._waiting if when > now]
        for port in due:
            self.ask(port)

    def all(self) -> list[float]:
        """Wait for everybody."""
        deadline = time.monotonic() + PATIENCE
        while self._asked or self._waiting:
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(self._asked) + len(self._waiting)} got no byte within {PATIENCE:g} s")
            self.turn(self.retry if self._waiting else 1.0)
        return self.took

    def close(self) -> None:
        for sock, _ in self._asked.values():
            sock.close()
        self._poll.close()


def first_bytes(ports: Sequence[int]) -> list[float]:
    """Seconds until the first byte of each, all asked at once."""
    with contextlib.closing(FirstBytes(WAVE_RETRY)) as clients:
        clients.begin()
        for port in ports:
            clients.ask(port)
        return clients.all()


# The peers. Each gives a Peer whose `tools` makes one measurement.


def httpd(directory: Path, port: int) -> list[str]:
    www = directory / "www"
    www.mkdir(exist_ok=True)
    (www / "k").write_bytes(b"x" * 1024)
    return [peers.need("busybox"), "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", str(www)]


@contextlib.contextmanager
def alone(directory: Path, count: int) -> Iterator[Peer]:
    port = free_port(count)
    commands = [httpd(directory, port + index) for index in range(count)]

    def once() -> list[float]:
        pids: list[int] = []
        try:
            with contextlib.closing(FirstBytes(0.0 if count == 1 else WAVE_RETRY)) as clients:
                for index, command in enumerate(commands):
                    # Returns with the exec: the fork is not the backend's own time.
                    pids.append(os.posix_spawn(command[0], command, os.environ, setpgroup=0))
                    if index == 0:
                        clients.begin()
                    clients.ask(port + index)
                    clients.turn(0)
                return clients.all()
        finally:
            for pid in pids:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    yield Peer("alone", Address(port), tools=once)


@contextlib.contextmanager
def socket_activate(directory: Path, count: int) -> Iterator[Peer]:
    activate, proxyd = peers.need("systemd-socket-activate"), peers.need("systemd-socket-proxyd")
    netcat = peers.need("nc.openbsd")
    port = free_port(2 * count)
    commands = []
    for listen in range(port, port + count):
        backend = listen + count
        script = (
            f"{' '.join(httpd(directory, backend))} & "
            f"until {netcat} -z 127.0.0.1 {backend}; do :; done; "
            f"exec {proxyd} 127.0.0.1:{backend}"
        )
        commands.append([activate, "-l", f"127.0.0.1:{listen}", "sh", "-c", script])

    def once() -> list[float]:
        """It serves one life: each time it is put to sleep anew."""
        running: list[subprocess.Popen[bytes]] = []
        ports, backends = range(port, port + count), range(port + count, port + 2 * count)
        try:
            for command in commands:
                one = subprocess.Popen(command, start_new_session=True, **QUIET)  # type: ignore[call-overload]
                running.append(one)
            eventually(lambda: set(ports) <= listening_ports(), "systemd-socket-activate")
            return first_bytes(ports)
        finally:
            for one in running:
                end(one)
            # The backends are not our children: the next ones could find their ports taken.
            eventually(lambda: not set(backends) & listening_ports(), "the end of the backends")

    yield Peer("socket-activate", Address(port), tools=once)


def listening_ports() -> set[int]:
    """Ports on which somebody listens, by proc(5); to connect would wake."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return {int(field[1].rpartition(":")[2], 16) for field in fields if field[3] == "0A"}


@contextlib.contextmanager
def dormant(directory: Path, count: int, name: str = "dormant", checkout: Path | None = None) -> Iterator[Peer]:
    port = free_port(2 * count)
    backends = {
        f"site-{index}": {
            "driver": "process",
            "command": httpd(directory, port + count + index),
            "listen": f"tcp://127.0.0.1:{port + index}",
            "endpoint": f"tcp://127.0.0.1:{port + count + index}",
            "idle": "1h",
        }
        for index in range(count)
    }
    with peers.gateway(directory / name, {"backends": backends}, checkout) as running:
        once = starts_of(running, list(backends), range(port, port + count))
        once()  # what the control plane imports and starts for its first backend is no part of the others' starts
        yield Peer(name, Address(port), (running.pid,), tools=once)


def starts_of(running: Gateway, names: Sequence[str], ports: Sequence[int]) -> Callable[[], list[float]]:
    def once() -> list[float]:
        try:
            return first_bytes(ports)
        finally:
            for name in names:
                running.ask("POST", f"/v1/backends/{name}/stop")

    return once
