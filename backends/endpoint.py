"""Socket addresses: one grammar for what Dormant listens on and for what it dials.

    tcp://HOST:PORT  udp://HOST:PORT  unix:PATH  unix:@NAME  unixgram:PATH
    vsock://CID:PORT  vsock-mux:PATH:PORT  fd://NAME

An address is parsed once, into a frozen value that prints itself again; `bind` makes a listening socket of it, `resolve`
turns names into numbers, `sockaddr` is what connect(2) takes. Counterpart: `gateway.listeners` keeps the bound sockets and
inherited ones (`fd://`), the data plane dials. This module opens no connection but one: to ask whether anybody still
listens behind a Unix socket file that is in the way.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import socket
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl

FORMS = "tcp://HOST:PORT, udp://HOST:PORT, unix:PATH, unix:@NAME, unixgram:PATH, vsock://CID:PORT, vsock-mux:PATH:PORT, fd://NAME"
LONGEST = 1024  # characters of an address; the longest part of one is a host name or a path
VSOCK_NAMES = {"any": 0xFFFFFFFF, "hypervisor": 0, "local": 1, "host": 2}
UNIX_PATH_MAX = 107  # sun_path holds 108 bytes with the closing NUL, unix(7)

DATAGRAM_BUFFER = 4 << 20
"""Bytes asked for, within net.core.rmem_max: the kernel drops the datagrams for which there is no room while nobody reads.
The default is full with 256 small ones."""


class AddressError(ValueError):
    """An address that cannot be understood or used; the message says what was found and what is allowed."""


@dataclass(frozen=True, slots=True)
class Inet:
    """A host and a port. `*` (and `::`) listens on IPv6 and IPv4 alike."""

    scheme: ClassVar[str]
    type: ClassVar[socket.SocketKind]

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host or self.host == "*" else socket.AF_INET

    @property
    def sockaddr(self) -> Any:
        """What bind(2) and connect(2) take; the host must be a number, see `resolve`."""
        if self.family == socket.AF_INET:
            return (self.host, self.port)
        host, _, zone = self.host.partition("%")
        scope = 0
        if zone:
            scope = int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
        return ("::" if host == "*" else host, self.port, 0, scope)


class Tcp(Inet):
    __slots__ = ()
    scheme = "tcp"
    type = socket.SOCK_STREAM


class Udp(Inet):
    __slots__ = ()
    scheme = "udp"
    type = socket.SOCK_DGRAM


@dataclass(frozen=True, slots=True)
class Local:
    """A Unix socket: a path, or `@NAME` in the abstract namespace. Mode and owner are for the one who listens."""

    scheme: ClassVar[str]
    type: ClassVar[socket.SocketKind]
    family: ClassVar[socket.AddressFamily] = socket.AF_UNIX

    path: str
    mode: int | None = None
    owner: str | None = None
    group: str | None = None

    def __str__(self) -> str:
        return f"{self.scheme}:{self.path}"

    @property
    def abstract(self) -> bool:
        return self.path.startswith("@")

    @property
    def sockaddr(self) -> str:
        return "\0" + self.path[1:] if self.abstract else self.path


class Unix(Local):
    __slots__ = ()
    scheme = "unix"
    type = socket.SOCK_STREAM


class Unixgram(Local):
    __slots__ = ()
    scheme = "unixgram"
    type = socket.SOCK_DGRAM


@dataclass(frozen=True, slots=True)
class Vsock:
    """A port of a virtual machine or of its host, vsock(7). `guest` stands for the CID of the backend's own machine."""

    type: ClassVar[socket.SocketKind] = socket.SOCK_STREAM

    cid: int | str
    port: int

    def __str__(self) -> str:
        names = {number: name for name, number in VSOCK_NAMES.items()}
        cid = self.cid if isinstance(self.cid, str) else names.get(self.cid, self.cid)
        return f"vsock://{cid}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_VSOCK

    @property
    def sockaddr(self) -> tuple[int, int]:
        if isinstance(self.cid, str):
            raise AddressError(f"{self}: only the driver of the backend knows this CID")
        return (self.cid, self.port)


@dataclass(frozen=True, slots=True)
class VsockMux:
    """A port of a guest behind the Unix socket of its VMM: `CONNECT port`, as Firecracker and Cloud Hypervisor speak it."""

    type: ClassVar[socket.SocketKind] = socket.SOCK_STREAM
    family: ClassVar[socket.AddressFamily] = socket.AF_UNIX

    path: str
    port: int

    def __str__(self) -> str:
        return f"vsock-mux:{self.path}:{self.port}"

    @property
    def sockaddr(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class Inherited:
    """A socket that the service manager passed in, by its name (`LISTEN_FDNAMES`) or its number."""

    name: str

    def __str__(self) -> str:
        return f"fd://{self.name}"


Endpoint = Tcp | Udp | Unix | Unixgram | Vsock | VsockMux | Inherited


def is_datagram(endpoint: Endpoint) -> bool:
    """Whether datagrams go there. Of an inherited socket that is not known."""
    return isinstance(endpoint, (Udp, Unixgram))


def parse(text: str, directory: Path | None = None) -> Endpoint:
    """Parse one address; relative paths of Unix sockets are relative to `directory`. Raises AddressError."""
    if len(text) > LONGEST:
        raise AddressError(f"{text[:40]!r}... is too long for an address; allowed: {FORMS}")
    match = re.match(r"(tcp|udp|vsock|fd)://|(unix|unixgram|vsock-mux):", text)
    if match is None:
        raise AddressError(f"{text!r} is not an address; allowed: {FORMS}")
    scheme, rest = match.group(0).rstrip(":/"), text[match.end() :]
    if scheme in ("tcp", "udp"):
        host, port = _host_port(text, rest)
        return Tcp(host, port) if scheme == "tcp" else Udp(host, port)
    if scheme == "vsock":
        return _vsock(text, rest)
    if scheme == "vsock-mux":
        path, _, port_text = rest.rpartition(":")
        if not path:
            raise AddressError(f"{text!r}: expected vsock-mux:PATH:PORT")
        return VsockMux(_path(text, path, directory), _number(text, port_text, "port", 0xFFFFFFFF))
    if scheme == "fd":
        if not rest:
            raise AddressError(f"{text!r}: expected fd://NAME, the name of an inherited socket")
        return Inherited(rest)
    return _local(text, scheme, rest, directory)


def _host_port(text: str, rest: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+(?:%[\w.-]+)?)\]|([^\[\]:/?#\s]+)):([0-9]+)", rest)
    if match is None:
        hint = "; an IPv6 address goes in brackets, as in tcp://[::1]:80" if rest.count(":") > 1 else ""
        raise AddressError(f"{text!r}: expected HOST:PORT{hint}")
    host = match[1] or match[2]
    if match[1]:
        try:
            socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        except OSError:
            raise AddressError(f"{text!r}: {host!r} is not an IPv6 address") from None
    elif any(not 0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        raise AddressError(f"{text!r}: {host!r} is not a host name or an address")
    return host, _number(text, match[3], "port", 65535)


def _vsock(text: str, rest: str) -> Vsock:
    cid_text, colon, port_text = rest.rpartition(":")
    port = _number(text, port_text, "port", 0xFFFFFFFF)
    if colon and cid_text == "guest":
        return Vsock("guest", port)
    if cid_text in VSOCK_NAMES:
        return Vsock(VSOCK_NAMES[cid_text], port)
    if not re.fullmatch("[0-9]+", cid_text):
        raise AddressError(f"{text!r}: {cid_text!r} is not a CID; allowed: any, host, local, guest or a number")
    return Vsock(_number(text, cid_text, "CID", 0xFFFFFFFF), port)


def _local(text: str, scheme: str, rest: str, directory: Path | None) -> Unix | Unixgram:
    path, _, query = rest.partition("?")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key == "mode":
            if not re.fullmatch(r"[0-7]{3,4}", value):
                raise AddressError(f"{text!r}: mode {value!r} is not an octal file mode such as 0660")
            options[key] = int(value, 8)
        elif key in ("owner", "group"):
            options[key] = value
        else:
            raise AddressError(f"{text!r}: unknown option {key!r}; allowed: mode, owner, group")
    if not path.startswith("@"):
        path = _path(text, path, directory)
        if "?" in path:  # it came with the directory; printed, the address would not be the same
            raise AddressError(f"{text!r}: {path} has a '?', where options begin; allowed: a directory without one")
    elif not 1 < len(os.fsencode(path)) <= UNIX_PATH_MAX:
        raise AddressError(f"{text!r}: an abstract name has 1 to {UNIX_PATH_MAX - 1} bytes")
    elif options:
        raise AddressError(f"{text!r}: an abstract name has no {', '.join(options)}; allowed: only with a path")
    return (Unix if scheme == "unix" else Unixgram)(path, **options)


def _path(text: str, path: str, directory: Path | None) -> str:
    if not path or "\0" in path:
        raise AddressError(f"{text!r}: expected a path")
    full = os.path.normpath(os.path.join(directory or "", os.path.expanduser(path)))
    full = re.sub("^/+", "/", full)
    if len(os.fsencode(full)) > UNIX_PATH_MAX:
        raise AddressError(f"{text!r}: {full} is longer than the {UNIX_PATH_MAX} bytes that the kernel takes")
    return full


def _number(text: str, digits: str, what: str, highest: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", digits) or int(digits) > highest:
        raise AddressError(f"{text!r}: {digits!r} is not a {what}; allowed: 0 to {highest}")
    return int(digits)


def resolve(endpoint: Endpoint) -> list[Endpoint]:
    """The numeric forms of an endpoint, in the order in which the resolver prefers them.

    Blocks on the resolver for names: call it in a thread. Raises AddressError when the name does not resolve.
    """
    if not isinstance(endpoint, Inet):
        return [endpoint]
    if endpoint.host == "*":
        return [replace(endpoint, host="127.0.0.1"), replace(endpoint, host="::1")]
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=endpoint.type)
    except (OSError, UnicodeError) as error:  # the latter: a name that IDNA does not take
        raise AddressError(f"{endpoint}: {getattr(error, 'strerror', None) or error}") from error
    hosts = dict.fromkeys(_numeric_host(sockaddr) for *_, sockaddr in found)
    return [replace(endpoint, host=host) for host in hosts]


def _numeric_host(sockaddr: Any) -> str:
    host = str(sockaddr[0])
    if len(sockaddr) == 4 and sockaddr[3] and "%" not in host:
        host += f"%{sockaddr[3]}"
    return host


def of_socket(sock: socket.socket) -> Endpoint:
    """The address that a socket is bound to. Raises AddressError for a family that Dormant does not know."""
    if sock.type not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        raise AddressError(f"inherited socket {sock.fileno()}: type {sock.type!r} is not supported")
    name = sock.getsockname()
    stream = sock.type == socket.SOCK_STREAM
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        host = _numeric_host(name)
        return Tcp(host, name[1]) if stream else Udp(host, name[1])
    if sock.family == socket.AF_UNIX:
        text = os.fsdecode(name)
        path = "@" + text[1:] if text.startswith("\0") else text
        return Unix(path) if stream else Unixgram(path)
    if sock.family == socket.AF_VSOCK:
        return Vsock(name[0], name[1])
    raise AddressError(f"inherited socket {sock.fileno()}: family {sock.family!r} is not supported")


def bind(endpoint: Endpoint, backlog: int = 4096, reuse_port: bool = False) -> socket.socket:
    """A non-blocking socket bound to the endpoint, listening if it is a stream.

    A Unix socket file in the way is replaced when nobody listens behind it. TCP_NODELAY is set here, because accepted
    sockets inherit it on Linux. Raises OSError (in use, no right) or AddressError.
    """
    if isinstance(endpoint, (Inherited, VsockMux)):
        raise AddressError(f"{endpoint} cannot be bound")
    family, address = endpoint.family, endpoint.sockaddr
    if isinstance(endpoint, Inet) and endpoint.host == "*" and not _has_ipv6():
        family, address = socket.AF_INET, ("0.0.0.0", endpoint.port)
    sock = socket.socket(family, endpoint.type | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if isinstance(endpoint, Inet):
            _tune_inet(sock, endpoint, reuse_port)
        if isinstance(endpoint, Local):
            _bind_local(sock, endpoint)
        else:
            sock.bind(address)
        if endpoint.type == socket.SOCK_STREAM:
            sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_several(endpoint: Endpoint, count: int, backlog: int = 4096, reuse_port: bool = False) -> list[socket.socket]:
    """`count` sockets at one address, among which the kernel spreads the clients (SO_REUSEPORT in socket(7)).

    One where the family has no such thing. Raises as `bind` does.
    """
    first = bind(endpoint, backlog, reuse_port)
    sockets = [first]
    if count == 1 or not isinstance(endpoint, Inet):
        return sockets
    try:
        # Only now: bound with it, the first one would not notice that another program of this user has the address.
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        same = replace(endpoint, port=first.getsockname()[1])
        while len(sockets) < count:
            sockets.append(bind(same, backlog, True))
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _has_ipv6() -> bool:
    return os.path.exists("/proc/net/if_inet6")


def _tune_inet(sock: socket.socket, endpoint: Inet, reuse_port: bool) -> None:
    if endpoint.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DATAGRAM_BUFFER)
    if reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, endpoint.host not in ("*", "::"))


def _bind_local(sock: socket.socket, endpoint: Local) -> None:
    try:
        sock.bind(endpoint.sockaddr)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or endpoint.abstract or not _is_stale(endpoint):
            raise
        os.unlink(endpoint.path)
        sock.bind(endpoint.sockaddr)
    if endpoint.abstract:
        return
    # Nobody can connect before listen(), so there is no moment with the wrong rights.
    try:
        set_rights(endpoint)
    except BaseException:
        os.unlink(endpoint.path)
        raise


def set_rights(endpoint: Local) -> None:
    """Give the socket file the mode, owner and group that the endpoint asks for. Raises OSError or AddressError."""
    if endpoint.mode is not None:
        os.chmod(endpoint.path, endpoint.mode)
    if endpoint.owner is not None or endpoint.group is not None:
        os.chown(endpoint.path, _uid(endpoint), _gid(endpoint))


def _is_stale(endpoint: Local) -> bool:
    """Whether the file is a socket behind which nobody listens any more."""
    if not stat.S_ISSOCK(os.lstat(endpoint.path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, endpoint.type | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(endpoint.path) == errno.ECONNREFUSED


def _uid(endpoint: Local) -> int:
    if endpoint.owner is None or endpoint.owner.isdigit():
        return int(endpoint.owner or -1)
    try:
        return pwd.getpwnam(endpoint.owner).pw_uid
    except KeyError:
        raise AddressError(f"{endpoint}: there is no user {endpoint.owner!r}") from None


def _gid(endpoint: Local) -> int:
    if endpoint.group is None or endpoint.group.isdigit():
        return int(endpoint.group or -1)
    try:
        return grp.getgrnam(endpoint.group).gr_gid
    except KeyError:
        raise AddressError(f"{endpoint}: there is no group {endpoint.group!r}") from None
