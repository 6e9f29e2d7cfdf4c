"""Where the next control plane finds a worker whose own one is gone: a Unix socket in the gateway's runtime directory.

Counterpart: `gateway.adoption` connects. Knows no message: it accepts, checks who it is, and hands the connection on.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable

from gateway.plane.loop import Loop

BACKLOG = 4
PAUSE = 0.05  # seconds without accepting when descriptors run out
_CREDENTIALS = struct.Struct("iII")  # struct ucred, unix(7)


class Rendezvous:
    """A listening socket `PID.sock` in a directory. Owns the file."""

    def __init__(self, loop: Loop, directory: str, met: Callable[[socket.socket], None]) -> None:
        """Raises OSError: then this worker cannot be found."""
        self.loop = loop
        self.met = met
        self.path = os.path.join(directory, f"{os.getpid()}.sock")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        folder = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        try:
            # By way of the folder's descriptor: the path may be longer than the 107 bytes that a Unix address takes.
            self.sock.bind(f"/proc/self/fd/{folder}/{os.path.basename(self.path)}")
        except BaseException:
            self.sock.close()
            raise
        finally:
            os.close(folder)
        self.sock.listen(BACKLOG)
        self._watch()

    def _watch(self) -> None:
        if self.sock.fileno() >= 0:
            self.loop.add(self.sock.fileno(), self, select.EPOLLIN)

    def event(self, mask: int) -> None:
        try:
            sock, _ = self.sock.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors left
            self.loop.remove(self.sock.fileno())
            self.loop.later(PAUSE, self._watch)
            return
        _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if user in (0, os.geteuid()):
            self.met(sock)
        else:
            sock.close()

    def close(self) -> None:
        """Remove the file, too."""
        self.loop.discard(self.sock)
        try:  # noqa: SIM105
            os.unlink(self.path)
        except OSError:
            pass
