"""Replacing the control plane by the version that is on the disk, in the same process, by exec(2).

Counterpart: `gateway.server` fills an `Estate` and starts from one. Workers are not part of it: they go on by themselves and
are found again (`gateway.adoption`). What is left is JSON in an anonymous file, beside the descriptors, which keep their
numbers; unknown keys are ignored and missing ones have defaults, because the two versions need not be the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, NoReturn

import msgspec
from msgspec import Struct

from backends.nursery import children
from backends.offspring import Offspring
from gateway.plane.link import Tally

VARIABLE = "DORMANT_UPGRADE"
"""In the environment of the new program: the descriptor of the estate, or TRIAL."""
TRIAL = "trial"

HELD_BACK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
"""Signals that wait until the new program handles them."""


class KeptSocket(Struct):
    """A listening socket of the control plane."""

    fd: int
    key: str
    """`gateway.listeners.key`"""
    inherited: str = ""
    """its name, if the service manager passed it in"""


class KeptBackoff(Struct, frozen=True):
    """Why it is left alone, and for how long still."""

    wait: float = 0.0
    """seconds"""
    failures: int = 0
    quick_ends: int = 0
    ended_for: float = 0.0
    """seconds since it ended quickly last"""


class KeptLife(Struct):
    """What an activation knows, beyond what its driver tells."""

    state: str
    endpoints: dict[str, str] = {}
    wakes: int = 0
    last_wake: str = ""
    last_error: str = ""
    start_took: float = 0.0
    ready_took: float = 0.0
    awake_for: float = 0.0
    """seconds"""
    backoff: KeptBackoff = KeptBackoff()


class KeptService(Struct):
    """One backend."""

    digest: str
    life: KeptLife | None = None
    total: int = 0
    """instances so far"""
    counted: Tally | None = None
    """by workers that are gone"""
    output: list[Any] = []
    driver: Any = None


class Left(Struct):
    """Everything that is written down."""

    sockets: list[KeptSocket] = []
    services: dict[str, KeptService] = {}
    shared: dict[str, Any] = {}
    descriptors: list[int] = []


class Estate:
    """See `backends.base.Estate`."""

    def __init__(self, left: Left | None = None, processes: Iterable[int] = ()) -> None:
        """`processes`: the children that this process has from the program before."""
        self.left = left or Left()
        self._unclaimed = set(self.left.descriptors)
        self._processes = set(processes)

    def keep(self, fd: int) -> int:
        self.left.descriptors.append(fd)
        return fd

    def claim(self, fd: int) -> int:
        self._unclaimed.remove(fd)
        os.set_inheritable(fd, False)
        return fd

    def claim_process(self, pid: int) -> int:
        self._processes.discard(pid)
        return pid

    def settle(self) -> None:
        """Close what nobody claimed; wait, beside, for the end of the processes that nobody did."""
        for fd in self._unclaimed:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._unclaimed.clear()
        for pid in self._processes:
            with contextlib.suppress(OSError):
                Offspring(pid)
        self._processes.clear()


def inherit(environment: MutableMapping[str, str] = os.environ) -> Estate | None:
    """What the program before this one left; None if there was none. The variable is removed."""
    fd = environment.pop(VARIABLE, "")
    if not fd.isdigit():
        return None
    with open(int(fd), "rb") as file:
        file.seek(0)
        estate = Estate(msgspec.json.decode(file.read(), type=Left), children(os.getpid()))
    for kept in estate.left.descriptors:
        with contextlib.suppress(OSError):
            os.set_inheritable(kept, False)
    return estate


def is_trial(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process only finds out if the program on the disk would start."""
    return environment.get(VARIABLE) == TRIAL


def arguments() -> list[str]:
    """The command line of this very program."""
    return [sys.executable, *sys.orig_argv[1:]]


def replace(estate: Estate, environment: Mapping[str, str]) -> NoReturn:
    """Become the program on the disk. `environment` is added to this one. Raises OSError: then nothing has changed."""
    file = os.memfd_create("dormant-estate")
    os.write(file, msgspec.json.encode(estate.left))
    for fd in (file, *estate.left.descriptors):
        os.set_inheritable(fd, True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        os.execve(sys.executable, arguments(), {**os.environ, **environment, VARIABLE: str(file)})
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for fd in estate.left.descriptors:
            os.set_inheritable(fd, False)
        os.close(file)
        raise


def signals_are_handled() -> None:
    """Take what was held back while there was nobody to take it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
