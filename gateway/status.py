"""What is told about the gateway and its backends: by the admin API as JSON, by `dormant status` for people."""

from __future__ import annotations

import msgspec


class BackendStatus(msgspec.Struct, frozen=True, omit_defaults=False):
    """One backend, now. Times are seconds, sizes are bytes; null: not known, or it does not apply."""

    name: str
    driver: str
    delivery: str
    state: str
    since: float
    """how long it has been in this state"""
    listeners: dict[str, str]
    endpoints: dict[str, str]
    """where it is dialled; empty while it sleeps"""
    connections: int
    waiting: int
    """clients that wait for it to start"""
    total: int
    """connections since the gateway started"""
    received: int
    sent: int
    refused: int
    """clients that a limit turned away"""
    dropped: int
    """datagrams that were not delivered"""
    wakes: int
    last_wake: str
    start_took: float
    ready_took: float
    sleeps_in: float | None
    held_for: float | None
    """-1: until released"""
    memory: int | None
    cpu: float | None
    last_error: str
    retry_in: float | None
    """a failed start is not tried again before"""


class GatewayStatus(msgspec.Struct, frozen=True):
    """The gateway itself."""

    version: str
    pid: int
    workers: list[int]
    started: float
    """CLOCK_MONOTONIC, seconds: another one after an upgrade"""
    uptime: float
    asleep: int
    awake: int
    backends: list[BackendStatus]


class StateChange(msgspec.Struct, frozen=True):
    """A line of `/v1/events`."""

    backend: str
    state: str
    last_wake: str
    last_error: str
