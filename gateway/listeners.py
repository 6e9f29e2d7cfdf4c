"""The listening sockets of the gateway: bound here or inherited, kept over reloads and deaths of workers, closed at the end.

Counterpart: `backends.endpoint` knows addresses; workers and backends get copies of the sockets. A socket that the service
manager passed in is used instead of binding its address again, whether it is named (`fd://NAME`) or merely the same.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from backends.endpoint import AddressError, Endpoint, Inet, Inherited, Local, bind_several, of_socket, set_rights
from gateway.config import Listener
from gateway.upgrade import Estate, KeptSocket

log = logging.getLogger(__name__)


class ListenError(Exception):
    """A socket cannot be bound, or is not there; the message says which and why."""


@dataclass(slots=True)
class Listening:
    """One listening socket and where it comes from."""

    listener: Listener
    sockets: list[socket.socket]
    """several where each worker has its own, SO_REUSEPORT in socket(7)"""
    inherited: bool
    key: str = ""
    """see `key`"""
    file: tuple[int, int] | None = None
    """device and inode of the Unix socket file that was made for it"""

    @property
    def socket(self) -> socket.socket:
        """The only one, or any."""
        return self.sockets[0]

    @property
    def address(self) -> Endpoint:
        """Where it really listens: with the port that the kernel chose for port 0."""
        return of_socket(self.socket)


class Listeners:
    """All listening sockets, by their configured addresses."""

    def __init__(
        self,
        inherited: Iterable[tuple[str, socket.socket]] = (),
    ) -> None:
        self._inherited: dict[int, tuple[str, socket.socket]] = {}
        for name, sock in inherited:
            self._inherited[sock.fileno()] = (name, sock)
        self._free = set(self._inherited)
        self._found: dict[str, list[socket.socket]] = {}
        self._open: dict[int, Listening] = {}
        """by id; without the inherited ones"""

    def inherit(self, name: str, sock: socket.socket) -> None:
        """There is a socket that the service manager passed in."""
        self._inherited[sock.fileno()] = (name, sock)
        self._free.add(sock.fileno())

    def hand_over(self, estate: Estate) -> list[KeptSocket]:
        """Every open socket, for the control plane that replaces this one."""
        kept = [KeptSocket(estate.keep(fd), "", name) for fd, (name, _) in self._inherited.items()]
        for listening in self._open.values():
            kept += (KeptSocket(estate.keep(sock.fileno()), listening.key) for sock in listening.sockets)
        return kept

    def find(self, key: str, sock: socket.socket) -> None:
        """There is a socket of a former control plane."""
        self._found.setdefault(key, []).append(sock)

    def open(self, listener: Listener, owner: str = "", count: int = 1) -> Listening:
        """Bind a listener, or take the inherited or found socket that fits. Raises ListenError.

        `count`: how many sockets are wanted, where the family and the place that they come from can give several.
        """
        inherited = self._find_inherited(listener.endpoint)
        if inherited is not None:
            return self._take(listener, inherited)
        if found := self._found.pop(key(listener, owner), None):
            listening = self._opened(listener, owner, found)
            self.take_on(listening, listener)
            return listening
        if isinstance(listener.endpoint, Inherited):
            have = ", ".join(sorted({f"fd://{name}" for name, _ in self._inherited.values()})) or "none"
            raise ListenError(f"{listener.endpoint}: no such socket was passed in; there are: {have}")
        try:
            sockets = bind_several(listener.endpoint, count, listener.backlog, listener.reuse_port)
        except AddressError as error:
            raise ListenError(str(error)) from error
        except OSError as error:
            raise ListenError(f"{listener.endpoint}: {_explain(error, listener.endpoint)}") from error
        return self._opened(listener, owner, sockets)

    def _opened(self, listener: Listener, owner: str, sockets: list[socket.socket]) -> Listening:
        listening = Listening(listener, sockets, False, key(listener, owner), _file(listener.endpoint))
        self._open[id(listening)] = listening
        return listening

    def forget_found(self) -> None:
        """Close what was found and is not listened on any more, and remove its files."""
        for sockets in self._found.values():
            address = _address(sockets[0])
            for sock in sockets:
                sock.close()
            if isinstance(address, Local) and not address.abstract:
                with contextlib.suppress(OSError):
                    os.unlink(address.path)
        self._found.clear()

    def take_on(self, listening: Listening, listener: Listener) -> None:
        """Go on with the same socket under other settings (name, backlog, rights)."""
        listening.listener = listener
        for sock in listening.sockets:
            if sock.type == socket.SOCK_STREAM:
                sock.listen(listener.backlog)
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
        self._open.pop(id(listening), None)
        for sock in listening.sockets:
            sock.close()
        endpoint = listening.listener.endpoint
        if isinstance(endpoint, Local) and listening.file is not None and _file(endpoint) == listening.file:
            with contextlib.suppress(OSError):
                os.unlink(endpoint.path)

    def close_inherited(self) -> None:
        for _, sock in self._inherited.values():
            sock.close()

    @property
    def unused(self) -> list[str]:
        """Inherited sockets that no listener took, for a warning."""
        return [f"fd://{self._inherited[fd][0]} ({_address(self._inherited[fd][1])})" for fd in sorted(self._free)]

    def _find_inherited(self, endpoint: Endpoint) -> int | None:
        for fd in sorted(self._free):
            name, sock = self._inherited[fd]
            if isinstance(endpoint, Inherited):
                if endpoint.name in (name, str(fd)):
                    return fd
            elif _same(_address(sock), endpoint):
                log.info("%s is inherited from the service manager", endpoint)
                return fd
        return None

    def _take(self, listener: Listener, fd: int) -> Listening:
        sock = self._inherited[fd][1]
        sock.setblocking(False)
        if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(f"{listener.endpoint}: the inherited socket does not listen")
        self._free.discard(fd)
        return Listening(listener, [sock], True)


def _address(sock: socket.socket) -> Endpoint | None:
    """None: of a kind that is not known here."""
    try:
        return of_socket(sock)
    except AddressError:
        return None


def key(listener: Listener, owner: str = "") -> str:
    """Two listeners of the same address, whatever their names, are one socket; but each port 0 is another port."""
    endpoint = listener.endpoint
    own = f" of {owner}/{listener.name}" if isinstance(endpoint, Inet) and endpoint.port == 0 else ""
    return f"{endpoint}{own}"


def _same(bound: Endpoint | None, wanted: Endpoint) -> bool:
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
    if error.errno == errno.EADDRINUSE and isinstance(endpoint, Local) and not endpoint.abstract:
        return "the address is in use by another program, or the file is no socket"
    if error.errno == errno.EADDRINUSE:
        return "the address is in use, by another program or by another listener here"
    if error.errno == errno.EACCES and isinstance(endpoint, Inet) and endpoint.port < 1024:
        return "no right to listen on a port below 1024; run it as root, with CAP_NET_BIND_SERVICE, or by socket activation"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if error.errno == errno.ENOENT:
        return "there is no such directory"
    return error.strerror or str(error)
