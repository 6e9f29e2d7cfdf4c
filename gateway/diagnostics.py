"""How many connections do listening sockets have? Asked of the kernel (sock_diag(7)), because for a handed-over socket nobody
else knows. Counterpart: `gateway.handover`. Blocks for milliseconds: call it in a thread.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

from backends.endpoint import Endpoint, Tcp, Unix

ESTABLISHED, SYN_RECV, CLOSE_WAIT = 1, 3, 8
IN_USE = 1 << ESTABLISHED | 1 << SYN_RECV | 1 << CLOSE_WAIT
"""States (tcp_states.h) in which the server still has something to do. CLOSE_WAIT: the client ended its sending only."""


def connections(listening: Iterable[Endpoint]) -> int:
    """Connections accepted from these sockets, or waiting in their backlogs. Datagram sockets have none.

    Of vsock the kernel tells nothing here; such a socket counts as unused.
    """
    from pyroute2 import DiagSocket  # takes a fifth of a second: only when a handed-over socket is in use

    count = 0
    with DiagSocket() as diagnostics:
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
    if endpoint.host in ("*", "::", "0.0.0.0"):
        return True
    local = ipaddress.ip_address(found["idiag_src"])
    mapped = getattr(local, "ipv4_mapped", None)
    return (mapped or local) == ipaddress.ip_address(endpoint.host.partition("%")[0])


def _name(found: Any) -> str:
    name = found.get_attr("UNIX_DIAG_NAME") or ""
    text = name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)
    return text if text.startswith("\0") else text.rstrip("\0")
