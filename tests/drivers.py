"""The drivers under the contract suite: how each of them runs `mimic.py`. A new driver adds one class to DRIVERS."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from backends.base import Backend, Setup, Shared
from backends.endpoint import Endpoint, parse
from backends.probe import Connect, Readiness
from backends.process import Process, ProcessOptions
from backends.units import Command
from tests import mimic
from tests.running import PATIENCE


async def services() -> AsyncIterator[Shared]:
    """The shared services of a gateway. A test module makes a fixture of it: `shared = pytest.fixture(services)`."""
    shared = Shared()
    yield shared
    await shared.close()


async def line(backend: Backend, beginning: str) -> str:
    """The first line of the output that begins so, once it is there."""
    found: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def look(text: str) -> None:
        if text.startswith(beginning) and not found.done():
            found.set_result(text)

    forget = backend.output.listen(look)
    for text in backend.output.fresh():
        look(text)
    try:
        return await asyncio.wait_for(found, PATIENCE)
    finally:
        forget()


class Driver(ABC):
    """Makes backends of one kind, each with `mimic.py` as its payload."""

    name: str

    def __init__(self, directory: Path, shared: Shared) -> None:
        self.directory = directory
        self.shared = shared

    @staticmethod
    def missing() -> str | None:
        """Why this machine cannot run it; None when it can."""
        return None

    @property
    @abstractmethod
    def listen(self) -> str:
        """Where the payload listens, seen from inside."""

    @property
    @abstractmethod
    def endpoint(self) -> Endpoint:
        """Where that is dialled, as it would be configured."""

    @abstractmethod
    def make(self, *arguments: object, readiness: Readiness | None = None, passes: bool = False) -> Backend:
        """A backend that runs the payload with these arguments."""

    @abstractmethod
    def broken(self) -> Backend:
        """A backend that cannot be started."""

    def setup(self, readiness: Readiness | None = None, passes: bool = False) -> Setup:
        endpoints: Mapping[str, Endpoint] = {"": self.endpoint}
        return Setup("mimic", self.directory, endpoints, readiness or Connect(), self.shared, passes)


class ProcessDriver(Driver):
    name = "process"

    @property
    def listen(self) -> str:
        return f"unix:{self.directory}/mimic.sock"

    @property
    def endpoint(self) -> Endpoint:
        return parse(self.listen)

    def make(self, *arguments: object, readiness: Readiness | None = None, passes: bool = False) -> Backend:
        return Process(ProcessOptions(command=Command(mimic.command(*arguments))), self.setup(readiness, passes))

    def broken(self) -> Backend:
        return Process(ProcessOptions(command=Command(["/nonexistent/program"])), self.setup())


DRIVERS: list[type[Driver]] = [ProcessDriver]
