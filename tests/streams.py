"""Many connections at once that stream in both directions and know each byte: what must survive upgrades and crashes.

Whoever answers echoes. What a connection sends depends on its number and the position, so that a byte that is lost, repeated
or another one's is found.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from tests.running import PATIENCE, eventually

CHUNK = 4096
AHEAD = 4 * CHUNK
"""Bytes that are on their way there and back at most."""
PACE = 0.1
"""Seconds between two chunks of a connection: load, but no more than two cores can take."""
STEP = 4099
"""By so much the streams of two neighbours differ."""
PATTERN = random.Random(1).randbytes(1 << 20)  # longer than anything here could lose or repeat


class Stream:
    """One connection, from its greeting to the end of file that answers its own."""

    def __init__(self, number: int, port: int) -> None:
        self.number = number
        self.port = port
        self.sent = self.received = 0
        self.stop = asyncio.Event()
        self._echoed = asyncio.Event()

    async def run(self) -> None:
        """Raises AssertionError or OSError when something is lost."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            assert (await reader.readline()).startswith(b"hello ")
            async with asyncio.TaskGroup() as both:
                both.create_task(self._send(writer))
                both.create_task(self._receive(reader))
            assert self.received == self.sent, f"{self.sent - self.received} bytes are missing at the end"
        finally:
            writer.transport.abort()

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        while not self.stop.is_set():
            writer.write(self._at(self.sent, CHUNK))
            self.sent += CHUNK
            await writer.drain()
            await asyncio.sleep(PACE)
            while self.sent - self.received > AHEAD:
                self._echoed.clear()
                await self._echoed.wait()
        writer.write_eof()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(1 << 16):
            assert data == self._at(self.received, len(data)), f"wrong bytes after {self.received}"
            self.received += len(data)
            self._echoed.set()
        assert self.stop.is_set(), f"cut after {self.received} bytes"

    def _at(self, position: int, size: int) -> bytes:
        begin = (position + self.number * STEP) % len(PATTERN)
        return (PATTERN[begin : begin + size] + PATTERN[:size])[:size]


class Streams:
    """All of them, in a thread of their own. A context manager."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        """what went wrong, by the number of the connection"""
        self._running: dict[Stream, Future[None]] = {}
        self._count = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for running in self._running.values():
            running.cancel()
        asyncio.run_coroutine_threadsafe(_gone(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def begin(self, count: int, port: int) -> list[Stream]:
        """So many more."""
        begun = [Stream(self._count + number, port) for number in range(count)]
        self._count += count
        for stream in begun:
            self._running[stream] = asyncio.run_coroutine_threadsafe(self._run(stream), self._loop)
        return begun

    async def _run(self, stream: Stream) -> None:
        try:
            await stream.run()
        except* (AssertionError, OSError) as errors:
            self.lost += [f"{stream.number}: {error!r}" for error in errors.exceptions]

    def flow(self) -> None:
        """Return when every connection has moved more bytes than are ever on their way, from now on; nothing is lost."""
        goals = {stream: stream.received + AHEAD + CHUNK for stream in self._running}
        eventually(lambda: self.lost or all(stream.received >= goal for stream, goal in goals.items()), "all flow")
        assert self.lost == []

    def end(self, streams: Sequence[Stream]) -> None:
        """These say that it was all, and have got everything back."""
        for stream in streams:
            self._loop.call_soon_threadsafe(stream.stop.set)
        for stream in streams:
            self._running.pop(stream).result(PATIENCE)
        assert self.lost == []


async def _gone() -> None:
    """Everything that was cancelled has ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
