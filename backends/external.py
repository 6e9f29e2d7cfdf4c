"""Driver `external`: a backend that lives outside of Dormant, started and stopped by the user's commands.

Counterpart: `backends.command` runs them. What they start is not watched: whether it runs is known from the `status`
command, or else assumed from the last command that worked. Without `start` and `stop` it is simply always there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from backends.base import Backend, BackendError, Capability, Exit, PassedSocket, Setup, Status
from backends.command import CommandFailed, run
from backends.environment import BACKEND
from backends.units import Command, Duration

DEFAULT_TIMEOUT = Duration(60)
FIRST_LOOK = 0.02  # seconds between two looks whether it has stopped, at first
LONGEST_LOOK = 1.0


class Action(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command and its deadline."""

    command: Command
    timeout: Duration = DEFAULT_TIMEOUT


Word = str | int | float
Written = Action | str | list[Word] | None
"""An action as it is written in a configuration: a command alone, or with its deadline."""


def action(written: Written) -> Action | None:
    """Raises ValueError."""
    if written is None or isinstance(written, Action):
        return written
    return Action(Command.parse(written))


class ExternalOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    start: Written = None
    stop: Written = None
    status: Written = None
    """exit status 0: it runs; any other: it does not"""

    def __post_init__(self) -> None:
        for written in (self.start, self.stop, self.status):
            action(written)


class External(Backend):
    """Calls run the commands, to their end or their deadline; a cancelled one is killed with its group.

    A `start` that failed or was cancelled may have done half of its work: `stop` runs its command after that, too.
    """

    Options: ClassVar[type[msgspec.Struct]] = ExternalOptions

    def __init__(self, options: ExternalOptions, setup: Setup) -> None:
        super().__init__(options, setup)
        self._start, self._stop, self._status = map(action, (options.start, options.stop, options.status))
        self._stopped = asyncio.Event()
        self._half_started = False
        if self._stop is not None:
            self.stop_slack += self._stop.timeout
        if self._start is None and self._stop is None:
            # It is looked at when somebody comes, unless it can be asked before.
            self.capabilities = Capability.ALWAYS_ON | (Capability.ADOPT if self._status else Capability.NONE)
        else:
            self.capabilities = Capability.ADOPT
            self._stopped.set()

    async def start(self, sockets: Sequence[PassedSocket] = ()) -> None:
        self.output.begin()
        self._stopped.clear()
        self._half_started = True
        await self._do(self._start)
        self._half_started = False

    async def wait(self) -> Exit:
        """As there is nothing to watch, this returns after `stop`, or a `status` that found it stopped."""
        await self._stopped.wait()
        return Exit()

    async def stop(self, grace: float) -> None:
        """Run the `stop` command; then, with a `status` command, wait at most `grace` seconds until it is stopped.

        What `status` calls stopped is left alone, unless `start` has done only a part of its work.
        """
        if Capability.ALWAYS_ON in self.capabilities:
            return
        if not self._half_started and await self.status() is Status.STOPPED:
            return
        await self._do(self._stop)
        self._half_started = False
        clock = asyncio.get_running_loop().time
        deadline, gap = clock() + grace, FIRST_LOOK
        while self._status is not None and await self.status() is not Status.STOPPED:
            if clock() >= deadline:
                raise BackendError(f"it still runs {grace:g}s after the command that stops it")
            await asyncio.sleep(gap)
            gap = min(gap * 2, LONGEST_LOOK)
        self._stopped.set()

    def presume(self) -> None:
        if self._status is None:
            self._stopped.clear()

    async def status(self) -> Status:
        if self._status is not None:
            try:
                await self._do(self._status, quiet=True)
            except CommandFailed as error:
                if error.exit is None:  # it said nothing about the backend
                    raise
                self._stopped.set()
            else:
                self._stopped.clear()
        return Status.STOPPED if self._stopped.is_set() else Status.RUNNING

    async def _do(self, wanted: Action | None, quiet: bool = False) -> None:
        """Raises CommandFailed."""
        if wanted is not None:
            await run(
                wanted.command,
                timeout=wanted.timeout,
                cwd=self.setup.directory,
                env={BACKEND: self.setup.name},
                output=None if quiet else self.output,
            )
