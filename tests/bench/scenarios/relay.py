"""Warm connections through each relay: requests, bulk, and connections that rest; over TCP and over Unix sockets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import load, peers, servers
from tests.bench.peers import Peer
from tests.bench.processes import Address, process
from tests.bench.results import Result, Sample
from tests.bench.rounds import Bench

FAMILIES = ("tcp", "unix")
CONNECTIONS = (1, 32, 256)
NEW_AT_A_TIME = 32
BULK = (("down", 1), ("down", 4), ("up", 1), ("up", 4))

NAMES = (
    *(f"relay.keepalive.{family}.{count}" for family in FAMILIES for count in CONNECTIONS),
    *(f"relay.new.{family}" for family in FAMILIES),
    *(f"relay.bulk.{family}.{way}.{streams}" for family in FAMILIES for way, streams in BULK),
    *(f"relay.idle.{family}" for family in FAMILIES),
)

Load = Callable[..., Sample]


def run(bench: Bench) -> None:
    for family in FAMILIES:
        for part in (requests, bulk, idle):
            with bench.scenario(f"relay.{part.__name__}.{family}"):
                part(bench, family)


def requests(bench: Bench, family: str) -> None:
    """Over connections that are kept, and over new ones."""
    cases = [
        (f"relay.keepalive.{family}.{count}", f"keep-alive, {count} connection{'s' * (count > 1)}", count, False)
        for count in (bench.plan.unix_connections if family == "unix" else CONNECTIONS)
    ]
    cases.append((f"relay.new.{family}", f"new connections, {NEW_AT_A_TIME} at a time", NEW_AT_A_TIME, True))
    cases = [case for case in cases if bench.wants(case[0])]
    if not cases:
        return
    with ExitStack() as stack:
        directory = folder(bench, f"requests-{family}")
        backend = peers.reserve(directory, "backend", family == "unix")
        load_ = stack.enter_context(site(directory, backend))
        there = relays(bench, stack, directory, backend)
        for name, title, count, close in cases:
            result = Result(name, f"{title}, {words(family)}", "requests/s", "request")
            measure = partial(load_, connections=count, seconds=bench.plan.seconds, close=close)
            bench.alternate(result, there, measure)


@contextlib.contextmanager
def site(directory: Path, backend: Address) -> Iterator[Load]:
    """The server that is asked for 1 KiB, and the load that fits it."""
    if backend.path:
        with process(load.redis_server(backend), backend):
            load.redis_fill(backend)
            yield load.RedisBenchmark()
    else:
        with process(peers.site(directory, "site", backend), backend):
            yield load.wrk


def bulk(bench: Bench, family: str) -> None:
    cases = [(f"relay.bulk.{family}.{way}.{streams}", way, streams) for way, streams in BULK]
    cases = [case for case in cases if bench.wants(case[0])]
    if not cases:
        return
    with ExitStack() as stack:
        directory = folder(bench, f"bulk-{family}")
        backend = server(stack, directory, "sink", family)
        there = relays(bench, stack, directory, backend)
        for name, way, streams in cases:
            title = f"bulk {way}, {streams} stream{'s' * (streams > 1)}, {words(family)}"
            measure = partial(load.bulk, streams=streams, megabytes=bench.plan.bulk, up=way == "up")
            bench.alternate(Result(name, title, "MB/s", "MB"), there, measure)


def idle(bench: Bench, family: str) -> None:
    """Fresh processes for each sample: what was freed once would hide what a connection costs."""
    name = f"relay.idle.{family}"
    if not bench.wants(name):
        return
    wanted = bench.plan.idle
    title = f"{wanted:,} idle connections, {words(family)}"
    memory = Result(f"{name}.memory", f"{title}: memory", "bytes each", baseline="", less_is_better=True)
    descriptors = Result(f"{name}.descriptors", f"{title}: descriptors", "each", baseline="", less_is_better=True)
    with ExitStack() as stack:
        directory = folder(bench, f"idle-{family}")
        backend = server(stack, directory, "echo", family)

        def measure(peer: Peer) -> Sample:
            with ExitStack() as one:
                fresh = peers.start(one, {peer.name: contexts(bench, directory, backend)[peer.name]})[0]
                if not fresh.available:
                    raise AssertionError(fresh.note)
                size, fds, count = load.idle(fresh, wanted)
                after = fresh.usage
            if count < wanted:
                memory.notes[peer.name] = f"only {count:,}: there are no more descriptors"
            descriptors.add(peer.name, Sample(fds))
            return Sample(size, rss=after.rss, pss=after.pss)

        names = contexts(bench, directory, backend)
        bench.alternate(
            memory, [Peer(name, backend) for name in names], measure, min(bench.plan.rounds, bench.plan.fresh_rounds)
        )
    bench.results.append(descriptors)


# What they share


def contexts(bench: Bench, directory: Path, backend: Address) -> dict[str, Any]:
    return peers.relays(directory, backend, bench.plan.workers, bench.plan.compare)


def relays(bench: Bench, stack: ExitStack, directory: Path, backend: Address) -> list[Peer]:
    """A direct connection and all relays, started."""
    return [Peer("direct", backend), *peers.start(stack, contexts(bench, directory, backend))]


def server(stack: ExitStack, directory: Path, kind: str, family: str) -> Address:
    """One of tests.bench.servers."""
    address = peers.reserve(directory, "backend", family == "unix")
    stack.enter_context(process(servers.command(kind, address.path or address.port), address))
    return address


def folder(bench: Bench, name: str) -> Path:
    path = bench.directory / name
    path.mkdir(exist_ok=True)
    return path


def words(family: str) -> str:
    return {"tcp": "TCP", "unix": "Unix"}[family]
