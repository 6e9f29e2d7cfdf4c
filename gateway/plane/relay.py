"""Moves the bytes of one connection until both directions ended.

A pair of `End`s, each one socket and the direction from it to its peer. Small messages are copied through one buffer
that all connections share; bulk is spliced, splice(2), through pipes that are lent only while bytes are in them. So a
connection at rest owns two descriptors and no buffer. What a socket does not take waits, and its source is not read
meanwhile: that is the backpressure. Half-close is kept in both directions, a reset is passed on.

Counterparts: `gateway.plane.dial` connects, `gateway.plane.worker` joins the sockets here; the owner
(`gateway.plane.gate`) hears once that a pair ended. Nothing here accepts, connects, times out or looks at the bytes.

Events are edge-triggered, epoll(7): what is not read to EAGAIN is never reported again, so each early return says who
comes back for the rest. Sockets come in connected: an unconnected one would report EPOLLHUP (Unix), and shutdown(2)
would break off its handshake (TCP).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
from socket import SocketType
from typing import Protocol

from gateway.plane.loop import Loop

SIZE = 64 << 10
"""Bytes of the shared buffer."""

BULK = 2
"""So many full buffers in a row make a direction bulk: from then on splice."""

SMALL = 16 << 10
"""Bytes. A bulk direction that moves less than this in one go is copied again: two system calls, not three."""

BUDGET = 4 << 20
"""Bytes that one direction may move before the others have their turn."""

READ = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
"""PRI: a read stops at the mark of urgent data, tcp(7). So no short read is taken for the last one then."""

READ_WRITE = READ | select.EPOLLOUT
IN = select.EPOLLIN
OUT = select.EPOLLOUT
LAST = select.EPOLLIN | select.EPOLLRDHUP
"""Bytes are there, and the end of file behind them."""

MORE = int(socket.MSG_MORE)  # a plain number: the enum costs a call each time
GONE = select.EPOLLHUP | select.EPOLLERR
SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
SPLICE_MOST = 1 << 20  # more than a pipe holds: the pipe is the limit
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with zero seconds: close(2) sends RST and drops what was not sent
INET = frozenset({int(socket.AF_INET), int(socket.AF_INET6)})

_buffer = bytearray(SIZE)
_view = memoryview(_buffer)


class Owner(Protocol):
    def ended(self, end: End) -> None:
        """A pair is over; `end` is its client side. Called once; the byte counts can be read until it returns."""


class Pipes:
    """The pipes for splicing, shared by all connections: own ones would cost each connection four descriptors more."""

    SIZE = 256 << 10  # bytes; with the default of 64 KiB bulk is 10 to 30 % slower
    MOST = 256  # of 256 KiB: what an unprivileged user may have, fs.pipe-user-pages-soft in proc_sys_fs(5)
    SPARE = 32  # kept open while nobody needs them

    def __init__(self) -> None:
        self.count = 0
        self._spare: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int] | None:
        """An empty pipe (read end, write end), or None: copy instead."""
        if self._spare:
            return self._spare.pop()
        if self.count >= self.MOST:
            return None
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        self.count += 1
        # EPERM beyond the user's limit: then the pipe stays as it is, 64 KiB.
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, self.SIZE)
        return pipe

    def give(self, pipe: tuple[int, int], empty: bool) -> None:
        """Take a pipe back. One that holds bytes is closed: they must never come out in another connection."""
        if empty and len(self._spare) < self.SPARE:
            self._spare.append(pipe)
        else:
            self._close(pipe)

    def close(self) -> None:
        """Close the spare pipes; lent ones come back by the end of their connection. Usable afterwards, idempotent."""
        while self._spare:
            self._close(self._spare.pop())

    def _close(self, pipe: tuple[int, int]) -> None:
        self.count -= 1
        os.close(pipe[0])
        os.close(pipe[1])


pipes = Pipes()


class End:
    """One socket of a pair, and the direction from it to its peer.

    `client`: the side that was accepted. `moved`: bytes that the peer's socket took from this direction.
    """

    __slots__ = (
        "_armed", "_eof", "_full", "_hot", "_loop", "_pending", "_pipe", "_piped", "_queued", "_receive", "_send",
        "_shut", "_spliceable", "_tcp", "client", "fd", "moved", "over", "owner", "peer", "sock",
    )  # fmt: skip

    peer: End

    def __init__(self, loop: Loop, sock: SocketType, peer_sock: SocketType, owner: Owner, client: bool) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.owner = owner
        self.client = client
        self.moved = 0
        self.over = False
        self._loop = loop
        self._receive = sock.recv_into
        self._send = peer_sock.send
        self._tcp = sock.family in INET
        self._hot = self._tcp  # everything was read, and a short read will again mean that
        self._pending: memoryview | None = None  # bytes that were read and that the peer does not take yet
        self._pipe: tuple[int, int] | None = None
        self._piped = 0  # bytes in the pipe
        self._full = 0  # full buffers in a row
        self._spliceable = True
        self._eof = False  # nothing more comes out of this socket
        self._shut = False  # nothing more goes into this socket
        self._armed = False  # EPOLLOUT is watched
        self._queued = False  # in the loop's next turn

    @property
    def peer_moved(self) -> int:
        """Bytes from the peer to here."""
        return self.peer.moved

    def event(self, mask: int) -> None:
        """epoll reported this socket."""
        if mask == IN and self._hot:
            # A request or an answer on a warm connection. A short read on TCP means that the socket is drained; an end
            # of file that is not in this mask is a new edge. A Unix socket also stops a read at passed descriptors.
            # These are `_copy` and `_hand_over` written out: two calls less, a tenth of the time spent in Python.
            try:
                size = self._receive(_buffer)
            except BlockingIOError:
                return
            except OSError:
                cut(self, reset=True)
                return
            if 0 < size < SIZE:
                try:
                    sent = self._send(_view[:size])
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self._write_failed()
                    return
                self.moved += sent
                if sent < size:
                    self._keep(sent, size)
            elif self._hand_over(size) >= 0:
                self._pump()
            return
        if mask == LAST and self._hot:
            self._last_words()
            return
        if mask & OUT:
            peer = self.peer
            if peer._blocked:
                peer._pump()
            elif self._armed and peer._full < BULK:
                # Unix sockets report EPOLLOUT whenever their reader reads, TCP with every EPOLLIN: not worth it now.
                self._watch(False)
            if self.over:
                return
        if mask & ~OUT:
            if mask & select.EPOLLPRI:
                self._spliceable = False  # at the mark it says EAGAIN, or the end, and more is there
            ended = self._eof
            # Blocked, it is not read; an edge that comes now, a FIN perhaps, is found when it flows again, because
            # then it is read to EAGAIN. Level-triggered, HUP and ERR would be reported for ever.
            if not ended and not self._blocked:
                self._pump()
                # A client's end may come with HUP or ERR, which is not reported again. A backend's is followed by the
                # client's own end: until then the client may still be reading.
                ended = self._eof and self.client and not self.over
            if ended and mask & GONE and not self._shut:
                self.peer._write_failed(reset=bool(mask & select.EPOLLERR))

    def abort(self) -> None:
        """The loop met an unexpected error here."""
        cut(self, reset=True)

    # self -> peer

    @property
    def _blocked(self) -> bool:
        """Bytes wait for the peer to become writable."""
        return self._pending is not None or self._piped > 0

    def _pump(self) -> None:
        """Move bytes until this socket is drained (EAGAIN), the peer is full, or the budget is spent."""
        start = self.moved
        while (self._pending is None and not self._piped) or self._flush():
            if self._eof:
                self._pass_eof()
                return
            if self.moved - start > BUDGET:
                self._hot = False
                if not self._queued:
                    self._queued = True
                    self._loop.soon(self._resume)
                return
            if self._full >= BULK and self._spliceable:
                if not self._splice_in(start):
                    return
            elif self._copy() < 0:
                return

    def _last_words(self) -> None:
        """Bytes with the end of file behind them: a short read takes them all, so no further one has to ask for the end.

        They leave in one packet with the FIN. Would the end not be passed on, the kernel sends them after 200 ms, tcp(7).
        """
        size = self._copy(MORE)
        if size == SIZE:
            self._pump()
        elif size >= 0:
            self._eof = True
            self._pass_eof()

    def _resume(self) -> None:
        """Its turn again: edge-triggered, what was left is not reported a second time."""
        self._queued = False
        if not self.over and not self._blocked and not (self._eof and self.peer._shut):
            self._pump()

    def _copy(self, flags: int = 0) -> int:
        """One read, one write: the bytes read, 0 at the end of file, or -1 when an event has to come first."""
        try:
            size = self._receive(_buffer)
        except BlockingIOError:
            self._hot = self._tcp
            return -1
        except OSError:
            cut(self, reset=True)
            return -1
        return self._hand_over(size, flags)

    def _hand_over(self, size: int, flags: int = 0) -> int:
        """Write what was read into the shared buffer; answers like `_copy`."""
        if not size:
            self._eof = True
            self._hot = False
            return 0
        self._full = self._full + 1 if size == SIZE else 0
        try:
            sent = self._send(_view[:size], flags)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._write_failed()
            return -1
        self.moved += sent
        if sent < size:
            self._keep(sent, size)
            return -1
        return size

    def _keep(self, start: int, end: int) -> None:
        """The peer did not take it all: the rest has to move out of the shared buffer."""
        self._pending = memoryview(bytes(_view[start:end]))
        self._wait_for_peer()

    def _splice_in(self, start: int) -> bool:
        """Fill the pipe, and say whether to go on; `start`: `moved` when this go began."""
        if self._pipe is None:
            self._pipe = pipes.take()
            if self._pipe is None:
                self._full = 0
                return True
        try:
            size = os.splice(self.fd, self._pipe[1], SPLICE_MOST, flags=SPLICE)
        except BlockingIOError:
            # Only this means drained. A short count does not: a pipe has 16 slots per 64 KiB, and a fragment takes one.
            self._return_pipe()
            if self.moved - start < SMALL:
                self._full = 0
            self._hot = self._tcp and self._full < BULK
            return False
        except OSError as error:
            if error.errno == errno.EINVAL:
                # This kernel cannot splice from this family (vsock before Linux 6.5).
                self._spliceable = False
                self._return_pipe()
                return True
            cut(self, reset=True)
            return False
        self._piped = size
        if not size:
            # The end, or the mark of urgent data: a read tells.
            self._return_pipe()
            self._full = 0
        return True

    def _flush(self) -> bool:
        """Hand over what was read before; whether all of it was taken."""
        while self._piped:
            assert self._pipe is not None
            try:
                sent = os.splice(self._pipe[0], self.peer.fd, self._piped, flags=SPLICE)
            except BlockingIOError:
                self._wait_for_peer()
                return False
            except OSError:
                self._write_failed()
                return False
            self._piped -= sent
            self.moved += sent
        if self._pending is not None:
            try:
                sent = self._send(self._pending)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._write_failed()
                return False
            self.moved += sent
            if sent < len(self._pending):
                self._pending = self._pending[sent:]
                self._wait_for_peer()
                return False
            self._pending = None
        return True

    def _wait_for_peer(self) -> None:
        """Stop reading; the peer's EPOLLOUT goes on. Bulk keeps it watched: no epoll_ctl for each block."""
        self._hot = False
        if not self.peer._armed:
            self.peer._watch(True)

    def _watch(self, write: bool) -> None:
        self._armed = write
        # Not yet in the table: join() watches it in a moment, with what is wanted by then.
        if self.fd in self._loop.table:
            self._loop.modify(self.fd, READ_WRITE if write else READ)

    def _return_pipe(self) -> None:
        if self._pipe is not None:
            pipes.give(self._pipe, empty=not self._piped)
            self._pipe = None
            self._piped = 0

    # Ends

    def _pass_eof(self) -> None:
        """This socket ended and all of it, pipe and all, was handed over: only now may the peer see the end."""
        self._hot = False
        if self._shut:
            cut(self)
            return
        self._return_pipe()
        self.peer._shut = True
        # ENOTCONN: reset meanwhile, which is reported.
        try:  # noqa: SIM105  # `try` is free, and this is part of each connection
            self.peer.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _write_failed(self, reset: bool = False) -> None:
        """The peer takes no more. What it said before still has to be delivered: an answer that came before the whole
        request was read ("413") is followed by a reset."""
        self._hot = False
        self._pending = None
        self._return_pipe()
        peer = self.peer
        self._eof = peer._shut = True
        if peer._blocked:
            # Its reader is this socket, which may itself wait for us to read from it, and that is over: neither would go on.
            cut(self, reset=True)
        elif peer._eof:
            cut(self, reset)
        else:
            peer._pump()


def hear(sock: SocketType) -> bytes | None:
    """What a client said before its connection to the backend is made; nothing at once, perhaps. None: it has hung up.

    The first request is often there already. It then leaves with the packet that ends the handshake (`attempt` of
    `gateway.plane.dial`).
    """
    try:
        return bytes(_view[: sock.recv_into(_buffer)])
    except BlockingIOError:
        return b""
    except OSError:
        return None


def join(loop: Loop, client: SocketType, upstream: SocketType, owner: Owner, said: bytes = b"", taken: int = 0) -> End:
    """Relay between two connected, non-blocking stream sockets, which are the relay's from now on; the client's End.

    `said`: what was read from the client before; `taken`: bytes of that which upstream has already. The pair may be over
    when this returns; `owner.ended` has been called then.
    """
    end = End(loop, client, upstream, owner, True)
    peer = End(loop, upstream, client, owner, False)
    end.peer = peer
    peer.peer = end
    end.moved = taken
    if taken < len(said):
        end._pending = memoryview(said)[taken:]
        end._flush()
        if end.over:
            return end
    # Whatever else is pending is reported when the sockets are added.
    try:
        loop.add(end.fd, end, READ_WRITE if end._armed else READ)
        loop.add(peer.fd, peer, READ_WRITE if peer._armed else READ)
    except OSError:  # ENOMEM, ENOSPC (fs.epoll.max_user_watches): it could never go on
        cut(end, reset=True)
    return end


def cut(end: End, reset: bool = False) -> None:
    """End a pair now: close both sides, with a TCP reset if asked. Idempotent; either End will do."""
    if end.over:
        return
    peer = end.peer
    end.over = peer.over = True
    loop = end._loop
    for side in (end, peer):
        side._pending = None
        if side._pipe is not None:
            side._return_pipe()
        if reset:
            # No effect on other families, which cannot say it. EINVAL: the connection is gone already.
            with contextlib.suppress(OSError):
                side.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        loop.drop(side.sock, side.fd)
    try:
        end.owner.ended(end if end.client else peer)
    finally:
        # The two know each other: without this cycle no garbage collector is needed.
        del end.peer, peer.peer
