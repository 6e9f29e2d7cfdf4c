"""The idle policy: when a backend may sleep, when to look again, and why not now; by itself, and at work."""

from __future__ import annotations

import asyncio
import math

import msgspec
import pytest

from backends.base import Capability, Exit
from backends.units import Duration
from gateway.config import Idle, Then
from gateway.idle import Signals, Verdict, judge
from gateway.states import State
from tests.test_activation import AFTER, FREEZE, SLEEP, SOON, START, Make, let_time_pass, stages

stage = pytest.fixture(stages)
QUIET, UPTIME = 10.0, 60.0


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
    verdict = judge(QUIET, 0.0, signals(now))
    assert verdict[:2] == ((True, None) if sleeps else (False, 110.0))


@pytest.mark.parametrize(
    ("now", "sleeps"), [(110.0, False), (159.999, False), (160.0, True)], ids=["quiet", "just before", "at last"]
)
def test_it_is_awake_for_min_uptime_however_quiet(now: float, sleeps: bool) -> None:
    verdict = judge(QUIET, UPTIME, signals(now))
    assert verdict[:2] == ((True, None) if sleeps else (False, 160.0))


@pytest.mark.parametrize(
    ("now", "held_until", "sleeps"),
    [
        (119.999, 120.0, False), (120.0, 120.0, True), (1e9, math.inf, False),
        (110.0, 105.0, True), (110.0, 0.0, True), (109.0, 105.0, False),
    ],
)  # fmt: skip
def test_a_hold_keeps_it_awake_until_it_ends(now: float, held_until: float, sleeps: bool) -> None:
    verdict = judge(QUIET, 0.0, signals(now, held_until=held_until))
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
    assert judge(QUIET, UPTIME, signals(156.0, quiet_since, held_until)) == Verdict(False, at, why)


def test_a_verdict_to_sleep_says_how_long_it_was_quiet() -> None:
    assert judge(QUIET, 0.0, signals(112.26)).why == "quiet for 12.3s"


def test_zero_seconds_sleep_at_once() -> None:
    assert judge(0.0, 0.0, signals(100.0)) == Verdict(True, None, "quiet for 0.0s")


# At work, in an activation


async def test_connections_keep_it_awake_and_their_end_arms_the_deadline(stage: Make) -> None:
    web = stage(SOON)
    await web.begin()
    web.life.busy()
    await let_time_pass(stage)
    assert web.did == [] and web.life.sleeps_at is None
    now = asyncio.get_running_loop().time()
    web.life.quiet(now)
    assert web.life.sleeps_at == now + AFTER
    await web.asked("arm")
    assert web.did == SLEEP and web.at["close"] >= now + AFTER


@pytest.mark.parametrize("stays", [False, True])
async def test_a_client_that_comes_between_close_and_stop_reopens_the_gate(stage: Make, stays: bool) -> None:
    web = stage(SOON)
    closed = web.hold("close")
    web.left = [1]
    await web.begin()
    await web.asked("close")
    if stays:
        web.life.busy()
    closed.set()
    await web.asked("open")
    await (let_time_pass(stage) if stays else web.asked("arm"))
    assert web.did == (["close", "open"] if stays else ["close", "open", *SLEEP])
    assert stays or web.at["close"] >= web.at["open"] + AFTER


async def test_a_death_while_the_gate_closes_is_no_sleep(stage: Make) -> None:
    web = stage(SOON)
    closed = web.hold("close")
    await web.begin()
    await web.asked("close")
    web.driver.end(Exit(1))
    await let_time_pass(stage)
    closed.set()
    await web.asked("arm")
    assert web.life.last_error == "died: exit status 1" and web.states[-2:] == [State.READY, State.STOPPED]


async def test_min_uptime_is_waited_for(stage: Make) -> None:
    web = stage(Idle(after=Duration(0), min_uptime=Duration(0.03)))
    await let_time_pass(stage)  # the time before it was awake does not count
    await web.begin()
    await web.asked("arm")
    assert web.did == SLEEP and web.at["close"] >= web.at["ready"] + 0.03


async def test_what_cannot_be_stopped_is_never_put_to_sleep(stage: Make) -> None:
    web = stage(SOON)
    web.driver.capabilities = Capability.ALWAYS_ON
    await web.begin()
    await let_time_pass(stage)
    assert web.did == [] and web.life.sleeps_at is None


async def test_another_policy_counts_at_once(stage: Make) -> None:
    web = stage()
    await web.begin()
    web.life.adjust(msgspec.structs.replace(web.life.config, idle=SOON, stop_grace=Duration(3)))
    await web.asked("arm")
    assert web.did == SLEEP and web.driver.grace == 3


@pytest.mark.parametrize("busy", [False, True])
async def test_a_retired_one_sleeps_as_soon_as_nobody_uses_it(stage: Make, busy: bool) -> None:
    web = stage(Idle(after=None, min_uptime=Duration(3600)))
    await web.begin()
    web.life.hold(None)
    if busy:
        web.life.busy()
    web.life.retire()
    if busy:
        await let_time_pass(stage)
        assert web.did == []
        web.life.quiet(asyncio.get_running_loop().time())
    await web.asked("arm")
    assert web.did == SLEEP


async def test_who_waits_for_a_retired_one_is_still_served(stage: Make) -> None:
    web = stage()
    web.left = [1]  # the client that was let in
    ready = web.hold("ready")
    web.life.wake("somebody")
    await web.asked("ready")
    web.life.retire()
    ready.set()
    await web.asked("arm")
    assert web.did == [*START, "close", "open", *SLEEP]


async def test_a_retired_one_that_refused_is_not_closed_and_opened_without_a_pause(stage: Make) -> None:
    web = stage()
    await web.begin()
    web.life.busy()
    web.life.refused("connection refused")
    await web.asked("open")
    web.left = [1] * 100
    web.life.retire()
    await let_time_pass(stage)
    assert web.did.count("close") < 100


# Freezing


async def test_a_frozen_one_is_thawed_by_the_next_client_and_freezes_again(stage: Make) -> None:
    web = stage(FREEZE)
    await web.begin()
    await web.reach(State.FROZEN)
    await let_time_pass(stage)
    assert web.did == ["close", "freeze", "arm"] and not web.life.asleep and web.life.sleeps_at is None
    web.life.wake("the second")
    await web.asked("arm", 2)
    assert web.did[3:] == ["thaw", "open", "close", "freeze", "arm"] and web.life.wakes == 2
    assert web.at["close"] >= web.at["thaw"] + AFTER


async def test_the_client_that_thawed_it_does_not_start_it_again_after_its_end(stage: Make) -> None:
    web = stage(FREEZE)
    await web.begin()
    await web.reach(State.FROZEN)
    web.life.wake("the second")
    await web.asked("open")
    web.driver.end(Exit(0))
    await web.asked("arm", 2)
    assert web.did == ["close", "freeze", "arm", "thaw", "open", *SLEEP]


async def test_a_client_that_comes_while_it_is_frozen_is_served(stage: Make) -> None:
    web = stage(FREEZE)
    frozen = web.hold("freeze")
    await web.begin()
    await web.asked("freeze")
    web.life.wake("somebody")
    frozen.set()
    await let_time_pass(stage)
    assert "open" in web.did


async def test_a_frozen_one_is_stopped_after_stop_after(stage: Make) -> None:
    web = stage(Idle(after=AFTER, then=Then.FREEZE, stop_after=Duration(0.03)))
    await web.begin()
    await web.asked("arm", 2)
    assert web.did == ["close", "freeze", "arm", "stop", "arm"]
    assert web.states == [State.STARTING, State.READY, State.FROZEN, State.STOPPING, State.STOPPED]
    assert web.at["stop"] >= web.at["freeze"] + 0.03


async def test_another_stop_after_counts_at_once(stage: Make) -> None:
    web = stage(FREEZE)
    await web.begin()
    await web.reach(State.FROZEN)
    web.life.adjust(msgspec.structs.replace(web.life.config, idle=Idle(then=Then.FREEZE, stop_after=AFTER)))
    await let_time_pass(stage)
    assert "stop" in web.did


@pytest.mark.parametrize("how", ["dies", "stop", "retire"])
async def test_a_frozen_one_can_end(stage: Make, how: str) -> None:
    web = stage(FREEZE)
    await web.begin()
    await web.asked("arm")
    web.did.clear()
    if how == "dies":
        web.driver.end(Exit(signal=9))
    elif how == "stop":
        await web.life.stop("by hand")
    else:
        web.life.retire()
    await web.asked("arm")
    assert web.did == (SLEEP if how == "dies" else ["stop", "arm"]) and web.life.state is State.STOPPED
