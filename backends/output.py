"""The output of one backend: its last lines are kept, and whoever listens gets each new one.

Counterpart: drivers `feed` what they read; `dormant logs`, the `log` probe and the error of a failed start read it.
Nothing is written to a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

KEPT_LINES = 200
LONGEST_LINE = 4096  # bytes; what is longer is cut into several lines, so that memory is bounded


class Output:
    """Lines of text, oldest first."""

    __slots__ = ("_fresh", "_lines", "_listeners", "_rest")

    def __init__(self) -> None:
        self._lines: deque[str] | None = None  # made on first use: sleeping backends are many
        self._listeners: list[Callable[[str], None]] = []
        self._rest = b""
        self._fresh = 0

    def begin(self) -> None:
        """A new life begins: what was said before is kept, but is no longer `fresh`."""
        self._fresh = 0

    def feed(self, data: bytes) -> None:
        """Take what was read; a last line without its end waits for the rest. `b""` ends it."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > LONGEST_LINE:
            whole.append(self._rest)
            self._rest = b""
        for line in whole:
            for start in range(0, max(len(line), 1), LONGEST_LINE):
                if data or line:
                    self.line(line[start : start + LONGEST_LINE].decode(errors="replace").rstrip("\r"))

    def line(self, text: str) -> None:
        if self._lines is None:
            self._lines = deque(maxlen=KEPT_LINES)
        self._lines.append(text)
        self._fresh += 1
        for listener in tuple(self._listeners):
            listener(text)

    def tail(self, count: int = KEPT_LINES) -> list[str]:
        """The last lines, at most `count`."""
        return list(self._lines or ())[-count:] if count > 0 else []

    def fresh(self, count: int = KEPT_LINES) -> list[str]:
        """The last lines of this life, at most `count`."""
        return self.tail(min(count, self._fresh))

    def hand_over(self) -> list[Any]:
        """What `take_over` needs to go on."""
        return [self.tail(), self._fresh]

    def take_over(self, data: list[Any]) -> None:
        lines, self._fresh = data or ([], 0)
        self._lines = deque(lines, maxlen=KEPT_LINES)

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with each new line from now on, until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def follow(self) -> AsyncIterator[str]:
        """Each new line from now on. A reader that is too slow loses lines, never holds the backend up."""
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=10 * KEPT_LINES)

        def put(text: str) -> None:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(text)

        forget = self.listen(put)
        try:
            while True:
                yield await queue.get()
        finally:
            forget()
