"""When is a backend quiet enough to sleep? Numbers in, a verdict out; nothing here looks at a clock or at the world.

Counterpart: `gateway.activation` collects the signals and acts on the verdict. More signals (sessions, CPU, traffic) join as
fields of `Signals`, each with its own line in `judge`.
"""

from __future__ import annotations

from typing import NamedTuple


class Signals(NamedTuple):
    """What is known of an awake backend. Times are in seconds of one monotonic clock."""

    now: float
    awake_since: float
    quiet_since: float | None
    """when the last connection went; None: there are connections"""
    held_until: float | None = None
    """kept awake by hand until then"""


class Verdict(NamedTuple):
    """Sleep now, or stay awake; `at` is when to look again without being told of a change (None: never)."""

    sleep: bool
    at: float | None
    why: str


def judge(after: float | None, min_uptime: float, signals: Signals) -> Verdict:
    """The idle policy: `after` seconds without a connection (None: never), but not before `min_uptime` seconds awake."""
    if after is None:
        return Verdict(False, None, "idle is never")
    if signals.quiet_since is None:
        return Verdict(False, None, "connections are open")
    deadlines = {
        "idle.after": signals.quiet_since + after,
        "idle.min_uptime": signals.awake_since + min_uptime,
        "held": signals.held_until or 0.0,
    }
    why, at = max(deadlines.items(), key=lambda item: item[1])
    if at <= signals.now:
        return Verdict(True, None, f"quiet for {signals.now - signals.quiet_since:.1f}s")
    return Verdict(False, at, why)
