"""The drivers: one module for each kind of backend, and what they share. Knows nothing of the gateway."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.base import Backend

DRIVERS = {
    "external": "backends.external:External",
    "process": "backends.process:Process",
}
"""Driver name -> module:class. A driver outside this package announces itself in the entry point group below."""
DEFAULT = "process"
"""The driver of a backend that names none."""

ENTRY_POINTS = "dormant.backends"
EXTRAS = {"podman": "podman", "libvirt": "libvirt", "dbus_fast": "systemd"}
"""Top-level module of a driver's library -> the extra of this distribution that installs it."""


class DriverMissing(ValueError):
    """There is no such driver, or its library is not installed; the message says what to do."""


def names() -> list[str]:
    """Every driver that can be named in a configuration."""
    return sorted({*DRIVERS, *_outside()})


def load(name: str) -> type[Backend]:
    """The class of a driver, imported on first use. Raises DriverMissing; an error inside its code is raised as it is."""
    path = DRIVERS.get(name) or _outside().get(name)
    if path is None:
        raise DriverMissing(f"unknown driver {name!r}")
    module, _, attribute = path.partition(":")
    try:
        driver: type[Backend] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise DriverMissing(f"driver {name!r} needs {error.name}: pip install 'dormant[{extra}]'") from error
    return driver


def _outside() -> dict[str, str]:
    """The drivers of other distributions: name -> module:class."""
    from importlib.metadata import entry_points  # a third of a worker's start, which never asks

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
