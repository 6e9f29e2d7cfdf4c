"""One backend of a configuration: its keys, and what must hold between them.

Counterpart: `gateway.config` finds the backends in the files and asks here for each; `gateway.clashes` looks at all of
them together. The keys that are not in KEYS are the driver's: they are checked against its `Options`, and no driver is
named here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

import backends
from backends.base import Backend, Capability
from backends.endpoint import (
    VSOCK_NAMES,
    AddressError,
    Endpoint,
    Inet,
    Inherited,
    Udp,
    Unixgram,
    Vsock,
    VsockMux,
    is_datagram,
    parse,
)
from backends.probe import KINDS, Connect, Http, Query
from backends.units import Duration
from gateway.parsing import convert, convert_struct
from gateway.problems import FAILED, Place, Problems, listed, nearest, show
from gateway.settings import BackendConfig, Count, Delivery, Idle, Limits, Listener, Then

T = TypeVar("T")

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$"
NAME_ALLOWED = "up to 64 letters, digits and _ . @ -, with a letter or a digit first"
KEYS = (
    "driver", "listen", "delivery", "endpoint", "endpoints", "ready", "idle", "limits", "start_timeout", "stop_grace",
)  # fmt: skip
ADJUSTABLE = ("idle", "limits", "start_timeout", "stop_grace")
"""What a running backend can take on."""
SCHEMES = ("tcp", "udp", "unix", "unixgram", "vsock", "vsock-mux", "fd")
DEFAULT_IDLE = Idle()
START_TIMEOUT = Duration(60)
STOP_GRACE = Duration(10)

_NEEDED = {Delivery.PASS: Capability.PASS, Delivery.ACCEPT: Capability.ACCEPT}
_is_name = re.compile(NAME_PATTERN.replace("$", r"\Z")).match


class Entry(Struct, frozen=True):
    """A listener with options."""

    address: str
    name: str | None = None
    backlog: Count = 4096
    reuse_port: bool = False


def is_name(name: str) -> bool:
    """Whether a backend or a listener can be called so."""
    return _is_name(name) is not None


class BackendReader:
    """Reads the backends of one configuration. Equal parts of different backends are kept once."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self._kept: dict[Any, Any] = {}
        self._drivers: dict[str, type[Backend] | str] = {}
        self.addressed: list[BackendConfig] = []
        """the backends whose addresses are known, even if something else is wrong with them"""

    def read(self, name: str, value: Any, place: Place, directory: Path) -> BackendConfig | None:
        """A backend; None after problems were added. Paths in it are relative to `directory`."""
        before = len(self.problems)
        if not is_name(name):
            self.problems.add(place, f"found the name {show(name)}; allowed: {NAME_ALLOWED}")
        if not isinstance(value, dict):
            self.problems.wrong(place, value, f"a mapping with the keys {', '.join(KEYS)} and those of its driver")
            return None
        driver = self._driver(value, place)
        delivery = self._key(Delivery, value, place, "delivery", Delivery.RELAY)
        listeners = self._listeners(value, place / "listen", directory)
        endpoints = self._endpoints(value, place, directory)
        idle: Idle = self._keep(self._key(Idle, value, place, "idle", DEFAULT_IDLE))
        backend = BackendConfig(
            name=name,
            driver=value.get("driver", backends.DEFAULT),
            options=self._options(driver, value, place),
            listeners=listeners,
            delivery=delivery,
            endpoints=endpoints,
            ready=self._keep(self._ready(value, place / "ready")),
            idle=idle,
            limits=self._keep(self._limits(value, place)),
            start_timeout=self._key(Duration, value, place, "start_timeout", START_TIMEOUT),
            stop_grace=self._key(Duration, value, place, "stop_grace", STOP_GRACE),
            directory=directory,
            origin=str(place),
            digest=_digest(value, directory),
        )
        if FAILED not in (delivery, listeners, endpoints):
            self.addressed.append(backend)
        self._check_delivery(backend, driver, place)
        self._check_idle(idle, driver, place)
        self._check_positive(backend.start_timeout, place / "start_timeout")
        return backend if len(self.problems) == before else None

    def _key(self, kind: Any, value: dict[str, Any], place: Place, key: str, default: T) -> T:
        if key not in value:
            return default
        converted: T = convert(kind, value[key], place / key, self.problems)
        return converted

    def _keep(self, value: T) -> T:
        kept: T = self._kept.setdefault(value, value)
        return kept

    # The driver

    def _driver(self, value: dict[str, Any], place: Place) -> type[Backend]:
        name = value.get("driver", backends.DEFAULT)
        if isinstance(name, str):
            if name not in self._drivers:
                self._drivers[name] = self._load(name)
            found = self._drivers[name]
            if not isinstance(found, str):
                return found
            self.problems.add(place / "driver", found)
        else:
            self.problems.wrong(place / "driver", name, ", ".join(backends.names()))
        return FAILED

    @staticmethod
    def _load(name: str) -> type[Backend] | str:
        try:
            return backends.load(name)
        except backends.DriverMissing as error:
            known = backends.names()
            return str(error) if name in known else f"unknown driver {show(name)}{nearest(name, known)} {listed(known)}"

    def _options(self, driver: type[Backend], value: dict[str, Any], place: Place) -> Struct:
        if driver is FAILED:
            return FAILED
        own = {key: item for key, item in value.items() if key not in KEYS}
        return convert_struct(driver.Options, own, place, self.problems, beside=KEYS)

    def _capable(self, capability: Capability) -> str:
        """The drivers that can do something, for a message; those whose library is missing are not known to."""
        loaded = {name: self._drivers.get(name) or self._load(name) for name in backends.names()}
        able = [
            name for name, driver in loaded.items() if not isinstance(driver, str) and capability in driver.capabilities
        ]
        return ", ".join(able) or "none"

    # Listeners and endpoints

    def _listeners(self, value: dict[str, Any], place: Place, directory: Path) -> tuple[Listener, ...]:
        """Listeners without a name are called `listen`, or `listen-N` as the Nth of several, N from 2."""
        given = value.get("listen")
        if given is FAILED:
            return FAILED
        if not given or not isinstance(given, (str, list, dict)):
            found = f"found {show(given)}" if "listen" in value else "missing"
            self.problems.add(
                place, f"{found}; allowed: an address, or several (without one, nothing could ever wake it)"
            )
            return FAILED
        result = [self._listener(*entry, directory) for entry in _entries(given, place)]
        if any(listener is FAILED for listener in result):
            return FAILED
        names = [listener.name for listener in result]
        for name in sorted({name for name in names if names.count(name) > 1} if len(names) > 1 else ()):
            self.problems.add(place, f"two listeners have the name {name!r}; allowed: a name of its own for each")
        return tuple(result)

    def _listener(self, name: str, named: bool, value: Any, place: Place, directory: Path) -> Listener:
        entry = Entry(value) if isinstance(value, str) else FAILED
        if isinstance(value, dict):
            entry = convert_struct(Entry, value, place, self.problems)
        elif not isinstance(value, str):
            self.problems.wrong(
                place, value, "an address, or a mapping with the keys address, backlog, name, reuse_port"
            )
        if entry is FAILED:
            return FAILED
        if named and entry.name is not None:
            self.problems.add(
                place / "name", f"found {show(entry.name)}; allowed: only one name, and {name!r} is its key"
            )
        if not is_name(entry.name or name):
            self.problems.add(place, f"found the name {show(entry.name or name)}; allowed: {NAME_ALLOWED}")
        endpoint = self._address(entry.address, place, directory)
        if isinstance(endpoint, VsockMux) or (isinstance(endpoint, Vsock) and endpoint.cid == "guest"):
            self.problems.add(place, f"{endpoint} can only be dialled; allowed: an address of this machine")
            return FAILED
        if endpoint is FAILED:
            return FAILED
        return Listener(entry.name or name, endpoint, entry.backlog, entry.reuse_port)

    def _endpoints(self, value: dict[str, Any], place: Place, directory: Path) -> dict[str, Endpoint]:
        result = {}
        if "endpoint" in value:
            result[""] = self._dialled(value["endpoint"], place / "endpoint", directory)
        several = value.get("endpoints", {})
        if isinstance(several, dict):
            for name, address in several.items():
                result[name] = self._dialled(address, place / "endpoints" / name, directory)
        else:
            self.problems.wrong(place / "endpoints", several, "a mapping of listener names to addresses")
        failed = several is FAILED or any(endpoint is FAILED for endpoint in result.values())
        return FAILED if failed else result

    def _dialled(self, value: Any, place: Place, directory: Path) -> Endpoint:
        if not isinstance(value, str):
            self.problems.wrong(place, value, "an address")
            return FAILED
        endpoint = self._address(value, place, directory)
        anywhere = isinstance(endpoint, Vsock) and endpoint.cid == VSOCK_NAMES["any"]
        if isinstance(endpoint, Inherited) or anywhere or (isinstance(endpoint, Inet) and endpoint.port == 0):
            self.problems.add(place, f"{endpoint} can only be listened on; allowed: where the backend listens")
            return FAILED
        return endpoint

    def _address(self, text: str, place: Place, directory: Path) -> Endpoint:
        try:
            return parse(text, directory)
        except AddressError as error:
            scheme = text.partition(":")[0]
            near = "" if scheme in SCHEMES else nearest(scheme, SCHEMES).rstrip(";")
            self.problems.add(place, f"{error}{near}")
            return FAILED

    # The other keys

    def _ready(self, value: dict[str, Any], place: Place) -> Any:
        given = value.get("ready", "connect")
        if given is FAILED:
            return FAILED
        allowed = f"{', '.join(KINDS)}; or one of them with a value, as in {{http: /health}}"
        if isinstance(given, str):
            word, inner = given, None
        elif isinstance(given, dict) and len(given) == 1:
            ((word, inner),) = given.items()
        else:
            found = f"the {len(given)} keys {', '.join(given)}" if isinstance(given, dict) and given else show(given)
            self.problems.add(place, f"found {found}; allowed: one of {allowed}")
            return FAILED
        kind = KINDS.get(word)
        if kind is None:
            self.problems.add(place, f"found {show(word)}{nearest(word, KINDS)} allowed: {allowed}")
            return FAILED
        if kind is Connect and inner is None:
            return Connect()
        return convert(kind, {} if inner is None else inner, place / word, self.problems)

    def _limits(self, value: dict[str, Any], place: Place) -> Limits:
        given = value.get("limits", {})
        # No short form: `limits: 100` would not say of what.
        limits = convert_struct(Limits, given, place / "limits", self.problems) if given != {} else Limits()
        if limits is not FAILED:
            self._check_positive(limits.connect_timeout, place / "limits" / "connect_timeout")
            self._check_positive(limits.idle_timeout, place / "limits" / "idle_timeout")
            self._check_positive(limits.flow_timeout, place / "limits" / "flow_timeout")
        return limits

    # What must hold between them

    def _check_positive(self, duration: Duration | None, place: Place) -> None:
        if duration is not None and duration is not FAILED and duration <= 0:
            self.problems.add(place, f"found {show(str(duration))}; allowed: more than 0s")

    def _check_idle(self, idle: Idle, driver: type[Backend], place: Place) -> None:
        if idle is FAILED:
            return
        if idle.stop_after is not None and idle.then is not Then.FREEZE:
            self.problems.add(place / "idle" / "stop_after", "is only for what is frozen; allowed: with then: freeze")
        if idle.then is Then.FREEZE and driver is not FAILED and Capability.FREEZE not in driver.capabilities:
            able = self._capable(Capability.FREEZE)
            self.problems.add(
                place / "idle" / "then", f"this driver cannot freeze; allowed: stop (drivers that can: {able})"
            )

    def _check_delivery(self, backend: BackendConfig, driver: type[Backend], place: Place) -> None:
        if backend.delivery is FAILED:
            return
        word = backend.delivery.value
        needed = _NEEDED.get(backend.delivery)
        if needed is not None and driver is not FAILED and needed not in driver.capabilities:
            self.problems.add(
                place / "delivery",
                f"driver {backend.driver} cannot do delivery {word}; allowed: another delivery "
                f"(drivers that can do {word}: {self._capable(needed)})",
            )
        if backend.delivery is Delivery.RELAY:
            self._check_relay(backend, place)
            return
        for key in ("endpoint", "endpoints"):
            if backend.endpoints is not FAILED and (
                "" in backend.endpoints if key == "endpoint" else any(backend.endpoints)
            ):
                self.problems.add(
                    place / key, f"nothing is dialled with delivery {word}; allowed: only with delivery relay"
                )
        if backend.delivery is Delivery.ACCEPT and backend.listeners is not FAILED:
            for listener in backend.listeners:
                if isinstance(listener.endpoint, (Udp, Unixgram)):
                    self.problems.add(
                        place / "listen", f"{listener.endpoint} has no connections to accept; allowed: stream sockets"
                    )

    def _check_relay(self, backend: BackendConfig, place: Place) -> None:
        listeners, endpoints = backend.listeners, backend.endpoints
        if endpoints is not FAILED and backend.ready is not FAILED:
            self._check_ready(backend, place / "ready")
        if listeners is FAILED or endpoints is FAILED:
            return
        names = [listener.name for listener in listeners]
        for name in endpoints:
            if name and name not in names:
                self.problems.unknown(place / "endpoints" / name, "no such listener", names)
        if not endpoints:
            self.problems.add(
                place / "endpoint", "missing; allowed: the address where the backend listens (delivery relay)"
            )
        elif "" not in endpoints and (lacking := [name for name in names if name not in endpoints]):
            self.problems.add(
                place / "endpoints",
                f"missing for {', '.join(lacking)}; allowed: one for each listener, or `endpoint` for the rest",
            )
        for listener in listeners:
            self._check_type(listener, endpoints, place)

    def _check_type(self, listener: Listener, endpoints: dict[str, Endpoint], place: Place) -> None:
        """Streams are relayed to a stream endpoint, datagrams to a datagram endpoint."""
        endpoint = endpoints.get(listener.name) or endpoints.get("")
        if endpoint is None or isinstance(listener.endpoint, Inherited):
            return
        wanted = is_datagram(listener.endpoint)
        if is_datagram(endpoint) is not wanted:
            own = listener.name in endpoints
            schemes = "udp:, unixgram:" if wanted else "tcp:, unix:, vsock:, vsock-mux:"
            alone = "" if own else f"; for this listener alone: endpoints.{listener.name}"
            self.problems.add(
                place / "endpoints" / listener.name if own else place / "endpoint",
                f"{endpoint} takes {'streams' if wanted else 'datagrams'}, but listener {listener.name!r} is "
                f"{listener.endpoint}; allowed: {schemes}{alone}",
            )

    def _check_ready(self, backend: BackendConfig, place: Place) -> None:
        """Readiness is what an endpoint can be asked for; nothing can be connected to where datagrams are answered."""
        datagrams = [is_datagram(endpoint) for endpoint in backend.endpoints.values()]
        if not datagrams:
            return
        if all(datagrams) and isinstance(backend.ready, (Connect, Http)):
            word = "connect (the default)" if isinstance(backend.ready, Connect) else "http"
            self.problems.add(
                place, f"{word} proves nothing of an endpoint for datagrams; allowed: udp with a datagram to send "
                "(and what to expect), exec, notify, log; or delay, as a guess",
            )  # fmt: skip
        if not any(datagrams) and isinstance(backend.ready, Query):
            self.problems.add(
                place,
                "udp asks endpoints for datagrams, and there is none; allowed: connect, http, exec, notify, log, delay",
            )


def _digest(value: dict[str, Any], directory: Path) -> str:
    """Short for what makes it this backend. From the text: another version of the program comes to the same."""
    told = {key: value[key] for key in sorted(value) if key not in ADJUSTABLE}
    return hashlib.blake2b(json.dumps([told, str(directory)], default=str).encode(), digest_size=12).hexdigest()


def _entries(given: str | list[Any] | dict[str, Any], place: Place) -> Iterator[tuple[str, bool, Any, Place]]:
    """Name, whether the user gave it as a key, value and place of each listener."""
    if isinstance(given, dict) and "address" not in given:
        for name, value in given.items():
            yield name, True, value, place / name
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield f"listen-{index + 1}" if index else "listen", False, value, place / index
    else:
        yield "listen", False, given, place
