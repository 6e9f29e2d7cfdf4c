"""A pipe that a program writes to and the event loop reads, without a thread.

Counterpart: drivers give the write end to what they start and the read end's bytes to an Output. A descendant that
keeps the write end open for ever holds up nobody: the owner calls `finish` when the program itself is gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

CHUNK = 16 << 10  # bytes in one turn of the loop: each line costs time, and others wait for their turn
LAST_CHUNKS = 16  # read after the end, so that somebody who still writes cannot keep us


class Pipe:
    """Calls `sink` with what is read, and once with `b""` at the end. Owns both ends."""

    def __init__(self, sink: Callable[[bytes], None], reader: int = -1) -> None:
        """`reader`: the read end of a pipe that is there already. Raises OSError when no descriptors are left."""
        self._sink = sink
        self._reader, self._writer = (reader, -1) if reader >= 0 else os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._reader, self._read)

    @property
    def reader(self) -> int:
        """The read end; -1 after the end of file."""
        return self._reader

    @property
    def writer(self) -> int:
        """The write end, to be inherited; blocking, as programs expect it."""
        return self._writer

    def close_writer(self) -> None:
        """Close our copy of the write end: the end of file comes when the last writer closes its own."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def finish(self) -> None:
        """Read what is left, then close both ends, whoever still writes. Idempotent."""
        self.close_writer()
        for _ in range(LAST_CHUNKS):
            if not self._read():
                break
        self._close()

    def _read(self) -> bool:
        """Read one chunk; False when there is none now or ever again."""
        if self._reader < 0:
            return False
        try:
            data = os.read(self._reader, CHUNK)
        except BlockingIOError:
            return False
        if data:
            self._sink(data)
        else:
            self._close()
        return bool(data)

    def _close(self) -> None:
        if self._reader >= 0:
            self._loop.remove_reader(self._reader)
            os.close(self._reader)
            self._reader = -1
            self._sink(b"")
