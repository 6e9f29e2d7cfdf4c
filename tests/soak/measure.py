"""Memory and descriptors of each role over time; what is said of them at the end.

Source: proc(5), and the page of smaps_rollup in the kernel's documentation.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.running import Gateway, children, descriptors

KIB_MORE, PART_MORE, FDS_MORE = 3 << 10, 0.10, 10
"""What the last quarter may use more than the second one: the larger of both for memory."""
ROLES = ("control plane", "nursery", "workers")


@dataclass(frozen=True)
class Use:
    pss: float  # KiB; the shared pages of a process are divided among those who share them
    fds: float


@dataclass
class Measures:
    """Of the workers: the mean of those that accept."""

    samples: list[tuple[float, dict[str, Use]]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)

    def take(self, gateway: Gateway) -> None:
        self.status = gateway.ask("GET", "/v1/status")
        workers = [use for pid in self.status["workers"] if (use := used(pid))]
        found = {
            "control plane": used(gateway.pid),
            "nursery": next((use for pid in children(gateway.pid) if is_nursery(pid) and (use := used(pid))), None),
            "workers": Use(statistics.mean(w.pss for w in workers), statistics.mean(w.fds for w in workers))
            if workers
            else None,
        }
        self.samples.append((time.monotonic(), {role: use for role, use in found.items() if use}))

    def between(self, role: str, begin: float, end: float) -> Use | None:
        """The median of the samples in a part of the time; 0.25 is a quarter."""
        first, last = self.samples[0][0], self.samples[-1][0]
        uses = [
            sample[role]
            for when, sample in self.samples
            if role in sample and begin <= (when - first) / (last - first or 1) <= end
        ]
        if not uses:
            return None
        return Use(statistics.median(use.pss for use in uses), statistics.median(use.fds for use in uses))

    def at(self, role: str, part: float) -> Use | None:
        first, last = self.samples[0][0], self.samples[-1][0]
        wanted = first + part * (last - first)
        having = [(abs(when - wanted), sample[role]) for when, sample in self.samples if role in sample]
        return min(having, key=lambda pair: pair[0])[1] if having else None

    def growth(self) -> list[str]:
        found = []
        for role in ROLES:
            then, now = self.between(role, 0.25, 0.5), self.between(role, 0.75, 1)
            if then is None or now is None:
                found.append(f"{role}: no samples")
                continue
            if now.fds > then.fds + FDS_MORE:
                found.append(f"{role}: descriptors grew from {then.fds:g} to {now.fds:g}")
            if now.pss > then.pss + max(KIB_MORE, PART_MORE * then.pss):
                found.append(f"{role}: memory grew from {then.pss:.0f} to {now.pss:.0f} KiB")
        return found


def used(pid: int) -> Use | None:
    """None: it is gone."""
    with contextlib.suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        pss = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
        return Use(pss, descriptors(pid)) if pss else None
    return None


def is_nursery(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"nursery.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
