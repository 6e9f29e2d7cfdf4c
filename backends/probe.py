"""Readiness: how one knows that a backend really answers, and waiting for it.

The readiness of a configuration (`ready: connect`, `ready: {http: /health}`) is one of the types in KINDS; the first
field of a type is the one that a plain value sets. Counterpart: `backends.base.Backend.ready` waits here, and drivers
say in `Probed` where and what to look at. A probe has no deadline and gives up on nothing: the gateway has the
deadline, and asks for the last error when it is over. That a backend died ends the wait in `Backend.ready`, not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from backends.endpoint import (
    AddressError,
    Endpoint,
    Inet,
    Inherited,
    Tcp,
    Unix,
    Vsock,
    VsockMux,
    is_datagram,
    resolve,
)
from backends.notifications import Notifications
from backends.output import Output
from backends.units import Command, Duration

FIRST_GAP = 0.001  # seconds between two attempts, at first
LONGEST_GAP = 0.05
GAP_GROWTH = 1.1  # so a gap is a tenth of the time that has passed: that much is lost at most when it becomes ready
CONNECT_TIMEOUT = 1.0  # seconds for one attempt: an address that swallows packets is tried again
HTTP_TIMEOUT = 2.0
ANSWER_TIMEOUT = LONGEST_GAP  # until a question is asked again; a later answer is heard, too
LARGEST_DATAGRAM = 65507  # UDP over IPv4
RESOLVE_AGAIN = 1.0  # seconds after which a name is looked up again: a machine may come back with another address


T = TypeVar("T")


class Connect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every stream endpoint accepts a connection."""


class Http(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every stream endpoint answers a GET of this path with this status; without one, with any 2xx or 3xx."""

    path: str = "/"
    status: int | None = None
    host: str | None = None
    """the Host header, where it is not the endpoint's own"""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"/[!-~]*", self.path):
            raise ValueError(f"{self.path!r} is not a path such as /health")
        if self.status is not None and not 100 <= self.status <= 599:
            raise ValueError(f"{self.status} is not an HTTP status")


def payload(text: str) -> bytes:
    """The bytes of a datagram: text, or after `hex:` hexadecimal digits. Raises ValueError."""
    if not text.startswith("hex:"):
        return text.encode()
    try:
        return bytes.fromhex(text.removeprefix("hex:"))
    except ValueError:
        raise ValueError(f"{text!r} does not go on in hexadecimal digits such as hex:00ff") from None


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every datagram endpoint answers this datagram."""

    send: str
    """text, or `hex:` and hexadecimal digits"""
    expect: str = ""
    """a part of the answer, in the same forms; empty: any answer will do"""

    def __post_init__(self) -> None:
        payload(self.expect)
        if len(payload(self.send)) > LARGEST_DATAGRAM:
            raise ValueError(f"is longer than a datagram, {LARGEST_DATAGRAM} bytes")


class Exec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command ends with exit status 0."""

    command: Command
    timeout: Duration = Duration(5)
    """of one attempt"""


class Notify(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The backend says READY=1 at its NOTIFY_SOCKET, sd_notify(3)."""


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of its output matches a regular expression, anywhere in the line."""

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is not a regular expression: {error}") from None


class Delay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So much time has passed: for what cannot be asked."""

    time: Duration


Readiness = Connect | Http | Query | Exec | Notify | Log | Delay
KINDS: dict[str, type[Readiness]] = {
    "connect": Connect,
    "http": Http,
    "udp": Query,
    "exec": Exec,
    "notify": Notify,
    "log": Log,
    "delay": Delay,
}


def _ignore(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Probed:
    """What a driver says about the backend whose readiness is awaited."""

    endpoints: Mapping[str, Endpoint]
    output: Output
    directory: Path
    """where an `exec` probe runs"""
    notifications: Notifications | None = None
    """where it says READY=1; made before the start, by drivers that can pass it on"""
    report: Callable[[str], None] = field(default=_ignore)
    """takes the error of each attempt that failed"""


class Unanswered(Exception):
    """One attempt failed; the next may not."""


class Impossible(Exception):
    """No attempt can ever work: the driver or the endpoint is of the wrong kind for this readiness."""


async def wait(readiness: Readiness, probed: Probed) -> Mapping[str, Endpoint]:
    """Return once it answers; the endpoints with numeric addresses, the ones that answered, by listener name.

    Cancelling leaves nothing behind. Raises Impossible.
    """
    for endpoint in probed.endpoints.values():
        if isinstance(endpoint, Vsock) and endpoint.cid == "guest":
            raise Impossible(f"{endpoint} is not possible with this driver, which knows no guest")
    match readiness:
        case Connect():
            streams = _askable(probed, "connect", _is_stream)
            return await _each(probed, streams, lambda endpoint: _answering(endpoint, probed, _reach))
        case Http():
            streams = _askable(probed, "http", _is_stream)
            for endpoint in streams:
                if not isinstance(endpoint, (Tcp, Unix)):
                    raise Impossible(f"readiness `http` is not possible at {endpoint}; only at tcp: and unix:")
            await asyncio.to_thread(importlib.import_module, "aiohttp")  # not in the loop: it takes a while
            return await _each(
                probed, streams, lambda endpoint: _answering(endpoint, probed, _getting(readiness, endpoint))
            )
        case Query():
            datagrams = _askable(probed, "udp", is_datagram)
            return await _each(probed, datagrams, lambda endpoint: _questioning(readiness, endpoint, probed))
        case Exec():
            await _until(lambda: _run(readiness, probed), probed.report)
        case Notify():
            if probed.notifications is None:
                raise Impossible("readiness `notify` is not possible with this driver")
            probed.report("it has not said READY=1")
            await probed.notifications.ready.wait()
        case Log():
            await _matching_line(readiness, probed)
        case Delay():
            await asyncio.sleep(readiness.time)
    return await _each(probed, (), lambda endpoint: _found(endpoint, probed))


def _askable(probed: Probed, kind: str, fits: Callable[[Endpoint], bool]) -> list[Endpoint]:
    """The endpoints that can be asked in this way; there must be one if there are any. Raises Impossible."""
    endpoints = list(probed.endpoints.values())
    askable = [endpoint for endpoint in endpoints if fits(endpoint)]
    if endpoints and not askable:
        raise Impossible(f"readiness `{kind}` is not possible at {endpoints[0]}")
    return askable


def _is_stream(endpoint: Endpoint) -> bool:
    return not is_datagram(endpoint)


async def _each(
    probed: Probed, asked: Collection[Endpoint], ask: Callable[[Endpoint], Coroutine[Any, Any, Endpoint]]
) -> Mapping[str, Endpoint]:
    """Ask about all endpoints at a time; an error of one ends the others. Of those that are not asked, the first address is
    taken.
    """
    loop = asyncio.get_running_loop()
    asking = [
        loop.create_task(ask(each) if each in asked else _found(each, probed), name=f"probe of {each}")
        for each in probed.endpoints.values()
    ]
    try:
        answers = await asyncio.gather(*asking)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    return dict(zip(probed.endpoints, answers, strict=True))


async def _found(endpoint: Endpoint, probed: Probed) -> Endpoint:
    return await _until(lambda: _first_address(endpoint), probed.report)


async def _until(attempt: Callable[[], Awaitable[T]], report: Callable[[str], None]) -> T:
    """Try until it works, soon at first, then with growing gaps."""
    gap = FIRST_GAP
    while True:
        try:
            return await attempt()
        except Unanswered as error:
            report(str(error))
        await asyncio.sleep(gap)
        gap = min(gap * GAP_GROWTH, LONGEST_GAP)


# Addresses


async def _resolved(endpoint: Endpoint) -> list[Endpoint]:
    """The numeric forms; only a name costs a thread. Raises Unanswered."""
    if isinstance(endpoint, Inet) and endpoint.host != "*" and not _is_numeric(endpoint.host):
        try:
            return await asyncio.to_thread(resolve, endpoint)
        except AddressError as error:
            raise Unanswered(str(error)) from None
    return resolve(endpoint) if isinstance(endpoint, Inet) and endpoint.host == "*" else [endpoint]


def _is_numeric(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host.partition("%")[0])
    except OSError:
        return False
    return True


async def _first_address(endpoint: Endpoint) -> Endpoint:
    return (await _resolved(endpoint))[0]


async def _answering(endpoint: Endpoint, probed: Probed, ask: Callable[[Endpoint], Awaitable[None]]) -> Endpoint:
    """Ask each address of an endpoint until one answers; that one is returned."""
    clock = asyncio.get_running_loop().time
    addresses: list[Endpoint] = []
    resolved_at = 0.0

    async def attempt() -> Endpoint:
        nonlocal addresses, resolved_at
        if not addresses or clock() - resolved_at > RESOLVE_AGAIN:
            addresses = await _resolved(endpoint)
            resolved_at = clock()
        errors = []
        for address in addresses:
            try:
                await ask(address)
                return address
            except Unanswered as error:
                errors.append(str(error))
        raise Unanswered("; ".join(errors))

    return await _until(attempt, probed.report)


# connect


async def _reach(endpoint: Endpoint) -> None:
    """Connect and close again. Raises Unanswered."""
    if isinstance(endpoint, Inherited):
        raise Unanswered(f"{endpoint} cannot be dialled")
    try:
        with socket.socket(endpoint.family, endpoint.type | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
            # On one machine the answer is there at once, and most attempts are there.
            if (number := sock.connect_ex(endpoint.sockaddr)) == errno.EINPROGRESS:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await asyncio.get_running_loop().sock_connect(sock, endpoint.sockaddr)
            elif number:
                raise OSError(number, os.strerror(number))
            if isinstance(endpoint, VsockMux):
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await _reach_guest(sock, endpoint)
            if isinstance(endpoint, Inet) and sock.getsockname() == sock.getpeername():
                # The kernel took the port that we dial as our own port, and connected us to ourselves, tcp(7). Closed
                # by a reset: a TIME_WAIT would keep the backend from binding its port.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise Unanswered(f"{endpoint}: nobody listens")
    except TimeoutError:
        raise Unanswered(f"{endpoint}: no answer within {CONNECT_TIMEOUT:g}s") from None
    except OSError as error:
        raise Unanswered(f"{endpoint}: {_why(error)}") from None


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)  # asyncio puts the address into `strerror`


async def _reach_guest(sock: socket.socket, endpoint: VsockMux) -> None:
    """Ask the VMM for a port of its guest; it says `OK` once somebody listens there."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, f"CONNECT {endpoint.port}\n".encode())
    if not (await loop.sock_recv(sock, 32)).startswith(b"OK "):
        raise Unanswered(f"{endpoint}: the guest does not listen")


# http


def _getting(http: Http, configured: Endpoint) -> Callable[[Endpoint], Awaitable[None]]:
    """How to ask the addresses of one endpoint over HTTP."""
    host = http.host or (str(configured).removeprefix("tcp://") if isinstance(configured, Tcp) else "localhost")

    async def get(endpoint: Endpoint) -> None:
        await _reach(endpoint)  # so that the HTTP client never meets a port where nobody listens
        try:
            status = await _status(http.path, endpoint, host)
        except TimeoutError:
            raise Unanswered(f"{endpoint}: no HTTP answer within {HTTP_TIMEOUT:g}s") from None
        except OSError as error:
            raise Unanswered(f"{endpoint}: {_why(error)}") from None
        if status != http.status if http.status is not None else not 200 <= status < 400:
            raise Unanswered(f"{endpoint}: GET {http.path} answered {status}")

    return get


async def _status(path: str, endpoint: Endpoint, host: str) -> int:
    """The status of one GET; redirects are not followed, the body is not read. Raises OSError or TimeoutError."""
    import aiohttp
    from yarl import URL

    connector: aiohttp.BaseConnector
    if isinstance(endpoint, Unix):
        connector, authority = aiohttp.UnixConnector(endpoint.sockaddr, force_close=True), "localhost"
    else:
        connector, authority = aiohttp.TCPConnector(force_close=True), str(endpoint).removeprefix("tcp://")
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=HTTP_TIMEOUT)) as session,
            session.get(
                URL(f"http://{authority}{path}", encoded=True), allow_redirects=False, headers={"Host": host}
            ) as answer,
        ):
            return answer.status
    except aiohttp.ClientError as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


# udp


async def _questioning(query: Query, endpoint: Endpoint, probed: Probed) -> Endpoint:
    questions = Questions(query)
    try:
        return await _answering(endpoint, probed, questions.ask)
    finally:
        questions.close()


class Questions:
    """The sockets from which the addresses of one endpoint are asked again and again: an answer may be late."""

    def __init__(self, query: Query) -> None:
        self._send, self._expect = payload(query.send), payload(query.expect)
        self._expected = query.expect
        self._sockets: dict[Endpoint, socket.socket] = {}

    async def ask(self, endpoint: Endpoint) -> None:
        """Ask once more, and listen for a moment. Raises Unanswered."""
        try:
            sock = self._sockets.get(endpoint) or self._connect(endpoint)
            with contextlib.suppress(BlockingIOError):  # full of questions that nobody has read yet
                sock.send(self._send)
            async with asyncio.timeout(ANSWER_TIMEOUT):
                answer = await asyncio.get_running_loop().sock_recv(sock, LARGEST_DATAGRAM)
        except TimeoutError:
            raise Unanswered(f"{endpoint}: no answer") from None
        except OSError as error:
            self._forget(endpoint)
            raise Unanswered(f"{endpoint}: {_why(error)}") from None
        if self._expect not in answer:
            raise Unanswered(f"{endpoint}: {self._expected!r} is not in its answer")

    def _connect(self, endpoint: Endpoint) -> socket.socket:
        """Raises OSError."""
        assert not isinstance(endpoint, Inherited)
        sock = socket.socket(endpoint.family, endpoint.type | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._sockets[endpoint] = sock
        if sock.family == socket.AF_UNIX:
            sock.bind("")  # a name that the kernel chooses: what has none cannot be answered
        sock.connect(endpoint.sockaddr)
        if isinstance(endpoint, Inet) and sock.getsockname() == sock.getpeername():
            raise OSError(errno.ECONNREFUSED, "connected to itself")  # as in `_reach`
        return sock

    def _forget(self, endpoint: Endpoint) -> None:
        sock = self._sockets.pop(endpoint, None)
        if sock is not None:
            sock.close()

    def close(self) -> None:
        for endpoint in list(self._sockets):
            self._forget(endpoint)


# exec, log


async def _run(probe: Exec, probed: Probed) -> None:
    from backends.command import CommandFailed, run  # not above: the base of the drivers imports this module

    try:
        await run(probe.command, timeout=probe.timeout, cwd=probed.directory)
    except CommandFailed as error:
        raise Unanswered(str(error)) from None


async def _matching_line(log: Log, probed: Probed) -> None:
    pattern = re.compile(log.pattern)
    seen = asyncio.Event()

    def look(line: str) -> None:
        if pattern.search(line):
            seen.set()

    probed.report(f"no line of its output matches {log.pattern!r}")
    forget = probed.output.listen(look)
    try:
        for line in probed.output.fresh():
            look(line)
        await seen.wait()
    finally:
        forget()
