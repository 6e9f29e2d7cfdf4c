"""The contract between the gateway and a driver: what a backend is, what may be asked of it, and how it fails.

Counterpart: `gateway.activation` calls these methods and owns every deadline; a driver never gives up by itself, except
in `stop`, where `grace` is the time between asking and forcing. A driver decides nothing: when to start, to sleep, to
try again is not its business.

Life of a backend, as a driver sees it (`status` and `usage` may be called at any moment, also during the others):

    start -> ready -> (wait is pending all the while) -> stop

The calls on one backend never overlap, except `wait` and `status`, and `stop`, which may come in any state.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

from backends import probe
from backends.endpoint import Endpoint
from backends.output import Output
from backends.probe import Readiness

T = TypeVar("T")

log = logging.getLogger(__name__)


class BackendError(Exception):
    """Something expected went wrong with a backend. Logged as one line, without a traceback.

    BackendError
    ├── StartFailed    it could not be started: no such program, image, unit; no right to
    ├── Exited         it ended while it was still needed
    └── CommandFailed  a helper program failed (backends.command)
    """


class StartFailed(BackendError):
    """There is nothing to wait for."""


class Exited(BackendError):
    """There is nothing to wait for any more."""

    def __init__(self, exit: Exit, lines: Sequence[str] = ()) -> None:
        self.exit = exit
        self.lines = tuple(lines)
        said = "; its last output:\n    " + "\n    ".join(self.lines) if self.lines else ""
        super().__init__(f"it ended ({exit}){said}")


@dataclass(frozen=True, slots=True)
class Exit:
    """How something ended: an exit code, a signal, or neither is known."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        return "cause unknown" if self.code is None else f"exit status {self.code}"


class Status(enum.Enum):
    """One look at a backend, without waiting."""

    STOPPED = "stopped"
    RUNNING = "running"
    FROZEN = "frozen"


class Capability(enum.Flag):
    """What a driver can do beyond start, ready and stop."""

    NONE = 0
    PASS = enum.auto()
    """`start` takes listening sockets and hands them to the backend as LISTEN_FDS."""
    ACCEPT = enum.auto()
    """`serve` runs one instance per connection."""
    FREEZE = enum.auto()
    """`freeze` and `thaw`: stays in memory, uses no CPU."""
    ADOPT = enum.auto()
    """It may be running before the gateway came, and outlives it."""
    ALWAYS_ON = enum.auto()
    """It cannot be stopped, so it is never put to sleep."""
    NOTIFY = enum.auto()
    """It can be given a NOTIFY_SOCKET, so `notify` is a possible readiness."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a running backend uses. None where it is not known."""

    memory: int | None = None
    """bytes"""
    cpu: float | None = None
    """seconds since it started"""


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """A listening socket to be handed over, and its name in LISTEN_FDNAMES."""

    name: str
    socket: socket.socket


class Estate(Protocol):
    """What one control plane leaves to the next in the same process, over exec(2). Descriptors keep their numbers.

    Counterpart: `gateway.upgrade`. What is handed over is plain data that JSON can hold, and another version of the
    program must understand it, or do without.
    """

    def keep(self, fd: int) -> int:
        """This descriptor stays open."""

    def claim(self, fd: int) -> int:
        """It belongs to the caller from now on. What nobody claims is closed. Raises KeyError: it was not kept."""

    def claim_process(self, pid: int) -> int:
        """The caller waits for the end of this child. For those that nobody claims the gateway does."""


class Service:
    """Something that the backends of one gateway share, such as a client of a daemon."""

    async def close(self) -> None:
        """Close it; nothing of it is left. Idempotent."""

    def hand_over(self, estate: Estate) -> Any:
        """What `take_over` needs, in the next control plane, to go on; None: it can begin anew."""

    def take_over(self, data: Any, estate: Estate) -> None:
        """Go on with what was handed over, before anything else is asked of it."""

    def settle(self) -> None:
        """All backends have taken over what is theirs: let go of the rest."""


S = TypeVar("S", bound=Service)


class Shared:
    """The services of one gateway: one instance of each class, made on first use, closed in the opposite order."""

    def __init__(self) -> None:
        self._services: dict[type[Any], Any] = {}
        self._left: Mapping[str, Any] = {}
        self._estate: Estate | None = None

    def get(self, kind: type[S]) -> S:
        if kind not in self._services:
            made = self._services[kind] = kind()
            if self._estate is not None and kind.__name__ in self._left:
                try:
                    made.take_over(self._left[kind.__name__], self._estate)
                except Exception:  # as another version left it; what it was responsible for is not found
                    log.exception("%s cannot be taken over", kind.__name__)
        service: S = self._services[kind]
        return service

    def hand_over(self, estate: Estate) -> dict[str, Any]:
        """What `take_over` needs in the next control plane."""
        left = {kind.__name__: service.hand_over(estate) for kind, service in self._services.items()}
        return {name: data for name, data in left.items() if data is not None}

    def take_over(self, data: Mapping[str, Any], estate: Estate) -> None:
        """Services that are asked for until `settle` go on with what was handed over."""
        self._left, self._estate = data, estate

    def settle(self) -> None:
        for service in self._services.values():
            service.settle()
        self._left, self._estate = {}, None

    async def close(self) -> None:
        while self._services:
            kind, service = self._services.popitem()
            try:
                await service.close()
            except Exception:  # the others are closed all the same
                log.exception("%s could not be closed", kind.__name__)


@dataclass(frozen=True, slots=True)
class Setup:
    """What the gateway tells every driver about one backend."""

    name: str
    directory: Path
    """What relative paths in the driver's options are relative to: the folder of the configuration file."""
    endpoints: Mapping[str, Endpoint]
    """Where it is dialled, as configured, by listener name; `""` is for every listener that is not named."""
    readiness: Readiness
    shared: Shared
    passes: bool = False
    """Whether it is handed its listening sockets; then nothing needs to be dialled to know that it is ready."""
    output: Output = field(default_factory=Output)


class Backend(ABC):
    """One thing that can be started, reached and stopped. Making one does nothing and cannot fail.

    Options are the driver's own keys of the configuration, already checked against `Options`.
    """

    Options: ClassVar[type[msgspec.Struct]]
    capabilities: Capability = Capability.NONE
    """Of the driver, or of one backend where its options decide."""

    stop_slack: float = 30.0
    """Seconds that `stop` may take beyond its `grace`, until the gateway takes it for stuck and gives up on it."""

    trouble: str = ""
    """The error of the last readiness probe, for the message that it did not become ready in time."""

    def __init__(self, options: Any, setup: Setup) -> None:
        self.setup = setup
        self.output = setup.output

    @abstractmethod
    async def start(self, sockets: Sequence[PassedSocket] = ()) -> None:
        """Start it; return as soon as `ready` and `wait` make sense. Not called while it runs.

        The caller keeps its own copies of the sockets. Cancelling leaves something that `stop` cleans up.
        Raises StartFailed or CommandFailed.
        """

    async def ready(self) -> Mapping[str, Endpoint]:
        """Wait until it really answers; return where it is dialled this time, in numbers, by listener name.

        Has no deadline of its own. Raises Exited as soon as it ends, StartFailed when it can never become ready.
        Cancelling leaves nothing behind.
        """
        self.trouble = ""
        try:
            return await self.unless_gone(probe.wait(self.setup.readiness, self._probed()))
        except probe.Impossible as error:
            raise StartFailed(str(error)) from None

    def _probed(self) -> probe.Probed:
        return probe.Probed(
            endpoints={} if self.setup.passes else self.setup.endpoints,
            output=self.output,
            directory=self.setup.directory,
            report=self._report,
        )

    def _report(self, trouble: str) -> None:
        self.trouble = trouble

    @abstractmethod
    async def wait(self) -> Exit:
        """Return when it is gone, for whatever reason, at once if it does not run. Cancelling leaves nothing behind."""

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """Stop it: ask, after `grace` seconds force; return only when it is gone.

        In any state, also after a cancelled or failed `start`; stopping what is stopped is no error. If cancelled, it
        may be called again. Raises BackendError when it cannot be stopped.
        """

    @abstractmethod
    async def status(self) -> Status:
        """One look, no waiting for a change. Raises BackendError when it cannot be told."""

    def presume(self) -> None:  # noqa: B027 - for most there is nothing to presume
        """Clients were let in to it a moment ago: where it cannot be asked whether it runs, it does."""

    async def serve(self, connection: socket.socket, environment: Mapping[str, str]) -> Exit:
        """Run one instance with the connection as its stdin and stdout until it ends (Capability.ACCEPT).

        Takes the connection over, and closes it as soon as the instance has its own copy: the client must see the end
        when the instance closes it. Cancelling kills the instance before it returns.
        """
        raise NotImplementedError

    async def freeze(self) -> None:
        """Stop it from running, keep it in memory (Capability.FREEZE)."""
        raise NotImplementedError

    async def thaw(self) -> None:
        """Undo `freeze` (Capability.FREEZE). What is not frozen is left as it is."""
        raise NotImplementedError

    def hand_over(self, estate: Estate) -> Any:
        """What `take_over` needs, in the control plane that replaces this one by exec(2), to go on with what runs.

        None, the default: `status` finds it, or nothing runs. Nothing else is asked of it afterwards.
        """
        return None

    def take_over(self, data: Any, estate: Estate) -> Sequence[tuple[Mapping[str, str], Awaitable[Exit]]]:
        """Go on with what was handed over; the first thing that is asked of it.

        Returns the instances that `serve` had begun: the environment that each was given, and its end.
        """
        return ()

    async def usage(self) -> Usage:
        """What it uses now; an empty Usage where that is not known or it does not run."""
        return Usage()

    async def unless_gone(self, waiting: Awaitable[T]) -> T:
        """Await something, but raise Exited, with the last lines of output, when the backend ends first."""
        return await unless(self.wait(), waiting, lambda exit: Exited(exit, self.output.fresh(10)))


async def unless(end: Awaitable[Exit], waiting: Awaitable[T], error: Callable[[Exit], Exception]) -> T:
    """Await `waiting`, but raise `error(exit)` when `end` comes first. Cancels and collects both."""
    ended = asyncio.ensure_future(end)  # noqa: TID251 - both are awaited below
    wanted = asyncio.ensure_future(waiting)  # noqa: TID251
    try:
        await asyncio.wait({ended, wanted}, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise error(ended.result())
    finally:
        for future in (ended, wanted):
            future.cancel()
        await asyncio.wait({ended, wanted})  # not one by one: who waits here may be cancelled as well
        for future in (ended, wanted):
            if not future.cancelled():
                future.exception()
