"""The life of one backend, between a driver and a gate that do what the test says: every order and every failure.

The parts that an activation asks are tested by themselves and then at work, on the same `Stage`: see test_idle (sleeping and
freezing), test_backoff (failing and dying) and test_holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.base import Backend, BackendError, Exit, PassedSocket, Setup, Shared, StartFailed, Status
from backends.endpoint import Endpoint, Tcp
from backends.probe import Connect
from backends.units import Duration
from gateway import backoff
from gateway.activation import Activation
from gateway.config import BackendConfig, Delivery, Idle, Limits, Then
from gateway.states import Event, IllegalTransition, State, transition
from tests.running import PATIENCE

AFTER = Duration(0.02)
NEVER, SOON, FREEZE = Idle(after=None), Idle(after=AFTER), Idle(after=AFTER, then=Then.FREEZE)
START = ["status", "start", "ready", "open"]
SLEEP = ["close", "stop", "arm"]


class Stage:
    """An activation on stage. `did` is what driver and gate were asked, in order; `at` is when each was asked last."""

    def __init__(self, idle: Idle = NEVER, **config: Any) -> None:
        self.did: list[str] = []
        self.at: dict[str, float] = {}
        self.states: list[State] = []
        self.held: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}  # what fails, once
        self.left: list[int] = []  # the next answers to `close`
        self.news = asyncio.Event()
        self.driver, self.gate = Driver(self), Gate(self)
        configured = BackendConfig(
            name="web", driver="scripted", options=msgspec.Struct(), listeners=(), delivery=Delivery.RELAY, endpoints={},
            ready=Connect(), idle=idle, limits=Limits(), directory=Path("/"), origin="test",
            **{"start_timeout": Duration(PATIENCE), "stop_grace": Duration(PATIENCE)} | config,
        )  # fmt: skip
        self.life = Activation(configured, self.driver, self.gate, self.changed)

    def changed(self) -> None:
        if self.states[-1:] != [self.life.state]:
            self.states.append(self.life.state)
        self.news.set()

    def note(self, what: str) -> None:
        self.did.append(what)
        self.at[what] = asyncio.get_running_loop().time()
        self.news.set()

    async def act(self, what: str) -> None:
        self.note(what)
        if what in self.held:
            try:
                await self.held[what].wait()
            except asyncio.CancelledError:
                self.note(f"{what} cancelled")
                raise
        if what in self.errors:
            raise self.errors.pop(what)

    def hold(self, what: str) -> asyncio.Event:
        """It does not return before the event is set."""
        return self.held.setdefault(what, asyncio.Event())

    async def until(self, look: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not look():
                self.news.clear()
                await self.news.wait()

    async def reach(self, state: State) -> None:
        await self.until(lambda: self.life.state is state)

    async def asked(self, what: str, times: int = 1) -> None:
        await self.until(lambda: self.did.count(what) >= times)

    async def begin(self) -> None:
        """Wake it and wait until it is ready; forget how."""
        self.life.wake("the first")
        await self.reach(State.READY)
        assert self.did == START
        self.did.clear()


class Driver(Backend):
    Options = msgspec.Struct
    current = Status.STOPPED
    grace = 0.0
    sockets: Sequence[PassedSocket] = ()

    def __init__(self, stage: Stage) -> None:
        super().__init__(None, Setup("web", Path("/"), {}, Connect(), Shared()))
        self.stage = stage
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    def end(self, exit: Exit) -> None:
        """It ends by itself."""
        self.current = Status.STOPPED
        if not self.ended.done():
            self.ended.set_result(exit)

    async def start(self, sockets: Sequence[PassedSocket] = ()) -> None:
        self.sockets = sockets
        self.current = Status.RUNNING
        self.ended = asyncio.get_running_loop().create_future()
        await self.stage.act("start")

    async def ready(self) -> Mapping[str, Endpoint]:
        await self.unless_gone(self.stage.act("ready"))
        return {"": Tcp("127.0.0.1", 80)}

    async def wait(self) -> Exit:
        return await asyncio.shield(self.ended)

    async def stop(self, grace: float) -> None:
        self.grace = grace
        await self.stage.act("stop")
        self.end(Exit(0))

    async def status(self) -> Status:
        await self.stage.act("status")
        return self.current

    async def freeze(self) -> None:
        await self.stage.act("freeze")
        self.current = Status.FROZEN

    async def thaw(self) -> None:
        await self.stage.act("thaw")
        self.current = Status.RUNNING


class Gate:
    sockets: Sequence[PassedSocket] = ()
    endpoints: Mapping[str, Endpoint] | None = None

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def arm(self) -> None:
        self.stage.note("arm")

    def open(self, endpoints: Mapping[str, Endpoint]) -> None:
        self.endpoints = endpoints
        self.stage.note("open")

    async def close(self) -> int:
        await self.stage.act("close")
        return self.stage.left.pop(0) if self.stage.left else 0

    def reject(self, reason: str) -> None:
        self.stage.note(f"reject: {reason}")


Make = Callable[..., Stage]


async def stages() -> AsyncIterator[Make]:
    """Makes activations; at the end they are stopped, and no task is left. A test module makes a fixture of it."""
    made: list[Stage] = []

    def make(idle: Idle = NEVER, **config: Any) -> Stage:
        made.append(Stage(idle, **config))
        return made[-1]

    yield make
    for one in made:
        for event in one.held.values():
            event.set()
        await asyncio.wait_for(one.life.stop("the test is over"), PATIENCE)
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        assert not (await asyncio.wait(others, timeout=PATIENCE))[1]


stage = pytest.fixture(stages)


async def let_time_pass(stage: Make) -> None:
    """A neighbour with the policy SOON wakes up and falls asleep."""
    neighbour = stage(SOON)
    neighbour.life.wake("time")
    await neighbour.asked("arm")


# The table, said once more, so that a change of it is meant

EXPECTED = {
    "stopped": {"wake": "starting"},
    "starting": {"started": "ready", "start failed": "stopped"},
    "ready": {"quiet: freeze": "frozen", "quiet: stop": "stopping", "died": "stopped", "refused": "starting"},
    "frozen": {"wake": "ready", "quiet: stop": "stopping", "died": "stopped"},
    "stopping": {"slept": "stopped"},
}


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_the_table_lists_what_may_happen_and_nothing_else(state: State, event: Event) -> None:
    if event.value in EXPECTED[state.value]:
        assert transition(state, event).value == EXPECTED[state.value][event.value]
    else:
        with pytest.raises(IllegalTransition, match=f"^'{event.value}' in state '{state.value}'$"):
            transition(state, event)


# From asleep to asleep


async def test_a_life_from_the_first_client_to_the_sleep(stage: Make) -> None:
    web = stage(SOON)
    web.gate.sockets = [PassedSocket("web", None)]  # type: ignore[arg-type]
    web.life.wake("somebody")
    await web.asked("arm")
    assert web.did == [*START, *SLEEP] and web.at["close"] >= web.at["ready"] + AFTER
    assert web.states == [State.STARTING, State.READY, State.STOPPING, State.STOPPED]
    assert (web.life.asleep, web.life.last_wake) == (True, "somebody")
    assert web.gate.endpoints == {"": Tcp("127.0.0.1", 80)} and web.driver.sockets is web.gate.sockets
    assert web.driver.grace == PATIENCE


async def test_one_start_serves_many_wakes(stage: Make) -> None:
    web = stage()
    started = web.hold("start")
    web.life.wake("the first")
    web.life.wake("another in the same turn")
    await web.asked("start")
    web.life.wake("one while it starts")
    started.set()
    await web.reach(State.READY)
    web.life.wake("one that crossed the opening of the gate")
    await let_time_pass(stage)
    assert web.did == START and (web.life.wakes, web.life.last_wake) == (1, "the first")


@pytest.mark.parametrize("moment", ["closes", "stops", "dies"])
async def test_a_client_that_comes_while_it_ends_is_served_by_a_new_start(stage: Make, moment: str) -> None:
    web = stage(SOON)
    held = web.hold("close" if moment == "closes" else "stop")
    await web.begin()
    if moment == "dies":
        web.driver.end(Exit(1))
    await web.asked("close" if moment == "closes" else "stop")
    web.life.wake("the second")
    held.set()
    await web.asked("open")
    # Neither sent away nor told of again; and as long as nothing is stopped, the gate opens again and nobody noticed.
    assert web.did[:6] == (["close", "open"] if moment == "closes" else ["close", "stop", *START])
    assert web.life.wakes == (1 if moment == "closes" else 2)


# Starts that fail, and what else goes wrong


@pytest.mark.parametrize(("step", "trouble"), [("start", ""), ("ready", "; tcp://a:80: refused")])
async def test_start_timeout_names_itself_and_the_last_trouble(stage: Make, step: str, trouble: str) -> None:
    web = stage(start_timeout=Duration(0.02))
    web.driver.trouble = trouble.removeprefix("; ")
    web.hold(step)
    web.life.wake("somebody")
    await web.asked("arm")
    assert web.life.last_error == f"start_timeout: not ready after 20ms{trouble}"
    assert web.did[-4:] == [f"{step} cancelled", "stop", f"reject: {web.life.last_error}", "arm"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (StartFailed("no such image"), "no such image"),
        (PermissionError(13, "Permission denied"), "[Errno 13] Permission denied"),
        (Exit(3), "it ended (exit status 3); its last output:\n    port 80 is taken"),
    ],
)
async def test_a_failed_start_is_cleaned_up_and_told_at_once(stage: Make, error: Exception | Exit, why: str) -> None:
    web = stage()
    if isinstance(error, Exception):
        web.errors["start"] = error
    web.hold("ready")
    web.life.wake("somebody")
    if isinstance(error, Exit):
        await web.asked("ready")
        web.driver.output.feed(b"port 80 is taken\n")
        web.driver.end(error)
    await web.asked("arm")
    assert web.did[-3:] == ["stop", f"reject: {why}", "arm"] and web.driver.current is Status.STOPPED
    assert web.states == [State.STARTING, State.STOPPED]
    assert (web.life.asleep, web.life.last_error, web.life.backoff.failures) == (True, why, 1)


@pytest.mark.parametrize("step", ["status", "start", "ready", "wait", "freeze", "thaw", "stop"])
async def test_an_unexpected_error_of_the_driver_ends_in_stopped(
    stage: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    monkeypatch.setattr(backoff, "FIRST", 0.02)
    web = stage(FREEZE if step in ("freeze", "thaw") else SOON)
    web.errors[step] = RuntimeError("a bug")
    if step == "stop":
        web.errors["status"] = RuntimeError("another bug")  # and the stop after that fails, too
    web.life.wake("the first")
    if step == "thaw":
        await web.reach(State.FROZEN)
        web.life.wake("the second")
    elif step == "wait":
        await web.reach(State.READY)
        web.driver.ended.set_exception(web.errors.pop("wait"))
    await web.until(lambda: web.life.asleep)
    assert web.life.state is State.STOPPED and web.did.index("stop") < web.did.index("reject: internal error")
    assert "unexpected error" in caplog.text and "RuntimeError: a bug" in caplog.text
    opened = web.did.count("open")
    web.life.wake("the next")
    await web.asked("open", opened + 1)


@pytest.mark.parametrize("current", [Status.RUNNING, Status.STOPPED])
async def test_one_that_refuses_is_brought_up_again_while_its_clients_wait(stage: Make, current: Status) -> None:
    web = stage()
    await web.begin()
    web.driver.current = current
    web.life.refused("connection refused")
    await web.asked("open")
    assert web.did == (["status", "ready", "open"] if current is Status.RUNNING else START)
    assert web.states == [State.STARTING, State.READY] * 2 and web.life.wakes == 1


# Stopped by hand


@pytest.mark.parametrize("step", ["status", "start", "ready"])
async def test_stop_during_the_start_cancels_it_and_costs_no_back_off(stage: Make, step: str) -> None:
    web = stage()
    web.hold(step)
    web.life.wake("somebody")
    await web.asked(step)
    await web.life.stop("by hand")
    assert web.did[-4:] == [f"{step} cancelled", "stop", "reject: by hand", "arm"]
    assert web.states == [State.STARTING, State.STOPPED]
    assert (web.life.asleep, web.life.backoff.until) == (True, 0.0)


@pytest.mark.parametrize("while_it_stops", [False, True])
async def test_stop_waits_for_its_end_and_for_no_connection(stage: Make, while_it_stops: bool) -> None:
    web = stage(SOON)
    await web.life.stop("what sleeps already")
    stopped = web.hold("stop")
    await web.begin()
    if while_it_stops:
        await web.asked("stop")
    else:
        web.life.busy()
        web.left = [5]
    stopping = asyncio.gather(web.life.stop("by hand"), web.life.stop("by another hand"))
    await let_time_pass(stage)
    assert not stopping.done()
    stopped.set()
    await stopping
    assert web.did == SLEEP and web.states[-2:] == [State.STOPPING, State.STOPPED]
    web.did.clear()
    await web.begin()


@pytest.mark.parametrize("moment", ["back-off", "dying", "stopping", "frozen"])
async def test_stop_forgets_nobody_who_waits(stage: Make, moment: str) -> None:
    """They are served by a new start, or sent away: a gate tells of a client once only."""
    web = stage(FREEZE if moment == "frozen" else SOON)
    stopped = web.hold("stop")
    if moment == "back-off":
        web.life.backoff.until = asyncio.get_running_loop().time() + 3600
    else:
        await web.begin()
        if moment == "dying":
            web.driver.end(Exit(1))
        await web.asked("arm" if moment == "frozen" else "stop")
    web.life.wake("somebody")
    stopping = asyncio.create_task(web.life.stop("by hand"))
    await let_time_pass(stage)
    stopped.set()
    await stopping
    await let_time_pass(stage)
    assert "start" in web.did or any(what.startswith("reject") for what in web.did)


async def test_stop_right_after_a_wake_is_not_lost(stage: Make) -> None:
    web = stage()
    stopping = asyncio.create_task(web.life.stop("by hand"))
    web.life.wake("somebody")  # its life begins a turn later, after the stop
    stopping.add_done_callback(lambda _: web.news.set())
    await web.until(lambda: stopping.done() or web.life.state is State.READY)
    assert web.life.asleep


# What runs already, and what does not go


@pytest.mark.parametrize(
    ("current", "did"),
    [(Status.RUNNING, ["ready", "open"]), (Status.FROZEN, ["thaw", "ready", "open"]), (Status.STOPPED, None), (None, None)],
)  # fmt: skip
async def test_what_runs_at_boot_is_taken_over(
    stage: Make, caplog: pytest.LogCaptureFixture, current: Status | None, did: list[str] | None
) -> None:
    web = stage()
    if current is None:
        web.errors["status"] = BackendError("the daemon is away")
    else:
        web.driver.current = current
    await web.life.adopt()
    await let_time_pass(stage)
    assert web.did == (["status"] if did is None else ["status", "status", *did])
    assert web.life.last_wake == ("" if did is None else "found running")
    assert ("its status is unknown: the daemon is away" in caplog.messages) is (current is None)


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_stop_that_fails_or_hangs_is_given_up(
    stage: Make, caplog: pytest.LogCaptureFixture, hangs: bool
) -> None:
    web = stage(SOON, stop_grace=Duration(0.02))
    web.driver.stop_slack = 0.01
    web.errors["stop"] = BackendError("the daemon is away")
    if hangs:
        web.hold("stop")
    await web.begin()
    await web.asked("arm")
    why = "stop_grace: it is not gone after 30ms; left alone" if hangs else "could not be stopped: the daemon is away"
    assert why in caplog.messages and web.life.state is State.STOPPED and ("stop cancelled" in web.did) is hangs
    web.did.clear()
    web.life.wake("the next")
    await web.asked("open")
    assert web.did == ["status", "ready", "open"]  # it runs still
