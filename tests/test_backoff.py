"""How long a failing backend is left alone: the numbers, and then at work."""

from __future__ import annotations

import asyncio

import pytest

from backends.base import Exit, StartFailed
from gateway import backoff
from gateway.backoff import FIRST, FREE_CRASHES, FREE_ENDS, LONGEST, STEADY, Backoff
from gateway.states import State
from tests.test_activation import SLEEP, SOON, START, Make, stages

stage = pytest.fixture(stages)
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


@pytest.mark.parametrize(("clean", "free"), [(False, FREE_CRASHES), (True, FREE_ENDS)], ids=["crashes", "clean ends"])
def test_quick_ends_that_are_far_apart_do_not_add_up(clean: bool, free: int) -> None:
    backoff = Backoff()
    for number in range(3 * free):
        backoff.ended(NOW + number * (LONGEST + 1), QUICK, clean)
    assert backoff.until == 0.0


def test_the_delays_themselves_do_not_count_as_far_apart() -> None:
    """Ends that follow the longest delay at once are still in a row."""
    backoff = Backoff()
    ends(backoff, FREE_ENDS, clean=True)
    now = NOW
    for _ in range(12):
        backoff.ended(now, QUICK, clean=True)
        delay = backoff.until - now
        now = backoff.until + QUICK
    assert delay == pytest.approx(LONGEST)


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


# At work, in an activation


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST", 0.02)


async def test_after_a_failed_start_the_next_client_waits_and_then_it_recovers(stage: Make, impatient: None) -> None:
    web = stage()
    web.errors["start"] = StartFailed("no such image")
    failing = web.hold("start")
    web.life.wake("the first")
    await web.asked("start")
    web.life.wake("one who is sent away with the first")
    failing.set()
    await web.asked("arm")
    until = web.life.backoff.until
    web.did.clear()
    for source in ("the second", "another meanwhile"):
        web.life.wake(source)
    await web.reach(State.READY)
    assert web.did == START and web.at["start"] >= until > web.at["stop"]
    assert (web.life.last_error, web.life.last_wake, web.life.wakes) == ("", "the second", 2)


async def test_a_good_sleep_forgives_failed_starts(stage: Make, impatient: None) -> None:
    web = stage(SOON)
    web.errors["start"] = StartFailed("no such image")
    web.life.wake("the first")
    await web.asked("arm")
    assert web.life.backoff.failures == 1
    web.life.wake("the second")
    await web.asked("arm", 2)
    assert web.life.backoff.failures == 0


@pytest.mark.parametrize(
    ("exit", "error"), [(Exit(0), ""), (Exit(7), "died: exit status 7"), (Exit(signal=9), "died: killed by signal 9")]
)
async def test_after_its_first_end_the_next_client_starts_it_at_once(stage: Make, exit: Exit, error: str) -> None:
    web = stage()
    await web.begin()
    web.driver.end(exit)
    await web.asked("arm")
    assert web.did == SLEEP and web.states == [State.STARTING, State.READY, State.STOPPED]
    assert (web.life.last_error, web.life.backoff.until) == (error, 0.0)
    web.did.clear()
    await web.begin()


async def test_who_was_served_does_not_start_it_again_after_its_end(stage: Make) -> None:
    web = stage()
    ready = web.hold("ready")
    web.life.wake("the first")
    await web.asked("ready")
    web.life.wake("one while it starts")
    ready.set()
    await web.reach(State.READY)
    web.driver.end(Exit(0))
    await web.asked("arm")
    assert web.did == [*START, *SLEEP]


async def test_one_that_dies_again_and_again_is_left_alone_for_a_while(stage: Make, impatient: None) -> None:
    web = stage()
    for _ in range(FREE_CRASHES + 1):
        await web.begin()
        web.driver.end(Exit(1))
        await web.asked("arm")
        web.did.clear()
    until = web.life.backoff.until
    await web.begin()
    assert web.at["start"] >= until > 0


async def test_stop_ends_the_wait_for_the_next_try(stage: Make) -> None:
    web = stage()
    web.life.backoff.until = asyncio.get_running_loop().time() + 3600
    web.life.wake("somebody")
    retry = web.life._retry
    await web.life.stop("by hand")
    assert retry is not None and retry.cancelled() and web.life.asleep
    web.did.clear()
    web.life.backoff.until = 0.0
    await web.begin()
