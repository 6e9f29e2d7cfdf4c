"""The service manager's protocols: sockets passed in (sd_listen_fds(3)), state told (sd_notify(3), sd_watchdog_enabled(3)).

Counterpart: systemd, or whatever speaks as it does. Without one, all of this does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

FIRST_FD = 3  # SD_LISTEN_FDS_START


def inherited_sockets(environment: MutableMapping[str, str] = os.environ) -> list[tuple[str, socket.socket]]:
    """The sockets that were passed to this process, with their names. The variables are removed: children must not see them.

    Descriptors that are no sockets are left alone.
    """
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    environment.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = []
    for index in range(int(count)):
        fd = FIRST_FD + index
        name = names[index] if index < len(names) and names[index] else "unknown"
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            found.append((name, socket.socket(fileno=fd)))
    return found


class Notifier:
    """Tells the service manager how it goes. Never waits, never fails: nobody may be listening."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        self.environment = {name: environment.pop(name) for name in names if name in environment}
        """what it was told, for the program that replaces this one"""
        address = self.environment.get("NOTIFY_SOCKET", "")
        interval = self.environment.get("WATCHDOG_USEC", "")
        watched = self.environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog = int(interval) / 1_000_000 / 2 if interval.isdigit() and watched and address else 0.0
        # One for all messages: the watchdog is fed also when no descriptors are left.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if address else None
        self._timer: asyncio.TimerHandle | None = None

    def ready(self) -> None:
        """The sockets listen. Starts answering the watchdog, from the event loop, so that a stuck loop is noticed."""
        self._tell("READY=1")
        if self._watchdog and self._timer is None:
            self._feed()

    def reloading(self) -> None:
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    def status(self, text: str) -> None:
        self._tell(f"STATUS={text}")

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._socket.close()

    def _feed(self) -> None:
        self._tell("WATCHDOG=1")
        self._timer = asyncio.get_running_loop().call_later(self._watchdog, self._feed)

    def _tell(self, text: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(text.encode(), self._address)
