"""What went wrong, and what may: connections that a disturbance had in its hands."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field

MARGIN = 0.1
"""Seconds after a SIGKILL in which its victim may still have accepted somebody."""

AT_ONCE = 3.0
"""Seconds in which a client notices that it was cut, also one that reads slowly."""


@dataclass
class Cut:
    """Connections that began before its end and failed after its begin may be lost."""

    what: str
    backend: str | None = None  # None: any
    begin: float = field(default_factory=time.monotonic)
    end: float = math.inf

    def over(self, margin: float = 0) -> None:
        self.end = time.monotonic() + margin


@dataclass
class Record:
    """Counts of everything, and the failures."""

    begun: float = field(default_factory=time.monotonic)
    traffic: Counter[str] = field(default_factory=Counter)
    disturbances: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)

    def cut(self, what: str, backend: str | None = None) -> Cut:
        # Nobody's connection is older than a minute.
        self.cuts = [cut for cut in self.cuts if time.monotonic() - cut.end < 60]
        self.cuts.append(Cut(what, backend))
        return self.cuts[-1]

    def fail(self, text: str) -> None:
        self.failures.append(f"{time.monotonic() - self.begun:.1f} s: {text}")

    def lost(self, kind: str, backend: str, began: float, error: BaseException, patience: float = AT_ONCE) -> None:
        """A client was not served. Who is cut notices within `patience`; who was left waiting has no excuse."""
        now = time.monotonic()
        for cut in self.cuts:
            if cut.backend in (None, backend) and began <= cut.end and now <= cut.end + patience:
                self.excused[cut.what if began <= cut.begin else f"{cut.what} a moment before"] += 1
                return
        self.fail(f"a client ({kind}) of {backend} was not served, {now - began:.3f} s after it began: {error!r}")
