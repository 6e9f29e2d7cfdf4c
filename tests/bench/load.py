"""The clients of the relays. Each is bounded in time and in count, and answers with a Sample.

Requests over TCP: wrk, one thread. wrk cannot dial Unix sockets, redis-benchmark can: it is C as well, one thread, a closed
loop, too, and is given a value of 1 KiB from redis-server, as wrk is given a file of 1 KiB. It is told a count and not a
time: the rate of the round before says which. Bulk and idle connections: this process.
"""

from __future__ import annotations

import csv
import io
import re
import resource
import socket
import threading
import time
from collections.abc import Sequence

from tests.bench.peers import Peer
from tests.bench.processes import Address, Usage, output
from tests.bench.results import Sample

MARGIN = 20.0
"""Seconds that a load may take longer than it was told."""

PILOT = 500
"""Requests that are made to learn the rate of a peer."""

FIRST = 100
"""Idle connections that are opened before the ones that count."""

UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7}
BLOCK = 256 << 10


def sample(value: float, before: Usage, after: Usage, operations: float, **more: float | str) -> Sample:
    """A sample with what the peer's processes used for each operation.

    How the time was divided is known in ticks of 10 ms, how long it was to the nanosecond.
    """
    user, system = after.user - before.user, after.system - before.system
    part = user / (user + system) if user + system > 0 else 0.0
    each = (after.running - before.running) / max(operations, 1) * 1e6
    return Sample(value, user=each * part, system=each * (1 - part), rss=after.rss, pss=after.pss, **more)  # type: ignore[arg-type]


# Requests over TCP


def wrk(peer: Peer, connections: int, seconds: float, close: bool) -> Sample:
    """Requests over connections that are kept, or a new connection for each."""
    length = max(1, round(seconds))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{length}s", "--latency"]
    command += ["-H", "Connection: close"] if close else []
    before = peer.usage
    text = output([*command, f"http://127.0.0.1:{peer.address.port}/k"], length + MARGIN)
    after = peer.usage
    said = read_wrk(text)
    errors = "; ".join(re.findall(r"(?:Socket errors|Non-2xx).*", text))
    return sample(said["rate"], before, after, said["count"], p50=said["p50"], p99=said["p99"], error=errors)


def read_wrk(text: str) -> dict[str, float]:
    """The figures in what wrk says."""
    patterns = {
        "count": r"(\d+) requests in",
        "rate": r"Requests/sec:\s+([\d.]+)",
        "p50": r"\n\s+50%\s+(\S+)",
        "p99": r"\n\s+99%\s+(\S+)",
    }
    found = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, text)
        if match is None:
            raise AssertionError(f"wrk says no {name}: {text}")
        found[name] = microseconds(match[1]) if name.startswith("p") else float(match[1])
    return found


def microseconds(text: str) -> float:
    """wrk's `1.5ms`."""
    match = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text)
    if match is None:
        raise AssertionError(f"wrk says {text!r}, which is no time")
    return float(match[1]) * UNITS[match[2]]


# Requests over Unix sockets


class RedisBenchmark:
    """Remembers the rate of each peer, for the count of the next round."""

    def __init__(self) -> None:
        self.rates: dict[tuple[str, int, bool], float] = {}

    def __call__(self, peer: Peer, connections: int, seconds: float, close: bool) -> Sample:
        known = (peer.name, connections, close)
        if known not in self.rates:
            self.rates[known] = self.run(peer, connections, close, PILOT)["rps"]
        count = int(max(self.rates[known] * seconds, PILOT))
        before = peer.usage
        said = self.run(peer, connections, close, count, seconds)
        after = peer.usage
        self.rates[known] = said["rps"]
        p50, p99 = said["p50_latency_ms"] * 1000, said["p99_latency_ms"] * 1000
        return sample(said["rps"], before, after, count, p50=p50, p99=p99)

    @staticmethod
    def run(peer: Peer, connections: int, close: bool, count: int, seconds: float = 0.0) -> dict[str, float]:
        command = ["redis-benchmark", "-s", peer.address.path, "-c", str(connections), "-n", str(count), "--csv"]
        command += ["-k", "0"] if close else []
        return read_redis_benchmark(output([*command, "get", "k"], 2 * seconds + MARGIN))


def read_redis_benchmark(text: str) -> dict[str, float]:
    """The figures of its only line, by the names in its head."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if len(rows) != 1:
        raise AssertionError(f"redis-benchmark says: {text}")
    return {name: float(value) for name, value in rows[0].items() if name != "test"}


def redis_server(address: Address) -> list[str]:
    return ["redis-server", "--port", "0", "--unixsocket", address.path, "--save", "", "--loglevel", "warning"]


def redis_fill(address: Address) -> None:
    """Put the value there that is asked for."""
    with address.connect() as sock:
        sock.sendall(b"SET k %s\r\n" % (b"x" * 1024))
        assert sock.recv(16) == b"+OK\r\n"


# Bulk


def bulk(peer: Peer, streams: int, megabytes: int, up: bool) -> Sample:
    """So many streams that share the bytes, to or from a sink (tests.bench.servers); MB/s."""
    size = megabytes * 10**6 // streams
    socks = [peer.address.connect() for _ in range(streams)]
    failed: list[str] = []

    def run(sock: socket.socket) -> None:
        try:
            stream(sock, size, up)
        except OSError as error:
            failed.append(str(error))

    try:
        before, begun = peer.usage, time.monotonic()
        threads = [threading.Thread(target=run, args=(sock,)) for sock in socks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()  # each system call in it has a deadline
        took = time.monotonic() - begun
        after = peer.usage
    finally:
        for sock in socks:
            sock.close()
    if failed:
        raise AssertionError(f"a stream broke: {failed[0]}")
    moved = streams * size / 1e6
    return sample(moved / took, before, after, moved)


def stream(sock: socket.socket, size: int, up: bool) -> None:
    """One stream, until the last byte has arrived."""
    block = memoryview(bytearray(BLOCK))
    sock.sendall((b"U" if up else b"D") + size.to_bytes(8, "big"))
    left = size
    while left > 0:
        moved = sock.send(block[:left]) if up else sock.recv_into(block)
        if not moved:
            raise OSError(f"it ended {left} bytes too early")
        left -= moved
    if up and sock.recv(1) != b".":
        raise OSError("not everything arrived")


# Idle connections


def idle(peer: Peer, wanted: int) -> tuple[float, float, int]:
    """Connections that were used once and then rest: bytes (RSS) and descriptors of the peer for each, and how many.

    As many as the peer has descriptors for, when those are fewer. The first ones do not count: with them comes code that
    was not in memory before.
    """
    socks: list[socket.socket] = []
    try:
        fresh = peer.usage
        used_connections(peer.address, FIRST, socks)
        before = peer.usage
        descriptors = (before.descriptors - fresh.descriptors) / FIRST
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        fit = int((limit - before.descriptors - 200) / max(descriptors, 1))
        more = min(wanted, fit)
        used_connections(peer.address, more, socks)
        time.sleep(0.1)  # what the peer still does for the last one
        after = peer.usage
        return (after.rss - before.rss) / more, (after.descriptors - before.descriptors) / more, more
    finally:
        close(socks)


def used_connections(address: Address, count: int, socks: list[socket.socket]) -> None:
    """Open connections to an echo, each with one small exchange behind it."""
    for _ in range(count):
        sock = address.connect()
        socks.append(sock)
        sock.sendall(b"abc")
        if sock.recv(3) != b"abc":
            raise AssertionError("no echo")


def close(socks: Sequence[socket.socket]) -> None:
    for sock in socks:
        sock.close()
