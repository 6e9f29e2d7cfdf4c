"""Datagrams, beside nginx stream and a direct connection: how many are answered in a second, and how soon one is.

Client and echo are single-threaded Python, sixteen flows with four datagrams under way each: as many as the default receive
buffer of one socket takes, so that nothing is dropped for want of room in the echo. A datagram that is not answered in
time counts as lost, and another goes in its place.
"""

from __future__ import annotations

import contextlib
import select
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import load, peers, servers
from tests.bench.peers import Peer
from tests.bench.processes import Address, process
from tests.bench.results import Result, Sample, percentile
from tests.bench.rounds import Bench
from tests.running import eventually, free_port

NAMES = ("udp.rate", "udp.latency")
FLOWS, UNDER_WAY = 16, 4
PAYLOAD = b"x" * 64
LOST = 0.2
"""Seconds after which a datagram counts as lost."""


def run(bench: Bench) -> None:
    if not bench.wants(*NAMES):
        return
    with bench.scenario("udp"), ExitStack() as stack:
        directory = bench.directory / "udp"
        directory.mkdir(exist_ok=True)
        backend = Address(free_port())
        stack.enter_context(process(servers.command("udp", backend.port)))
        eventually(lambda: answered(backend), "the echo of datagrams")
        contexts: dict[str, Any] = {
            "nginx-stream": peers.nginx_stream(directory, Address(free_port()), backend, udp=True),
            "dormant": dormant(directory, Address(free_port()), backend),
        }
        there = [Peer("direct", backend), *peers.start(stack, contexts)]
        for name, title, unit, measure in (
            ("udp.rate", f"UDP, {FLOWS} flows of {len(PAYLOAD)} bytes", "answers/s", rate),
            ("udp.latency", "UDP, one at a time: round trip", "us", latency),
        ):
            if bench.wants(name):
                result = Result(name, title, unit, "answer", "nginx-stream", less_is_better=measure is latency)
                bench.alternate(result, there, partial(measure, seconds=bench.plan.seconds))


@contextlib.contextmanager
def dormant(directory: Path, listen: Address, backend: Address) -> Iterator[Peer]:
    keys = {
        "driver": "external",
        "listen": f"udp://127.0.0.1:{listen.port}",
        "endpoint": f"udp://127.0.0.1:{backend.port}",
        "ready": {"udp": {"send": "x"}},
        "idle": "1h",
    }
    with peers.gateway(directory / "dormant", {"backends": {"echo": keys}}) as running:
        eventually(lambda: answered(listen), "datagrams through Dormant")
        yield Peer("dormant", listen, (running.pid,))


def answered(address: Address) -> bool:
    with flow(address) as sock:
        sock.settimeout(LOST)
        try:
            sock.send(PAYLOAD)
            return sock.recv(2048) == PAYLOAD
        except OSError:
            return False


def flow(address: Address) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(address.sockaddr)
    return sock


def rate(peer: Peer, seconds: float) -> Sample:
    """Answers in a second, with some datagrams under way in each of several flows."""
    with ExitStack() as stack:
        flows = [stack.enter_context(flow(peer.address)) for _ in range(FLOWS)]
        epoll = stack.enter_context(contextlib.closing(select.epoll()))
        for sock in flows:
            sock.setblocking(False)
            epoll.register(sock, select.EPOLLIN)
        exchange = Exchange(epoll, {sock.fileno(): sock for sock in flows})
        before, begun = peer.usage, time.monotonic()
        exchange.run(begun + seconds)
        count, took = exchange.answered, time.monotonic() - begun
        after = peer.usage
        lost = exchange.drain()
    return load.sample(count / took, before, after, count, error=f"{lost} lost" if lost else "")


class Exchange:
    """Datagrams to an echo: one goes out for each that comes back."""

    def __init__(self, epoll: select.epoll, flows: dict[int, socket.socket]) -> None:
        self.epoll = epoll
        self.flows = flows
        self.sent = self.answered = 0

    def fill(self) -> None:
        for sock in self.flows.values():
            for _ in range(UNDER_WAY):
                sock.send(PAYLOAD)
        self.sent += len(self.flows) * UNDER_WAY

    def run(self, end: float) -> None:
        self.fill()
        while time.monotonic() < end:
            events = self.epoll.poll(LOST)
            if not events:  # all of them are lost
                self.fill()
            self.take(events, again=True)

    def take(self, events: list[tuple[int, int]], again: bool) -> None:
        buffer = bytearray(2048)
        for fd, _ in events:
            sock = self.flows[fd]
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.recv_into(buffer)
                    self.answered += 1
                    if again:
                        sock.send(PAYLOAD)
                        self.sent += 1

    def drain(self) -> int:
        """Wait for those that are under way; how many were lost in all."""
        while events := self.epoll.poll(LOST):
            self.take(events, again=False)
        return self.sent - self.answered


def latency(peer: Peer, seconds: float) -> Sample:
    """Microseconds from a datagram to its answer, one at a time."""
    times: list[float] = []
    lost = serial = 0
    with flow(peer.address) as sock:
        sock.settimeout(LOST)
        before, end = peer.usage, time.monotonic() + seconds
        while (sent := time.monotonic()) < end:
            serial += 1
            payload = serial.to_bytes(8, "big") + PAYLOAD[8:]
            sock.send(payload)
            try:
                while sock.recv(2048) != payload:
                    pass  # an answer that came too late
            except TimeoutError:
                lost += 1
            else:
                times.append((time.monotonic() - sent) * 1e6)
        after = peer.usage
    if not times:
        raise AssertionError("no datagram was answered")
    middle, high = percentile(times, 0.5), percentile(times, 0.99)
    error = f"{lost} lost" if lost else ""
    return load.sample(statistics.median(times), before, after, len(times), p50=middle, p99=high, error=error)
