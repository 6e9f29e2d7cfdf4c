"""One configured backend in operation: its driver, its listening sockets, and what brings them together.

For the deliveries `relay` and `pass` that is an activation and its gate, for `accept` the instances. Counterpart:
`gateway.server` makes services and lets them go; everything that differs by delivery is decided here, once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from backends import load
from backends.base import BackendError, Capability, Exit, PassedSocket, Setup, Shared, Usage
from backends.endpoint import parse
from gateway.activation import Activation
from gateway.config import BackendConfig, Delivery
from gateway.handover import Instances, PassGate
from gateway.listeners import Listeners, Listening, key
from gateway.logs import OutputLog
from gateway.plane.link import Tally
from gateway.states import State
from gateway.status import BackendStatus, StateChange
from gateway.upgrade import Estate, KeptService
from gateway.workers import RelayGate, Workers

log = logging.getLogger(__name__)

USAGE_DEADLINE = 1.0
"""Seconds that a driver may take to say what its backend uses; then the status is shown without."""


class NoLife(ValueError):
    """This backend has no life of its own: one instance runs per connection."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What services need of the gateway."""

    workers: Workers
    listeners: Listeners
    shared: Shared
    changed: Callable[[Service], None]
    """called whenever something that `change` tells has changed"""


class Service:
    """`after` is the drain of the services that this one replaces: it starts nothing before that is done.

    `listens_after`: nor does it listen before, because a backend still accepts from one of its sockets.
    """

    __slots__ = (
        "_gate", "_numbers", "activation", "backend", "config", "environment", "given", "instances", "listens_after",
        "number", "sockets",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        config: BackendConfig,
        sockets: list[Listening],
        environment: Environment,
        after: asyncio.Task[None] | None = None,
        listens_after: bool = False,
    ) -> None:
        self.number = number
        self.config = config
        self.sockets = sockets
        self.given = tuple(sockets)
        """those that it began with, whoever has them now"""
        self.environment = environment
        self.listens_after = after if listens_after else None
        setup = Setup(
            name=config.name, directory=config.directory, endpoints=config.endpoints, readiness=config.ready,
            shared=environment.shared, passes=config.delivery is Delivery.PASS,
        )  # fmt: skip
        self.backend = load(config.driver)(config.options, setup)
        setup.output.listen(OutputLog(config.name))
        self.activation: Activation | None = None
        self.instances: Instances | None = None
        self._gate: RelayGate | PassGate | None = None
        self._numbers: dict[int, list[int]] = {}
        """id of a listening socket -> its numbers in the workers"""
        passed = [PassedSocket(listening.listener.name, listening.socket) for listening in sockets]
        if config.delivery is Delivery.ACCEPT:
            self.instances = Instances(config, self.backend, passed, self._changed)
            return
        if config.delivery is Delivery.PASS:
            self._gate = PassGate(config.name, passed, config.idle.after, self.wake, self._busy, self._quiet)
        else:
            self._gate = RelayGate(number, environment.workers)
        self.activation = Activation(config, self.backend, self._gate, self._changed, after)

    # Its doors

    def listen(self) -> None:
        """Let clients come."""
        if isinstance(self._gate, RelayGate):
            self.environment.workers.serve(self.number, self.config)
        if self.listens_after is None:
            self._listen()
        else:
            self.listens_after.add_done_callback(lambda _: self._listen())

    def _listen(self) -> None:
        if not self.sockets:  # it was removed while it waited
            return
        if not isinstance(self._gate, PassGate):  # there the backend may have it now, and wants it blocking
            for listening in self.sockets:
                for sock in listening.sockets:
                    sock.setblocking(False)  # a backend that had it has changed that for all who have it
        if self.instances is not None:
            self.instances.listen()
        elif isinstance(self._gate, PassGate):
            self._gate.arm()
        else:
            workers = self.environment.workers
            spread = workers.spread(self.config)
            for listening in self.sockets:
                self._numbers[id(listening)] = workers.listen(
                    self.number, listening.listener.name, key(listening.listener, self.name), listening.sockets, spread
                )

    def unlisten(self, keep: Collection[int] = ()) -> None:
        """Let nobody in any more; close the sockets but those (by id) that somebody else takes over."""
        if self.instances is not None:
            self.instances.unlisten()
        if isinstance(self._gate, PassGate):
            self._gate.remove()
        for listening in self.sockets:
            if id(listening) in self._numbers:
                self.environment.workers.unlisten(
                    self._numbers[id(listening)], accept_waiting=id(listening) not in keep
                )
            if id(listening) not in keep:
                self.environment.listeners.close(listening)
        self._numbers = {}
        self.sockets = []

    # The next control plane

    def hand_over(self, estate: Estate) -> KeptService:
        """What `take_over` needs in the control plane that replaces this one."""
        return KeptService(
            digest=self.config.digest,
            life=self.activation.hand_over() if self.activation else None,
            total=self.instances.total if self.instances else 0,
            counted=self.environment.workers.past(self.number),
            output=self.backend.output.hand_over(),
            driver=self.backend.hand_over(estate),
        )

    def take_over(self, kept: KeptService, estate: Estate) -> bool:
        """Go on where the replaced control plane was. False: what it runs is still to be found, by `adopt`."""
        if kept.counted is not None:
            self.environment.workers.count_past(self.number, kept.counted)
        found = kept.driver is not None
        instances: Sequence[tuple[Mapping[str, str], Awaitable[Exit]]] = ()
        if found:
            try:
                self.backend.output.take_over(kept.output)
                instances = self.backend.take_over(kept.driver, estate)
            except Exception:  # as another version left it, for one: the others are taken over all the same
                log.exception("what runs cannot be taken over", extra={"backend": self.name})
                found = False
        if self.instances is not None:
            self.instances.total = kept.total
            self.instances.resume(instances)
        if self.activation is not None and kept.life is not None:
            self.activation.take_over(kept.life, found)
        return found

    async def adopt(self, endpoints: Mapping[str, str] | None) -> None:
        """Find out whether it runs already; `endpoints`: its gate is open with these."""
        opened = None if endpoints is None else {name: parse(address) for name, address in endpoints.items()}
        if self.activation is not None and (opened or Capability.ADOPT in self.backend.capabilities):
            await self.activation.adopt(opened)

    # Its life

    def wake(self, source: str) -> None:
        """A client waits."""
        self.lives().wake(source)

    def lives(self) -> Activation:
        """Its activation. Raises NoLife in delivery `accept`."""
        if self.activation is None:
            raise NoLife(f"{self.config.name}: with delivery accept there is nothing to start, stop or hold")
        return self.activation

    def retire(self) -> None:
        """Sleep as soon as nobody uses it."""
        if isinstance(self._gate, PassGate):
            self._gate.adjust(0.0)
        if self.activation is not None:
            self.activation.retire()

    def hurry(self) -> None:
        """Stop without grace, now or whenever it comes to that."""
        if self.activation is not None:
            self.activation.hurry()

    async def stop(self, why: str) -> None:
        """Close everything at once; return when nothing is left of it."""
        if self.sockets:
            self.unlisten()
        if self.instances is not None:
            await self.instances.stop()
        if self.activation is not None:
            self.environment.workers.cut(self.number)
            await self.activation.close(why)
            self.environment.workers.forget(self.number)

    # Its configuration

    def can_become(self, config: BackendConfig) -> bool:
        """Whether the new configuration can be taken on without replacing the service."""
        same = msgspec.structs.replace(
            config, idle=self.config.idle, limits=self.config.limits, start_timeout=self.config.start_timeout,
            stop_grace=self.config.stop_grace, origin=self.config.origin,
        )  # fmt: skip
        spread = self.environment.workers.spread
        return same == self.config and spread(config) == spread(self.config)

    def stands_in_the_way(self, config: BackendConfig, sockets: Collection[Listening]) -> bool:
        """Whether a new backend must wait for the end of this one: the same name, sockets or endpoints."""
        mine = {id(listening) for listening in self.given}
        return (
            config.name == self.name
            or any(id(listening) in mine for listening in sockets)
            or any(endpoint in self.config.endpoints.values() for endpoint in config.endpoints.values())
        )

    def adjust(self, config: BackendConfig) -> None:
        """Take on new limits, timeouts and idle policy."""
        self.config = config
        if self.instances is not None:
            self.instances.adjust(config)
        if isinstance(self._gate, RelayGate):
            self.environment.workers.serve(self.number, config)
        if isinstance(self._gate, PassGate):
            self._gate.adjust(config.idle.after)
        if self.activation is not None:
            self.activation.adjust(config)

    # What is known of it

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def held_until(self) -> float | None:
        """Loop time; None: not held."""
        return self.activation.held_until if self.activation else None

    @property
    def asleep(self) -> bool:
        return self.activation.asleep if self.activation is not None else not self.instances or not self.instances.count

    @property
    def settled(self) -> bool:
        """No command is under way for something that lives outside."""
        return self.state not in (State.STARTING, State.STOPPING) or Capability.ADOPT not in self.backend.capabilities

    @property
    def state(self) -> State:
        if self.activation is not None:
            return self.activation.state
        return State.STOPPED if self.asleep else State.READY

    def change(self) -> StateChange:
        who = self.activation or self.instances
        assert who is not None
        return StateChange(self.name, self.state.value, who.last_wake, who.last_error)

    async def status(self, tally: Tally | None) -> BackendStatus:
        """All that is known of it."""
        usage = Usage()
        if not self.asleep:
            try:
                async with asyncio.timeout(USAGE_DEADLINE):
                    usage = await self.backend.usage()
            except (TimeoutError, BackendError, OSError) as error:
                log.debug("usage is not known: %s", error, extra={"backend": self.name})
        now = asyncio.get_running_loop().time()
        sleeps_at = self.activation.sleeps_at if self.activation else None
        life, instances = self.activation, self.instances
        held = life.held_until if life else None
        who = life or instances
        assert who is not None
        connections = tally.connections if tally else 0
        if instances is not None:
            connections = instances.count
        elif isinstance(self._gate, PassGate):
            connections = self._gate.connections
        return BackendStatus(
            name=self.name,
            driver=self.config.driver,
            delivery=self.config.delivery.value,
            state=self.state.value,
            since=now - who.since,
            listeners={listening.listener.name: str(listening.address) for listening in self.sockets},
            endpoints={name: str(endpoint) for name, endpoint in life.endpoints.items()}
            if life and not life.asleep
            else {},
            connections=connections,
            waiting=tally.parked if tally else 0,
            total=instances.total if instances else tally.total if tally else 0,
            received=tally.received if tally else 0,
            sent=tally.sent if tally else 0,
            refused=tally.refused if tally else 0,
            dropped=tally.dropped if tally else 0,
            wakes=life.wakes if life else instances.total if instances else 0,
            last_wake=who.last_wake,
            start_took=life.start_took if life else 0.0,
            ready_took=life.ready_took if life else 0.0,
            sleeps_in=None if sleeps_at is None else _left(sleeps_at, now),
            held_for=None if held is None else _left(held, now),
            memory=usage.memory,
            cpu=usage.cpu,
            last_error=who.last_error,
            retry_in=life.backoff.until - now if life and life.backoff.until > now else None,
        )

    # What its gate and its driver tell

    def _busy(self) -> None:
        self.lives().busy()

    def _quiet(self, since: float) -> None:
        self.lives().quiet(since)

    def _changed(self) -> None:
        self.environment.changed(self)


def _left(until: float, now: float) -> float:
    """Seconds until then; -1 for ever."""
    return -1.0 if until == float("inf") else max(0.0, until - now)
