"""A client of the admin API, for the commands. Counterpart: `gateway.admin`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import msgspec

from gateway.status import GatewayStatus, StateChange


class AdminError(Exception):
    """The gateway said no, or is not there; the message says why."""


class Client:
    """An async context manager. All methods raise AdminError."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def __aenter__(self) -> Self:
        # No deadline: a start may take as long as it is configured to; the user has Ctrl-C.
        self._session = aiohttp.ClientSession(
            "http://dormant", connector=aiohttp.UnixConnector(self.path), timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def status(self, *names: str) -> GatewayStatus:
        query = [("name", name) for name in names]
        return msgspec.json.decode(await self._ask("GET", "/v1/status", query), type=GatewayStatus)

    async def reload(self) -> str:
        return self._message(await self._ask("POST", "/v1/reload"))

    async def upgrade(self) -> str:
        return self._message(await self._ask("POST", "/v1/upgrade"))

    async def order(self, name: str, verb: str, **query: str) -> str:
        """`start`, `stop`, `hold`, `release` a backend."""
        return self._message(await self._ask("POST", f"{_path(name)}/{verb}", list(query.items())))

    async def events(self) -> AsyncIterator[StateChange]:
        """Each change of a state from now on."""
        async with self._lines("/v1/events") as lines:
            async for line in lines:
                yield msgspec.json.decode(line, type=StateChange)

    async def watch(self, *names: str) -> AsyncIterator[GatewayStatus]:
        """The status now, and again after each change of a state; goes on with the gateway that takes over."""
        while True:
            async with self._lines("/v1/events") as lines:  # first, so that no change is missed
                yield await self.status(*names)
                async for line in lines:
                    if not names or msgspec.json.decode(line, type=StateChange).backend in names:
                        yield await self.status(*names)

    async def logs(self, name: str, follow: bool) -> AsyncIterator[str]:
        async with self._lines(f"{_path(name)}/logs", follow="1" if follow else "0") as lines:
            async for line in lines:
                yield line.decode(errors="replace").rstrip("\n")

    async def _ask(self, method: str, path: str, query: list[tuple[str, str]] | None = None) -> bytes:
        try:
            async with self._session.request(method, path, params=query) as response:
                body = await response.read()
                if response.status >= 400:
                    raise AdminError(_reason(body))
                return body
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error

    @contextlib.asynccontextmanager
    async def _lines(self, path: str, **query: str) -> AsyncIterator[aiohttp.StreamReader]:
        """The lines of an answer, which has begun."""
        try:
            async with self._session.get(path, params=query) as response:
                if response.status >= 400:
                    raise AdminError(_reason(await response.read()))
                yield response.content
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> AdminError:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return AdminError(f"no gateway answers at {self.path} ({why}); is it running? --socket names another one")

    @staticmethod
    def _message(body: bytes) -> str:
        answer: dict[str, Any] = msgspec.json.decode(body)
        return str(answer["message"])


def _path(name: str) -> str:
    """Whatever the name holds, it is one segment of the path."""
    return f"/v1/backends/{quote(name, safe='')}"


def _reason(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"])
    except (msgspec.MsgspecError, LookupError, TypeError):
        return body.decode(errors="replace")[:200]
