"""The admin API: JSON over HTTP on a Unix socket that only its owner can open (mode 0600).

    GET  /v1/status                          everything; ?name=NAME (repeatable) for some
    GET  /v1/events                          a line of JSON for each change of a state, until the client leaves
    POST /v1/reload                          read the configuration again
    POST /v1/upgrade                         let the version on the disk take over; 409 and the reason if it would not start
    POST /v1/backends/NAME/start             start it; answers when it is ready, or 502 with the reason
    POST /v1/backends/NAME/stop              stop it now; answers when it is gone
    POST /v1/backends/NAME/hold?seconds=N    keep it awake (without seconds: until released)
    POST /v1/backends/NAME/release
    GET  /v1/backends/NAME/logs?follow=1     its last lines as text, and new ones until the client leaves

An error is `{"error": TEXT}` with a fitting status. Counterpart: `gateway.cli` is the client; `gateway.server` does the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from backends.command import CommandFailed
from backends.endpoint import Unix
from gateway.config import ConfigError, Listener
from gateway.listeners import ListenError, Listening
from gateway.states import State
from gateway.status import StateChange

if TYPE_CHECKING:
    from gateway.server import Server


class UnknownBackend(LookupError):
    """There is no backend of this name."""


class Refused(Exception):
    """The gateway does not take this order now; the message says why."""


log = logging.getLogger(__name__)

EVENTS_KEPT = 1000
"""Changes that wait for a slow reader of /v1/events; what is more is lost to it."""


class Admin:
    def __init__(self, server: Server, path: str) -> None:
        self.server = server
        self.path = path
        self._runner: web.AppRunner | None = None
        self._listening: Listening | None = None

    async def start(self) -> None:
        """Listen; who comes waits for `serve`. Raises ListenError, also when another gateway answers there."""
        with contextlib.suppress(OSError):
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._listening = self.server.listeners.open(Listener(name="admin", endpoint=Unix(self.path, mode=0o600)))
        except ListenError as error:
            raise ListenError(f"the admin socket: {error}; gateway.admin names another path") from error

    async def serve(self) -> None:
        """Answer: there is something to tell of now."""
        assert self._listening is not None
        self._runner = web.AppRunner(
            application(self.server),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=1.0,
            handler_cancellation=True,
        )
        await self._runner.setup()
        await web.SockSite(self._runner, self._listening.socket).start()

    async def stop(self) -> None:
        """Close it, and the connections that are left."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._listening is not None:
            self.server.listeners.close(self._listening)


def application(server: Server) -> web.Application:
    """The HTTP application; for tests, too."""
    app = web.Application(middlewares=[_errors])
    api = Api(server)
    app.add_routes([
        web.get("/v1/status", api.status),
        web.get("/v1/events", api.events),
        web.post("/v1/reload", api.reload),
        web.post("/v1/upgrade", api.upgrade),
        web.post("/v1/backends/{name}/start", api.start),
        web.post("/v1/backends/{name}/stop", api.stop),
        web.post("/v1/backends/{name}/hold", api.hold),
        web.post("/v1/backends/{name}/release", api.release),
        web.get("/v1/backends/{name}/logs", api.logs),
    ])  # fmt: skip
    return app


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value) + b"\n", status=status, content_type="application/json")


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _json({"error": error.reason}, error.status)
    except UnknownBackend as error:
        return _json({"error": f"there is no backend {error.args[0]!r}"}, 404)
    except (ConfigError, ListenError) as error:
        return _json({"error": str(error)}, 422)
    except Refused as error:
        return _json({"error": str(error)}, 409)
    except ValueError as error:
        return _json({"error": str(error)}, 400)


class Api:
    """One method for each route."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def status(self, request: web.Request) -> web.Response:
        return _json(await self.server.status(request.query.getall("name", None)))

    async def events(self, request: web.Request) -> web.StreamResponse:
        queue: asyncio.Queue[StateChange] = asyncio.Queue(EVENTS_KEPT)
        forget = self.server.watch(queue)

        async def lines() -> AsyncIterator[bytes]:
            while True:
                yield msgspec.json.encode(await queue.get()) + b"\n"

        try:
            return await _stream(request, "application/x-ndjson", lines())
        finally:
            forget()

    async def reload(self, request: web.Request) -> web.Response:
        return _json({"message": await self.server.reload()})

    async def upgrade(self, request: web.Request) -> web.StreamResponse:
        response = _json({"message": "the version on the disk takes over"})

        async def answered() -> None:
            await response.prepare(request)
            await response.write_eof()

        try:
            await self.server.upgrade(answered)
        except (CommandFailed, OSError) as error:
            if not response.prepared:
                return _json({"error": str(error)}, 409)
            log.error("not upgraded: %s", error)
        return response

    async def start(self, request: web.Request) -> web.Response:
        life = self._service(request).lives()
        life.wake_now("dormant start")
        await self.server.until(lambda: life.state is State.READY or life.asleep)
        if life.state is not State.READY:
            return _json({"error": life.last_error or "it was stopped again"}, 502)
        return _json({"message": "ready"})

    async def stop(self, request: web.Request) -> web.Response:
        await self._service(request).lives().stop("stopped by hand")
        return _json({"message": "stopped"})

    async def hold(self, request: web.Request) -> web.Response:
        seconds = request.query.get("seconds")
        await self.server.hold(request.match_info["name"], None if seconds is None else _seconds(seconds))
        return _json({"message": "held"})

    async def release(self, request: web.Request) -> web.Response:
        await self.server.release(request.match_info["name"])
        return _json({"message": "released"})

    async def logs(self, request: web.Request) -> web.StreamResponse:
        output = self._service(request).backend.output

        async def lines() -> AsyncIterator[bytes]:
            for line in output.tail():
                yield line.encode() + b"\n"
            if request.query.get("follow") == "1":
                async for line in output.follow():
                    yield line.encode() + b"\n"

        return await _stream(request, "text/plain", lines())

    def _service(self, request: web.Request) -> Any:
        return self.server.find(request.match_info["name"])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ValueError(f"seconds={text!r} is not a number of seconds")
    return seconds


async def _stream(request: web.Request, content_type: str, chunks: AsyncIterator[bytes]) -> web.StreamResponse:
    """Send chunks as they come, until they end or the client leaves."""
    response = web.StreamResponse(headers={"Content-Type": f"{content_type}; charset=utf-8"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionResetError):
        async for chunk in chunks:
            await response.write(chunk)
    return response
