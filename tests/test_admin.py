"""The admin API over HTTP, on a gateway in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from blockbuster import BlockBuster
from pytest_aiohttp.plugin import AiohttpClient

from gateway import __version__, config, upgrade
from gateway.admin import application
from gateway.server import Server
from gateway.status import BackendStatus, GatewayStatus
from tests.mimic import command

PATIENCE = 20.0

Api = TestClient[Any, Any]

MAY_BLOCK = [
    # Before it is ready it serves nobody.
    ("os.mkdir", "gateway/admin.py", "start"),
    ("os.stat", "gateway/admin.py", "start"),
    # One file of a socket, in a directory of sockets.
    ("os.unlink", "gateway/listeners.py", "close"),
]


def document(directory: Path) -> dict[str, Any]:
    """Three backends: one that works, one that cannot, and one without a life."""
    endpoint = f"unix:{directory}/backend.sock"
    return {
        "gateway": {"admin": f"{directory}/admin.sock", "state_directory": f"{directory}/state"},
        "backends": {
            "web": {
                "command": command("--listen", endpoint, "--say", "good morning"),
                "listen": f"unix:{directory}/web.sock",
                "endpoint": endpoint,
            },
            "broken": {"command": "/no/such/program", "listen": f"unix:{directory}/broken.sock", "endpoint": endpoint},
            "echo": {"command": "cat", "listen": f"unix:{directory}/echo.sock", "delivery": "accept"},
        },
    }


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket as that of the service manager."""
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(f"{tmp_path}/notify")
        yield manager


@pytest.fixture
async def server(tmp_path: Path, manager: socket.socket, never_blocked: BlockBuster) -> AsyncIterator[Server]:
    """A gateway that runs; it reads `document.json` again when it is reloaded."""
    for function, file, caller in MAY_BLOCK:
        never_blocked.functions[function].can_block_in(file, caller)
    file = tmp_path / "document.json"
    file.write_text(json.dumps(document(tmp_path)))

    def read() -> config.Config:
        return config.build(json.loads(file.read_text()), tmp_path, "test")

    loaded = await asyncio.to_thread(read)
    server = Server(loaded, read)
    running = asyncio.create_task(server.run())
    async with asyncio.timeout(PATIENCE):
        assert await asyncio.get_running_loop().sock_recv(manager, 100) == b"READY=1"
    yield server
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(PATIENCE):
        assert await running == 0


@pytest.fixture
async def api(server: Server, aiohttp_client: AiohttpClient) -> Api:
    return await aiohttp_client(application(server))


async def ask(api: Api, method: str, path: str, status: int = 200) -> Any:
    """The answer, which must be JSON and have this status."""
    async with asyncio.timeout(PATIENCE), api.request(method, path) as response:
        assert response.content_type == "application/json"
        answer = await response.json()
        assert response.status == status, answer
        return answer


async def test_the_socket_is_for_its_owner_only(server: Server, tmp_path: Path) -> None:
    mode = os.stat(tmp_path / "admin.sock").st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_status(api: Api) -> None:
    answer = await ask(api, "GET", "/v1/status")
    assert set(answer) == set(GatewayStatus.__struct_fields__)
    assert (answer["version"], answer["pid"]) == (__version__, os.getpid())
    assert (answer["asleep"], answer["awake"]) == (3, 0)
    assert [row["name"] for row in answer["backends"]] == ["web", "broken", "echo"]
    assert all(set(row) == set(BackendStatus.__struct_fields__) for row in answer["backends"])


async def test_status_of_some(api: Api) -> None:
    answer = await ask(api, "GET", "/v1/status?name=echo&name=web")
    assert [(row["name"], row["delivery"]) for row in answer["backends"]] == [("echo", "accept"), ("web", "relay")]
    assert await ask(api, "GET", "/v1/status?name=nope", 404) == {"error": "there is no backend 'nope'"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/status", 404),
        ("GET", "/v1/backends/web", 404),
        ("POST", "/v1/backends/web/wake", 404),
        ("POST", "/v1/status", 405),
        ("GET", "/v1/backends/web/start", 405),
        ("POST", "/v1/backends/nope/start", 404),
        ("POST", "/v1/backends/no%2Fpe/stop", 404),
        ("POST", "/v1/backends/nope/hold", 404),
        ("POST", "/v1/backends/nope/release", 404),
        ("GET", "/v1/backends/nope/logs", 404),
        ("POST", "/v1/backends/echo/start", 400),
        ("POST", "/v1/backends/echo/stop", 400),
        ("POST", "/v1/backends/echo/hold", 400),
        ("POST", "/v1/backends/echo/release", 400),
        ("POST", "/v1/backends/web/hold?seconds=soon", 400),
        ("POST", "/v1/backends/web/hold?seconds=-1", 400),
        ("POST", "/v1/backends/web/hold?seconds=nan", 400),
        ("POST", "/v1/backends/web/hold?seconds=inf", 400),
        ("POST", "/v1/backends/web/hold?seconds=", 400),
    ],
)
async def test_an_error_is_json_too(api: Api, method: str, path: str, status: int) -> None:
    answer = await ask(api, method, path, status)
    assert list(answer) == ["error"]
    assert answer["error"]
    assert (await ask(api, "GET", "/v1/status"))["awake"] == 0


async def test_start_and_stop(api: Api) -> None:
    assert await ask(api, "POST", "/v1/backends/web/start") == {"message": "ready"}
    (row,) = (await ask(api, "GET", "/v1/status?name=web"))["backends"]
    assert (row["state"], row["wakes"], row["last_wake"]) == ("ready", 1, "dormant start")
    assert await ask(api, "POST", "/v1/backends/web/stop") == {"message": "stopped"}
    assert (await ask(api, "GET", "/v1/status"))["awake"] == 0


async def test_many_starts_at_once_are_one(api: Api) -> None:
    answers = await asyncio.gather(*(ask(api, "POST", "/v1/backends/web/start") for _ in range(20)))
    assert answers == [{"message": "ready"}] * 20
    (row,) = (await ask(api, "GET", "/v1/status?name=web"))["backends"]
    assert row["wakes"] == 1


async def test_a_start_that_fails_tells_why(api: Api) -> None:
    answer = await ask(api, "POST", "/v1/backends/broken/start", 502)
    assert answer == {"error": "/no/such/program: No such file or directory"}
    (row,) = (await ask(api, "GET", "/v1/status?name=broken"))["backends"]
    assert row["last_error"] == answer["error"]
    assert 0 < row["retry_in"] <= 1


async def test_hold_and_release(api: Api) -> None:
    assert await ask(api, "POST", "/v1/backends/web/hold?seconds=60.5") == {"message": "held"}
    assert await ask(api, "POST", "/v1/backends/web/start") == {"message": "ready"}
    (row,) = (await ask(api, "GET", "/v1/status?name=web"))["backends"]
    assert 50 < row["held_for"] <= 60.5
    assert await ask(api, "POST", "/v1/backends/web/release") == {"message": "released"}
    (row,) = (await ask(api, "GET", "/v1/status?name=web"))["backends"]
    assert row["held_for"] is None


async def test_events(api: Api) -> None:
    async with asyncio.timeout(PATIENCE), api.get("/v1/events") as response:
        assert response.content_type == "application/x-ndjson"
        await ask(api, "POST", "/v1/backends/web/start")
        await ask(api, "POST", "/v1/backends/web/stop")
        states: list[str] = []
        while states[-1:] != ["stopped"]:
            change = json.loads(await response.content.readline())
            assert set(change) == {"backend", "state", "last_wake", "last_error"}
            assert change["backend"] == "web"
            states += [change["state"]] if states[-1:] != [change["state"]] else []
        assert states == ["starting", "ready", "stopping", "stopped"]


async def test_events_to_many_who_come_and_go(api: Api, server: Server) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        async with api.get("/v1/events"):
            pass
    await ask(api, "POST", "/v1/backends/web/start")
    await ask(api, "POST", "/v1/backends/web/stop")
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 10


async def test_logs(api: Api) -> None:
    await ask(api, "POST", "/v1/backends/web/start")
    async with asyncio.timeout(PATIENCE), api.get("/v1/backends/web/logs") as response:
        assert response.content_type == "text/plain"
        assert await response.text() == "good morning\n"


async def test_logs_are_followed(api: Api) -> None:
    async with asyncio.timeout(PATIENCE), api.get("/v1/backends/web/logs?follow=1") as response:
        for _ in range(2):
            await ask(api, "POST", "/v1/backends/web/start")
            assert await response.content.readline() == b"good morning\n"
            await ask(api, "POST", "/v1/backends/web/stop")


@pytest.mark.parametrize("error", [ConnectionResetError, asyncio.CancelledError])
async def test_who_leaves_before_the_answer_to_an_upgrade_does_not_keep_the_service_manager_waiting(
    server: Server, manager: socket.socket, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(upgrade, "arguments", lambda: ["true"])  # the version on the disk would start

    async def answered() -> None:
        raise error

    with pytest.raises(error):
        await server.upgrade(answered)
    told = []
    while not told or told[-1] != "READY=1":
        async with asyncio.timeout(PATIENCE):
            told.append((await asyncio.get_running_loop().sock_recv(manager, 100)).decode().partition("\n")[0])
    assert "RELOADING=1" in told


async def test_reload(api: Api, tmp_path: Path) -> None:
    changed = document(tmp_path)
    del changed["backends"]["broken"]
    (tmp_path / "document.json").write_text(json.dumps(changed))
    answer = await ask(api, "POST", "/v1/reload")
    assert answer == {"message": "reloaded: 0 added, 0 changed, 1 removed, 2 backends in all"}


async def test_reload_with_errors_tells_all_of_them_and_changes_nothing(api: Api, tmp_path: Path) -> None:
    changed = document(tmp_path)
    changed["backends"]["web"]["idel"] = "1s"
    changed["backends"]["echo"]["listen"] = "tcp//localhost"
    (tmp_path / "document.json").write_text(json.dumps(changed))
    error = (await ask(api, "POST", "/v1/reload", 422))["error"]
    assert "test: backends.web.idel: unknown key" in error
    assert "test: backends.echo.listen: " in error
    assert len((await ask(api, "GET", "/v1/status"))["backends"]) == 3


async def test_reload_that_cannot_bind_tells_what(api: Api, tmp_path: Path) -> None:
    changed = document(tmp_path)
    changed["backends"]["far"] = {**changed["backends"]["echo"], "listen": f"unix:{tmp_path}/no/such/folder"}
    (tmp_path / "document.json").write_text(json.dumps(changed))
    error = (await ask(api, "POST", "/v1/reload", 422))["error"]
    assert error == f"unix:{tmp_path}/no/such/folder: there is no such directory"
    assert len((await ask(api, "GET", "/v1/status"))["backends"]) == 3
