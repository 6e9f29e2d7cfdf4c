"""Where the next control plane finds a worker whose own one is gone: a Unix socket in the gateway's runtime directory.

Counterpart: `gateway.adoption` binds it and connects to it. Knows no message: it accepts, checks who it is, and hands the
connection on.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable

from gateway.plane.loop import Loop

PAUSE = 0.05  # seconds without accepting when descriptors run out
_CREDENTIALS = struct.Struct("iII")  # struct ucred, unix(7)


class Rendezvous:
    """A listening socket, which the control plane bound before it started this worker, and its file. Owns both."""

    def __init__(self, loop: Loop, fd: int, path: str, met: Callable[[socket.socket], None]) -> None:
        self.loop = loop
        self.met = met
        self.path = path
        self.sock = socket.socket(fileno=fd)
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
