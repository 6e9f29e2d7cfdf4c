"""The contract of `backends.base`: the same cases for every driver, each against the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backends.base import Backend, BackendError, Capability, Exit, Exited, PassedSocket, Shared, Status
from backends.endpoint import Unix
from backends.probe import Log
from tests.drivers import DRIVERS, Driver, line, services

GRACE = 10.0
PATIENCE = 20.0

shared = pytest.fixture(services)


@pytest.fixture(params=DRIVERS, ids=lambda kind: kind.name)
def driver(request: pytest.FixtureRequest, tmp_path: Path, shared: Shared) -> Driver:
    kind: type[Driver] = request.param
    if reason := kind.missing():
        pytest.skip(reason)
    return kind(tmp_path, shared)


@pytest.fixture
async def served(driver: Driver) -> AsyncIterator[Backend]:
    """A backend that is ready."""
    backend = driver.make("--listen", driver.listen)
    await backend.start()
    await asyncio.wait_for(backend.ready(), PATIENCE)
    yield backend
    await backend.stop(GRACE)


async def ask(backend: Backend, said: bytes = b"ping\n") -> bytes:
    """What one client gets: the greeting, then the echo."""
    (endpoint,) = (await asyncio.wait_for(backend.ready(), PATIENCE)).values()
    with socket.socket(endpoint.family, endpoint.type) as client:  # type: ignore[union-attr]
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, endpoint.sockaddr)  # type: ignore[union-attr]
        return await talk(client, said)


async def talk(client: socket.socket, said: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, said)
    answer = b""
    async with asyncio.timeout(PATIENCE):
        while not answer.endswith(said):
            data = await loop.sock_recv(client, 65536)
            if not data:
                raise ConnectionResetError("end of file")
            answer += data
    return answer


def is_down(driver: Driver) -> bool:
    with socket.socket(driver.endpoint.family, driver.endpoint.type) as client:  # type: ignore[union-attr]
        return client.connect_ex(driver.endpoint.sockaddr) != 0  # type: ignore[union-attr]


async def test_it_answers_once_it_is_ready(served: Backend) -> None:
    assert (await ask(served)).startswith(b"hello ")
    assert await served.status() is Status.RUNNING


async def test_it_is_gone_once_it_is_stopped(driver: Driver, served: Backend) -> None:
    await served.stop(GRACE)
    assert await served.status() is Status.STOPPED
    assert is_down(driver)
    await asyncio.wait_for(served.wait(), PATIENCE)


async def test_it_can_be_started_again(served: Backend) -> None:
    first = await ask(served)
    await served.stop(GRACE)
    await served.start()
    await asyncio.wait_for(served.ready(), PATIENCE)
    assert (await ask(served)).endswith(b"ping\n")
    assert first.endswith(b"ping\n")


async def test_stopping_what_is_stopped_is_no_error(driver: Driver, served: Backend) -> None:
    never_started = driver.make("--listen", driver.listen)
    for backend in (never_started, served, served):
        await backend.stop(GRACE)
        assert await backend.status() is Status.STOPPED


async def test_what_does_not_run_is_not_waited_for(driver: Driver) -> None:
    await asyncio.wait_for(driver.make().wait(), PATIENCE)


async def test_its_own_end_is_seen_and_its_status_known(driver: Driver) -> None:
    backend = driver.make("--exit-after", 0, "--exit-code", 7)
    await backend.start()
    assert await asyncio.wait_for(backend.wait(), PATIENCE) == Exit(code=7)
    assert await backend.status() is Status.STOPPED
    await backend.stop(GRACE)


async def test_several_may_wait_for_the_end(served: Backend) -> None:
    waiters = [asyncio.create_task(served.wait()) for _ in range(3)]
    waiters.append(asyncio.create_task(asyncio.wait_for(served.wait(), PATIENCE)))
    await asyncio.sleep(0)
    waiters.pop(0).cancel()
    await served.stop(GRACE)
    assert len(set(await asyncio.gather(*waiters))) == 1


async def test_death_ends_the_wait_for_readiness_with_its_last_words(driver: Driver) -> None:
    backend = driver.make("--say", "out of cheese", "--exit-after", 0, "--exit-code", 3)
    await backend.start()
    with pytest.raises(Exited, match="exit status 3") as caught:
        await asyncio.wait_for(backend.ready(), PATIENCE)
    assert "out of cheese" in caught.value.lines
    await backend.stop(GRACE)


async def test_last_words_are_of_this_life_only(driver: Driver) -> None:
    backend = driver.make("--exit-after", 0)
    backend.output.line("said in another life")
    await backend.start()
    with pytest.raises(Exited) as caught:
        await asyncio.wait_for(backend.ready(), PATIENCE)
    assert caught.value.lines == ()
    assert "said in another life" in backend.output.tail()
    await backend.stop(GRACE)


async def test_its_output_is_kept_line_by_line(driver: Driver) -> None:
    backend = driver.make("--say", "one", "--say", "two", "--say-error", "three")
    await backend.start()
    await line(backend, "three")
    assert backend.output.fresh() == ["one", "two", "three"]
    await backend.stop(GRACE)


@pytest.mark.slow
async def test_it_may_listen_late(driver: Driver) -> None:
    backend = driver.make("--listen", driver.listen, "--after", 0.3)
    await backend.start()
    await asyncio.wait_for(backend.ready(), PATIENCE)
    assert (await ask(backend)).endswith(b"ping\n")
    await backend.stop(GRACE)


async def test_what_never_listens_is_never_ready_and_says_why(driver: Driver) -> None:
    backend = driver.make("--never-ready", "--say", "up")
    await backend.start()
    await line(backend, "up")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(backend.ready(), 0.05)
    assert str(driver.endpoint) in backend.trouble
    await backend.stop(GRACE)


@pytest.mark.slow
async def test_what_ignores_the_request_is_forced_after_the_grace(driver: Driver) -> None:
    backend = driver.make("--ignore-term", "--say", "up")
    await backend.start()
    await line(backend, "up")
    loop = asyncio.get_running_loop()
    asked = loop.time()
    await backend.stop(0.3)
    assert 0.3 <= loop.time() - asked < 5
    assert await backend.status() is Status.STOPPED


async def test_a_failed_start_leaves_nothing(driver: Driver) -> None:
    backend = driver.broken()
    for _ in range(2):
        with pytest.raises(BackendError, match="No such file or directory"):
            await backend.start()
        assert await backend.status() is Status.STOPPED
        await backend.stop(GRACE)


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
async def test_a_cancelled_start_is_cleaned_up_by_stop(driver: Driver, turns: int) -> None:
    backend = driver.make("--listen", driver.listen)
    starting = asyncio.create_task(backend.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    await backend.stop(GRACE)
    assert await backend.status() is Status.STOPPED
    assert is_down(driver)


async def test_it_may_be_stopped_while_it_starts(driver: Driver) -> None:
    backend = driver.make("--listen", driver.listen)
    starting = asyncio.create_task(backend.start())
    await asyncio.sleep(0)
    await backend.stop(GRACE)
    with contextlib.suppress(BackendError):
        await starting
    await backend.stop(GRACE)
    assert await backend.status() is Status.STOPPED
    assert is_down(driver)


async def test_a_cancelled_wait_for_readiness_changes_nothing(driver: Driver) -> None:
    backend = driver.make("--listen", driver.listen)
    await backend.start()
    waiting = asyncio.create_task(backend.ready())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(backend.ready(), PATIENCE)
    await backend.stop(GRACE)


async def test_a_cancelled_stop_may_be_called_again(driver: Driver) -> None:
    backend = driver.make("--ignore-term", "--say", "up")
    await backend.start()
    await line(backend, "up")
    stopping = asyncio.create_task(backend.stop(3600))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await backend.status() is Status.RUNNING
    await backend.stop(0)
    assert await backend.status() is Status.STOPPED


async def test_a_line_of_its_output_may_be_its_readiness(driver: Driver) -> None:
    backend = driver.make("--say", "listening on port 80", readiness=Log(r"listening on port \d+"))
    await backend.start()
    assert list((await asyncio.wait_for(backend.ready(), PATIENCE)).keys()) == [""]
    await backend.stop(GRACE)


async def test_a_line_of_an_earlier_life_is_no_readiness(driver: Driver) -> None:
    backend = driver.make("--exit-after", 0, "--exit-code", 4, readiness=Log("ready"))
    backend.output.line("ready")
    await backend.start()
    with pytest.raises(Exited):
        await asyncio.wait_for(backend.ready(), PATIENCE)
    await backend.stop(GRACE)


async def test_its_use_of_memory_is_known_while_it_runs(served: Backend) -> None:
    usage = await served.usage()
    assert usage.memory is None or 1 << 20 < usage.memory < 1 << 30
    assert usage.cpu is None or 0 <= usage.cpu < 10
    await served.stop(GRACE)
    assert (await served.usage()).memory is None


async def test_it_takes_its_listening_sockets(driver: Driver, tmp_path: Path) -> None:
    backend = driver.make("--inherit", "--fd-report", passes=True)
    require(backend, Capability.PASS)
    with socket.socket(socket.AF_UNIX) as web, socket.socket(socket.AF_UNIX) as admin:
        for sock, name in ((web, "web"), (admin, "admin")):
            sock.bind(str(tmp_path / name))
            sock.listen()
            sock.setblocking(False)
        for _ in range(2):  # the gateway's copies outlive the backend
            await backend.start([PassedSocket("web", web), PassedSocket("admin", admin)])
            assert await asyncio.wait_for(backend.ready(), PATIENCE) == {}
            assert await line(backend, "fds ") == "fds 0,1,2,3,4 2 True web:admin"
            for name in ("web", "admin"):
                with socket.socket(socket.AF_UNIX) as client:
                    client.setblocking(False)
                    client.connect(Unix(str(tmp_path / name)).sockaddr)
                    assert (await talk(client, b"ping\n")).startswith(b"hello ")
            await backend.stop(GRACE)


async def test_it_serves_one_connection_on_its_stdin_and_stdout(driver: Driver) -> None:
    backend = driver.make("--stdio", "--say-error", "for the log", "--exit-code", 5)
    require(backend, Capability.ACCEPT)
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        theirs.setblocking(False)
        serving = asyncio.create_task(backend.serve(theirs, {"REMOTE_ADDR": "192.0.2.1"}))
        assert (await talk(ours, b"ping\n")).startswith(b"hello ")
        theirs.close()
        ours.shutdown(socket.SHUT_WR)
        assert await asyncio.wait_for(serving, PATIENCE) == Exit(code=5)
        assert await asyncio.get_running_loop().sock_recv(ours, 10) == b""
    assert backend.output.tail() == ["for the log"]


async def test_a_cancelled_instance_is_killed(driver: Driver) -> None:
    backend = driver.make("--stdio", "--ignore-term")
    require(backend, Capability.ACCEPT)
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        serving = asyncio.create_task(backend.serve(theirs, {}))
        await talk(ours, b"ping\n")
        theirs.close()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert await asyncio.get_running_loop().sock_recv(ours, 10) == b""


async def test_a_frozen_one_is_silent_until_it_is_thawed(served: Backend) -> None:
    require(served, Capability.FREEZE)
    (endpoint,) = (await served.ready()).values()
    with socket.socket(endpoint.family, endpoint.type) as client:  # type: ignore[union-attr]
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, endpoint.sockaddr)  # type: ignore[union-attr]
        await talk(client, b"before\n")
        await served.freeze()
        assert await served.status() is Status.FROZEN
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(talk(client, b"during\n"), 0.05)
        await served.thaw()
        assert await served.status() is Status.RUNNING
        assert (await talk(client, b"after\n")).endswith(b"after\n")
    await served.thaw()
    assert await served.status() is Status.RUNNING


async def test_a_frozen_one_can_be_stopped(served: Backend) -> None:
    require(served, Capability.FREEZE)
    await served.freeze()
    await asyncio.wait_for(served.stop(GRACE), GRACE / 2)
    assert await served.status() is Status.STOPPED
    await served.start()
    await asyncio.wait_for(served.ready(), PATIENCE)
    assert await served.status() is Status.RUNNING


async def test_one_that_outlives_the_gateway_is_found_again(driver: Driver, served: Backend) -> None:
    require(served, Capability.ADOPT)
    found = driver.make("--listen", driver.listen)
    assert await found.status() is Status.RUNNING
    await found.stop(GRACE)
    assert await served.status() is Status.STOPPED


def require(backend: Backend, capability: Capability) -> None:
    if capability not in backend.capabilities:
        pytest.skip(f"the driver cannot {capability.name}")
