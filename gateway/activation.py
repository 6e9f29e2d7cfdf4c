"""The life of one backend: asleep, started by the first client, ready, asleep again.

Rule: everything that changes a state is in this file; which changes there are is in `gateway.states`. Counterparts: a `Gate`
(gateway.workers, gateway.handover) brings the clients and is told when to let them through; a `Backend` is started and
stopped; `gateway.idle` says when it is quiet enough; `gateway.server` owns all activations.

A sleeping backend has no task and no timer. An awake one has one task, `_live`, which reads as the life it leads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from backends.base import Backend, BackendError, Capability, Exit, PassedSocket, Status
from backends.endpoint import Endpoint, parse
from backends.units import Duration
from gateway.backoff import Backoff
from gateway.config import BackendConfig, Then
from gateway.idle import Signals, Verdict, judge
from gateway.states import Event, State, transition
from gateway.upgrade import KeptLife

log = logging.getLogger(__name__)

BY_HAND = "a hold"


class Gate(Protocol):
    """What clients of one backend stand before. Closed at first."""

    sockets: Sequence[PassedSocket]
    """The listening sockets that the backend is handed at its start; none when its clients are relayed."""

    def arm(self) -> None:
        """The backend is gone or frozen: tell of the next client."""

    def open(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Let clients through to these endpoints."""

    async def close(self) -> int:
        """Keep new clients waiting from now on; return how many connections are left."""

    def reject(self, reason: str) -> None:
        """The start failed: send the waiting clients away, where that is possible."""


class Activation:
    """One backend's state machine. All methods belong to the event loop's thread; only `stop`, `close` and `adopt` wait.

    `after`: the drain of a backend that this one replaces; it starts nothing before that is done.
    """

    def __init__(
        self,
        config: BackendConfig,
        backend: Backend,
        gate: Gate,
        changed: Callable[[], None] = lambda: None,
        after: asyncio.Task[None] | None = None,
    ) -> None:
        self.config = config
        self.backend = backend
        self.gate = gate
        self.state = State.STOPPED
        self.endpoints: Mapping[str, Endpoint] = {}
        self.backoff = Backoff()
        self.wakes = 0
        self.last_wake = ""
        """who woke it last"""
        self.last_error = ""
        """why the last start failed, or how it died; empty after a good start"""
        self.start_took = self.ready_took = 0.0
        """seconds: until the driver had started it, and from there until it answered"""
        self.quiet_since: float | None = 0.0
        self.held_until: float | None = None
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self.since = self._loop.time()
        """when this state was entered"""
        self.awake_since = self.since
        self._life: asyncio.Task[None] | None = None
        self._bringing_up: asyncio.Task[Mapping[str, Endpoint]] | None = None
        self._poke: asyncio.Future[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._patience: asyncio.Timeout | None = None
        self._after = after
        self._wanted = ""
        """who waits, and will not be let in by what is going on now"""
        self._refused = ""
        self._ordered_stop = ""
        self._retired = self._hurried = self._closed = self._resumed = False

    # What happens to it; cheap, at any moment

    def wake(self, source: str) -> None:
        """Somebody waits for it."""
        if self._closed:
            return
        self._wanted = self._wanted or source
        if self._life is not None:
            self._poked()
        elif self._retry is None:
            delay = self.backoff.until - self._loop.time()
            if delay > 0:
                self._retry = self._loop.call_later(delay, self._begin)
                log.info("waits %s before the next start", Duration(delay), extra=self._who)
            else:
                self._begin()

    def wake_now(self, source: str) -> None:
        """Somebody wants it by hand: failures of the past do not count."""
        self._stop_waiting()
        self.backoff.until = 0.0
        self.wake(source)

    def busy(self) -> None:
        """It has connections."""
        self.quiet_since = None
        self._poked()

    def quiet(self, since: float) -> None:
        """It has had no connection since then."""
        self.quiet_since = since
        self._poked()

    def refused(self, error: str) -> None:
        """It did not take a connection although it is ready; its gate is closed already."""
        self._refused = error
        self._poked()

    def hold(self, seconds: float | None, again: bool = False) -> None:
        """Wake it and keep it awake for so long, None: until released. `again`: as it was before this control plane, so
        that failures of the past still count."""
        self.held_until = float("inf") if seconds is None else self._loop.time() + seconds
        log.info("held %s", "until released" if seconds is None else f"for {Duration(seconds)}", extra=self._who)
        if again:
            self.wake(BY_HAND)
        else:
            self.wake_now(BY_HAND)

    def release(self) -> None:
        if self.held_until is not None:
            log.info("released", extra=self._who)
        self.held_until = None
        self._poked()

    def retire(self) -> None:
        """Put it to sleep as soon as nobody uses it, whatever the policy says. Who waits already is still served."""
        self._retired = True
        self._poked()

    def adjust(self, config: BackendConfig) -> None:
        """Go on with other timeouts and another idle policy."""
        self.config = config
        self._poked()

    async def stop(self, why: str) -> None:
        """Stop it now, whoever uses it, and whatever it is doing; return when it is gone. The next client wakes it again."""
        self._stop_waiting()
        if self._life is None:
            if self._wanted:
                self._send_away(why)
                self.gate.arm()
            return
        self._ordered_stop = why
        if self._bringing_up is not None:
            self._bringing_up.cancel()
        self._poked()
        await asyncio.shield(self._life)

    async def close(self, why: str) -> None:
        """Stop it for good: nobody wakes it any more."""
        self._closed = True
        await self.stop(why)

    def hurry(self) -> None:
        """Whatever stop comes or goes on is without grace."""
        self._hurried = True
        if self._patience is not None:
            self._patience.reschedule(self._loop.time())

    async def adopt(self, endpoints: Mapping[str, Endpoint] | None = None) -> None:
        """Take over what is already running.

        `endpoints`: its gate is open with these, because a former control plane saw it answer there. What does not run
        any more gets its gate closed.
        """
        status = Status.STOPPED
        if self._after is not None:
            await asyncio.wait({self._after})
        if endpoints is not None:
            self.backend.presume()
        try:
            status = await self.backend.status()
        except (BackendError, OSError) as error:
            log.warning("its status is unknown: %s", error, extra=self._who)
        if not self.asleep or self._closed:
            return
        if status is Status.RUNNING and endpoints is not None:
            log.info("still awake", extra=self._who)
            self.resume(State.READY, endpoints)
            return
        if endpoints is not None:
            await self.gate.close()
        if status is not Status.STOPPED:
            self.wake("found running")

    def resume(self, state: State, endpoints: Mapping[str, Endpoint]) -> None:
        """Lead on the life that another control plane of the same backend began, instead of a `wake`."""
        if state is State.STOPPED:
            return
        self.since = self.awake_since = self.quiet_since = self._loop.time()
        if state is not State.STARTING:  # which is begun anew: what is started already is seen by its status
            self.state, self.endpoints = state, endpoints
        if state is State.READY:
            self.gate.open(endpoints)
        self._resumed = state is State.READY
        self._begin()
        self._changed()

    def hand_over(self) -> KeptLife:
        """What `resume` needs in the control plane that replaces this one; nothing may happen to it afterwards."""
        return KeptLife(
            state=self.state.value, endpoints={name: str(endpoint) for name, endpoint in self.endpoints.items()},
            wakes=self.wakes, last_wake=self.last_wake, last_error=self.last_error, start_took=self.start_took,
            ready_took=self.ready_took, awake_for=self._loop.time() - self.awake_since,
            backoff=self.backoff.hand_over(self._loop.time()),
        )  # fmt: skip

    def take_over(self, kept: KeptLife, resume: bool) -> None:
        """Know what the replaced control plane knew; with `resume`, lead on the life that it led."""
        self.wakes, self.last_wake, self.last_error = kept.wakes, kept.last_wake, kept.last_error
        self.start_took, self.ready_took = kept.start_took, kept.ready_took
        self.backoff.take_over(kept.backoff, self._loop.time())
        if not resume:
            return
        try:
            state, endpoints = State(kept.state), {name: parse(address) for name, address in kept.endpoints.items()}
        except ValueError:  # another version's: see what there is
            state, endpoints = State.STARTING, {}
        self.resume(state, endpoints)
        self.awake_since -= kept.awake_for

    # What it tells

    @property
    def asleep(self) -> bool:
        return self._life is None

    @property
    def sleeps_at(self) -> float | None:
        """When it will be put to sleep if nobody comes (loop time)."""
        verdict = self._judge() if self.state is State.READY else None
        return verdict.at if verdict else None

    @property
    def _who(self) -> dict[str, Any]:
        return {"backend": self.config.name}

    # The life

    def _begin(self) -> None:
        self._retry = None
        self._ordered_stop = self._refused = ""
        self.last_wake, self._wanted = self._wanted or self.last_wake, ""
        self._life = self._loop.create_task(self._live(), name=f"life of {self.config.name}")

    async def _live(self) -> None:
        """From STOPPED to STOPPED. Never raises: what is unexpected is logged, and the backend is stopped."""
        try:
            if await self._may_begin():
                await self._lead()
        except Exception:
            log.exception("unexpected error", extra=self._who)
            await self.gate.close()
            await self._make_stopped()
            self.last_error = "internal error"
            self.backoff.failed(self._loop.time())
            self._send_away(self.last_error)
            self.state, self.since = State.STOPPED, self._loop.time()
        finally:
            self._life = None
            self._changed()
        if self._closed:
            self._send_away(self._ordered_stop)
        elif self._wanted:
            self.wake(self._wanted)  # a client came while it was stopping
        elif (self.held_until or 0.0) > self._loop.time() and not (self._ordered_stop or self._retired):
            self.wake(BY_HAND)  # it died
        else:
            self.gate.arm()

    async def _may_begin(self) -> bool:
        """Wait for the end of the one before. False: it was ordered to stop meanwhile."""
        while self._after is not None and not self._after.done() and not self._ordered_stop:
            await self._something(self._after, None)
        self._after = None
        if self._ordered_stop:
            self._send_away(self._ordered_stop)
        return not self._ordered_stop

    async def _lead(self) -> None:
        if self.state is State.STOPPING:  # resumed there
            await self._make_stopped()
            self._to(Event.SLEPT)
            return
        if self.state is State.STOPPED:
            self._to(Event.WAKE)
            self.wakes += 1
        while self.state in (State.READY, State.FROZEN) or await self._bring_up():
            if self._resumed:
                await self._undo_freeze()
            death = self._loop.create_task(self.backend.wait(), name=f"death of {self.config.name}")
            try:
                if not await self._serve(death):
                    break
            finally:
                death.cancel()

    async def _bring_up(self) -> bool:
        """Start it unless it runs, wait until it answers, open the gate. On failure it is stopped again."""
        begun = self._loop.time()
        why = ""
        self._bringing_up = self._loop.create_task(self._start_and_wait(), name=f"start of {self.config.name}")
        try:
            async with asyncio.timeout(self.config.start_timeout) as timeout:
                self.endpoints = await self._bringing_up
        except TimeoutError as error:
            why = f"start_timeout: not ready after {self.config.start_timeout}{self._trouble()}"
            if not timeout.expired():
                why = str(error) or "the driver timed out"
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            why = self._ordered_stop or "the driver gave up"
        except (BackendError, OSError) as error:
            why = str(error)
        finally:
            self._bringing_up = None
        if not why and self._ordered_stop:
            why = self._ordered_stop
        if why:
            await self._give_up(why)
            return False
        self.last_error = ""
        self.awake_since = self._loop.time()
        if self.quiet_since is not None:  # else it has connections from before it refused one
            self.quiet_since = self.awake_since
        self._wanted = self._refused = ""
        self._to(Event.STARTED)
        self.gate.open(self.endpoints)
        log.info(
            "awake: woken by %s; started in %s, ready %s later, %s in all",
            self.last_wake, Duration(self.start_took), Duration(self.ready_took), Duration(self.awake_since - begun),
            extra=self._who,
        )  # fmt: skip
        return True

    async def _start_and_wait(self) -> Mapping[str, Endpoint]:
        begun = self._loop.time()
        status = await self.backend.status()
        if status is Status.FROZEN:
            await self.backend.thaw()
        elif status is Status.STOPPED:
            await self.backend.start(self.gate.sockets)
        started = self._loop.time()
        self.start_took = started - begun
        endpoints = await self.backend.ready()
        self.ready_took = self._loop.time() - started
        return endpoints

    async def _give_up(self, why: str) -> None:
        await self._make_stopped()
        self.last_error = why
        if self._ordered_stop:
            log.info("start given up: %s", why, extra=self._who)
        else:
            self.backoff.failed(self._loop.time())
            delay = Duration(max(0.0, self.backoff.until - self._loop.time()))
            log.error("start failed: %s; next try in %s at the earliest", why, delay, extra=self._who)
        self._send_away(why)
        self._to(Event.START_FAILED)

    async def _serve(self, death: asyncio.Task[Exit]) -> bool:
        """From READY until it sleeps or is dead (False), or has to be brought up again (True)."""
        while True:
            event = await (self._stay_frozen(death) if self.state is State.FROZEN else self._attend(death))
            if event is Event.FREEZE and not await self._freeze():
                event = Event.SLEEP
            if event is Event.DIED:
                await self._bury(death.result())
                return False
            if event is Event.SLEEP:
                await self._sleep()
                return False
            if event is Event.REFUSED:
                log.warning("does not answer any more: %s", self._refused, extra=self._who)
                self._refused = ""
                self._to(event)
                return True

    async def _attend(self, death: asyncio.Task[Exit]) -> Event:
        """Wait, in READY, until something is to be done. After SLEEP and FREEZE the gate is closed."""
        while not death.done():
            if self._ordered_stop:
                await self.gate.close()
                return Event.SLEEP
            if self._refused:
                return Event.REFUSED
            self._wanted = ""  # the gate is open: who waited is let in
            verdict = self._judge()
            if not verdict.sleep:
                await self._something(death, verdict.at)
                continue
            unused = await self._is_unused()
            if death.done():
                break
            if self._ordered_stop:
                return Event.SLEEP
            if unused:
                return Event.FREEZE if self.config.idle.then is Then.FREEZE else Event.SLEEP
            # Somebody came in between: open it again, nobody noticed.
            self.gate.open(self.endpoints)
            if self.quiet_since is not None:
                self.quiet_since = self._loop.time()
        return Event.DIED

    async def _is_unused(self) -> bool:
        """Close the gate, and see if nobody is left behind it or came before it meanwhile.

        A backend that accepts by itself is frozen for that, if it can be: nobody comes in after the count.
        """
        left = await self.gate.close()
        if not left and self.gate.sockets and Capability.FREEZE in self.backend.capabilities:
            try:
                await self.backend.freeze()
                left = await self.gate.close()
                if left or self._wanted:
                    await self.backend.thaw()
            except (BackendError, OSError) as error:
                log.warning("could not be frozen to count its connections: %s", error, extra=self._who)
        return not left and not self._wanted

    async def _undo_freeze(self) -> None:
        """The former control plane may have ended while it was about to freeze this, whose gate is open."""
        self._resumed = False
        if Capability.FREEZE in self.backend.capabilities:
            try:
                async with asyncio.timeout(self.config.start_timeout):
                    await self.backend.thaw()
            except (TimeoutError, BackendError, OSError) as error:
                log.error("could not be thawed: %s", error or "timed out", extra=self._who)

    async def _freeze(self) -> bool:
        """READY to FROZEN; False, and still READY, if that cannot be."""
        try:
            async with asyncio.timeout(self._longest_stop):
                await self.backend.freeze()
        except (TimeoutError, BackendError, OSError) as error:
            log.error("could not be frozen: %s", error or "timed out", extra=self._who)
            return False
        self._to(Event.FREEZE)
        log.info("frozen: %s", self._judge().why, extra=self._who)
        return True

    async def _stay_frozen(self, death: asyncio.Task[Exit]) -> Event:
        """In FROZEN until something ends that: WAKE (it is READY again), SLEEP or DIED."""
        self.gate.arm()
        while not death.done():
            after = self.config.idle.stop_after
            deadline = None if after is None else self.since + after
            if self._ordered_stop:
                return Event.SLEEP
            if self._wanted:
                return await self._thaw()
            if self._retired or (deadline is not None and self._loop.time() >= deadline):
                return Event.SLEEP
            await self._something(death, deadline)
        return Event.DIED

    async def _thaw(self) -> Event:
        """FROZEN to READY; SLEEP if that cannot be: it is started anew for those who wait."""
        begun = self._loop.time()
        try:
            async with asyncio.timeout(self.config.start_timeout):
                await self.backend.thaw()
        except (TimeoutError, BackendError, OSError) as error:
            log.error("could not be thawed: %s", error or "timed out", extra=self._who)
            return Event.SLEEP
        self.wakes += 1
        self.last_wake, self._wanted = self._wanted, ""
        self.quiet_since = self._loop.time()
        self._to(Event.WAKE)
        self.gate.open(self.endpoints)
        took = Duration(self._loop.time() - begun)
        log.info("awake: woken by %s; thawed in %s", self.last_wake, took, extra=self._who)
        return Event.WAKE

    async def _sleep(self) -> None:
        """READY or FROZEN, with its gate closed, to STOPPED."""
        begun = self._loop.time()
        why = self._ordered_stop or self._judge().why
        self._to(Event.SLEEP)
        await self._make_stopped()
        now = self._loop.time()
        log.info(
            "asleep: %s; stopped in %s, was awake for %s", why, Duration(now - begun), Duration(begun - self.awake_since),
            extra=self._who,
        )  # fmt: skip
        self.backoff.reset()
        self._to(Event.SLEPT)

    async def _bury(self, exit: Exit) -> None:
        """It ended by itself. Clean up after it; whoever comes now starts it again."""
        uptime = self._loop.time() - self.awake_since
        await self.gate.close()
        await self._make_stopped()
        clean = exit.code == 0
        self.backoff.ended(self._loop.time(), uptime, clean)
        if clean:
            log.info("asleep: it ended by itself after %s", Duration(uptime), extra=self._who)
            if self.gate.sockets and self.backoff.until > self._loop.time():
                log.warning(
                    "it keeps ending at once: does it accept on the sockets that it is handed (LISTEN_FDS)?",
                    extra=self._who,
                )
        else:
            self.last_error = f"died: {exit}"
            lines = "".join(f"\n    {line}" for line in self.backend.output.fresh(5))
            log.warning("died after %s: %s%s", Duration(uptime), exit, lines, extra=self._who)
        self._to(Event.DIED)

    async def _make_stopped(self) -> None:
        """Stop it, in whatever state it is."""
        grace = 0.0 if self._hurried else float(self.config.stop_grace)
        try:
            async with asyncio.timeout(grace + self.backend.stop_slack) as self._patience:
                await self.backend.stop(grace)
        except TimeoutError:
            if self._hurried and grace:
                await self._make_stopped()
            else:
                log.error(
                    "stop_grace: it is not gone after %s; left alone", Duration(self._longest_stop), extra=self._who
                )
        except (BackendError, OSError) as error:
            log.error("could not be stopped: %s", error, extra=self._who)
        except Exception:
            log.exception("unexpected error while it is stopped", extra=self._who)
        finally:
            self._patience = None

    # Small parts

    @property
    def _longest_stop(self) -> float:
        """Seconds after which a driver's stop is given up."""
        return self.config.stop_grace + self.backend.stop_slack

    def _stop_waiting(self) -> None:
        """Back-off is over."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _send_away(self, why: str) -> None:
        """Nobody is let in: who waits is told so."""
        self._wanted = ""
        self.gate.reject(why)

    def _to(self, event: Event) -> None:
        self.state = transition(self.state, event)
        self.since = self._loop.time()
        self._changed()

    def _judge(self) -> Verdict:
        now, idle = self._loop.time(), self.config.idle
        if self._retired:
            return judge(0.0, 0.0, Signals(now, self.awake_since, self.quiet_since))
        always_on = Capability.ALWAYS_ON in self.backend.capabilities
        signals = Signals(now, self.awake_since, self.quiet_since, self.held_until)
        return judge(None if always_on else idle.after, idle.min_uptime, signals)

    def _trouble(self) -> str:
        return f"; {self.backend.trouble}" if self.backend.trouble else ""

    def _poked(self) -> None:
        if self._poke is not None and not self._poke.done():
            self._poke.set_result(None)

    async def _something(self, other: asyncio.Task[Any], deadline: float | None) -> None:
        """Wait for another task, for a poke, or until the deadline (loop time)."""
        self._poke = self._loop.create_future()
        timeout = None if deadline is None or deadline == float("inf") else max(0.0, deadline - self._loop.time())
        waiting: set[asyncio.Future[Any]] = {other, self._poke}
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self._poke = None
