"""`pass`: a program on a handed-over socket, against the same program that listens by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench import load, peers
from tests.bench.peers import Peer
from tests.bench.processes import process
from tests.bench.results import Result
from tests.bench.rounds import Bench
from tests.running import eventually

NAMES = ("pass.keepalive", "pass.new")
CONNECTIONS = 32
ITSELF = "by itself"


def run(bench: Bench) -> None:
    if not bench.wants(*NAMES):
        return
    with bench.scenario("pass"), ExitStack() as stack:
        directory = bench.directory / "pass"
        directory.mkdir(exist_ok=True)
        there = peers.start(stack, {ITSELF: by_itself(directory), "dormant": handed_over(directory)})
        for name, title, close in (
            ("pass.keepalive", f"handed-over socket: keep-alive, {CONNECTIONS} connections", False),
            ("pass.new", f"handed-over socket: new connections, {CONNECTIONS} at a time", True),
        ):
            if bench.wants(name):
                result = Result(name, title, "requests/s", "request", reference=ITSELF, baseline=ITSELF)
                measure = partial(load.wrk, connections=CONNECTIONS, seconds=bench.plan.seconds, close=close)
                bench.alternate(result, there, measure)


@contextlib.contextmanager
def by_itself(directory: Path) -> Iterator[Peer]:
    address = peers.reserve(directory, "itself", unix=False)
    with process(peers.site(directory, "itself", address), address) as pid:
        yield Peer(ITSELF, address, (pid,))


@contextlib.contextmanager
def handed_over(directory: Path) -> Iterator[Peer]:
    address = peers.reserve(directory, "handed-over", unix=False)
    keys = {
        "driver": "process",
        "command": peers.site(directory, "handed-over", address),
        "listen": str(address),
        "delivery": "pass",
        # nginx takes over listening sockets that this variable names: how it upgrades itself.
        "env": {"NGINX": "3;"},
        "idle": "1h",
    }
    with peers.gateway(directory / "dormant", {"backends": {"site": keys}}) as running:
        eventually(address.answers, "nginx behind Dormant")
        running.wait_state("site", "ready")
        yield Peer("dormant", address, (running.pid,))
