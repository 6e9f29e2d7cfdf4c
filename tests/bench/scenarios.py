"""The scenarios. Each yields rows for the report and says on stderr how far it is."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import load, peers
from tests.bench.load import Sample, Sink
from tests.bench.peers import Peer
from tests.running import Gateway, free_port


@dataclass
class Result:
    """One line of the report: the samples of each peer, round by round."""

    title: str
    unit: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def add(self, peer: str, sample: Sample) -> None:
        self.samples.setdefault(peer, []).append(sample)

    def ratios(self, peer: str, reference: str) -> list[float]:
        pairs = zip(self.samples[peer], self.samples[reference], strict=True)
        return [mine.rate / theirs.rate for mine, theirs in pairs]


def progress(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def alternate(result: Result, rounds: int, there: list[Peer], measure: Callable[[Peer], Sample]) -> None:
    """All peers in each round, in one order and then in the other."""
    for turn in range(rounds):
        for peer in there if turn % 2 == 0 else reversed(there):
            progress(f"{result.title}: round {turn + 1} of {rounds}, {peer.name}")
            result.add(peer.name, measure(peer))


def relay(directory: Path, rounds: int, seconds: float) -> list[Result]:
    """Warm connections: requests over kept and new connections, and bulk."""
    results = []
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(peers.direct(directory))
        there = [site, *_proxies(stack, directory, site.port)]
        for title, connections, close in (
            ("keep-alive, 1 connection", 1, False),
            ("keep-alive, 32 connections", 32, False),
            ("keep-alive, 256 connections", 256, False),
            ("new connections, 32 at a time", 32, True),
        ):
            result = Result(title, "requests/s")
            alternate(result, rounds, there, lambda peer, c=connections, x=close: load.requests(peer, c, seconds, x))  # type: ignore[misc]
            results.append(result)
    with contextlib.ExitStack() as stack:
        port = free_port()
        stack.enter_context(peers.process([sys.executable, "-c", Sink.SCRIPT, str(port)], port))
        there = [Peer("direct", port), *_proxies(stack, directory, port)]
        for streams, up in ((1, False), (4, False), (1, True), (4, True)):
            result = Result(f"bulk, {streams} stream{'s' * (streams > 1)} {'up' if up else 'down'}", "bytes/s")
            size = int(3e8 * seconds / streams)
            alternate(result, rounds, there, lambda peer, n=streams, s=size, u=up: load.bulk(peer, n, s, u))  # type: ignore[misc]
            results.append(result)
    return results


def _proxies(stack: contextlib.ExitStack, directory: Path, backend: int) -> list[Peer]:
    found = [stack.enter_context(peers.haproxy(directory, backend))]
    if peers.find("systemd-socket-proxyd"):
        found.append(stack.enter_context(peers.socket_proxyd(backend)))
    found.append(stack.enter_context(peers.dormant(directory, backend)))
    return found


def cold(directory: Path, rounds: int, seconds: float) -> list[Result]:
    """A sleeping nginx: from the client's connect to its first byte, beside nginx's own time from exec to its first byte."""
    result = Result("cold start of nginx", "starts/s")
    port = free_port(2)
    command = peers.nginx_command(directory, port + 1)
    keys = {
        "driver": "process", "command": command, "listen": f"tcp://127.0.0.1:{port}",
        "endpoint": f"tcp://127.0.0.1:{port + 1}", "idle": "1h",
    }  # fmt: skip
    gateway = Gateway(directory, {"backends": {"site": keys}}).start()
    try:
        for turn in range(4 * rounds):
            progress(f"{result.title}: {turn + 1} of {4 * rounds}")
            result.add("alone", _cold_alone(command, port + 1))
            begun = time.monotonic()
            _first_byte(port)
            took = time.monotonic() - begun
            result.add("dormant", Sample(rate=1 / took, p50=took * 1e6))
            gateway.ask("POST", "/v1/backends/site/stop")
    finally:
        gateway.stop()
    return [result]


def _cold_alone(command: list[str], port: int) -> Sample:
    begun = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as running:
        while True:
            try:
                _first_byte(port)
                break
            except ConnectionRefusedError:
                continue
        took = time.monotonic() - begun
        os.killpg(running.pid, signal.SIGTERM)
    return Sample(rate=1 / took, p50=took * 1e6)


def _first_byte(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"GET /k HTTP/1.0\r\n\r\n")
        assert sock.recv(1)


def overhead(result: Result) -> tuple[float, float]:
    """Milliseconds that Dormant adds to a cold start: median and 99th percentile of the differences."""
    pairs = zip(result.samples["dormant"], result.samples["alone"], strict=True)
    added = sorted((mine.p50 - alone.p50) / 1000 for mine, alone in pairs)
    return statistics.median(added), added[min(len(added) - 1, int(len(added) * 0.99))]


SCENARIOS: dict[str, Callable[[Path, int, float], list[Result]]] = {"relay": relay, "cold": cold}
