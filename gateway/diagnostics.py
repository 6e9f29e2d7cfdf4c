"""How many connections do listening sockets have? Asked of the kernel (sock_diag(7)), because for a handed-over socket nobody
else knows. Counterpart: `gateway.handover`. Blocks for milliseconds: call it in a thread.

pyroute2 knows the messages. Its own socket is not used: it makes an event loop for each, and complains on stderr when no
descriptors are left.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from backends.endpoint import Endpoint, Tcp, Unix

# tcp_states.h
ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LISTEN = 1, 3, 4, 5, 8, 10
FINISHED = (FIN_WAIT1, FIN_WAIT2)
"""The server ended its sending: it may still receive, or it has closed the connection and only the kernel is left."""
IN_USE = sum(1 << state for state in (ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT))
"""States in which the server may still have something to do. CLOSE_WAIT: the client ended its sending only."""

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
NLMSG_ERROR, NLMSG_DONE = 2, 3
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr, netlink(7): length, type, flags, sequence number, port
LARGEST = 64 << 10  # bytes of a datagram; the kernel sends half of that at most


def connections(listening: Iterable[Endpoint]) -> int:
    """Connections accepted from these sockets, or waiting in their backlogs. Datagram sockets have none.

    Of vsock the kernel tells nothing here; such a socket counts as unused. Raises OSError.
    """
    ports: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
    names: set[bytes] = set()
    for endpoint in listening:
        if isinstance(endpoint, Tcp):
            family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
            ports[family, endpoint.port].add(endpoint.host.partition("%")[0])
        elif isinstance(endpoint, Unix):
            names.add(os.fsencode(endpoint.sockaddr))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as kernel:
        count = sum(_of_port(kernel, family, port, hosts) for (family, port), hosts in ports.items())
        return count + (_of_names(kernel, names) if names else 0)


def _of_port(kernel: socket.socket, family: int, port: int, hosts: set[str]) -> int:
    """A socket for `::` has IPv4 clients as well; theirs are IPv6 sockets, too."""
    from pyroute2.netlink.diag import inet_diag_msg, inet_diag_req  # takes a fifth of a second: only when it is needed

    request = inet_diag_req()
    request["sdiag_protocol"] = socket.IPPROTO_TCP
    request["idiag_states"] = IN_USE
    request["idiag_sport"] = port
    addresses = None if hosts & {"::", "0.0.0.0"} else {ipaddress.ip_address(host) for host in hosts}
    count = 0
    for found in _dump(kernel, family, request, inet_diag_msg):
        if found["idiag_sport"] != port:
            continue
        if found["idiag_state"] in FINISHED and not found["idiag_inode"]:  # closed: no descriptor refers to it
            continue
        count += addresses is None or ipaddress.ip_address(found["idiag_src"]) in addresses
    return count


def _of_names(kernel: socket.socket, names: set[bytes]) -> int:
    """All Unix sockets are looked at: the kernel does not search by name."""
    from pyroute2.netlink.diag import UDIAG_SHOW_NAME, UDIAG_SHOW_RQLEN, unix_diag_msg, unix_diag_req

    class Message(unix_diag_msg):  # type: ignore[misc]
        """Names as they are: the zero in front of an abstract one belongs to it."""

        nla_map = (("UNIX_DIAG_NAME", "cdata"), *unix_diag_msg.nla_map[1:])

    request = unix_diag_req()
    request["udiag_states"] = 1 << ESTABLISHED | 1 << LISTEN
    request["udiag_show"] = UDIAG_SHOW_NAME | UDIAG_SHOW_RQLEN
    count = 0
    for found in _dump(kernel, socket.AF_UNIX, request, Message):
        name: bytes = found.get_attr("UNIX_DIAG_NAME") or b""
        if (name if name.startswith(b"\0") else name.rstrip(b"\0")) in names:
            # The backlog is the queue of the listening socket.
            waiting = found["udiag_state"] == LISTEN
            count += found.get_attr("UNIX_DIAG_RQLEN")["udiag_rqueue"] if waiting else 1
    return count


def _dump(kernel: socket.socket, family: int, request: Any, kind: Any) -> Iterator[Any]:
    """The answers to a request for all sockets of a family. Raises OSError."""
    request["sdiag_family"] = family
    request["header"]["type"] = SOCK_DIAG_BY_FAMILY
    request["header"]["flags"] = DUMP
    request.encode()
    kernel.send(request.data)
    while True:
        data, offset = kernel.recv(LARGEST), 0
        while offset < len(data):
            length, answer, *_ = HEADER.unpack_from(data, offset)
            if answer == NLMSG_DONE:
                return
            if answer == NLMSG_ERROR:
                number = -struct.unpack_from("=i", data, offset + HEADER.size)[0]
                raise OSError(number, os.strerror(number))
            found = kind(data, offset=offset)
            found.decode()
            yield found
            offset += length + 3 & ~3
