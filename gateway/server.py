"""The gateway as a whole: which backends there are, and how their lives begin, change and end.

    load the configuration -> bind every socket -> start the workers -> tell them what to serve
    a client waits         -> its backend's activation wakes               (gateway.activation)
    reload                 -> what changed is drained and replaced, what did not is not touched
    upgrade                -> the version on the disk takes this process over, and goes on   (gateway.upgrade)
    SIGTERM                -> listeners close, connections get `gateway.drain`, backends stop

At its begin it takes over what there is of a former control plane: what that left on purpose, or the workers of one that
died (gateway.adoption).

This is the only module that knows all the others. It handles no connection: that is `gateway.plane.worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NoReturn

from backends import environment
from backends.base import Shared
from backends.command import CommandFailed, run
from gateway import __version__, logs, upgrade
from gateway.admin import Admin, Refused, UnknownBackend
from gateway.config import BackendConfig, Config, ConfigError, Delivery
from gateway.holds import Holds
from gateway.listeners import ListenError, Listeners, Listening, key
from gateway.notify import Notifier, inherited_sockets
from gateway.service import Environment, Service
from gateway.status import GatewayStatus, StateChange
from gateway.workers import Workers

log = logging.getLogger(__name__)


TRIAL_DEADLINE = 60.0
"""Seconds for the version on the disk to show that it would start."""


SETTLE_TIME = 10.0
"""Seconds beyond `gateway.drain` that an upgrade waits for what is under way."""

SAME_SIGNAL = 0.3
"""Seconds within which another signal is the same one: some signal a process and then its whole group."""


class Server:
    """`read` loads the configuration anew, for a reload; it is called in a thread."""

    def __init__(self, config: Config, read: Callable[[], Config]) -> None:
        self.config = config
        self.read = read
        self.services: dict[str, Service] = {}
        self.numbers: dict[int, Service] = {}
        """every service that still lives, also those that are being drained"""
        self.drains: dict[Service, asyncio.Task[None]] = {}
        """those that are not configured any more, or differently"""
        self.awake: set[int] = set()
        self.loop = asyncio.get_running_loop()
        self.started = self.loop.time()
        self.notifier = Notifier()
        self.estate = upgrade.inherit() or upgrade.Estate()
        self.upgraded = bool(self.estate.left.descriptors)
        self.listeners = Listeners(inherited_sockets())
        self.workers = Workers(self, config.gateway)
        self.shared = Shared()
        self.holds = Holds(config.gateway.state_directory, config.gateway.admin)
        self.admin = Admin(self, config.gateway.admin)
        self.environment = Environment(self.workers, self.listeners, self.shared, self.changed)
        self.stopping = False
        self._next_number = 0
        self._signals = 0
        self._last_signal = (0, 0.0)
        self._signalled = asyncio.Event()
        self._news = asyncio.Event()
        self._watchers: set[asyncio.Queue[StateChange]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reloading = asyncio.Lock()

    async def run(self) -> int:
        """Serve until a signal says stop. Returns the exit status. Raises ListenError when a socket cannot be had."""
        _raise_descriptor_limit()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._on_stop_signal, number)
        self.loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)
        self.loop.add_signal_handler(signal.SIGUSR2, self._on_upgrade_signal)
        upgrade.signals_are_handled()
        try:
            async with self._reloading:
                await self._begin()
            await self._signalled.wait()
            await self._drain()
        finally:
            await self._end()
        return 0

    async def _begin(self) -> None:
        self._find_sockets()
        await self.admin.start()
        await self.workers.find(replace=self.upgraded)
        for pid in self.workers.all_pids:
            self.estate.claim_process(pid)
        if not self.upgraded:  # else there are more descriptors of the same sockets
            for held, sock in self.workers.adopted.ears.values():
                self.listeners.find(held.address, sock)
        # From here on without a pause: what the workers say meanwhile has to find its service.
        sockets = self._open_listeners(self.config.backends.values(), {})
        self.workers.start()
        self.shared.take_over(self.estate.left.shared, self.estate)
        self._next_number = max(self.workers.adopted.gates, default=0)
        for config in self.config.backends.values():
            self._add(config, sockets[config.name])
        self._settle()
        await self.admin.serve()
        self.notifier.ready()
        self._tell_status()
        for unused in self.listeners.unused:
            log.warning("inherited socket %s belongs to no listener", unused)
        awake = len(self.awake)
        asleep = len(self.services) - awake
        log.info("%d backend%s asleep, listening; pid %d", asleep, "s" * (asleep != 1), os.getpid())
        for name, seconds in self.holds.load().items():
            if name in self.services and self.services[name].activation:
                self.services[name].lives().hold(seconds, again=True)

    def _find_sockets(self) -> None:
        """Those that the replaced control plane left."""
        for kept in self.estate.left.sockets:
            try:
                sock = socket.socket(fileno=self.estate.claim(kept.fd))
            except (KeyError, OSError) as error:
                log.error("the socket of %s cannot be taken over: %r", kept.key or kept.inherited, error)
                continue
            if kept.inherited:
                self.listeners.inherit(kept.inherited, sock)
            else:
                self.listeners.find(kept.key, sock)

    def _settle(self) -> None:
        """Everybody has taken over what is theirs: let go of the rest."""
        self.workers.settle()
        self.shared.settle()
        self.listeners.forget_found()
        self.estate.settle()

    async def _drain(self) -> None:
        """Close the doors, let live connections end, for at most `gateway.drain` or until a second signal."""
        self.notifier.stopping()
        drain = self.config.gateway.drain
        log.info("stopping; live connections have %s", drain)
        for service in self.numbers.values():
            service.unlisten()
            service.retire()
        impatient = self.loop.create_task(self.until(lambda: self._signals > 1), name="second signal")
        quiet = self.loop.create_task(self.until(lambda: all(s.asleep for s in self.numbers.values())), name="drain")
        _, left = await asyncio.wait({impatient, quiet}, timeout=drain, return_when=asyncio.FIRST_COMPLETED)
        if quiet in left:
            busy = [service.name for service in self.numbers.values() if not service.asleep]
            why = "second signal" if impatient.done() else "gateway.drain"
            log.warning("%s: cutting the connections of %s", why, ", ".join(busy))
        for task in left:
            task.cancel()

    async def _end(self) -> None:
        """Stop whatever still runs; nothing is left. Comes here also when the start failed half-way."""
        self.stopping = True
        self._tell_news()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(service.stop("the gateway stops") for service in list(self.numbers.values())))
        await self.admin.stop()
        await self.workers.stop()
        await self.shared.close()
        self.listeners.close_inherited()
        self.notifier.close()
        log.info("stopped")

    # Backends come, change and go

    def _open_listeners(
        self, configs: Sequence[BackendConfig] | Any, held: Mapping[str, Listening]
    ) -> dict[str, list[Listening]]:
        """The sockets of these backends; `held` are open ones, by address. All or nothing: raises ListenError."""
        opened: list[Listening] = []
        result: dict[str, list[Listening]] = {}
        try:
            for config in configs:
                sockets = result[config.name] = []
                sockets_wanted = self.workers.spread(config) if config.delivery is Delivery.RELAY else 1
                for listener in config.listeners:
                    listening = held.get(key(listener, config.name))
                    if listening is None:
                        listening = self.listeners.open(listener, config.name, sockets_wanted)
                        opened.append(listening)
                    sockets.append(listening)
        except BaseException:
            for listening in opened:
                self.listeners.close(listening)
            raise
        return result

    def _add(self, config: BackendConfig, sockets: list[Listening]) -> None:
        known = self.workers.adopted.gate(config)
        if known is None:
            self._next_number += 1
        number = self._next_number if known is None else known.backend
        before = [old for old in self.drains if old.stands_in_the_way(config, sockets)]
        after = self.spawn(_all_of([self.drains[old] for old in before]), f"wait of {config.name}") if before else None
        accepts = any(old.config.delivery is Delivery.PASS for old in before)
        service = Service(number, config, sockets, self.environment, after, accepts)
        self.services[config.name] = self.numbers[number] = service
        service.listen()
        kept = self.estate.left.services.pop(config.name, None)
        if kept is None or kept.digest != config.digest or not service.take_over(kept, self.estate):
            self.spawn(service.adopt(known.endpoints if known else None), f"adoption of {service.name}")
        if self.workers.is_busy(number):
            self.busy(number)

    async def upgrade(self, answered: Callable[[], Awaitable[None]]) -> None:
        """Become the version of the program that is on the disk. Returns only if that cannot be: raises CommandFailed,
        OSError, ConfigError, ListenError or Refused. `answered` is awaited when it is sure to try.

        The configuration is taken on first, as by a reload: what it adds is bound here, where an error does no harm, and
        what it changed is drained.
        """
        async with self._reloading:
            self._refuse_if_stopping()
            await run(upgrade.arguments(), timeout=TRIAL_DEADLINE, env={upgrade.VARIABLE: upgrade.TRIAL})
            config = await asyncio.to_thread(self.read)
            if config.gateway.admin != self.config.gateway.admin:
                raise Refused("gateway.admin changed, which takes a restart")
            if not await self.workers.can_be_found():
                raise Refused(
                    "the workers could not be found again; gateway.admin is in a folder that cannot be written to"
                )
            self._refuse_if_stopping()
            self._apply(config)
            await self._settled()
            self._refuse_if_stopping()
            self.notifier.reloading()
            self.workers.be_patient(TRIAL_DEADLINE)
            try:
                log.info("the version on the disk takes over")
                await asyncio.to_thread(logs.flush)
                await answered()
                self._become_it()
            except (ConnectionError, asyncio.CancelledError):
                log.error("not upgraded: who asked for it has left")
                raise
            finally:
                self.workers.be_patient(0.0)
                self.notifier.ready()

    def _become_it(self) -> NoReturn:
        """Without a pause: what happened meanwhile would be lost."""
        estate = upgrade.Estate()
        estate.left.sockets += self.listeners.hand_over(estate)
        estate.left.shared = self.shared.hand_over(estate)
        estate.left.services = {name: service.hand_over(estate) for name, service in self.services.items()}
        limit = {environment.NOFILE_VARIABLE: str(environment.NOFILE)}
        upgrade.replace(estate, {**self.notifier.environment, **limit})

    def _refuse_if_stopping(self) -> None:
        if self._signals:
            raise Refused("the gateway is stopping")

    async def _settled(self) -> None:
        """Wait until nothing is under way that the next control plane could not go on with, but not for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.gateway.drain + SETTLE_TIME):
                await self.until(
                    lambda: self._signals > 0 or not (self.drains or any(not s.settled for s in self.numbers.values()))
                )

    async def reload(self) -> str:
        """Read the configuration again and bring about what it says; one line about what was done.

        Raises ConfigError, ListenError or Refused, and then nothing has changed.
        """
        async with self._reloading:
            self._refuse_if_stopping()
            self.notifier.reloading()
            try:
                config = await asyncio.to_thread(self.read)
                return self._apply(config)
            except (ConfigError, ListenError) as error:
                log.error("nothing was reloaded: %s", error)
                raise
            finally:
                self.notifier.ready()

    def _apply(self, config: Config) -> str:
        old, new = self.services, config.backends
        replaced = {name for name in old if name not in new or not old[name].can_become(new[name])}
        adjusted = {name for name in old if name not in replaced and old[name].config != new[name]}
        fresh = [config for name, config in new.items() if name not in old or name in replaced]
        held = {key(listening.listener, name): listening for name in replaced for listening in old[name].sockets}
        sockets = self._open_listeners(fresh, held)

        for config_ in fresh:
            for listening, listener in zip(sockets[config_.name], config_.listeners, strict=True):
                self.listeners.take_on(listening, listener)
        moved = {id(listening) for listenings in sockets.values() for listening in listenings}
        held_until = {name: self.services[name].held_until for name in replaced}
        for name in replaced:
            service = self.services.pop(name)
            self.drains[service] = self.spawn(self._drain_service(service), f"drain of {name}")
            service.unlisten(keep=moved)
        for name in adjusted:
            self.services[name].adjust(new[name])
        for added in fresh:
            self._add(added, sockets[added.name])
            until = held_until.get(added.name)
            if until is not None and added.delivery is not Delivery.ACCEPT:
                self.services[added.name].lives().hold(until - self.loop.time())
        for name in held_until.keys() - new.keys():
            self.spawn(self.holds.remove(name), f"hold of {name}")
        self.services = {name: self.services[name] for name in new}  # in the order of the configuration
        removed = sum(name not in new for name in replaced)
        changed = len(replaced) - removed + len(adjusted)
        added_count = len(fresh) - (len(replaced) - removed)
        summary = f"reloaded: {added_count} added, {changed} changed, {removed} removed, {len(new)} backends in all"
        if config.gateway != self.config.gateway:
            summary += "; changes under `gateway` take effect with a restart"
        self.config = config
        log.info("%s", summary)
        self._tell_status()
        return summary

    async def _drain_service(self, service: Service) -> None:
        """A service that is not configured any more, or differently: let its connections end, then stop it."""
        service.retire()
        try:
            async with asyncio.timeout(self.config.gateway.drain):
                await self.until(lambda: service.asleep)
        except TimeoutError:
            log.warning("gateway.drain: cutting its connections", extra={"backend": service.name})
        finally:
            await service.stop("it was removed or changed in the configuration")
            self.numbers.pop(service.number, None)
            self.awake.discard(service.number)
            del self.drains[service]
            self._tell_news()

    # What the workers report

    def wake(self, backend: int, source: str) -> None:
        service = self.numbers.get(backend)
        if service is not None and not self.stopping:
            service.wake(source)

    def busy(self, backend: int) -> None:
        service = self.numbers.get(backend)
        if service is not None and service.activation:
            service.activation.busy()

    def quiet(self, backend: int, since: float) -> None:
        service = self.numbers.get(backend)
        if service is not None and service.activation:
            service.activation.quiet(since)

    def refused(self, backend: int, error: str) -> None:
        service = self.numbers.get(backend)
        if service is not None and service.activation:
            service.activation.refused(error)

    def limited(self, backend: int, limit: str, count: int, source: str) -> None:
        service = self.numbers.get(backend)
        if service is not None:
            many = f"{count} clients, the last was " if count > 1 else ""
            log.warning("%s: cut %s%s", limit, many, source, extra={"backend": service.name})

    # What the commands ask (gateway.admin)

    def find(self, name: str) -> Service:
        """Raises UnknownBackend."""
        try:
            return self.services[name]
        except KeyError:
            raise UnknownBackend(name) from None

    async def hold(self, name: str, seconds: float | None) -> None:
        """Wake it and keep it awake for so many seconds; None: until released."""
        self.find(name).lives().hold(seconds)
        await self.holds.set(name, seconds)

    async def release(self, name: str) -> None:
        self.find(name).lives().release()
        await self.holds.remove(name)

    async def status(self, names: Sequence[str] | None = None) -> GatewayStatus:
        """Everything about these backends, or all."""
        services = list(self.services.values()) if names is None else [self.find(name) for name in names]
        tallies = await self.workers.count()
        rows = await asyncio.gather(*(service.status(tallies.get(service.number)) for service in services))
        awake = sum(not service.asleep for service in self.services.values())
        return GatewayStatus(
            __version__, os.getpid(), self.workers.pids, self.started, self.loop.time() - self.started,
            len(self.services) - awake, awake, list(rows),
        )  # fmt: skip

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something about the backends is true. Looks whenever a state changed."""
        while not condition():
            await self._news.wait()

    def watch(self, queue: asyncio.Queue[StateChange]) -> Callable[[], None]:
        """Put each change of a state into the queue, while there is room, until the returned function is called."""
        self._watchers.add(queue)
        return lambda: self._watchers.discard(queue)

    # Small parts

    def changed(self, service: Service) -> None:
        """The state of a service changed."""
        self._tell_news()
        before = len(self.awake)
        if service.asleep:
            self.awake.discard(service.number)
        else:
            self.awake.add(service.number)
        if len(self.awake) != before:
            self._tell_status()
        change = service.change()
        for queue in self._watchers:
            if not queue.full():
                queue.put_nowait(change)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run something beside; an unexpected error is logged. What still runs at the end is cancelled."""
        task = self.loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("unexpected error in %s", task.get_name(), exc_info=task.exception())

    def _tell_status(self) -> None:
        awake = sum(service.number in self.awake for service in self.services.values()) if self.awake else 0
        self.notifier.status(f"{len(self.services) - awake} asleep, {awake} awake")

    def _on_stop_signal(self, number: int) -> None:
        """The first one drains, a second one cuts at once, whatever is going on by then."""
        last, when = self._last_signal
        self._last_signal = number, self.loop.time()
        if number == last and self.loop.time() - when < SAME_SIGNAL:
            return
        self._signals += 1
        self._signalled.set()
        if self._signals > 1:
            for service in self.numbers.values():
                service.hurry()
        self._tell_news()

    def _tell_news(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _on_reload_signal(self) -> None:
        self.spawn(self._reload_and_log(), "reload")

    def _on_upgrade_signal(self) -> None:
        self.spawn(self._upgrade_and_log(), "upgrade")

    async def _upgrade_and_log(self) -> None:
        try:
            await self.upgrade(_nobody_waits)
        except (CommandFailed, OSError, ConfigError, ListenError, Refused) as error:
            log.error("not upgraded: %s", error)

    async def _reload_and_log(self) -> None:
        with contextlib.suppress(ConfigError, ListenError, Refused):
            await self.reload()


async def _nobody_waits() -> None:
    pass


async def _all_of(tasks: Sequence[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)


def _raise_descriptor_limit() -> None:
    """Each sleeping backend costs a descriptor for each of its sockets: take what the system gives."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(config: Config, read: Callable[[], Config]) -> int:
    """Run a gateway until it is told to stop; returns its exit status."""
    return await Server(config, read).run()
