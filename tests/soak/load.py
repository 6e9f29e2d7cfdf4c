"""The clients: one asyncio loop. Each player visits one backend in bursts and leaves it alone in between, so it sleeps."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import Awaitable, Callable

from backends.endpoint import Endpoint, parse
from tests.soak.failures import AT_ONCE, Record

DEADLINE = 20.0
"""Seconds after which a client that was not served gives up."""
FLOOD = 50
LINGER_NONE = struct.pack("ii", 1, 0)
NOISE = random.Random(1).randbytes(1 << 20)

Visit = Callable[["Client"], Awaitable[None]]


class Wrong(Exception):
    """Bytes that were not those that were sent."""


class Client:
    """One connection, or one flow of datagrams."""

    def __init__(self, address: Endpoint) -> None:
        self.address = address
        self.loop = asyncio.get_running_loop()
        self.sock = socket.socket(address.family, address.type)
        self.sock.setblocking(False)

    async def connect(self) -> None:
        await self.loop.sock_connect(self.sock, self.address.sockaddr)

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    async def some(self, size: int = 1 << 16) -> bytes:
        data = await self.loop.sock_recv(self.sock, size)
        if not data:
            raise ConnectionError("closed too early")
        return data

    async def greeting(self) -> None:
        line = b""
        while not line.endswith(b"\n"):
            line += await self.some(1)
        check_greeting(line)

    async def expect(self, data: bytes, size: int = 1 << 16, pause: float = 0) -> None:
        seen = 0
        while seen < len(data):
            got = await self.some(min(size, len(data) - seen))
            if got != data[seen : seen + len(got)]:
                raise Wrong(f"wrong bytes after {seen} of {len(data)}")
            seen += len(got)
            if pause:
                await asyncio.sleep(pause)

    async def rest(self) -> bytes:
        chunks = []
        while chunk := await self.loop.sock_recv(self.sock, 1 << 16):
            chunks.append(chunk)
        return b"".join(chunks)

    def close(self) -> None:
        self.sock.close()


def check_greeting(line: bytes) -> None:
    words = line.split()
    if len(words) != 2 or words[0] != b"hello" or not words[1].isdigit():
        raise Wrong(f"a greeting: {line[:80]!r}")


def some_bytes(most: int) -> bytes:
    size = random.randint(1, most)
    start = random.randrange(len(NOISE) - size)
    return NOISE[start : start + size]


# What clients do


async def echo(client: Client) -> None:
    await client.connect()
    await client.greeting()
    for _ in range(random.randint(1, 3)):
        data = some_bytes(16 << 10)
        await client.send(data)
        await client.expect(data)


async def stay(client: Client) -> None:
    """Through whatever happens meanwhile."""
    await client.connect()
    await client.greeting()
    end = time.monotonic() + random.uniform(1, 6)
    while time.monotonic() < end:
        data = some_bytes(1 << 10)
        await client.send(data)
        await client.expect(data)
        await asyncio.sleep(0.25)


async def read_slowly(client: Client) -> None:
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 10)
    await client.connect()
    await client.greeting()
    data = NOISE[: 512 << 10]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(client.send(data))
        tasks.create_task(client.expect(data, 16 << 10, 0.02))


async def half_close(client: Client) -> None:
    """The answer follows the client's end of file, or goes on after it."""
    await client.connect()
    data = some_bytes(64 << 10)
    await client.send(data)
    client.sock.shutdown(socket.SHUT_WR)
    greeting, newline, rest = (await client.rest()).partition(b"\n")
    if not newline:
        raise ConnectionError("closed too early")
    check_greeting(greeting + newline)
    if rest != data:
        if data.startswith(rest):
            raise ConnectionError(f"cut after {len(rest)} of {len(data)} bytes")
        raise Wrong("the echo of a half-closed connection")


async def reset(client: Client) -> None:
    await client.connect()
    if random.random() < 0.7:
        await client.greeting()
        await client.send(some_bytes(4 << 10))
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)


async def leave(client: Client) -> None:
    await client.connect()


async def datagrams(client: Client) -> None:
    await client.connect()
    for _ in range(3):
        data = some_bytes(1200)
        await client.send(data)
        if await client.some() != data:
            raise Wrong("a datagram")


KINDS: dict[Visit, str] = {
    echo: "echo", stay: "stay", read_slowly: "slow reader", half_close: "half-close", reset: "reset", leave: "leave",
    datagrams: "datagrams",
}  # fmt: skip


class Load:
    """Players until `stop`; nobody is cut off by the end."""

    def __init__(self, record: Record, stop: asyncio.Event) -> None:
        self.record = record
        self.stop = stop
        self.live = 0

    async def visit(self, backend: str, address: Endpoint, what: Visit, kind: str = "") -> None:
        kind = kind or KINDS[what]
        began = time.monotonic()
        client = Client(address)
        self.live += 1
        try:
            async with asyncio.timeout(DEADLINE):
                await what(client)
        except* Wrong as errors:
            self.record.fail(f"a client ({kind}) of {backend} got what nobody sent: {errors.exceptions}")
        except* (OSError, TimeoutError) as errors:
            # A flow of datagrams is not closed: its client waits in vain.
            patience = DEADLINE + AT_ONCE if what is datagrams else AT_ONCE
            self.record.lost(kind, backend, began, errors.exceptions[0], patience)
        else:
            self.record.traffic[kind] += 1
        finally:
            self.live -= 1
            client.close()

    async def pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            pass

    async def play(
        self, backend: str, listen: str, visits: list[Visit], *, rate: float, burst: float, quiet: float
    ) -> None:
        """New clients at this rate for `burst` seconds, none for `quiet` seconds; each about that long."""
        address = parse(listen)
        async with asyncio.TaskGroup() as tasks:
            while not self.stop.is_set():
                end = time.monotonic() + burst * random.uniform(0.5, 1.5)
                while time.monotonic() < end and not self.stop.is_set():
                    tasks.create_task(self.visit(backend, address, random.choice(visits)))
                    await self.pause(random.expovariate(rate))
                await self.pause(quiet * random.uniform(0.5, 1.5))

    async def flood(self, backend: str, listen: str, *, quiet: float) -> None:
        """Many at once, on a sleeping backend."""
        address = parse(listen)
        while not self.stop.is_set():
            async with asyncio.TaskGroup() as tasks:
                for _ in range(FLOOD):
                    tasks.create_task(self.visit(backend, address, echo, "flood"))
            await self.pause(quiet * random.uniform(0.8, 1.2))
