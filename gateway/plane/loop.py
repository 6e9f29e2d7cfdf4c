"""The event loop of a worker: one epoll, one process, no threads, no asyncio.

Counterparts: everything in the data plane that owns a descriptor is a `Source` and is called when epoll(7) reports it;
`gateway.plane.worker` runs the loop. The loop knows descriptors, times and callbacks, and nothing of connections. It
reads and writes nothing, and it closes only what `discard` gave it. None of it is thread-safe, and a signal handler
cannot wake it: whoever wants that adds the descriptor of signal.set_wakeup_fd.

A turn: close what was discarded, wait, hand out the events, then the `soon` callbacks of the turn before, then the
timers that are due.
"""

from __future__ import annotations

import heapq
import select
import time
import traceback
from collections.abc import Callable, Iterable
from itertools import count
from socket import SocketType
from typing import Protocol

MAX_EVENTS = 256
"""Of one epoll_wait. Python's default makes room for 1023 in every call."""

LONGEST_WAIT = 86400.0
"""Seconds. epoll_wait(2) takes an int of milliseconds, which is 24 days; waking once a day is no wake-up."""

GARBAGE = 64
"""Cancelled timers that may stay in the heap before it is worth a look."""

Callback = Callable[[], object]


class Source(Protocol):
    """What owns a descriptor in the loop.

    It may also have `abort()`: called when its `event`, or a callback that is a method of it, raised something
    unexpected. It has to give up its descriptor by `Loop.discard`, in whatever state the error left it.
    """

    def event(self, mask: int) -> None:
        """`mask` is what epoll reported. Events of a descriptor that was taken out in the same batch do not come."""


class Timer:
    """A callback that waits for its time."""

    __slots__ = ("_callback", "_loop")

    def __init__(self, loop: Loop, callback: Callback) -> None:
        self._loop = loop
        self._callback: Callback | None = callback

    def cancel(self) -> None:
        """It will not be called any more. Idempotent; after it was called, nothing happens."""
        if self._callback is not None:
            self._callback = None
            self._loop._timer_cancelled()

    @property
    def pending(self) -> bool:
        return self._callback is not None

    def _take(self) -> Callback | None:
        callback, self._callback = self._callback, None
        return callback


class Loop:
    """See the module.

    `table` is the source of each descriptor. `on_error` is called with the source (or callback) and its exception; the
    loop goes on after it.
    """

    __slots__ = ("_cancelled", "_discarded", "_epoll", "_serial", "_soon", "_stopping", "_timers", "on_error", "table")

    def __init__(self) -> None:
        self.table: dict[int, Source] = {}
        self.on_error: Callable[[object, Exception], object] = print_error
        self._epoll = select.epoll()
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = count()  # timers of the same moment are called in their order, and are never compared themselves
        self._cancelled = 0
        self._soon: list[Callback] = []
        self._discarded: list[SocketType] = []
        self._stopping = False

    now = staticmethod(time.monotonic)

    # Descriptors

    def add(self, fd: int, source: Source, mask: int) -> None:
        """Watch a descriptor; what is pending already is reported. Raises OSError: watched already, no memory."""
        self._epoll.register(fd, mask)
        self.table[fd] = source

    def modify(self, fd: int, mask: int) -> None:
        """Watch it for other events; what is pending is reported anew. Raises OSError when it is not watched."""
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Stop watching a descriptor, which stays open. Idempotent."""
        if self.table.pop(fd, None) is not None:
            # Not left to close(2): a copy of the descriptor in another process would keep it in the epoll for ever.
            try:  # noqa: SIM105  # here and below: `try` is free, and this is part of each connection
                self._epoll.unregister(fd)
            except OSError:
                pass

    def discard(self, sock: SocketType) -> None:
        """Stop watching a socket now and close it after this batch of events. Its descriptor is no longer the caller's.

        Closed at once, its number could be given to a new socket, which would get the old one's events of this batch.
        """
        self.remove(sock.fileno())
        self._discarded.append(sock)

    def drop(self, sock: SocketType, fd: int) -> None:
        """`discard` for a socket of which there is no copy anywhere: closing it takes it out of the epoll as well."""
        self.table.pop(fd, None)
        self._discarded.append(sock)

    # Times and turns

    def later(self, delay: float, callback: Callback) -> Timer:
        """Call back after so many seconds, not earlier, to the millisecond of epoll_wait."""
        timer = Timer(self, callback)
        heapq.heappush(self._timers, (self.now() + delay, next(self._serial), timer))
        return timer

    def soon(self, callback: Callback) -> None:
        """Call back in the next turn, after the events that are there by then. The caller sees that it is not twice."""
        self._soon.append(callback)

    def run(self) -> None:
        """Work until `stop`. At rest it waits in epoll_wait without a timeout unless a timer is pending."""
        poll, events = self._epoll.poll, self._events
        while not self._stopping:
            if self._discarded:
                self._close_discarded()
            ready = self._soon
            if ready:
                self._soon = []
                events(poll(0, MAX_EVENTS))
                self._call(ready)
            else:
                events(poll(self._timeout() if self._timers else None, MAX_EVENTS))
            if self._timers:
                self._call(self._due())
        self._close_discarded()
        self._stopping = False

    def stop(self) -> None:
        """End `run` after this turn, or the next `run` at once. Idempotent."""
        self._stopping = True

    def close(self) -> None:
        """Close the epoll and what was discarded. Sources keep their descriptors; nothing is called. Idempotent."""
        self._close_discarded()
        self._epoll.close()
        self.table.clear()
        self._timers.clear()
        self._soon.clear()

    # Inside

    def _events(self, batch: Iterable[tuple[int, int]]) -> None:
        events = iter(batch)
        get = self.table.get
        while True:
            fd, source = -1, None
            # Around the batch, not around each event; after an error the iterator goes on behind the one that raised.
            try:
                for fd, mask in events:
                    source = get(fd)
                    if source is not None:
                        source.event(mask)
            except Exception as error:
                self._broken(source, error, fd)
            else:
                return

    def _call(self, callbacks: Iterable[Callback]) -> None:
        for callback in callbacks:
            try:
                callback()
            except Exception as error:
                self._broken(getattr(callback, "__self__", callback), error)

    def _broken(self, source: object, error: Exception, fd: int = -1) -> None:
        self.on_error(source, error)
        abort = getattr(source, "abort", None)
        if abort is None:
            return
        try:
            abort()
        except Exception as second:
            self.on_error(source, second)
        if fd >= 0 and self.table.get(fd) is source:
            self.remove(fd)

    def _timeout(self) -> float | None:
        """Seconds until the next timer."""
        timers = self._timers
        while timers and not timers[0][2].pending:
            heapq.heappop(timers)
            self._cancelled -= 1
        if not timers:
            return None
        return min(max(timers[0][0] - self.now(), 0), LONGEST_WAIT)

    def _due(self) -> Iterable[Callback]:
        """The callbacks whose time has come, each taken when the one before it was called: it may cancel the next."""
        now = self.now()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2]._take()
            if callback is None:
                self._cancelled -= 1
            else:
                yield callback

    def _timer_cancelled(self) -> None:
        """Timeouts that never come true must not pile up: the heap is at most twice as large as what is pending."""
        self._cancelled += 1
        if self._cancelled > GARBAGE and 2 * self._cancelled > len(self._timers):
            # In place: `_due` may be at work on it.
            self._timers[:] = [entry for entry in self._timers if entry[2].pending]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _close_discarded(self) -> None:
        for sock in self._discarded:
            # close(2) has released the descriptor even when it reports an error of the connection.
            try:  # noqa: SIM105
                sock.close()
            except OSError:
                pass
        self._discarded.clear()


def print_error(source: object, error: Exception) -> None:
    """The default of `Loop.on_error`: a traceback on standard error."""
    traceback.print_exception(error)
