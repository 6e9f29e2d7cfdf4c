"""Loads: wrk for requests, a thread for each bulk stream. Bounded in time and count."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from dataclasses import dataclass

from tests.bench.peers import Peer

UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7}


@dataclass(frozen=True)
class Sample:
    """One peer in one round."""

    rate: float
    """requests, connections or bytes per second"""
    p50: float = 0.0
    """microseconds"""
    p99: float = 0.0
    cpu: float = 0.0
    """microseconds of the peer's CPU for each request, or milliseconds for each 100 MB"""
    errors: str = ""


def requests(peer: Peer, connections: int, seconds: float, close: bool) -> Sample:
    """Keep-alive requests, or a new connection for each."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency"]
    command += ["-H", "Connection: close"] if close else []
    before = sum(peer.cpu)
    text = subprocess.run([*command, f"http://127.0.0.1:{peer.port}/k"], capture_output=True, text=True).stdout
    used = sum(peer.cpu) - before
    count = int(_find(r"(\d+) requests in", text))
    errors = re.findall(r"(Socket errors: .*|Non-2xx.*)", text)
    return Sample(
        rate=float(_find(r"Requests/sec:\s+([\d.]+)", text)),
        p50=_microseconds(_find(r"\n\s+50%\s+(\S+)", text)),
        p99=_microseconds(_find(r"\n\s+99%\s+(\S+)", text)),
        cpu=used / max(count, 1) * 1e6,
        errors="; ".join(errors),
    )


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"wrk said: {text}"
    return found[1]


def _microseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def bulk(peer: Peer, streams: int, size: int, up: bool) -> Sample:
    """So many streams of `size` bytes each, to or from the sink (see `sink`)."""
    before, begun = sum(peer.cpu), time.monotonic()
    threads = [threading.Thread(target=_stream, args=(peer.port, size, up)) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    return Sample(rate=streams * size / took, cpu=(sum(peer.cpu) - before) * 1000 / (streams * size / 1e8))


def _stream(port: int, size: int, up: bool) -> None:
    block = bytearray(256 << 10)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall((b"U" if up else b"D") + size.to_bytes(8, "big"))
        left = size
        while left > 0:
            if up:
                sock.sendall(block[: min(left, len(block))])
                left -= len(block)
            else:
                left -= sock.recv_into(block) or size
        sock.recv(1)


class Sink:
    """The other end of `bulk`: takes or gives as many bytes as it is told to, in a process of its own."""

    SCRIPT = """
import socket, sys, threading
def serve(sock):
    with sock:
        head = sock.recv(9, socket.MSG_WAITALL)
        if len(head) < 9: return
        left, block = int.from_bytes(head[1:], "big"), bytearray(256 << 10)
        while left > 0:
            if head[:1] == b"U": n = sock.recv_into(block)
            else: n = sock.send(memoryview(block)[:min(left, len(block))])
            if not n: return
            left -= n
server = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=512)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
