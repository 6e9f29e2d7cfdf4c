"""The control plane's side of the data plane: a real worker process is told what to serve, and is replaced when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.endpoint import Endpoint, bind, of_socket, parse
from backends.units import Duration
from gateway import worker_process
from gateway import workers as module
from gateway.config import GatewayOptions, Limits, build
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


def options(directory: Path, size: int = 1) -> GatewayOptions:
    return GatewayOptions(admin=f"{directory}/admin.sock", workers=size, orphan_time=Duration(0))


class Plane:
    """The workers, and the sockets that they were given."""

    def __init__(self, directory: Path, size: int = 1) -> None:
        self.heard = Heard()
        self.workers = Workers(self.heard, options(directory, size))
        self.sockets: list[socket.socket] = []
        self.numbers: list[int] = []

    def serve(self, number: int = 1, **limits: Any) -> Endpoint:
        """A backend with one listener; where that listens."""
        sock = bind(parse("tcp://127.0.0.1:0"))
        self.sockets.append(sock)
        self.configure(number, **limits)
        self.numbers += self.workers.listen(number, "web", "an address", [sock], 1)
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
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    plane = Plane(tmp_path)
    logging.getLogger("gateway").addHandler(plane.heard)
    await plane.workers.find(replace=False)
    plane.workers.start()
    plane.workers.settle()
    yield plane
    await plane.workers.stop()
    logging.getLogger("gateway").removeHandler(plane.heard)
    for sock in plane.sockets:
        sock.close()


async def accepted(upstream: Upstream) -> socket.socket:
    """The next connection of the backend, while the event loop goes on."""
    upstream.socket.setblocking(False)
    async with asyncio.timeout(PATIENCE):
        sock, _ = await asyncio.get_running_loop().sock_accept(upstream.socket)
    sock.settimeout(PATIENCE)
    return sock


async def at_once(waited: Awaitable[int]) -> int:
    """What is answered without waiting for a deadline."""
    async with asyncio.timeout(worker_process.ANSWER_DEADLINE / 2):
        return await waited


# Orders and reports


async def test_a_client_wakes_its_backend_by_its_address_and_is_served_when_the_gate_opens(plane: Plane) -> None:
    address = plane.serve()
    loop = asyncio.get_running_loop()
    started = loop.time()
    with Upstream() as upstream, connect(address) as client:
        client.sendall(b"question")
        assert await plane.heard.next("wake") == ("wake", 1, "{}:{}".format(*client.getsockname()))
        await plane.parked(1)
        plane.workers.open(1, {"": upstream.endpoint})
        with await accepted(upstream) as server:
            assert server.recv(100) == b"question"
            assert await plane.heard.next("busy") == ("busy", 1)
            assert plane.workers.is_busy(1) and not plane.workers.is_busy(2)
    _, backend, since = await plane.heard.next("quiet")
    assert backend == 1 and started < since < loop.time()
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
            assert list(await asyncio.gather(plane.workers.close(1), plane.workers.close(1))) == [2, 2]
            with connect(address):
                await plane.heard.next("wake")
                plane.workers.open(1, {"": upstream.endpoint})
                with await accepted(upstream):
                    assert await plane.workers.close(1) == 3


async def test_rejected_clients_are_closed_and_the_next_one_wakes_again(plane: Plane) -> None:
    address = plane.serve()
    with connect(address) as client:
        await plane.heard.next("wake")
        plane.workers.reject(1)
        assert client.recv(1) == b""
    with connect(address):
        await plane.heard.next("wake")


async def test_a_backend_that_is_cut_loses_its_connections_and_no_other_does(plane: Plane) -> None:
    address, other = plane.serve(1), plane.serve(2)
    with Upstream() as upstream:
        for number in (1, 2):
            plane.workers.open(number, {"": upstream.endpoint})
        with (
            connect(address) as client,
            await accepted(upstream),
            connect(other) as safe,
            await accepted(upstream) as server,
        ):
            plane.workers.cut(1)
            assert client.recv(1) == b""
            server.sendall(b"alive")
            assert safe.recv(5) == b"alive"


async def test_clients_in_the_backlog_come_in_before_a_listener_ends(plane: Plane) -> None:
    address = plane.serve()
    await plane.workers.count()
    plane.signal(signal.SIGSTOP)
    with connect(address), connect(address):
        plane.workers.unlisten([plane.numbers[0]], accept_waiting=True)
        plane.signal(signal.SIGCONT)
        await plane.parked(2)


async def test_clients_that_come_after_a_listener_ended_belong_to_whoever_else_has_the_socket(plane: Plane) -> None:
    address = plane.serve()
    plane.workers.unlisten([plane.numbers[0]], accept_waiting=False)
    assert await plane.workers.count() == {}
    with connect(address) as client:
        plane.sockets[0].settimeout(PATIENCE)
        server, peer = plane.sockets[0].accept()
        with server:
            assert peer == client.getsockname()
        assert await plane.workers.count() == {}


async def test_a_forgotten_backend_is_kept_until_its_last_connection_ends(plane: Plane) -> None:
    address = plane.serve()
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        with connect(address) as client, await accepted(upstream) as server:
            plane.workers.unlisten([plane.numbers[0]], accept_waiting=True)
            plane.workers.forget(1)
            client.sendall(b"still here")
            assert server.recv(100) == b"still here"
            assert (await plane.workers.count())[1].connections == 1
        await plane.until(lambda tallies: not tallies)
        assert not plane.workers.served and not plane.workers.opened


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
            await plane.workers.count()
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
        plane.workers.unlisten([plane.numbers[0]], accept_waiting=True)
        plane.workers.forget(1)
        plane.workers.opened.pop(2)
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
            with connect(address):
                await plane.heard.next("wake")


@pytest.mark.slow
async def test_a_thousand_backends_are_told_and_counted_in_several_messages(plane: Plane) -> None:
    addresses = [plane.serve(number) for number in range(1, 1002)]
    plane.signal(signal.SIGKILL)
    clients = [connect(address) for address in addresses]
    assert {(await plane.heard.next("wake"))[1] for _ in clients} == set(range(1, 1002))
    assert sum(tally.parked for tally in (await plane.workers.count()).values()) == 1001
    for client in clients:
        client.close()


async def test_close_while_there_is_no_worker_answers_that_nothing_is_left(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `idle: 0s`, a backend whose last connection died with the worker goes to sleep in this very moment."""
    address = plane.serve()
    plane.signal(signal.SIGKILL)
    await plane.workers._places[0].gone.wait()
    with monkeypatch.context() as patch:
        patch.setattr(worker_process, "ANSWER_DEADLINE", 0.05)
        left = await plane.workers.close(1)
    with connect(address):
        await plane.heard.next("wake")
        assert left == 0
        assert await plane.workers.close(1) == 0


@pytest.mark.slow
async def test_the_first_successor_comes_at_once_and_the_others_not(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    address = plane.serve()
    started = loop.time()
    for gap in (2 * PATIENCE, 0.3, 0.3):
        monkeypatch.setattr(module, "RESPAWN_GAP", gap)
        plane.signal(signal.SIGKILL)
        with connect(address):
            await plane.heard.next("wake")
    assert loop.time() - started >= 2 * 0.3


async def test_a_worker_that_cannot_be_started_is_tried_again(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESPAWN_GAP", 0.01)
    address = plane.serve()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nonexistent/python")
        plane.signal(signal.SIGKILL)
        for _ in range(2):
            await plane.heard.line("worker 0 cannot be started: [Errno 2] No such file or directory")
    with connect(address):
        await plane.heard.next("wake")


async def test_a_worker_that_cannot_be_started_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    workers = Workers(Heard(), options(tmp_path))
    with pytest.raises(FileNotFoundError):
        workers.start()
    assert workers.pids == []


async def test_a_worker_of_another_version_is_replaced(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The files on the disk were upgraded: the successor is a newer program than the control plane."""
    monkeypatch.setattr(module, "RESPAWN_GAP", 0.01)
    address = plane.serve()
    with monkeypatch.context() as patch:
        patch.setattr(say, "VERSION", say.VERSION + 1)
        plane.signal(signal.SIGKILL)
        await plane.heard.line(f"worker 0 speaks version {say.VERSION - 1}, not {say.VERSION}")
        await plane.heard.line("another takes its place")
    with connect(address):
        await plane.heard.next("wake")
    assert "Exception in callback" not in caplog.text


async def test_many_open_gates_with_long_endpoints_are_told_to_a_successor(plane: Plane) -> None:
    address = plane.serve(500)
    endpoints = {f"listener{number}": parse("unix:/" + "x" * 100) for number in range(3)}
    for number in range(500):
        plane.configure(number)
        plane.workers.open(number, endpoints)
    with Upstream() as upstream:
        plane.workers.open(500, {"": upstream.endpoint})
        plane.signal(signal.SIGKILL)
        await plane.heard.line("another takes its place")
        with connect(address):
            relayed = asyncio.create_task(accepted(upstream))
            died_again = asyncio.create_task(plane.heard.line("another takes its place"))
            done, left = await asyncio.wait({relayed, died_again}, return_when=asyncio.FIRST_COMPLETED)
            for task in left:
                task.cancel()
            assert done == {relayed}
            relayed.result().close()


# Another control plane


async def test_a_gate_that_is_open_in_one_worker_only_is_closed_by_the_next_control_plane(tmp_path: Path) -> None:
    """Else its clients would use a backend of which nobody knows that it is used."""
    lasting = msgspec.structs.replace(options(tmp_path, 2), orphan_time=Duration(PATIENCE))
    heard = Heard()
    before, after = Workers(Heard(), lasting), Workers(heard, lasting)
    sockets = [bind(parse("tcp://127.0.0.1:0")) for _ in range(2)]
    await before.find(replace=False)
    before.start()
    before.settle()
    before.serve(1, CONFIG)
    before.listen(1, "web", "an address", sockets, 2)
    try:
        with Upstream() as upstream:
            before.open(1, {"": upstream.endpoint})
            await before._places[1].ask(partial(say.Close, 1))
            await before._places[0].ask(say.Count)  # it has taken the order
            for task in before._tasks:
                task.cancel()
            for worker in before._places:
                worker.lose()
                worker.process.close()
            await after.find(replace=False)
            gate = after.adopted.gate(CONFIG)
            assert gate is not None and gate.endpoints is None
            found = [sock for _, sock in after.adopted.ears.values()]
            after.start()
            after.serve(1, CONFIG)
            after.listen(1, "web", "an address", found, 2)
            after.settle()
            for sock in sockets:
                with connect(of_socket(sock)):
                    assert (await heard.next("wake", "busy"))[0] == "wake"
    finally:
        await after.stop()
    for sock in sockets + found:
        sock.close()


# A worker that is stuck


@pytest.mark.slow
async def test_a_stuck_worker_holds_nobody_up(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    address = plane.serve()
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        with connect(address), await accepted(upstream):
            plane.signal(signal.SIGSTOP)
            with monkeypatch.context() as patch:
                patch.setattr(worker_process, "ANSWER_DEADLINE", 0.05)
                assert await plane.workers.close(1) == 1  # not known, so it counts as used
                await plane.heard.line("worker 0 does not answer")
                assert await plane.workers.count() == {}
            plane.signal(signal.SIGCONT)
            assert (await plane.workers.count())[1].connections == 1
        await plane.heard.next("quiet")
        assert await plane.workers.close(1) == 0


async def test_a_late_answer_is_not_taken_for_that_to_the_next_question(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate was opened again in between: it must be closed now, whatever the answer says."""
    address = plane.serve()
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        await plane.workers.count()
        plane.signal(signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(worker_process, "ANSWER_DEADLINE", 0.05)
            assert await plane.workers.close(1) == 1
        plane.workers.open(1, {"": upstream.endpoint})
        closing = asyncio.create_task(plane.workers.close(1))
        await asyncio.sleep(0)
        plane.signal(signal.SIGCONT)
        assert await closing == 0
        with connect(address):
            assert (await plane.heard.next("wake", "busy"))[0] == "wake"


async def test_orders_to_a_stuck_worker_are_kept_until_it_goes_on(plane: Plane) -> None:
    address = plane.serve()
    plane.signal(signal.SIGSTOP)
    for number in range(2, 2000):
        plane.configure(number)
    other = plane.serve(2000)
    link = plane.workers._places[0].link
    assert link is not None and link.pending
    plane.signal(signal.SIGCONT)
    with connect(address), connect(other):
        assert {(await plane.heard.next("wake"))[1] for _ in range(2)} == {1, 2000}
    assert not link.pending


async def test_a_listener_that_ended_while_its_socket_was_queued_does_no_harm(plane: Plane) -> None:
    address = plane.serve()
    plane.signal(signal.SIGSTOP)
    for number in range(2, 2000):
        plane.configure(number)
    plane.serve(2000)
    plane.workers.unlisten([plane.numbers[1]], accept_waiting=True)
    plane.sockets[1].close()
    plane.signal(signal.SIGCONT)
    with connect(address):
        await plane.heard.next("wake")
        assert await plane.workers.close(1) == 0
    assert not [item for item in plane.heard.items if item[0] == "log"]


async def test_a_stuck_worker_is_killed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "ANSWER_DEADLINE", 0.05)
    workers = Workers(Heard(), options(tmp_path))
    await workers.find(replace=False)
    workers.start()
    os.kill(workers.pids[0], signal.SIGSTOP)
    await workers.stop()
    assert workers.pids == []


# The end


async def test_stop_closes_what_is_left_and_is_idempotent(plane: Plane) -> None:
    address = plane.serve()
    with Upstream() as upstream:
        plane.workers.open(1, {"": upstream.endpoint})
        pid = plane.pid
        with connect(address) as client, await accepted(upstream) as server:
            await plane.workers.stop()
            await plane.workers.stop()
            assert client.recv(1) == server.recv(1) == b""
    assert pid not in children(os.getpid())
    assert plane.workers.pids == []
    assert await plane.workers.close(1) == 0
    assert await plane.workers.count() == {}
