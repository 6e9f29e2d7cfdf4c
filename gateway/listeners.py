"""The listening sockets of the gateway: bound here or inherited, kept over reloads and deaths of workers, closed at the end.

Counterpart: `backends.endpoint` knows addresses; workers and backends get copies of the sockets. A socket that the service
manager passed in is used instead of binding its address again, whether it is named (`fd://NAME`) or merely the same.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from backends.endpoint import AddressError, Endpoint, Inet, Inherited, Local, bind, of_socket, set_rights
from gateway.config import Listener

log = logging.getLogger(__name__)


class ListenError(Exception):
    """A socket cannot be bound, or is not there; the message says which and why."""


@dataclass(slots=True)
class Listening:
    """One listening socket and where it comes from."""

    listener: Listener
    socket: socket.socket
    inherited: bool
    file: tuple[int, int] | None = None
    """device and inode of the Unix socket file that was made for it"""

    @property
    def address(self) -> Endpoint:
        """Where it really listens: with the port that the kernel chose for port 0."""
        return of_socket(self.socket)


class Listeners:
    """All listening sockets, by their configured addresses."""

    def __init__(self, inherited: Iterable[tuple[str, socket.socket]] = ()) -> None:
        self._inherited: dict[int, tuple[str, socket.socket]] = {}
        for name, sock in inherited:
            self._inherited[sock.fileno()] = (name, sock)
        self._free = set(self._inherited)

    def open(self, listener: Listener) -> Listening:
        """Bind a listener, or take the inherited socket that fits. Raises ListenError."""
        found = self._find_inherited(listener.endpoint)
        if found is not None:
            return self._take(listener, found)
        if isinstance(listener.endpoint, Inherited):
            have = ", ".join(sorted({f"fd://{name}" for name, _ in self._inherited.values()})) or "none"
            raise ListenError(f"{listener.endpoint}: no such socket was passed in; there are: {have}")
        try:
            sock = bind(listener.endpoint, listener.backlog, listener.reuse_port)
        except AddressError as error:
            raise ListenError(str(error)) from error
        except OSError as error:
            raise ListenError(f"{listener.endpoint}: {_explain(error, listener.endpoint)}") from error
        return Listening(listener, sock, False, _file(listener.endpoint))

    def take_on(self, listening: Listening, listener: Listener) -> None:
        """Go on with the same socket under other settings (name, backlog, rights)."""
        listening.listener = listener
        if listening.socket.type == socket.SOCK_STREAM:
            listening.socket.listen(listener.backlog)
        if isinstance(listener.endpoint, Local) and listening.file is not None:
            try:
                set_rights(listener.endpoint)
            except (AddressError, OSError) as error:
                log.warning("%s: its rights stay as they are: %s", listener.endpoint, error)

    def close(self, listening: Listening) -> None:
        """Close it and remove its file; an inherited one stays open, for it cannot be had again."""
        if listening.inherited:
            self._free.add(listening.socket.fileno())
            return
        listening.socket.close()
        endpoint = listening.listener.endpoint
        if isinstance(endpoint, Local) and listening.file is not None and _file(endpoint) == listening.file:
            os.unlink(endpoint.path)

    def close_inherited(self) -> None:
        for _, sock in self._inherited.values():
            sock.close()

    @property
    def unused(self) -> list[str]:
        """Inherited sockets that no listener took, for a warning."""
        return [f"fd://{self._inherited[fd][0]} ({of_socket(self._inherited[fd][1])})" for fd in sorted(self._free)]

    def _find_inherited(self, endpoint: Endpoint) -> int | None:
        for fd in sorted(self._free):
            name, sock = self._inherited[fd]
            if isinstance(endpoint, Inherited):
                if endpoint.name in (name, str(fd)):
                    return fd
            elif _same(of_socket(sock), endpoint):
                log.info("%s is inherited from the service manager", endpoint)
                return fd
        return None

    def _take(self, listener: Listener, fd: int) -> Listening:
        self._free.discard(fd)
        sock = self._inherited[fd][1]
        sock.setblocking(False)
        if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(f"{listener.endpoint}: the inherited socket does not listen")
        return Listening(listener, sock, True)


def _same(bound: Endpoint, wanted: Endpoint) -> bool:
    if type(bound) is not type(wanted):
        return False
    if isinstance(wanted, Inet) and isinstance(bound, Inet):
        everywhere = ("*", "::")
        same_host = bound.host == wanted.host or (bound.host in everywhere and wanted.host in everywhere)
        return same_host and bound.port == wanted.port
    if isinstance(wanted, Local) and isinstance(bound, Local):
        return bound.path == wanted.path
    return bound == wanted


def _file(endpoint: object) -> tuple[int, int] | None:
    if not isinstance(endpoint, Local) or endpoint.abstract:
        return None
    try:
        found = os.lstat(endpoint.path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino)


def _explain(error: OSError, endpoint: Endpoint) -> str:
    """What went wrong, and what helps."""
    if error.errno == errno.EADDRINUSE:
        return "the address is in use by another program"
    if error.errno == errno.EACCES and isinstance(endpoint, Inet) and endpoint.port < 1024:
        return "no right to listen on a port below 1024; run it as root, with CAP_NET_BIND_SERVICE, or by socket activation"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if error.errno == errno.ENOENT:
        return "there is no such directory"
    return error.strerror or str(error)
