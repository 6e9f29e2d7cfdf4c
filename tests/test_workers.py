"""The control plane's side of the data plane: a real worker process is told what to serve, and is replaced when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.endpoint import Endpoint, bind, of_socket, parse
from gateway import workers as module
from gateway.config import Limits, build
from gateway.plane import link as say
from gateway.workers import RelayGate, Workers
from tests.plane import Upstream, connect
from tests.running import PATIENCE, children

WEB: dict[str, Any] = {"command": "true", "listen": "unix:@listen", "endpoint": "unix:@endpoint"}
CONFIG = build({"backends": {"web": WEB}}, Path("/"), "the test").backends["web"]


class Heard(logging.Handler):
    """Everything that was reported or logged and was not asked for yet, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[tuple[Any, ...]] = []
        self.news = asyncio.Event()

    def wake(self, backend: int, source: str) -> None:
        self.add("wake", backend, source)

    def busy(self, backend: int) -> None:
        self.add("busy", backend)

    def quiet(self, backend: int, since: float) -> None:
        self.add("quiet", backend, since)

    def refused(self, backend: int, error: str) -> None:
        self.add("refused", backend, error)

    def limited(self, backend: int, limit: str, count: int, source: str) -> None:
        self.add("limited", backend, limit, count, source)

    def emit(self, record: logging.LogRecord) -> None:
        self.add("log", record.getMessage())

    def add(self, *item: Any) -> None:
        self.items.append(item)
        self.news.set()

    async def next(self, *kinds: str) -> tuple[Any, ...]:
        """The next report of one of these kinds."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for index, item in enumerate(self.items):
                    if item[0] in kinds:
                        return self.items.pop(index)
                self.news.clear()
                await self.news.wait()

    async def line(self, text: str) -> None:
        """Wait for a line of the log."""
        while text not in (await self.next("log"))[1]:
            pass


class Plane:
    """The workers, and the sockets that they were given."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.workers = Workers(self.heard)
        self.sockets: list[socket.socket] = []
        self.numbers: list[int] = []

    def serve(self, number: int = 1, **limits: Any) -> Endpoint:
        """A backend with one listener; where that listens."""
        sock = bind(parse("tcp://127.0.0.1:0"))
        self.sockets.append(sock)
        self.configure(number, **limits)
        self.numbers += self.workers.listen(number, [("web", sock)])
        return of_socket(sock)

    def configure(self, number: int, **limits: Any) -> None:
        self.workers.serve(number, msgspec.structs.replace(CONFIG, name=f"web{number}", limits=Limits(**limits)))

    @property
    def pid(self) -> int:
        return self.workers.pids[0]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def parked(self, count: int, backend: int = 1) -> None:
        await self.until(lambda tallies: backend in tallies and tallies[backend].parked == count)

    async def until(self, condition: Callable[[dict[int, say.Tally]], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition(await self.workers.count()):
                pass


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    plane = Plane()
    for name in ("gateway", "asyncio"):
        logging.getLogger(name).addHandler(plane.heard)
    await plane.workers.start()
    yield plane
    await plane.workers.stop()
    for name in ("gateway", "asyncio"):
        logging.getLogger(name).removeHandler(plane.heard)
    for sock in plane.sockets:
        sock.close()


async def accepted(upstream: Upstream) -> socket.socket:
    """The next connection of the backend, while the event loop goes on."""
    return await asyncio.to_thread(upstream.accept)


async def at_once(waited: Awaitable[int]) -> int:
    """What is answered without waiting for a deadline."""
    async with asyncio.timeout(module.ANSWER_DEADLINE / 2):
        return await waited


# Orders and reports


async def test_a_client_wakes_its_backend_by_its_address_and_is_served_when_the_gate_opens(plane: Plane) -> None:
    address = plane.serve()
    with Upstream() as upstream, connect(address) as client:
        client.sendall(b"question")
        assert await plane.heard.next("wake") == ("wake", 1, "{}:{}".format(*client.getsockname()))
        await plane.parked(1)
        plane.workers.open(1, {"": upstream.endpoint})
        with await accepted(upstream) as server:
            assert server.recv(100) == b"question"
            assert await plane.heard.next("busy") == ("busy", 1)
            assert plane.workers.is_busy(1) and not plane.workers.is_busy(2)
    before = asyncio.get_running_loop().time()
    _, backend, since = await plane.heard.next("quiet")
    assert backend == 1 and since <= before + 1
    assert not plane.workers.is_busy(1)
    assert await plane.workers.count() == {1: say.Tally(1, 0, 0, 1, 8, 0, 0)}


async def test_the_name_of_the_listener_chooses_the_endpoint(plane: Plane) -> None:
    address = plane.serve()
    with Upstream() as web, Upstream() as other:
        plane.workers.open(1, {"web": web.endpoint, "": other.endpoint})
        with connect(address), await accepted(web):
            pass


async def test_close_answers_with_the_connections_that_are_left(plane: Plane) -> None:
    address = plane.serve()
    assert await plane.workers.close(1) == 0
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        with connect(address), await accepted(upstream), connect(address), await accepted(upstream):
            assert await plane.workers.close(1) == 2
            assert await asyncio.gather(plane.workers.close(1), plane.workers.close(1)) == [2, 2]
            with connect(address):
                await plane.heard.next("wake")
                plane.workers.open(1, {"": upstream.endpoint})
                with await accepted(upstream):
                    assert await plane.workers.close(1) == 3


async def test_rejected_clients_are_closed_and_the_next_one_wakes_again(plane: Plane) -> None:
    address = plane.serve()
    with connect(address) as client:
        await plane.heard.next("wake")
        plane.workers.reject(1, "it does not start")
        assert client.recv(1) == b""
    with connect(address):
        await plane.heard.next("wake")


async def test_a_backend_that_is_cut_loses_its_connections_and_no_other_does(plane: Plane) -> None:
    address, other = plane.serve(1), plane.serve(2)
    with Upstream() as upstream:
        for number in (1, 2):
            plane.workers.open(number, {"": upstream.endpoint})
        with connect(address) as client, await accepted(upstream), connect(other) as safe, await accepted(upstream) as server:
            plane.workers.cut(1, "the test")
            assert client.recv(1) == b""
            server.sendall(b"alive")
            assert safe.recv(5) == b"alive"


@pytest.mark.parametrize("accept_waiting", [True, False])
async def test_clients_in_the_backlog_come_in_or_are_left_to_the_successor(plane: Plane, accept_waiting: bool) -> None:
    address = plane.serve()
    await plane.workers.count()
    plane.signal(signal.SIGSTOP)
    with connect(address):
        plane.workers.unlisten(plane.numbers[0], accept_waiting)
        # The order is there before the worker looks for clients: the link became readable first.
        plane.signal(signal.SIGCONT)
        if accept_waiting:
            await plane.heard.next("wake")
        await plane.workers.count()
        with connect(address):
            tallies = await plane.workers.count()
            assert plane.workers.listening == {}
            assert sum(tally.parked for tally in tallies.values()) <= 1
            assert plane.sockets[0].accept()[0].close() is None  # whoever else has the socket gets the others


async def test_a_forgotten_backend_is_kept_until_its_last_connection_ends(plane: Plane) -> None:
    address = plane.serve()
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        with connect(address) as client, await accepted(upstream) as server:
            plane.workers.unlisten(plane.numbers[0], accept_waiting=True)
            plane.workers.forget(1)
            client.sendall(b"still here")
            assert server.recv(100) == b"still here"
            assert (await plane.workers.count())[1].connections == 1
        await plane.until(lambda tallies: not tallies)
        assert plane.workers.served == plane.workers.opened == {}


async def test_limits_can_be_changed_and_are_reported_by_their_names(plane: Plane) -> None:
    address = plane.serve(connections=1)
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        with connect(address), await accepted(upstream):
            with connect(address) as second:
                assert second.recv(1) == b""
                source = "{}:{}".format(*second.getsockname())
            assert await plane.heard.next("limited") == ("limited", 1, "limits.connections", 1, source)
            plane.configure(1, connections=2)
            with connect(address), await accepted(upstream):
                assert (await plane.workers.count())[1].refused == 1


async def test_a_refused_gate_is_reported_and_closed(plane: Plane) -> None:
    address = plane.serve()
    with Upstream() as upstream:
        endpoint = upstream.endpoint
    plane.workers.open(1, {"": endpoint})
    with connect(address):
        _, backend, error = await plane.heard.next("refused")
        assert backend == 1 and "refused" in error
        plane.workers.refused(1)
        assert plane.workers.opened == {}
        await plane.heard.next("wake")
        assert await plane.workers.close(1) == 0


async def test_the_gate_of_an_activation_stands_in_the_workers(plane: Plane) -> None:
    address = plane.serve()
    gate = RelayGate(1, plane.workers)
    gate.arm()
    with Upstream() as upstream:
        with connect(address) as client:
            await plane.heard.next("wake")
            gate.reject("it does not start")
            assert client.recv(1) == b""
        gate.open({"": upstream.endpoint})
        with connect(address), await accepted(upstream):
            assert await gate.close() == 1


@pytest.mark.slow
async def test_more_than_fit_in_one_message(plane: Plane) -> None:
    """1001 backends: their descriptors and their counters need several."""
    sock = bind(parse("tcp://127.0.0.1:0"))
    plane.sockets.append(sock)
    for number in range(1, 1002):
        plane.configure(number)
    # One socket many times over: whoever accepts a client does so for one of the backends.
    plane.workers.listen(1, [("web", sock)] * 1001)
    addresses = [plane.serve(number, pending=1) for number in range(1, 1002)]
    clients = [connect(address) for address in addresses]
    await plane.until(lambda tallies: sum(tally.parked for tally in tallies.values()) == 1001)
    for client in clients:
        client.close()


# A worker that dies


async def test_a_killed_worker_is_replaced_and_its_successor_is_told_everything(plane: Plane) -> None:
    address, asleep = plane.serve(1, connections=1), plane.serve(2)
    pid = plane.pid
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        with connect(address) as client, await accepted(upstream):
            await plane.heard.next("busy")
            plane.signal(signal.SIGKILL)
            assert (await plane.heard.next("quiet"))[1] == 1
            assert client.recv(1) == b""
        with connect(address), await accepted(upstream), connect(asleep):
            assert (await plane.heard.next("wake"))[1] == 2
            with connect(address) as second:
                assert second.recv(1) == b""
            assert (await plane.heard.next("limited"))[2] == "limits.connections"
    assert plane.pid != pid
    await plane.heard.line("another takes its place")


async def test_clients_that_came_while_there_was_no_worker_wake_their_backend(plane: Plane) -> None:
    address = plane.serve()
    plane.signal(signal.SIGSTOP)
    with connect(address):
        plane.signal(signal.SIGKILL)
        await plane.heard.next("wake")


async def test_what_ended_while_there_was_no_worker_is_not_told_to_the_successor(plane: Plane) -> None:
    address, other = plane.serve(1), plane.serve(2)
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        plane.workers.open(2, {"": upstream.endpoint})
        await plane.workers.count()
        plane.signal(signal.SIGSTOP)
        plane.workers.unlisten(plane.numbers[0], accept_waiting=True)
        plane.workers.forget(1)
        plane.workers.refused(2)
        plane.signal(signal.SIGKILL)
        with connect(other), connect(address):
            assert (await plane.heard.next("wake"))[1] == 2
            assert set(await plane.workers.count()) == {2}


async def test_close_of_a_worker_that_dies_meanwhile_answers_that_nothing_is_left(plane: Plane) -> None:
    address = plane.serve()
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        with connect(address), await accepted(upstream):
            plane.signal(signal.SIGSTOP)
            closing = asyncio.create_task(plane.workers.close(1))
            counting = asyncio.create_task(plane.workers.count())
            await asyncio.sleep(0)
            plane.signal(signal.SIGKILL)
            assert await at_once(closing) == 0
            assert await counting == {}


@pytest.mark.xfail(raises=TimeoutError, reason="a question that is asked while there is no worker is never answered")
async def test_close_while_there_is_no_worker_answers_at_once_that_nothing_is_left(plane: Plane) -> None:
    """Its last connection died with the worker, so the backend with `idle: 0s` sleeps in this very moment."""
    plane.serve()
    worker = plane.workers._workers[0]
    plane.signal(signal.SIGKILL)
    await worker.gone.wait()
    assert await at_once(plane.workers.close(1)) == 0
    await plane.heard.line("another takes its place")
    assert await at_once(plane.workers.close(1)) == 0


@pytest.mark.slow
async def test_one_that_keeps_dying_is_not_replaced_at_once(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESPAWN_GAP", 0.4)
    loop = asyncio.get_running_loop()
    address = plane.serve()
    deaths = []
    for _ in range(3):
        with connect(address):
            await plane.heard.next("wake")
            plane.signal(signal.SIGKILL)
            deaths.append(loop.time())
            await plane.heard.line("another takes its place")
    with connect(address):
        await plane.heard.next("wake")
    assert deaths[1] - deaths[0] < 0.4  # the first successor came at once
    assert loop.time() - deaths[0] >= 2 * 0.4
