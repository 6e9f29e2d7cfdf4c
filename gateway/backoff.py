"""How long to leave a failing backend alone. Pure: times go in and come out.

Counterpart: `gateway.activation` tells it what happened and asks `until` before it starts anything.
"""

from __future__ import annotations

from gateway.upgrade import KeptBackoff

FIRST = 1.0  # seconds
LONGEST = 180.0
STEADY = 10.0
"""Seconds of uptime after which an end is no longer held against the backend."""
FREE_CRASHES = 1
FREE_ENDS = 20
"""So many quick ends in a row cost nothing: one crash is repaired at once, and a program that serves a client and exits
with 0 is meant that way; but one that never takes its client must not be spun."""


class Backoff:
    __slots__ = ("_last_end", "failures", "quick_ends", "until")

    def __init__(self) -> None:
        self.until = 0.0
        """no start before this time"""
        self._last_end = 0.0
        self.reset()

    def hand_over(self, now: float) -> KeptBackoff:
        """What `take_over` needs in the next control plane."""
        return KeptBackoff(max(0.0, self.until - now), self.failures, self.quick_ends, now - self._last_end)

    def take_over(self, kept: KeptBackoff, now: float) -> None:
        self.until = now + kept.wait if kept.wait else 0.0
        self.failures, self.quick_ends = kept.failures, kept.quick_ends
        self._last_end = now - kept.ended_for

    def reset(self) -> None:
        """It slept as it should, or was stopped by hand."""
        self.failures = 0
        self.quick_ends = 0

    def failed(self, now: float) -> None:
        """A start failed."""
        self.until = now + min(FIRST * 2 ** min(self.failures, 20), LONGEST)
        self.failures += 1

    def ended(self, now: float, uptime: float, clean: bool) -> None:
        """It ended by itself after `uptime` seconds; `clean`: with exit status 0."""
        if uptime >= STEADY:
            self.reset()
            return
        if now - max(self._last_end, self.until) > LONGEST:  # it could have been started since: not in a row
            self.quick_ends = 0
        self._last_end = now
        self.quick_ends += 1
        if self.quick_ends > (FREE_ENDS if clean else FREE_CRASHES):
            self.failed(now)
