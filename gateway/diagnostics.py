"""How many connections do listening sockets have? Asked of the kernel (sock_diag(7)), because for a handed-over socket nobody
else knows. Counterpart: `gateway.handover`. Blocks for milliseconds: call it in a thread.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

from backends.endpoint import Endpoint, Tcp, Unix

# tcp_states.h
ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT = 1, 3, 4, 5, 8
FINISHED = (FIN_WAIT1, FIN_WAIT2)
"""The server ended its sending: it may still receive, or it has closed the connection and only the kernel is left."""
IN_USE = sum(1 << state for state in (ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT))
"""States in which the server may still have something to do. CLOSE_WAIT: the client ended its sending only."""


def connections(listening: Iterable[Endpoint]) -> int:
    """Connections accepted from these sockets, or waiting in their backlogs. Datagram sockets have none.

    Of vsock the kernel tells nothing here; such a socket counts as unused. Raises OSError.
    """
    # Takes a fifth of a second: only when a handed-over socket is in use.
    from pyroute2 import DiagSocket
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with DiagSocket() as diagnostics:
            return _count(diagnostics, listening)
    except NetlinkError as error:
        raise OSError(error.code, str(error)) from error


def _count(diagnostics: Any, listening: Iterable[Endpoint]) -> int:
    count = 0
    for endpoint in listening:
        if isinstance(endpoint, Tcp):
            count += sum(
                _accepted_from(endpoint, found)
                for family in (socket.AF_INET, socket.AF_INET6)
                for found in diagnostics.get_sock_stats(family=family, states=IN_USE, sport=endpoint.port)
            )
        elif isinstance(endpoint, Unix):
            found_unix = diagnostics.get_sock_stats(family=socket.AF_UNIX, states=1 << ESTABLISHED)
            count += sum(_name(found) == endpoint.sockaddr for found in found_unix)
    return count


def _accepted_from(endpoint: Tcp, found: Any) -> bool:
    if found["idiag_sport"] != endpoint.port:
        return False
    if found["idiag_state"] in FINISHED and not found["idiag_inode"]:  # closed: no descriptor refers to it
        return False
    if endpoint.host in ("*", "::", "0.0.0.0"):
        return True
    local = ipaddress.ip_address(found["idiag_src"])
    mapped = getattr(local, "ipv4_mapped", None)
    return (mapped or local) == ipaddress.ip_address(endpoint.host.partition("%")[0])


def _name(found: Any) -> str:
    name = found.get_attr("UNIX_DIAG_NAME") or ""
    text = name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)
    return text if text.startswith("\0") else text.rstrip("\0")
