"""The nursery: the small process that starts every process of the `process` driver, and outlives none of them.

Counterpart: `backends.spawner` runs this file by its path (so it must import nothing of this package) and speaks to it
over one SOCK_SEQPACKET socket, whose messages are defined here. The nursery has one thread and few imports: forking it
is fast, and code may run in the child before exec, which a process with threads must not do. It knows nothing of
backends, decides nothing, and lives until the end of file of its socket.

What it promises: nothing that it started is left behind.
- A main process leads its own session and group. When it ends, the rest of its group is killed while the main process
  is still a zombie, so that the group's number cannot be somebody else's by then.
- What left the group (daemons) is found by a mark and killed as well. The mark is the soft limit RLIMIT_LOCKS:
  inherited by every descendant, enforced by no kernel since 2.4.25 (getrlimit(2)), and unlike a variable in the
  environment it survives a cleared environment and programs that write their title over it (nginx, PostgreSQL).
  Orphans come to the nursery because it is a child subreaper, PR_SET_CHILD_SUBREAPER(2const).
- When the gateway is gone, even by SIGKILL, the socket ends: TERM to all groups, and KILL to all after a while.
- When the nursery itself is killed, the main processes die with it (PR_SET_PDEATHSIG), and the gateway calls `purge`.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import enum
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import msgspec

VERSION = 1  # of the messages; a gateway of another version cannot take this nursery over
LARGEST = 128 << 10  # bytes of a message; the default send buffer of Linux takes 208 KiB
MOST_FDS = 250  # with a message; the kernel takes 253 (SCM_MAX_FD)
TERM_TIME = 2.0  # seconds from TERM to KILL when the gateway is gone
KILL_TIME = 1.0  # seconds after which what does not even die by KILL is left to the kernel

RLIMIT_LOCKS = 10
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
prctl = ctypes.CDLL(None, use_errno=True).prctl


# The messages. The gateway says:


class Launch(msgspec.Struct, frozen=True, array_like=True):
    """What to run, and as whom. All names are resolved: looking them up may block."""

    argv: Sequence[bytes]
    env: dict[bytes, bytes]
    cwd: bytes
    umask: int | None = None
    uid: int | None = None
    gid: int | None = None
    groups: Sequence[int] | None = None
    rlimits: dict[str, tuple[int, int]] = {}
    """name in lower case, as in prlimit(1) -> soft, hard; -1: unlimited"""


class Spawn(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Start a process. Descriptors come along: first those of `stdio`, then one listening socket for each name."""

    serial: int
    """the gateway's number for this process; ascending"""
    launch: Launch
    stdio: tuple[int, int, int]
    """which descriptor becomes stdin, stdout, stderr; -1: /dev/null"""
    names: Sequence[str] = ()
    """LISTEN_FDNAMES"""


class Signal(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Send a signal to the group of a process, if it still lives."""

    serial: int
    number: int
    confirm: bool = False
    """Answer with Signalled, or Ended."""


# The nursery says:


class Started(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It runs: exec succeeded. Its pidfd comes along."""

    serial: int
    pid: int


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It does not run, and nothing of it is left."""

    serial: int
    step: str
    """a Step"""
    error: int
    """errno"""
    detail: str = ""


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Its main process has ended and everything else of it is gone."""

    serial: int
    code: int | None
    signal: int | None


class Signalled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A signal was sent. In the order of the orders."""

    serial: int


class Step(enum.StrEnum):
    """What failed on the way to a running program."""

    RECEIVE = "receive"
    FORK = "fork"
    SESSION = "session"
    SOCKETS = "sockets"
    LIMIT = "limit"
    GROUP = "group"
    USER = "user"
    DIRECTORY = "directory"
    EXECUTE = "execute"
    INTERPRETER = "interpreter"


encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Spawn | Signal).decode
decode_report = msgspec.msgpack.Decoder(Started | Failed | Ended | Signalled).decode


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors, which the caller owns; `b""` at the end. Raises OSError."""
    space = socket.CMSG_SPACE(MOST_FDS * 4)
    data, ancillary, _, _ = sock.recvmsg(LARGEST, space, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    fds = array.array("i")
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    return data, list(fds)


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """One message with descriptors. Raises OSError, BlockingIOError where the socket does not block."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)


# The mark


def mark_of(token: int, serial: int) -> int:
    """The mark of one process and its descendants: a nursery's random token, and the serial."""
    return token << 32 | serial


def read_mark(pid: int) -> int | None:
    """The mark of a process, None without one. Reads /proc, which never waits; hence O_NONBLOCK is honest."""
    try:
        fd = os.open(f"/proc/{pid}/limits", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        text = os.read(fd, 4096)
    except OSError:
        return None
    finally:
        os.close(fd)
    _, found, rest = text.partition(b"Max file locks")
    soft = rest.split(None, 1)[0] if found else b""
    return int(soft) if soft.isdigit() else None


def children(pid: int) -> list[int]:
    """The PIDs of the children of all threads of a process; none if it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb", 0) as file:
                while data := file.read(1 << 16):
                    found += map(int, data.split())
    return found


def purge(token: int, patience: float = KILL_TIME) -> bool:
    """Kill what a dead nursery left behind and wait until it is gone; False when not all of it is.

    Blocks: call it in a thread.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.ExitStack() as opened:
            dying = select.poll()
            count = 0
            for pidfd in _left_behind(token):
                opened.callback(os.close, pidfd)
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                dying.register(pidfd, select.POLLIN)
                count += 1
            if not count:
                return True
            dying.poll(10)  # then look again: what dies may have left others
    return False


def _left_behind(token: int) -> Iterator[int]:
    """Pidfds of all living processes with a mark of this nursery; the caller closes them."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or (read_mark(int(name)) or 0) >> 32 != token:
            continue
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        # Looked at again, now that the number cannot become somebody else's; and zombies are not ours to reap.
        if (read_mark(int(name)) or 0) >> 32 == token and not select.select([pidfd], [], [], 0)[0]:
            yield pidfd
        else:
            os.close(pidfd)


# Between fork and exec


def become(order: Spawn, fds: Sequence[int], mark: int, report: int, parent: int, changed: Sequence[int]) -> NoReturn:
    """Turn this forked child into the program, or write the step and the error into `report` and exit.

    `changed` are the signals whose dispositions are not the default ones here.
    """
    launch, step, detail = order.launch, Step.SESSION, ""
    try:
        os.setsid()
        step = Step.SOCKETS
        lowest = 3 + len(order.names)
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, lowest)
        _place(fds, order, lowest)
        env = dict(launch.env)
        if order.names:
            env[b"LISTEN_FDS"] = b"%d" % len(order.names)
            env[b"LISTEN_PID"] = b"%d" % os.getpid()
            env[b"LISTEN_FDNAMES"] = ":".join(order.names).encode()
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
        _mark(mark)
        step = Step.LIMIT
        for detail, (soft, hard) in launch.rlimits.items():
            _limit(detail, soft, hard)
        step, detail = Step.GROUP, ""
        if launch.groups is not None:
            os.setgroups(launch.groups)
        if launch.gid is not None:
            os.setresgid(launch.gid, launch.gid, launch.gid)
        step = Step.USER
        if launch.uid is not None:
            os.setresuid(launch.uid, launch.uid, launch.uid)
        # After setresuid, which clears it. The nursery may have died before: then nobody would tell us.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(127)
        step = Step.DIRECTORY
        os.chdir(launch.cwd)
        if launch.umask is not None:
            os.umask(launch.umask)
        step = Step.EXECUTE
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execvpe(launch.argv[0], list(launch.argv), env)
    except BaseException as error:
        why = getattr(error, "errno", None) or errno.EINVAL
        if step is Step.EXECUTE and why == errno.ENOENT and b"/" in launch.argv[0] and os.path.exists(launch.argv[0]):
            step = Step.INTERPRETER
        os.write(report, msgspec.msgpack.encode((step, why, detail)))
    finally:
        os._exit(127)


def _place(fds: Sequence[int], order: Spawn, lowest: int) -> None:
    """Put stdin, stdout, stderr and the sockets where they belong; everything else is closed by exec."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    stdio = [fds[index] if index >= 0 else null for index in order.stdio]
    sockets = fds[len(fds) - len(order.names) :]
    # First all out of the way, so that none is overwritten before it was copied.
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest) for fd in (*stdio, *sockets)]
    for target, source in enumerate(sources):
        os.dup2(source, target)
        # A property of the open file, so also of the gateway's own copy, which is only ever polled.
        os.set_blocking(target, True)


def _mark(mark: int) -> None:
    _, hard = resource.getrlimit(RLIMIT_LOCKS)
    # Where an administrator lowered it there is no room for a mark: then only the group is sure to be found.
    if hard == resource.RLIM_INFINITY:
        resource.setrlimit(RLIMIT_LOCKS, (mark, hard))


def _limit(name: str, soft: int, hard: int) -> None:
    try:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (soft, hard))
    except ValueError as error:  # what Python makes of EPERM and EINVAL
        raise OSError(errno.EPERM if "raise" in str(error) else errno.EINVAL, str(error)) from error


# The process


class Child:
    """A main process, from fork until nothing of it is left."""

    def __init__(self, serial: int, pid: int) -> None:
        self.serial = serial
        self.pid = pid
        self.failed = False
        self.result: os.waitid_result | None = None
        """set when the main process is gone"""


class Nursery:
    """The loop: orders in, reports out, and the dead in between."""

    def __init__(self, sock: socket.socket, token: int) -> None:
        self.socket = sock
        self.token = token
        self.running: dict[int, Child] = {}  # by serial
        self.by_pid: dict[int, Child] = {}
        self.starting: dict[int, Child] = {}  # by the pipe on which a failed exec is reported
        self.deadline: float | None = None  # the gateway is gone; KILL then
        self.childless = True
        self.poll = select.epoll()
        self.poll.register(sock, select.EPOLLIN)
        self.wakeup, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.poll.register(self.wakeup, select.EPOLLIN)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.signals = [int(number) for number in signal.valid_signals()]
        self.changed = [n for n in self.signals if signal.getsignal(n) not in (signal.SIG_DFL, None)]

    def run(self) -> bool:
        """Until the gateway and all children are gone. False: some would not die."""
        while self.deadline is None or not self.childless:
            left = None if self.deadline is None else self.deadline - time.monotonic()
            if left is not None and left <= 0:
                return self.kill_all()
            ready = [fd for fd, _ in self.poll.poll(left)]
            if self.wakeup in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wakeup, 4096)
                self.reap()
            for fd in ready:
                if fd in self.starting:
                    self.conclude_start(fd)
            if self.deadline is None and self.socket.fileno() in ready:
                self.obey()
        return True

    def obey(self) -> None:
        """Take one order."""
        try:
            data, fds = receive(self.socket)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self.end()
            return
        order = decode_order(data)
        if isinstance(order, Spawn):
            try:
                self.spawn(order, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        elif child := self.running.get(order.serial):
            self.signal(child, order.number)
            if order.confirm:
                self.report(Signalled(order.serial))

    def report(self, message: Started | Failed | Ended | Signalled, fds: Sequence[int] = ()) -> None:
        # May block: when the gateway does not read, nothing is more urgent. When it is gone, the next look says so.
        with contextlib.suppress(OSError):
            send(self.socket, encode(message), fds)

    def spawn(self, order: Spawn, fds: Sequence[int]) -> None:
        if len(fds) != max(order.stdio) + 1 + len(order.names):  # the kernel had no room for them in our table
            self.report(Failed(order.serial, Step.RECEIVE, errno.EMFILE))
            return
        parent = os.getpid()
        # Blocked until the child has default dispositions: a TERM that comes early must still end it.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        reader = writer = -1
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
            if pid == 0:
                become(order, fds, mark_of(self.token, order.serial), writer, parent, self.changed)
        except OSError as error:
            if reader >= 0:
                os.close(reader)
            self.report(Failed(order.serial, Step.FORK, error.errno or errno.EAGAIN))
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            if writer >= 0:
                os.close(writer)
        child = Child(order.serial, pid)
        self.running[order.serial] = self.by_pid[pid] = self.starting[reader] = child
        self.childless = False
        self.poll.register(reader, select.EPOLLIN)

    def conclude_start(self, reader: int) -> None:
        """The pipe was closed by exec, or says why there is none."""
        child = self.starting.pop(reader)
        self.poll.unregister(reader)
        failure = os.read(reader, 4096)
        os.close(reader)
        if failure:
            child.failed = True
            step, number, detail = msgspec.msgpack.decode(failure)
            self.report(Failed(child.serial, step, number, detail))
            return
        pidfds = []
        if child.result is None:  # else its number may be somebody else's; the report of its end follows
            with contextlib.suppress(OSError):  # no descriptors left: the gateway can do without
                pidfds.append(os.pidfd_open(child.pid))
        self.report(Started(child.serial, child.pid), pidfds)
        for pidfd in pidfds:
            os.close(pidfd)
        self.settle()

    def signal(self, child: Child, number: int) -> None:
        if child.result is None:  # so the number is its own, alive or zombie
            with contextlib.suppress(PermissionError):  # it became somebody whom we may not signal
                try:
                    os.killpg(child.pid, number)
                except ProcessLookupError:  # not yet in its own group
                    os.kill(child.pid, number)

    def reap(self) -> None:
        """Collect all dead children, adopted ones too."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self.childless = True
                break
            if found is None:
                break
            child = self.by_pid.pop(found.si_pid, None)
            if child is not None:
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.result = found
            os.waitpid(found.si_pid, 0)
        self.settle()

    def settle(self) -> None:
        """Kill what the dead left behind; report those of whom nothing is left."""
        dead = [child for child in self.running.values() if child.result is not None]
        if not dead:
            return
        left = set()
        for pid in children(os.getpid()):
            mark = None if pid in self.by_pid else read_mark(pid)
            if mark is None or mark >> 32 != self.token:
                continue
            serial = mark & 0xFFFFFFFF
            owner = self.running.get(serial)
            if owner is None or owner.result is not None:
                with contextlib.suppress(PermissionError):
                    os.kill(pid, signal.SIGKILL)  # our own child, not reaped: the number is still its own
                left.add(serial)
        for child in dead:
            # The start is concluded first, so that no end is reported of what was never started.
            if child.serial not in left and child not in self.starting.values():
                del self.running[child.serial]
                self.report_end(child)

    def report_end(self, child: Child) -> None:
        if child.result is not None and not child.failed:
            exited = child.result.si_code == os.CLD_EXITED
            status = child.result.si_status
            self.report(Ended(child.serial, status if exited else None, None if exited else status))

    def end(self) -> None:
        """The gateway is gone."""
        self.poll.unregister(self.socket)
        self.deadline = time.monotonic() + TERM_TIME
        for child in self.by_pid.values():
            self.signal(child, signal.SIGTERM)
            self.signal(child, signal.SIGCONT)

    def kill_all(self) -> bool:
        """KILL generation after generation: what dies leaves its own children to us."""
        deadline = time.monotonic() + KILL_TIME
        while time.monotonic() < deadline:
            for pid in children(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            if self.childless:
                return True
            self.poll.poll(0.01)
        return False


def main(arguments: Sequence[str]) -> int:
    """`nursery.py FD TOKEN`"""
    sock = socket.socket(fileno=int(arguments[0]))
    sock.set_inheritable(False)
    # Whatever else the gateway's own starter left open is not for the backends.
    os.closerange(3, sock.fileno())
    os.closerange(sock.fileno() + 1, 1 << 30)
    os.chdir("/")
    # What a terminal or an operator sends to the gateway is the gateway's business.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    return 0 if Nursery(sock, int(arguments[1])).run() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
