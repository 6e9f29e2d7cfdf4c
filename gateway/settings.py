"""The types of a configuration: what the control plane is told, checked and complete, frozen.

Counterpart: `gateway.config` makes these of YAML and is where everybody imports them from. Nothing is parsed or checked
here. Two values are equal when they say the same: a reload compares them to find what changed.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from backends.endpoint import Endpoint
from backends.probe import Readiness
from backends.units import Duration, Size

Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]


def seconds(value: float) -> Any:
    """A default that is a duration."""
    duration = Duration(value)
    return field(default_factory=lambda: duration)


class Delivery(enum.Enum):
    """How a client reaches a backend."""

    RELAY = "relay"
    PASS = "pass"
    ACCEPT = "accept"


class Then(enum.Enum):
    """What an idle policy does with a backend that is quiet for long enough."""

    STOP = "stop"
    FREEZE = "freeze"


class Listener(Struct, frozen=True, gc=False):
    """A socket that Dormant holds for a backend."""

    name: str
    """unique in the backend; what LISTEN_FDNAMES and the keys of `endpoints` say"""
    endpoint: Endpoint
    backlog: int = 4096
    """clients that the kernel keeps until they are accepted; it cuts this to net.core.somaxconn"""
    reuse_port: bool = False


class Idle(Struct, frozen=True, gc=False):
    """When a backend goes to sleep, and how deep."""

    after: Duration | None = seconds(300)
    """without a connection for so long; None: never"""
    min_uptime: Duration = seconds(0)
    """not before it has been ready for so long"""
    then: Then = Then.STOP
    stop_after: Duration | None = None
    """how long it stays frozen before it is stopped; None: for good"""


class Limits(Struct, frozen=True, gc=False):
    """Bounds for the connections of one backend. The name of a field is what the log says when it cuts."""

    connections: Count = 10_000
    pending: Count = 10_000
    """clients that wait for it to start"""
    connect_timeout: Duration = seconds(5)
    """for a connection to its endpoint"""
    idle_timeout: Duration | None = None
    """a connection without a byte in either direction for so long is cut; None: never"""
    flow_timeout: Duration = seconds(30)
    """datagrams of one client are a connection until there was none in either direction for so long"""
    flow_datagrams: Count = 16
    """kept for each client until it is ready"""
    flow_bytes: Size = Size(1 << 20)
    """kept for all clients together"""


class GatewayOptions(Struct, frozen=True):
    """The gateway itself."""

    admin: str = field(default_factory=lambda: default_admin())
    """path of the Unix socket of the admin API"""
    state_directory: str = field(default_factory=lambda: default_state_directory())
    log: Literal["auto", "text", "json"] = "auto"
    """auto: text on a terminal, else JSON"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain: Duration = seconds(30)
    """how long live connections get at the end"""
    workers: Annotated[int, Meta(ge=1, le=256)] | Literal["auto"] = 1
    """processes of the data plane; auto: one for each CPU"""
    orphan_time: Duration = seconds(60)
    """how long workers go on when the control plane has died, until another one takes over"""


class BackendConfig(Struct, frozen=True):
    """One backend."""

    name: str
    driver: str
    options: Struct
    """an instance of the driver's `Options`"""
    listeners: tuple[Listener, ...]
    delivery: Delivery
    endpoints: dict[str, Endpoint]
    """where it is dialled, by listener name; `""`: for every listener that is not named. Empty unless it is relayed to"""
    ready: Readiness
    idle: Idle
    limits: Limits
    start_timeout: Duration
    stop_grace: Duration
    directory: Path
    """the folder of its file, which relative paths start from"""
    origin: str
    """`FILE: backends.NAME`, for messages; does not count in comparisons"""
    digest: str = ""
    """the same for the same text, but for what can be adjusted; does not count in comparisons"""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BackendConfig):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in _COMPARED)

    def __hash__(self) -> int:
        return hash(self.name)


_COMPARED = [name for name in BackendConfig.__struct_fields__ if name not in ("origin", "digest")]


class Config(Struct, frozen=True):
    """A whole configuration."""

    gateway: GatewayOptions
    backends: dict[str, BackendConfig]
    files: tuple[Path, ...]
    """every file that was read, the main one first"""


def default_admin(environment: Mapping[str, str] = os.environ) -> str:
    """Where the admin API listens unless the file says otherwise; a command without a file asks there, too."""
    if os.geteuid() == 0:
        return "/run/dormant/admin.sock"
    return os.path.join(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}", "dormant", "admin.sock")


def default_state_directory(environment: Mapping[str, str] = os.environ) -> str:
    """Where holds are kept unless the file says otherwise. Sources: systemd.exec(5), XDG Base Directory Specification."""
    if given := environment.get("STATE_DIRECTORY"):
        return given.partition(":")[0]
    if os.geteuid() == 0:
        return "/var/lib/dormant"
    home = environment.get("HOME") or os.path.expanduser("~")
    return os.path.join(environment.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state"), "dormant")
