"""A process that was started by this program, or by the one that this program replaced by exec(2): known by its pid, watched
by a pidfd.

Counterpart: `backends.spawner` and `gateway.worker_process` keep their helpers so. asyncio's own subprocesses cannot be
taken over from a former program. Backends are not started here: that is the nursery.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence

NOT_OURS = -1
"""The exit status of what was not our child; nobody's signal is 1 here, because workers and helpers ignore it."""


class Offspring:
    """Owns the pidfd until `wait` returned or `close`."""

    def __init__(self, pid: int) -> None:
        """Raises OSError: there is no such process, or no descriptor is left."""
        self.pid = pid
        self.ended = False
        self._pidfd = os.pidfd_open(pid)
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._end)
        self._status = NOT_OURS

    def kill(self) -> None:
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit status, or minus the signal; NOT_OURS if it was not our child. Cancelling changes nothing."""
        await self._gone.wait()
        return self._status

    def close(self) -> None:
        """Watch it no more. Idempotent."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _end(self) -> None:
        self.ended = True
        with contextlib.suppress(ChildProcessError):
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, os.WNOHANG)[1])
        self.close()
        self._gone.set()


def run_python(arguments: Sequence[str], fds: Sequence[int], environment: Mapping[str, str] | None = None) -> Offspring:
    """Run Python with these arguments in a session of its own, with our stderr; it inherits `fds`. Raises OSError.

    Takes a fraction of a millisecond. -P: nothing in the current folder can pass for a module.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", *arguments],
            os.environ if environment is None else environment,
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, null, stdio) for stdio in (0, 1)),
                *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds),
            ],
            setsid=True,
            setsigmask=[],
        )
    finally:
        os.close(null)
    try:
        return Offspring(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
