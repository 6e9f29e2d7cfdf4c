"""The environment of what is started: the gateway's own, without what the service manager told the gateway."""

from __future__ import annotations

import os
from collections.abc import Mapping

PRIVATE = ("INVOCATION_ID", "JOURNAL_STREAM", "MAINPID", "MANAGERPID", "NOTIFY_SOCKET", "SYSTEMD_EXEC_PID")
PRIVATE_PREFIXES = ("LISTEN_", "MEMORY_PRESSURE_", "WATCHDOG_")
BACKEND = "DORMANT_BACKEND"
"""The name of the backend, in the environment of everything that is started for it."""


def inherited(*additions: Mapping[str, str]) -> dict[str, str]:
    """The gateway's environment without what is meant for it alone (systemd.exec(5)), then the additions in order."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(PRIVATE_PREFIXES)}
    for key in PRIVATE:
        environment.pop(key, None)
    for addition in additions:
        environment.update(addition)
    return environment
