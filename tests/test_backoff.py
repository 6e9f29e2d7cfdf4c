"""How long a failing backend is left alone."""

from __future__ import annotations

import pytest

from gateway.backoff import FIRST, FREE_CRASHES, FREE_ENDS, LONGEST, STEADY, Backoff

NOW = 1000.0
QUICK = STEADY - 0.001


def delays(backoff: Backoff, count: int) -> list[float]:
    """What so many failed starts in a row cost."""
    costs = []
    for _ in range(count):
        backoff.failed(NOW)
        costs.append(backoff.until - NOW)
    return costs


def ends(backoff: Backoff, count: int, *, clean: bool, uptime: float = QUICK) -> None:
    for _ in range(count):
        backoff.ended(NOW, uptime, clean)


def test_a_new_one_starts_at_once() -> None:
    assert Backoff().until == 0.0


def test_each_failed_start_doubles_the_delay_up_to_the_longest() -> None:
    assert delays(Backoff(), 10) == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 180.0, 180.0]
    assert (FIRST, LONGEST) == (1.0, 180.0)


def test_a_backend_that_fails_for_years_does_not_overflow() -> None:
    assert set(delays(Backoff(), 2000)[8:]) == {LONGEST}


def test_a_reset_begins_with_the_first_delay_again() -> None:
    backoff = Backoff()
    delays(backoff, 5)
    backoff.reset()
    assert delays(backoff, 2) == [1.0, 2.0]


def test_the_delay_counts_from_the_last_failure() -> None:
    backoff = Backoff()
    backoff.failed(NOW)
    backoff.failed(NOW + 50)
    assert backoff.until == NOW + 50 + 2 * FIRST


@pytest.mark.parametrize(("clean", "free"), [(False, FREE_CRASHES), (True, FREE_ENDS)], ids=["crashes", "clean ends"])
def test_the_first_quick_ends_are_free_and_the_next_ones_are_not(clean: bool, free: int) -> None:
    backoff = Backoff()
    ends(backoff, free, clean=clean)
    assert (backoff.until, backoff.failures) == (0.0, 0)
    ends(backoff, 1, clean=clean)
    assert (backoff.until, backoff.failures) == (NOW + FIRST, 1)
    ends(backoff, 1, clean=clean)
    assert backoff.until == NOW + 2 * FIRST


@pytest.mark.parametrize("clean", [False, True])
def test_an_end_after_a_steady_time_is_not_held_against_it(clean: bool) -> None:
    backoff = Backoff()
    ends(backoff, FREE_ENDS + 3, clean=clean)
    before = backoff.until
    assert before > NOW
    backoff.ended(NOW, STEADY, clean)  # at the boundary: long enough
    assert (backoff.until, backoff.failures, backoff.quick_ends) == (before, 0, 0)


def test_a_crash_just_before_the_steady_time_counts() -> None:
    backoff = Backoff()
    ends(backoff, FREE_CRASHES + 1, clean=False, uptime=QUICK)
    assert backoff.until == NOW + FIRST


def test_a_reset_forgives_quick_ends() -> None:
    backoff = Backoff()
    ends(backoff, FREE_CRASHES, clean=False)
    backoff.reset()
    ends(backoff, FREE_CRASHES, clean=False)
    assert backoff.until == 0.0


def test_failed_starts_and_crashes_add_up() -> None:
    backoff = Backoff()
    delays(backoff, 2)
    ends(backoff, FREE_CRASHES + 1, clean=False)
    assert backoff.until == NOW + 4 * FIRST
