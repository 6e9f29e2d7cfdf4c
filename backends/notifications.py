"""The NOTIFY_SOCKET of one backend: what it says about itself by sd_notify(3).

Counterpart: a driver makes one before each start, puts `environment` into the backend's environment and says which
processes belong to it; `backends.probe` waits for `ready`. Only READY=1 means anything here.
"""

from __future__ import annotations

import array
import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

LONGEST = 4096  # bytes of one message
_CREDENTIALS = struct.Struct("iII")  # struct ucred, unix(7): pid, uid, gid


class Notifications:
    """Owns the socket until `close`."""

    def __init__(
        self, belongs: Callable[[int, int], bool], path: Path | None = None, sock: socket.socket | None = None
    ) -> None:
        """Listen at an abstract name, or at `path` where the backend has no access to our network namespace; removing
        that file is left to who made its folder. `sock`: a former control plane's, which listens already.

        `belongs` gets the PID and the UID of a sender, which the kernel vouches for; what it refuses is ignored.
        Raises OSError.
        """
        self.ready = asyncio.Event()
        self._belongs = belongs
        self._loop = asyncio.get_running_loop()
        self._socket = sock or _bound(path)
        self._loop.add_reader(self._socket, self._read)

    @property
    def environment(self) -> Mapping[str, str]:
        name = self._socket.getsockname()
        return {"NOTIFY_SOCKET": f"@{name[1:].decode()}" if isinstance(name, bytes) else name}

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(LONGEST, space, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return
        sender: tuple[int, int] | None = None
        descriptors = array.array("i")
        for level, kind, body in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender = _CREDENTIALS.unpack(body[: _CREDENTIALS.size])[:2]
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(body[: len(body) - len(body) % descriptors.itemsize])
        if sender is not None and self._belongs(*sender):
            self._take(data)
        # Closing a descriptor that came along is the answer to BARRIER=1, sd_notify_barrier(3).
        for descriptor in descriptors:
            os.close(descriptor)

    def _take(self, data: bytes) -> None:
        if b"READY=1" in data.splitlines():
            self.ready.set()


def _bound(path: Path | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(str(path) if path else f"\0dormant-notify-{secrets.token_hex(8)}")
    except BaseException:
        sock.close()
        raise
    return sock
