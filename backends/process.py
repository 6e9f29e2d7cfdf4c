"""Driver `process`, the default: a backend is a child process and its descendants.

Counterpart: `backends.spawner` starts it and reports its end. Nothing of a backend survives it, and no backend survives
the gateway. A process that puts itself into the background is therefore ended: programs run in the foreground here.

All methods may be called in any order that `backends.base` allows. A cancelled `start` may leave a process, which
`stop` ends; a cancelled `stop` may be called again; a cancelled `serve` has killed its instance.
"""

from __future__ import annotations

import asyncio
import dataclasses
import grp
import logging
import os
import pwd
import re
import resource
import signal
import socket
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from backends import usage
from backends.base import Backend, Capability, Estate, Exit, PassedSocket, Setup, StartFailed, Status, Usage
from backends.environment import BACKEND, NOFILE, inherited
from backends.notifications import Notifications
from backends.nursery import Launch
from backends.output import Output
from backends.pipe import Pipe
from backends.probe import Notify, Probed
from backends.spawner import Child, Spawner
from backends.units import Command, Duration, Size

log = logging.getLogger(__name__)

RLIMITS = sorted(name[7:].lower() for name in dir(resource) if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE")
Limit = int | str


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    command: Command
    cwd: str | None = None
    """the folder of the configuration file"""
    env: dict[str, str | int] = {}
    """added to the gateway's own"""
    user: str | int | None = None
    group: str | int | None = None
    """the user's own"""
    umask: str | int | None = None
    """octal, such as "0022" """
    rlimits: dict[str, Limit | list[Limit]] = {}
    """as prlimit(1) names them: a number, a size, `unlimited`, or [soft, hard]"""

    def __post_init__(self) -> None:
        parse_umask(self.umask)
        parse_rlimits(self.rlimits)
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in f"{name}{value}":
                raise ValueError(f"{name!r} is not the name of an environment variable, or its value has a NUL in it")


def parse_umask(value: str | int | None) -> int | None:
    """Raises ValueError."""
    if isinstance(value, str) and re.fullmatch(r"(0o)?[0-7]{1,4}", value):
        value = int(value, 8)
    if isinstance(value, str) or (value is not None and not 0 <= value <= 0o777):
        raise ValueError(f'{value!r} is not a file mode mask such as "0022"')
    return value


def parse_rlimits(values: Mapping[str, Limit | list[Limit]]) -> dict[str, tuple[int, int]]:
    """Name -> soft and hard, -1 for unlimited. Raises ValueError."""
    limits = {}
    for name, value in values.items():
        if name not in RLIMITS:
            raise ValueError(f"{name!r} is not a resource limit; allowed: {', '.join(RLIMITS)}")
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2:
            raise ValueError(f"{name}: {value!r} is not a limit; allowed: a number, `unlimited`, or [soft, hard]")
        soft, hard = (resource.RLIM_INFINITY if item in ("unlimited", -1) else int(Size.parse(item)) for item in pair)
        limits[name] = (soft, hard)
    return limits


@dataclasses.dataclass(slots=True)
class Account:
    """As whom a program runs, and what that means for its environment."""

    uid: int | None = None
    gid: int | None = None
    groups: list[int] | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def look_up(user: str | int | None, group: str | int | None) -> Account:
    """The account of configured names or numbers. Blocks on the user database. Raises StartFailed."""
    account = Account()
    if user is not None:
        try:
            entry = pwd.getpwnam(user) if isinstance(user, str) and not user.isdigit() else pwd.getpwuid(int(user))
        except KeyError:
            if isinstance(user, str) and not user.isdigit():
                raise StartFailed(f"user {user!r}: unknown") from None
            account.uid, account.groups = int(user), []  # a number needs no entry
        else:
            account.uid, account.gid = entry.pw_uid, entry.pw_gid
            account.groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
            account.environment = {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
    if group is not None:
        try:
            is_name = isinstance(group, str) and not group.isdigit()
            account.gid = grp.getgrnam(str(group)).gr_gid if is_name else int(group)
        except KeyError:
            raise StartFailed(f"group {group!r}: unknown") from None
    if account.gid is None and account.uid is not None:
        raise StartFailed(f"user {user}: unknown, so its group must be configured, too")
    if (account.uid, account.gid) == (os.geteuid(), os.getegid()):
        account.groups = None  # it is us: nothing to change, and perhaps no right to
    return account


def open_pipe(output: Output, reader: int = -1) -> Pipe:
    """`reader`: one that is there already. Raises StartFailed."""
    try:
        return Pipe(output.feed, reader)
    except OSError as error:
        raise StartFailed(f"no pipe for its output: {error.strerror}") from error


def keep(estate: Estate, pipe: Pipe) -> int:
    """The read end for the next control plane; -1 if its end was seen already."""
    return estate.keep(pipe.reader) if pipe.reader >= 0 else -1


def claim(estate: Estate, output: Output, reader: int) -> Pipe:
    """The pipe of which that was kept."""
    pipe = open_pipe(output, estate.claim(reader) if reader >= 0 else -1)
    pipe.close_writer()
    return pipe


@dataclasses.dataclass(eq=False, slots=True)
class Instance:
    """A process that serves one connection."""

    environment: Mapping[str, str]
    child: Child
    pipe: Pipe

    async def ended(self) -> Exit:
        """Wait for its end. Cancelling kills it before this returns."""
        try:
            return await self.child.wait()
        except asyncio.CancelledError:
            self.child.signal(signal.SIGKILL)
            await self.child.wait()
            raise
        finally:
            self.pipe.finish()


class Run:
    """One life of the process, and what the gateway holds for it: a pipe for its output, perhaps a NOTIFY_SOCKET."""

    def __init__(self, pipe: Pipe, notify: bool, notify_socket: socket.socket | None = None) -> None:
        """Raises StartFailed."""
        self.child: Child | None = None
        self.frozen = False
        self.pipe = pipe
        try:
            self.notifications = Notifications(self._belongs, sock=notify_socket) if notify else None
        except OSError as error:
            self.pipe.finish()
            raise StartFailed(f"no socket for its notifications: {error.strerror}") from error

    def release(self) -> None:
        """Take the last output and close everything. Idempotent."""
        self.pipe.finish()
        if self.notifications is not None:
            self.notifications.close()

    def hand_over(self, estate: Estate) -> Any:
        """None when nothing runs."""
        if self.child is None or self.child.gone:
            return None
        return {
            "serial": self.child.serial,
            "frozen": self.frozen,
            "pipe": keep(estate, self.pipe),
            "notify": estate.keep(self.notifications.fileno()) if self.notifications else None,
            "said_ready": self.notifications is not None and self.notifications.ready.is_set(),
        }

    @classmethod
    def taken_over(cls, data: Any, child: Child, output: Output, estate: Estate) -> Run:
        """Raises KeyError, OSError."""
        notify = None if data["notify"] is None else socket.socket(fileno=estate.claim(data["notify"]))
        run = cls(claim(estate, output, data["pipe"]), notify is not None, notify)
        if run.notifications is not None and data["said_ready"]:
            run.notifications.ready.set()
        run.frozen = data["frozen"]
        run.child = child
        child.claim(run.release)
        return run

    def _belongs(self, pid: int, uid: int) -> bool:
        """Whether a message is the backend's own.

        Anybody can give himself the mark of a descendant, so the user must be right as well. The main process may have
        changed its user since. A sender that is gone already cannot be asked, but its user can.
        """
        if self.child is None:
            return False
        if pid == self.child.pid:
            return True
        return uid in (0, self.child.uid) and (self.child.owns(pid) or not _exists(pid))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Process(Backend):
    Options: ClassVar[type[msgspec.Struct]] = ProcessOptions
    capabilities = Capability.PASS | Capability.ACCEPT | Capability.FREEZE | Capability.NOTIFY

    def __init__(self, options: ProcessOptions, setup: Setup) -> None:
        super().__init__(options, setup)
        self.options = options
        self._run: Run | None = None
        self._instances: set[Instance] = set()

    async def start(self, sockets: Sequence[PassedSocket] = ()) -> None:
        """Return as soon as the program runs. The sockets become blocking ones, for the gateway's copies as well.

        What the former life left, beyond its main process, is gone before: it may hold a port, and has last words.
        """
        if self._child is not None and self._child.dead:
            await self._child.wait()
        self.output.begin()
        run = self._run = Run(open_pipe(self.output), isinstance(self.setup.readiness, Notify))
        try:
            launch = await self._launch(run.notifications.environment if run.notifications else {})
            run.child = self.setup.shared.get(Spawner).spawn(
                launch, stdout=run.pipe.writer, stderr=run.pipe.writer, sockets=sockets, ended=run.release
            )
            run.pipe.close_writer()
            await run.child.started()
        except BaseException:
            if run.child is None:
                run.release()
            raise

    async def _launch(self, *additions: Mapping[str, str]) -> Launch:
        """What to run. Raises StartFailed."""
        options, directory = self.options, self.setup.directory
        account = Account()
        if options.user is not None or options.group is not None:
            account = await asyncio.to_thread(look_up, options.user, options.group)
        program, *arguments = options.command
        if "/" in program:
            program = str(directory / program)
        configured = {name: str(value) for name, value in options.env.items()}
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        env = inherited(account.environment, {BACKEND: self.setup.name}, *additions, configured)
        return Launch(
            argv=[os.fsencode(word) for word in (program, *arguments)],
            env={os.fsencode(name): os.fsencode(value) for name, value in env.items()},
            cwd=os.fsencode(directory / (options.cwd or "")),
            umask=parse_umask(options.umask),
            uid=account.uid,
            gid=account.gid,
            groups=account.groups,
            rlimits={"nofile": (min(NOFILE, hard), hard)} | parse_rlimits(options.rlimits),
        )

    def _probed(self) -> Probed:
        return dataclasses.replace(super()._probed(), notifications=self._run.notifications if self._run else None)

    @property
    def _child(self) -> Child | None:
        return self._run.child if self._run else None

    async def wait(self) -> Exit:
        return await self._child.wait() if self._child else Exit()

    async def stop(self, grace: float) -> None:
        """TERM to its group, after `grace` KILL; what it left outside of its group is killed as soon as it ends."""
        child = self._child
        if child is None or child.gone:
            return
        child.signal(signal.SIGTERM)
        child.signal(signal.SIGCONT)  # what is frozen would not even hear it
        try:
            async with asyncio.timeout(grace):
                await child.wait()
        except TimeoutError:
            who = {"backend": self.setup.name}
            log.warning("stop_grace: it has not ended after %s; killed", Duration(grace), extra=who)
            child.signal(signal.SIGKILL)
            await child.wait()

    async def status(self) -> Status:
        if self._run is None or self._run.child is None or self._run.child.dead:
            return Status.STOPPED
        return Status.FROZEN if self._run.frozen else Status.RUNNING

    async def freeze(self) -> None:
        if self._run and self._run.child:
            self._run.frozen = True
            await self._run.child.signalled(signal.SIGSTOP)

    async def thaw(self) -> None:
        if self._run and self._run.child and self._run.frozen:
            await self._run.child.signalled(signal.SIGCONT)
            self._run.frozen = False

    async def usage(self) -> Usage:
        child = self._child
        if child is None or child.pid is None or child.dead:
            return Usage()
        return await asyncio.to_thread(usage.of_family, child.pid)

    async def serve(self, connection: socket.socket, environment: Mapping[str, str]) -> Exit:
        """One instance; its stderr goes to the output. The connection becomes a blocking one."""
        with connection:
            pipe = open_pipe(self._lines())
            try:
                launch = await self._launch(environment)
                stream = connection.fileno()
                child = self.setup.shared.get(Spawner).spawn(launch, stdin=stream, stdout=stream, stderr=pipe.writer)
            except BaseException:
                pipe.finish()
                raise
        # The instance has its own connection now: the client sees the end when that is closed.
        pipe.close_writer()
        return await self._serve(Instance(environment, child, pipe))

    async def _serve(self, instance: Instance) -> Exit:
        self._instances.add(instance)
        try:
            exit = await instance.ended()
            await instance.child.started()  # raises if it never ran
        finally:
            self._instances.discard(instance)
        return exit

    def _lines(self) -> Output:
        """For what one instance says: its lines, whole, are lines of the backend."""
        lines = Output()
        lines.listen(self.output.line)
        return lines

    # The next control plane

    def hand_over(self, estate: Estate) -> Any:
        return {
            "run": self._run.hand_over(estate) if self._run else None,
            "instances": [
                [dict(instance.environment), instance.child.serial, keep(estate, instance.pipe)]
                for instance in self._instances
            ],
        }

    def take_over(self, data: Any, estate: Estate) -> Sequence[tuple[Mapping[str, str], Awaitable[Exit]]]:
        """What ended meanwhile is as if it had never run."""
        spawner = self.setup.shared.get(Spawner)
        run = data["run"]
        if run is not None and (child := spawner.child(run["serial"])) is not None:
            self._run = Run.taken_over(run, child, self.output, estate)
        instances = []
        for environment, serial, reader in data["instances"]:
            if (child := spawner.child(serial)) is not None:
                instances.append(Instance(environment, child, claim(estate, self._lines(), reader)))
        for instance in instances:
            instance.child.claim(lambda: None)
        return [(instance.environment, self._serve(instance)) for instance in instances]
