"""What cannot work between the addresses of a whole configuration: two listeners on one address, connections in a circle.

Counterpart: `gateway.config` asks once, when every backend is read. Nothing is resolved or bound here, so a name is only
the same as itself (`localhost` is known), and what other programs listen on shows when the sockets are bound.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from backends.endpoint import VSOCK_NAMES, Endpoint, Inet, Inherited, Local, Vsock
from gateway.problems import Problems
from gateway.settings import BackendConfig, Delivery, Listener

ANY4, ANY6, ANY_CID = "0.0.0.0", "::", "any"
_BOUND = {"*": (ANY4, ANY6), "::": (ANY4, ANY6), "localhost": ("127.0.0.1", "::1")}
_DIALLED = {"*": ("127.0.0.1", "::1"), "::": ("::1",), "0.0.0.0": ("127.0.0.1",), "localhost": ("127.0.0.1", "::1")}

Claim = tuple[str, str, int]
"""Kind, address, port: what only one socket can have."""


class Door(NamedTuple):
    """A listener and whose it is."""

    backend: BackendConfig
    listener: Listener

    def __str__(self) -> str:
        return f"{self.backend.origin}.listen"

    @property
    def target(self) -> Endpoint | None:
        """Where its connections are relayed to."""
        if self.backend.delivery is not Delivery.RELAY:
            return None
        return self.backend.endpoints.get(self.listener.name) or self.backend.endpoints.get("")


def check(backends: Iterable[BackendConfig], admin: str, problems: Problems) -> None:
    """Add a problem for each clash and each circle."""
    doors = [Door(backend, listener) for backend in backends for listener in backend.listeners]
    held = _check_same(doors, admin, problems)
    _check_wildcards(doors, held, problems)
    _check_circles(doors, held, problems)


def _check_same(doors: list[Door], admin: str, problems: Problems) -> dict[Claim, Door]:
    held: dict[Claim, Door] = {}
    for door in doors:
        for claim in _claims(door.listener.endpoint):
            if claim == ("unix", admin, 0):
                problems.add(
                    str(door), f"{door.listener.endpoint} is the address of gateway.admin; allowed: another one"
                )
            first = held.setdefault(claim, door)
            if first is not door:
                problems.add(
                    str(door),
                    f"{door.listener.endpoint} is already listened on as {first.listener.endpoint} ({first}); "
                    "allowed: an address of its own",
                )
                break
    return held


def _check_wildcards(doors: list[Door], held: dict[Claim, Door], problems: Problems) -> None:
    for door in doors:
        for claim in _claims(door.listener.endpoint):
            wide = held.get(_covering(claim) or claim)
            if wide is None or wide is door or claim in (*_claims(wide.listener.endpoint),):
                continue
            if not (wide.listener.reuse_port and door.listener.reuse_port):
                problems.add(
                    str(door),
                    f"{door.listener.endpoint} is already covered by {wide.listener.endpoint} ({wide}); "
                    "allowed: another port, or no listener for all addresses of this one",
                )
                break


def _check_circles(doors: list[Door], held: dict[Claim, Door], problems: Problems) -> None:
    done: set[int] = set()
    for start in doors:
        path: list[Door] = []
        door: Door | None = start
        while door is not None and id(door) not in done:
            done.add(id(door))
            path.append(door)
            door = _behind(door.target, held)
        if door is None or not any(door is passed for passed in path):
            continue
        circle = path[next(index for index, passed in enumerate(path) if passed is door) :]
        where, target = f"{door.backend.origin}.endpoint", door.target
        if len(circle) == 1:
            problems.add(
                where, f"{target} is its own listener {door.listener.endpoint}; allowed: where the backend listens"
            )
        else:
            names = " -> ".join(passed.backend.name for passed in [*circle, door])
            problems.add(where, f"{target} leads in a circle: {names}; allowed: where the backend listens")


def _behind(target: Endpoint | None, held: dict[Claim, Door]) -> Door | None:
    """The door that a connection to the target comes to."""
    if target is None:
        return None
    for claim in _dialled(target):
        wide = _covering(claim) if _is_here(claim) else None
        door = held.get(claim) or (held.get(wide) if wide else None)
        if door is not None:
            return door
    return None


def _claims(endpoint: Endpoint) -> list[Claim]:
    """What a listener takes for itself."""
    if isinstance(endpoint, Inet):
        if endpoint.port == 0:  # the kernel finds a free one
            return []
        hosts = _BOUND.get(endpoint.host) or (_number(endpoint.host),)
        return [(endpoint.scheme, host, endpoint.port) for host in hosts]
    if isinstance(endpoint, Local):
        # A file is in the way of both kinds of sockets; abstract names are apart.
        return [(endpoint.scheme if endpoint.abstract else "unix", endpoint.path, 0)]
    if isinstance(endpoint, Vsock):
        everywhere = endpoint.cid == VSOCK_NAMES["any"]
        return [("vsock", ANY_CID if everywhere else str(endpoint.cid), endpoint.port)]
    return [("fd", endpoint.name, 0)] if isinstance(endpoint, Inherited) else []


def _dialled(endpoint: Endpoint) -> list[Claim]:
    """What a connection to the endpoint reaches."""
    if isinstance(endpoint, Inet):
        hosts = _DIALLED.get(endpoint.host) or (_number(endpoint.host),)
        return [(endpoint.scheme, host, endpoint.port) for host in hosts]
    return [] if isinstance(endpoint, Inherited) else _claims(endpoint)


def _covering(claim: Claim) -> Claim | None:
    """The claim on all addresses that includes this one."""
    kind, address, port = claim
    if kind == "vsock":
        return (kind, ANY_CID, port)
    if kind not in ("tcp", "udp"):
        return None
    if ":" in address:
        return (kind, ANY6, port)
    return (kind, ANY4, port) if address.replace(".", "").isdigit() else None


def _is_here(claim: Claim) -> bool:
    kind, address, _ = claim
    return address == "::1" or address.startswith("127.") or (kind == "vsock" and address == str(VSOCK_NAMES["local"]))


@lru_cache(maxsize=1024)
def _number(host: str) -> str:
    """One spelling for each address; names as they are."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
