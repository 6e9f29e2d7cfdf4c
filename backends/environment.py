"""What a started program finds: the gateway's own environment, without what the service manager told the gateway, and the
limit of open files that the gateway was started with.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping

NOFILE_VARIABLE = "DORMANT_NOFILE"
"""NOFILE, in the environment of a control plane that replaces another one and inherits the limit that that one raised."""
PRIVATE = ("INVOCATION_ID", "JOURNAL_STREAM", "MAINPID", "MANAGERPID", "NOTIFY_SOCKET", "SYSTEMD_EXEC_PID")
PRIVATE_PREFIXES = ("LISTEN_", "MEMORY_PRESSURE_", "WATCHDOG_", NOFILE_VARIABLE)
BACKEND = "DORMANT_BACKEND"
"""The name of the backend, in the environment of everything that is started for it."""
NOFILE = int(os.environ.get(NOFILE_VARIABLE) or resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""The soft limit of open files before the gateway raised its own: programs that use select(2), or that close every descriptor
that there may be, do not bear the highest one."""


def inherited(*additions: Mapping[str, str]) -> dict[str, str]:
    """The gateway's environment without what is meant for it alone (systemd.exec(5)), then the additions in order."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(PRIVATE_PREFIXES)}
    for key in PRIVATE:
        environment.pop(key, None)
    for addition in additions:
        environment.update(addition)
    return environment
