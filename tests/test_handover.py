"""The gate of delivery `pass` alone. What a backend sees of it is in test_pass, delivery `accept` is in test_accept."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import Exit, PassedSocket
from backends.endpoint import bind, of_socket, parse
from gateway import diagnostics, handover
from gateway.handover import Instances, PassGate
from tests.plane import connect
from tests.running import PATIENCE


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Watched:
    """A gate with two doors, and what it tells."""

    def __init__(self, stack: ExitStack, idle_after: float | None) -> None:
        self.stack = stack
        self.sockets = [stack.enter_context(bind(parse("tcp://127.0.0.1:0"))) for _ in range(2)]
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.gate = PassGate(
            "web",
            [PassedSocket("door", sock) for sock in self.sockets],
            idle_after,
            lambda source: self.told.put_nowait(source),
            lambda: self.told.put_nowait("busy"),
            lambda since: self.told.put_nowait("quiet"),
        )

    def knock(self, door: int = 0) -> socket.socket:
        return self.stack.enter_context(connect(of_socket(self.sockets[door])))

    def accept(self, door: int = 0) -> socket.socket:
        """What the backend would do."""
        self.sockets[door].settimeout(PATIENCE)
        return self.stack.enter_context(self.sockets[door].accept()[0])

    async def next(self) -> Any:
        return await asyncio.wait_for(self.told.get(), PATIENCE)

    async def nothing(self) -> None:
        """Nothing is told, for as long as several looks take."""
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self.told.get(), 0.05)


@pytest.fixture
async def watched(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(handover, "SHORTEST_LOOK", 0.01)
    watched = Watched(stack, None)
    yield watched
    watched.gate.remove()
    watched.gate.adjust(None)


async def test_the_first_client_is_told_once_until_the_gate_is_armed_again(watched: Watched) -> None:
    watched.knock(1)
    await watched.nothing()
    watched.gate.arm()
    watched.gate.arm()
    assert await watched.next() == f"a client at {of_socket(watched.sockets[1])}"
    watched.knock(0)
    watched.gate.reject("it does not start")
    await watched.nothing()
    watched.gate.arm()  # both wait still
    assert str(await watched.next()).startswith("a client at ")
    await watched.nothing()


async def test_an_open_gate_leaves_the_clients_to_the_backend(watched: Watched) -> None:
    watched.gate.arm()
    watched.gate.open({})
    watched.knock()
    await watched.nothing()
    watched.accept()


async def test_a_removed_gate_is_not_armed_any_more(watched: Watched) -> None:
    watched.gate.arm()
    watched.gate.remove()
    watched.gate.arm()
    watched.knock()
    await watched.nothing()


async def test_close_answers_with_the_connections_and_tells_that_it_is_busy(watched: Watched) -> None:
    assert await watched.gate.close() == 0
    assert watched.told.empty()
    clients = [watched.knock(door) for door in (0, 0, 1)]
    servers = [watched.accept(door) for door in (0, 0, 1)]
    assert await watched.gate.close() == watched.gate.connections == 3
    assert await watched.next() == "busy"
    for sock in (*servers, *clients):
        sock.close()
    assert await watched.gate.close() == watched.gate.connections == 0
    assert watched.told.empty()


async def test_an_idle_policy_has_the_connections_looked_at_while_the_gate_is_open(watched: Watched) -> None:
    watched.gate.open({})
    client = watched.knock()
    server = watched.accept()
    await watched.nothing()  # without a policy nobody looks
    watched.gate.adjust(0.1)
    assert await watched.next() == "busy"
    server.close()
    client.close()
    assert await watched.next() == "quiet"
    watched.knock()
    watched.accept()
    assert await watched.next() == "busy"
    watched.gate.adjust(0.2)  # the first look under another policy always tells
    assert await watched.next() == "busy"
    watched.gate.adjust(None)
    await watched.nothing()


async def test_what_cannot_be_counted_counts_as_used_whatever_the_error_is(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> int:
        raise KeyError("attrs")

    with monkeypatch.context() as broken_library:
        broken_library.setattr(diagnostics, "connections", broken)
        assert await watched.gate.close() == 1
        assert await watched.next() == "busy"
        watched.gate.open({})
        watched.gate.adjust(0.1)
        assert await watched.next() == "busy"
        await watched.nothing()
    assert await watched.next() == "quiet"  # it has gone on looking
    assert caplog.messages == ["connections cannot be counted, so it stays awake: KeyError('attrs')"]


async def test_the_name_of_a_unix_client_is_text(stack: ExitStack, tmp_path: Path) -> None:
    listening = stack.enter_context(bind(parse(f"unix:{tmp_path}/s")))
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.bind(f"\0dormant-test-{os.getpid()}".encode() + b"\xff\n\033[2J")
    client.connect(f"{tmp_path}/s")
    connection, peer = listening.accept()
    with connection:
        name, _ = handover._peer(connection, peer)
    assert name == rf"@dormant-test-{os.getpid()}\xff\n\x1b[2J"


async def test_it_is_known_since_when_there_are_instances_or_none(stack: ExitStack) -> None:
    class Served:
        async def serve(self, connection: socket.socket, _: object) -> Exit:
            with connection:
                await asyncio.get_running_loop().run_in_executor(None, connection.recv, 1)
            return Exit(0)

    listening = stack.enter_context(bind(parse("tcp://127.0.0.1:0")))
    changed: asyncio.Queue[int] = asyncio.Queue()
    config: Any = SimpleNamespace(name="web", limits=SimpleNamespace(connections=10))
    served: Any = Served()
    instances = Instances(config, served, [PassedSocket("", listening)], lambda: changed.put_nowait(instances.count))
    clock = asyncio.get_running_loop().time
    instances.listen()
    since = [instances.since]
    clients = []
    for count in (1, 2):
        clients.append(stack.enter_context(connect(of_socket(listening))))
        assert await asyncio.wait_for(changed.get(), PATIENCE) == count
        since.append(instances.since)
    for count in (1, 0):
        clients.pop().close()
        assert await asyncio.wait_for(changed.get(), PATIENCE) == count
        since.append(instances.since)
    instances.unlisten()
    created, first, second, third, last = since
    assert created < first == second == third < last <= clock()
