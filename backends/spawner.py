"""Starting processes: the gateway's side of the nursery.

Counterpart: `backends.nursery`, the process that forks, and says there why it is one. One `Spawner` serves all
backends of a gateway; the nursery is started with the first process, and again when it died. Nothing here blocks the
event loop, and nothing here knows what the processes are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import socket
import sys
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from backends import nursery
from backends.base import Estate, Exit, PassedSocket, Service, StartFailed
from backends.nursery import Ended, Failed, Launch, Signal, Signalled, Spawn, Started, Step
from backends.offspring import Offspring, run_python

FAREWELL = 5.0  # seconds for the nursery to end everything, which takes it 3 at most; then it is killed
PROGRAM = os.path.abspath(nursery.__file__)
BATCH = 64  # reports taken in one turn of the loop


class Child:
    """A process, from the order to start it until nothing of it is left, its stray descendants included."""

    def __init__(self, nest: Nest, serial: int, launch: Launch, ended: Callable[[], None]) -> None:
        self.pid: int | None = None
        self.claimed = True
        """False: a former control plane's, and no backend has taken it over yet"""
        self.uid = os.geteuid() if launch.uid is None else launch.uid
        self.dead = False
        """The main process has ended, seen by its pidfd; a moment later everything of it is `gone`."""
        self._nest = nest
        self.serial = serial
        self._launch = launch
        self._ended = ended
        self._pidfd = -1
        self._settled = asyncio.Event()
        self._gone = asyncio.Event()
        self._error: StartFailed | None = None
        self._exit = Exit()
        self._confirmations: deque[asyncio.Future[None] | None] = deque()
        """who waits for the next confirmations, in order; None: a former control plane did"""

    @property
    def gone(self) -> bool:
        """Nothing of it is left, or it never ran."""
        return self._gone.is_set()

    async def started(self) -> None:
        """Wait until the program runs. Raises StartFailed. Cancelling changes nothing: it may run a moment later."""
        await self._settled.wait()
        if self._error is not None:
            raise self._error

    async def wait(self) -> Exit:
        """Wait until everything of it is gone. Cancelling changes nothing."""
        await self._gone.wait()
        return self._exit

    def signal(self, number: int) -> None:
        """Send a signal to its group, also before it has started. What is gone is left alone."""
        if not self.gone:
            self._nest.send(Signal(self.serial, number))

    async def signalled(self, number: int) -> None:
        """Send a signal; return when the kernel has taken it. Cancelling does not take it back."""
        if not self.gone:
            confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._confirmations.append(confirmed)
            self._nest.send(Signal(self.serial, number, confirm=True))
            await confirmed

    def owns(self, pid: int) -> bool:
        """Whether a living process descends from it."""
        return nursery.read_mark(pid) == nursery.mark_of(self._nest.token, self.serial)

    # What the nursery says:

    def on_started(self, pid: int, pidfds: list[int]) -> None:
        self.pid = pid
        for self._pidfd in pidfds:
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_death)
        self._settled.set()

    def on_failed(self, error: StartFailed) -> None:
        self._error = error
        self.on_gone(Exit())

    def on_gone(self, how: Exit) -> None:
        self._exit = how
        self._on_death()
        self._ended()
        self._settled.set()
        self._gone.set()
        while self._confirmations:
            self.on_signalled()

    def on_signalled(self) -> None:
        confirmed = self._confirmations.popleft()
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(None)

    def _on_death(self) -> None:
        self.dead = True
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def hand_over(self, estate: Estate) -> dict[str, Any]:
        argv = [os.fsdecode(word) for word in self._launch.argv]
        pidfd = estate.keep(self._pidfd) if self._pidfd >= 0 else -1
        asked = len(self._confirmations)
        return {"pid": self.pid, "uid": self.uid, "pidfd": pidfd, "argv": argv, "dead": self.dead, "asked": asked}

    @classmethod
    def taken_over(cls, nest: Nest, serial: int, data: dict[str, Any], estate: Estate) -> Child:
        launch = Launch(argv=[os.fsencode(word) for word in data["argv"]], env={}, cwd=b"/", uid=data["uid"])
        child = cls(nest, serial, launch, lambda: None)
        child.claimed = False
        if data["pid"] is not None:
            child.on_started(data["pid"], [estate.claim(data["pidfd"])] if data["pidfd"] >= 0 else [])
        child.dead = data["dead"]
        child._confirmations.extend([None] * data.get("asked", 0))
        return child

    def claim(self, ended: Callable[[], None]) -> None:
        """A backend takes it over; `ended` is called as it is for one that was spawned."""
        self.claimed = True
        self._ended = ended

    def explain(self, failed: Failed) -> StartFailed:
        """What the nursery reports, as a sentence."""
        launch, why = self._launch, os.strerror(failed.error)
        program = os.fsdecode(launch.argv[0])
        match failed.step:
            case Step.EXECUTE:
                if failed.error == errno.ENOENT and "/" not in program:
                    why = "no such program in PATH"
                elif failed.error == errno.ENOEXEC:
                    why += "; a script begins with a line such as #!/bin/sh"
                return StartFailed(f"{program}: {why}")
            case Step.INTERPRETER:
                return StartFailed(f"{program}: the interpreter that it names does not exist")
            case Step.DIRECTORY:
                return StartFailed(f"cwd {os.fsdecode(launch.cwd)}: {why}")
            case Step.USER:
                return StartFailed(f"user {launch.uid}: {why}")
            case Step.GROUP:
                return StartFailed(f"group {launch.gid}: {why}")
            case Step.LIMIT:
                soft, hard = launch.rlimits[failed.detail]
                return StartFailed(f"rlimit {failed.detail} {soft}:{hard}: {why}")
        return StartFailed(f"{program}: {failed.step}: {why}")


class Nest:
    """One nursery and the children in it, from its start until it and they are gone."""

    def __init__(self, token: int, sock: socket.socket, process: Offspring, serial: int = 0) -> None:
        self.token = token
        self.over = False
        """It takes no more orders."""
        self.children: dict[int, Child] = {}
        self._loop = asyncio.get_running_loop()
        self._serial = serial
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._eof = asyncio.Event()
        self._process = process
        self._socket = sock
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._read)
        self._life = self._loop.create_task(self._live(), name="nursery")

    @classmethod
    def start(cls) -> Nest:
        """Run a nursery, by its path: it is up sooner. Raises OSError."""
        token = secrets.randbits(30)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = run_python([PROGRAM, str(theirs.fileno()), str(token)], [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        return cls(token, ours, process)

    def hand_over(self, estate: Estate) -> dict[str, Any]:
        return {
            "protocol": nursery.VERSION,
            "token": self.token,
            "serial": self._serial,
            "pid": self._process.pid,
            "socket": estate.keep(self._socket.fileno()),
            "children": {str(serial): child.hand_over(estate) for serial, child in self.children.items()},
            "queue": [[b64encode(data).decode(), [*map(estate.keep, fds)]] for data, fds in self._queue],
        }

    @classmethod
    def taken_over(cls, data: dict[str, Any], estate: Estate) -> Nest:
        """Raises OSError, KeyError: then the nursery ends, and all in it."""
        process = Offspring(estate.claim_process(data["pid"]))
        try:
            sock = socket.socket(fileno=estate.claim(data["socket"]))
        except BaseException:
            process.close()
            raise
        nest = cls(data["token"], sock, process, data["serial"])
        try:
            for serial, child in data["children"].items():
                nest.children[int(serial)] = Child.taken_over(nest, int(serial), child, estate)
            nest._resume([(b64decode(order), [*map(estate.claim, fds)]) for order, fds in data.get("queue", ())])
        except BaseException:
            nest._hang_up()
            raise
        return nest

    @property
    def life(self) -> asyncio.Task[None]:
        return self._life

    def spawn(
        self,
        launch: Launch,
        fds: Sequence[int],
        stdio: tuple[int, int, int],
        names: Sequence[str],
        ended: Callable[[], None],
    ) -> Child:
        """Raises StartFailed."""
        self._serial += 1
        child = Child(self, self._serial, launch, ended)
        data = nursery.encode(Spawn(self._serial, launch, stdio, names))
        if len(data) > nursery.LARGEST:
            raise StartFailed(f"the command and its environment are longer than {nursery.LARGEST >> 10} KiB")
        try:
            self._post(data, fds)
        except OSError as error:
            raise StartFailed(f"{os.fsdecode(launch.argv[0])}: {error.strerror}") from error
        self.children[self._serial] = child
        return child

    def send(self, order: Signal) -> None:
        self._post(nursery.encode(order), ())

    async def close(self) -> None:
        """End the nursery and with it all children; return when they are gone. Cancelling leaves that going on."""
        if not self.over:
            self.over = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(FAREWELL):
                await self._eof.wait()
        except TimeoutError:
            self._process.kill()
        await asyncio.shield(self._life)

    async def _live(self) -> None:
        """The rest of the life of the nursery."""
        error = "the process that starts processes died"
        await self._eof.wait()
        try:
            async with asyncio.timeout(FAREWELL):
                status = await self._process.wait()
        except TimeoutError:
            self._process.kill()
            status = await self._process.wait()
        if status != 0:
            await asyncio.to_thread(nursery.purge, self.token)
        self._hang_up()
        for child in list(self.children.values()):
            if child.pid is None:
                child.on_failed(StartFailed(error))
            else:
                child.on_gone(Exit())
        self.children.clear()

    def _post(self, data: bytes, fds: Sequence[int]) -> None:
        """Send now, or as soon as there is room, with copies of the descriptors. Raises OSError."""
        if self._eof.is_set():
            return  # all children are being buried
        if not self._queue:
            try:
                nursery.send(self._socket, data, fds)
                return
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._flush)
            except (BrokenPipeError, ConnectionResetError):
                return  # the end of file comes next
        copies: list[int] = []
        try:
            copies.extend(os.dup(fd) for fd in fds)
        except OSError:
            _close_all(copies)
            raise
        self._queue.append((data, copies))

    def _resume(self, orders: Sequence[tuple[bytes, list[int]]]) -> None:
        """What the former control plane could not send yet."""
        if orders:
            self._queue.extend(orders)
            self._loop.add_writer(self._socket, self._flush)

    def _flush(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            try:
                nursery.send(self._socket, data, fds)
            except BlockingIOError:
                return
            except OSError:
                self._hang_up()
                return
            self._queue.popleft()
            _close_all(fds)
        self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        for _ in range(BATCH):
            try:
                data, fds = nursery.receive(self._socket)
                report = nursery.decode_report(data) if data else None
            except BlockingIOError:
                return
            except (OSError, msgspec.MsgspecError):
                report, fds = None, []
            if report is None:
                self._hang_up()
                return
            self._take(report, fds)

    def _take(self, report: Started | Failed | Ended | Signalled, fds: list[int]) -> None:
        child = self.children[report.serial]
        match report:
            case Started(pid=pid):
                child.on_started(pid, fds)
                return
            case Signalled():
                child.on_signalled()
                return
            case Failed():
                child.on_failed(child.explain(report))
            case Ended(code=code, signal=number):
                child.on_gone(Exit(code, number))
        del self.children[report.serial]

    def _hang_up(self) -> None:
        """The nursery says nothing more."""
        self.over = True
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        while self._queue:
            _close_all(self._queue.popleft()[1])
        self._eof.set()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class Spawner(Service):
    """Starts processes."""

    def __init__(self) -> None:
        self._nest: Nest | None = None
        self._lives: set[asyncio.Task[None]] = set()
        """also of nurseries that died a moment ago, whose children are being killed"""

    def spawn(
        self,
        launch: Launch,
        *,
        stdin: int | None = None,
        stdout: int,
        stderr: int,
        sockets: Sequence[PassedSocket] = (),
        ended: Callable[[], None] = lambda: None,
    ) -> Child:
        """Order a process; await `started` of what is returned. The caller keeps its descriptors and may close them.

        `sockets` are handed over as LISTEN_FDS. All descriptors are set to blocking mode, as programs expect it, which
        the caller's copies of a socket share. `ended` is called when everything is gone, before anybody who waits for
        that. Raises StartFailed.
        """
        fds: list[int] = []
        for fd in (stdin, stdout, stderr):
            if fd is not None and fd not in fds:
                fds.append(fd)
        stdio = (-1 if stdin is None else fds.index(stdin), fds.index(stdout), fds.index(stderr))
        if len(fds) + len(sockets) > nursery.MOST_FDS:
            raise StartFailed(f"{len(sockets)} sockets cannot be handed over; allowed: {nursery.MOST_FDS - len(fds)}")
        if self._nest is None or self._nest.over:
            try:
                self._nest = Nest.start()
            except OSError as error:
                raise StartFailed(f"no process can be started: {sys.executable}: {error.strerror}") from error
            self._live(self._nest)
        fds += (passed.socket.fileno() for passed in sockets)
        return self._nest.spawn(launch, fds, stdio, [passed.name for passed in sockets], ended)

    def _live(self, nest: Nest) -> None:
        self._lives.add(nest.life)
        nest.life.add_done_callback(self._lives.discard)

    def hand_over(self, estate: Estate) -> Any:
        return None if self._nest is None or self._nest.over else self._nest.hand_over(estate)

    def take_over(self, data: Any, estate: Estate) -> None:
        """Processes of a nursery that speaks otherwise end: nobody could tell it anything."""
        if data["protocol"] == nursery.VERSION:
            self._nest = Nest.taken_over(data, estate)
            self._live(self._nest)

    def settle(self) -> None:
        """What belongs to no backend any more is asked to end; it is killed at the latest when the gateway ends."""
        for child in self._nest.children.values() if self._nest else ():
            if not child.claimed:
                child.signal(signal.SIGTERM)
                child.signal(signal.SIGCONT)

    def child(self, serial: int) -> Child | None:
        """A process of a former control plane, for the backend that takes it over."""
        return self._nest.children.get(serial) if self._nest else None

    async def close(self) -> None:
        """End all processes: TERM, after 2 s KILL; return when they are gone. Idempotent."""
        if self._nest is not None:
            await self._nest.close()
        for life in tuple(self._lives):
            await asyncio.shield(life)
