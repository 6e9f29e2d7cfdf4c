"""The idle policy: when a backend may sleep, when to look again, and why not now."""

from __future__ import annotations

import math

import pytest

from gateway.idle import Signals, Verdict, judge

AFTER, UPTIME = 10.0, 60.0


def signals(now: float, quiet_since: float | None = 100.0, held_until: float | None = None) -> Signals:
    """Of a backend that is awake since 100."""
    return Signals(now, 100.0, quiet_since, held_until)


@pytest.mark.parametrize("now", [100.0, 1e9])
def test_without_a_time_it_never_sleeps(now: float) -> None:
    assert judge(None, 0.0, signals(now)) == Verdict(False, None, "idle is never")


@pytest.mark.parametrize("held_until", [None, 50.0, math.inf])
def test_open_connections_keep_it_awake_without_a_next_look(held_until: float | None) -> None:
    """Their end is told, so no timer is needed."""
    verdict = judge(0.0, 0.0, signals(1e9, quiet_since=None, held_until=held_until))
    assert verdict == Verdict(False, None, "connections are open")


@pytest.mark.parametrize(
    ("now", "sleeps"), [(100.0, False), (109.999, False), (110.0, True), (110.001, True), (1e9, True)]
)
def test_it_sleeps_once_it_was_quiet_for_long_enough(now: float, sleeps: bool) -> None:
    verdict = judge(AFTER, 0.0, signals(now))
    assert verdict[:2] == ((True, None) if sleeps else (False, 110.0))


@pytest.mark.parametrize(
    ("now", "sleeps"), [(110.0, False), (159.999, False), (160.0, True)], ids=["quiet", "just before", "at last"]
)
def test_it_is_awake_for_min_uptime_however_quiet(now: float, sleeps: bool) -> None:
    verdict = judge(AFTER, UPTIME, signals(now))
    assert verdict[:2] == ((True, None) if sleeps else (False, 160.0))


@pytest.mark.parametrize(
    ("now", "held_until", "sleeps"),
    [
        (119.999, 120.0, False), (120.0, 120.0, True), (1e9, math.inf, False),
        (110.0, 105.0, True), (110.0, 0.0, True), (109.0, 105.0, False),
    ],
)  # fmt: skip
def test_a_hold_keeps_it_awake_until_it_ends(now: float, held_until: float, sleeps: bool) -> None:
    verdict = judge(AFTER, 0.0, signals(now, held_until=held_until))
    assert verdict[:2] == ((True, None) if sleeps else (False, max(110.0, held_until)))


@pytest.mark.parametrize(
    ("quiet_since", "held_until", "why", "at"),
    [
        (155.0, None, "idle.after", 165.0),
        (140.0, None, "idle.min_uptime", 160.0),
        (140.0, 161.0, "held", 161.0),
        (155.0, 161.0, "idle.after", 165.0),
        (140.0, math.inf, "held", math.inf),
    ],
)
def test_what_ends_last_is_the_reason(quiet_since: float, held_until: float | None, why: str, at: float) -> None:
    assert judge(AFTER, UPTIME, signals(156.0, quiet_since, held_until)) == Verdict(False, at, why)


def test_a_verdict_to_sleep_says_how_long_it_was_quiet() -> None:
    assert judge(AFTER, 0.0, signals(112.26)).why == "quiet for 12.3s"


def test_zero_seconds_sleep_at_once() -> None:
    assert judge(0.0, 0.0, signals(100.0)) == Verdict(True, None, "quiet for 0.0s")
