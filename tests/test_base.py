"""What all drivers share: how things end, what is awaited beside the end, and the services of a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from backends import base
from backends.base import (
    Backend,
    Exit,
    Exited,
    Service,
    Setup,
    Shared,
    Status,
    Usage,
    unless,
)
from backends.endpoint import Endpoint, bind, of_socket, parse
from backends.probe import Connect

ENDED = Exit(code=3)


class Sleeper(Backend):
    """Runs until `end` is set, and does nothing."""

    def __init__(self, endpoints: Mapping[str, Endpoint] | None = None) -> None:
        super().__init__(None, Setup("sleeper", Path("/"), endpoints or {}, Connect(), Shared()))
        self.end = asyncio.Event()
        self.troubled = asyncio.Event()

    async def start(self, sockets: object = ()) -> None:
        self.output.begin()

    async def wait(self) -> Exit:
        await self.end.wait()
        return ENDED

    async def stop(self, grace: float) -> None:
        self.end.set()

    async def status(self) -> Status:
        return Status.STOPPED if self.end.is_set() else Status.RUNNING

    def _report(self, trouble: str) -> None:
        super()._report(trouble)
        self.troubled.set()


class Task:
    """Something to await, and what became of it."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.begun = asyncio.Event()
        self.collected = False

    async def run(self) -> Exit:
        self.begun.set()
        try:
            return await self.outcome
        finally:
            self.collected = True


def ended(exit: Exit) -> Exception:
    return Exited(exit)


# Words


@pytest.mark.parametrize(
    ("exit", "text"),
    [
        (Exit(code=0), "exit status 0"), (Exit(code=3), "exit status 3"), (Exit(signal=9), "killed by signal 9"),
        (Exit(code=137, signal=9), "killed by signal 9"), (Exit(), "cause unknown"),
    ],
)  # fmt: skip
def test_an_exit_says_how_it_was(exit: Exit, text: str) -> None:
    assert str(exit) == text
    assert str(Exited(exit)) == f"it ended ({text})"


def test_exited_has_the_last_lines_of_output() -> None:
    error = Exited(ENDED, ["one", "two"])
    assert str(error) == "it ended (exit status 3); its last output:\n    one\n    two"
    assert (error.exit, error.lines) == (ENDED, ("one", "two"))


# unless


async def test_what_is_wanted_comes_first() -> None:
    end, wanted = Task(), Task()
    wanted.outcome.set_result(Exit(0))
    assert await unless(end.run(), wanted.run(), ended) == Exit(0)
    assert end.outcome.cancelled() and end.collected


async def test_the_end_comes_first() -> None:
    end, wanted = Task(), Task()
    end.outcome.set_result(ENDED)
    with pytest.raises(Exited) as caught:
        await unless(end.run(), wanted.run(), ended)
    assert caught.value.exit is ENDED
    assert wanted.outcome.cancelled() and wanted.collected


async def test_both_come_at_once() -> None:
    end, wanted = Task(), Task()
    end.outcome.set_result(ENDED)
    wanted.outcome.set_result(Exit(0))
    assert await unless(end.run(), wanted.run(), ended) == Exit(0)
    assert end.collected


@pytest.mark.parametrize("which", ["end", "wanted"])
async def test_an_error_of_either_is_raised_and_the_other_is_cancelled(which: str) -> None:
    tasks = {"end": Task(), "wanted": Task()}
    tasks[which].outcome.set_exception(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        await unless(tasks["end"].run(), tasks["wanted"].run(), ended)
    other = tasks["wanted" if which == "end" else "end"]
    assert other.outcome.cancelled() and other.collected


async def test_both_are_cancelled_and_collected_with_whoever_waits() -> None:
    end, wanted = Task(), Task()
    waiting = asyncio.create_task(unless(end.run(), wanted.run(), ended))
    await asyncio.gather(end.begun.wait(), wanted.begun.wait())
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert all(task.outcome.cancelled() and task.collected for task in (end, wanted))


class Slow(Task):
    """Needs time to be cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.cleaning, self.clean = asyncio.Event(), asyncio.Event()

    async def run(self) -> Exit:
        try:
            return await self.outcome
        finally:
            self.cleaning.set()
            await self.clean.wait()
            self.collected = True


async def test_what_takes_its_time_to_be_cancelled_is_waited_for() -> None:
    end, wanted = Slow(), Task()
    wanted.outcome.set_result(Exit(0))
    waiting = asyncio.create_task(unless(end.run(), wanted.run(), ended))
    await end.cleaning.wait()
    assert not waiting.done()
    end.clean.set()
    assert await waiting == Exit(0)
    assert end.collected


async def test_whoever_is_cancelled_while_it_collects_is_cancelled() -> None:
    end, wanted = Slow(), Task()
    wanted.outcome.set_result(Exit(0))
    waiting = asyncio.create_task(unless(end.run(), wanted.run(), ended))
    await end.cleaning.wait()
    waiting.cancel()
    end.clean.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting


# Backends


async def test_a_backend_that_ends_shows_the_last_lines_of_this_life() -> None:
    backend = Sleeper()
    backend.output.line("of another life")
    await backend.start()
    for number in range(12):
        backend.output.line(str(number))
    backend.end.set()
    with pytest.raises(Exited) as caught:
        await backend.unless_gone(asyncio.Event().wait())
    assert caught.value.exit == ENDED
    assert caught.value.lines == tuple(map(str, range(2, 12)))


async def test_a_backend_is_ready_when_its_endpoint_answers() -> None:
    with bind(parse("tcp://127.0.0.1:0")) as listening:
        endpoints = {"": of_socket(listening)}
        assert await Sleeper(endpoints).ready() == endpoints


async def test_the_trouble_of_the_last_probe_is_kept_for_the_error_message() -> None:
    with bind(parse("tcp://127.0.0.1:0")) as listening:
        endpoint = of_socket(listening)
    backend = Sleeper({"": endpoint})
    readying = asyncio.create_task(backend.ready())
    await backend.troubled.wait()
    assert "refused" in backend.trouble
    await backend.stop(0)
    with pytest.raises(Exited):
        await readying
    assert "refused" in backend.trouble


async def test_what_a_driver_does_not_offer() -> None:
    backend = Sleeper()
    assert await backend.usage() == Usage(None, None)
    assert backend.capabilities == base.Capability.NONE
    for call in (backend.freeze, backend.thaw):
        with pytest.raises(NotImplementedError):
            await call()


# Services


async def test_services_are_made_once_on_first_use_and_closed_in_the_opposite_order() -> None:
    closed: list[object] = []

    class First:
        async def close(self) -> None:
            closed.append(self)

    class Second(First):
        pass

    shared = Shared()
    first, second = shared.get(First), shared.get(Second)
    assert type(first) is First and type(second) is Second
    assert shared.get(First) is first
    await shared.close()
    assert closed == [second, first]
    await shared.close()
    assert closed == [second, first]
    assert shared.get(First) is not first


async def test_a_service_that_cannot_be_closed_does_not_keep_the_others_open(caplog: pytest.LogCaptureFixture) -> None:
    closed: list[object] = []

    class First(Service):
        async def close(self) -> None:
            closed.append(self)

    class Second(Service):
        async def close(self) -> None:
            raise OSError("the daemon is gone")

    shared = Shared()
    first, _ = shared.get(First), shared.get(Second)
    await shared.close()
    assert closed == [first]
    assert [record.getMessage() for record in caplog.records] == ["Second could not be closed"]
    assert "the daemon is gone" in caplog.text
