"""What was measured, and what follows from it. Pure: nothing here runs or reads anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """One peer in one round."""

    value: float
    """in the unit of its result; NaN: there is none, see `error`"""
    p50: float = 0.0
    """microseconds; 0: not measured"""
    p99: float = 0.0
    user: float = 0.0
    """microseconds of CPU in the peer's processes for each operation, in user mode"""
    system: float = 0.0
    rss: int = 0
    """bytes, of all processes of the peer"""
    pss: int = 0
    times: tuple[float, ...] = ()
    """milliseconds, where a round is many measurements"""
    error: str = ""


@dataclass
class Result:
    """One scenario: the samples of each peer, round by round."""

    name: str
    """for `--only`: parts from the general to the special, `relay.keepalive.tcp.32`"""
    title: str
    unit: str
    operation: str = ""
    """what the CPU time is for: `request`, `MB`"""
    reference: str = "haproxy"
    """the peer that ratios are against"""
    baseline: str = "direct"
    """what it would be without a relay"""
    less_is_better: bool = False
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """by peer: what the figures do not say, or why there are none"""

    def add(self, peer: str, sample: Sample) -> None:
        self.samples.setdefault(peer, []).append(sample)

    @property
    def peers(self) -> list[str]:
        """In the order of the table: those that were measured, then those that could not be."""
        return list(dict.fromkeys([*self.samples, *self.notes]))

    def median(self, peer: str, what: str = "value") -> float:
        """The median over the rounds; NaN when there is none."""
        values = [getattr(sample, what) for sample in self.samples.get(peer, ())]
        values = [value for value in values if not math.isnan(value)]
        return statistics.median(values) if values else math.nan

    def ratios(self, peer: str, reference: str) -> list[float]:
        """Against another peer in the same round. Rounds in which one of the two failed are left out."""
        pairs = zip(self.samples.get(peer, ()), self.samples.get(reference, ()), strict=False)
        ratios = [mine.value / theirs.value for mine, theirs in pairs if theirs.value]
        return [ratio for ratio in ratios if not math.isnan(ratio)]

    def error(self, peer: str) -> str:
        """The first error, and in how many rounds there was one."""
        errors = [sample.error for sample in self.samples.get(peer, ()) if sample.error]
        if not errors:
            return ""
        return errors[0] if len(errors) == 1 else f"{errors[0]} (and in {len(errors) - 1} more rounds)"

    def added(self, peer: str, ranked: bool) -> tuple[float, float]:
        """Milliseconds that a peer takes longer than the baseline in the same round: p50 and p99 over all rounds.

        Each time minus the baseline's median; `ranked`: the k-th fastest minus the baseline's k-th fastest, for starts
        that have to wait for each other's CPU time.
        """
        differences: list[float] = []
        for mine, alone in zip(self.samples.get(peer, ()), self.samples.get(self.baseline, ()), strict=False):
            if ranked:
                pairs = zip(sorted(mine.times), sorted(alone.times), strict=False)
                differences += [time - own for time, own in pairs]
            elif alone.times:
                own = statistics.median(alone.times)
                differences += [time - own for time in mine.times]
        return percentile(differences, 0.5), percentile(differences, 0.99)


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that so large a part of the values does not exceed; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def selected(name: str, only: Sequence[str]) -> bool:
    """Whether a scenario is asked for: `relay.new` means `relay.new.tcp` and `relay.new.unix`. Nothing means all."""
    return not only or any(f"{name}.".startswith(f"{wanted}.") for wanted in only)
