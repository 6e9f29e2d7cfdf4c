"""Driver `external`: the user's own commands."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.base import Backend, BackendError, Capability, Exited, Setup, Shared, Status
from backends.command import CommandFailed
from backends.endpoint import parse
from backends.external import Action, External, ExternalOptions
from backends.probe import Connect
from backends.units import decode
from tests import mimic
from tests.running import PATIENCE

Make = Callable[..., External]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(**options: Any) -> External:
        parsed = msgspec.convert(options, ExternalOptions, dec_hook=decode)
        endpoint = parse("unix:service.sock", tmp_path)
        return External(parsed, Setup("service", tmp_path, {"": endpoint}, Connect(), Shared()))

    return make


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


FLAG = {"start": sh("touch up"), "stop": sh("rm up"), "status": sh("test -e up")}


async def test_without_commands_it_is_always_there(make: Make) -> None:
    backend = make()
    assert backend.capabilities == Capability.ALWAYS_ON
    await backend.start()
    assert await backend.status() is Status.RUNNING
    await backend.stop(0)
    assert await backend.status() is Status.RUNNING
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(backend.wait(), 0.01)


async def test_its_commands_start_and_stop_it(make: Make, tmp_path: Path) -> None:
    backend = make(**FLAG)
    assert backend.capabilities == Capability.ADOPT
    for _ in range(2):
        assert await backend.status() is Status.STOPPED
        await asyncio.wait_for(backend.wait(), PATIENCE)
        await backend.start()
        assert (tmp_path / "up").exists()
        assert await backend.status() is Status.RUNNING
        waiting = asyncio.create_task(backend.wait())
        await backend.stop(0)
        assert not (tmp_path / "up").exists()
        await asyncio.wait_for(waiting, PATIENCE)
        await backend.stop(0)


async def test_without_a_status_command_the_last_command_counts(make: Make, tmp_path: Path) -> None:
    backend = make(start=sh("touch up"), stop=sh("rm up"))
    assert await backend.status() is Status.STOPPED
    await backend.stop(0)
    await backend.start()
    assert await backend.status() is Status.RUNNING
    await backend.stop(0)
    assert await backend.status() is Status.STOPPED
    assert not (tmp_path / "up").exists()


async def test_what_ran_before_the_gateway_is_found(make: Make, tmp_path: Path) -> None:
    (tmp_path / "up").touch()
    backend = make(**FLAG)
    assert await backend.status() is Status.RUNNING
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(backend.wait(), 0.01)
    await backend.stop(0)
    assert not (tmp_path / "up").exists()


async def test_a_look_that_finds_it_stopped_ends_the_wait(make: Make, tmp_path: Path) -> None:
    backend = make(**FLAG)
    await backend.start()
    ready = asyncio.create_task(backend.ready())
    await asyncio.sleep(0)
    (tmp_path / "up").unlink()
    assert await backend.status() is Status.STOPPED
    with pytest.raises(Exited, match="cause unknown"):
        await asyncio.wait_for(ready, PATIENCE)


async def test_what_it_starts_lives_on_its_own(make: Make, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/service.sock"
    command = " ".join(mimic.command("--listen", listen))
    backend = make(start=sh(f"setsid {command} & echo $! > pid"), stop=sh("kill $(cat pid)"))
    await backend.start()  # although the daemon has its stdout
    assert await asyncio.wait_for(backend.ready(), PATIENCE) == {"": parse(listen)}
    pid = int((tmp_path / "pid").read_text())
    assert os.getsid(pid) == pid
    await backend.stop(PATIENCE)


async def test_a_failed_start_says_why_and_may_be_stopped(make: Make, tmp_path: Path) -> None:
    backend = make(start=sh("touch half; echo no luck; exit 6"), stop=sh("rm half"))
    with pytest.raises(CommandFailed, match="exit status 6") as caught:
        await backend.start()
    assert caught.value.lines == ("no luck",)
    assert backend.output.fresh() == ["no luck"]
    await backend.stop(0)
    assert not (tmp_path / "half").exists()
    assert await backend.status() is Status.STOPPED


async def test_a_cancelled_start_may_be_stopped(make: Make, tmp_path: Path) -> None:
    backend = make(start=sh("touch half; echo now; sleep 1000"), stop=sh("rm half"))
    said = asyncio.Event()
    backend.output.listen(lambda _: said.set())
    starting = asyncio.create_task(backend.start())
    await asyncio.wait_for(said.wait(), PATIENCE)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await backend.stop(0)
    assert not (tmp_path / "half").exists()


async def test_what_a_failed_start_left_is_cleaned_up_although_it_does_not_run(make: Make, tmp_path: Path) -> None:
    backend = make(start=sh("touch half; exit 6"), stop=sh("rm half"), status=["false"])
    with pytest.raises(CommandFailed):
        await backend.start()
    assert await backend.status() is Status.STOPPED
    await backend.stop(0)
    assert not (tmp_path / "half").exists()
    await backend.stop(0)  # runs nothing: `rm` would fail


async def test_it_says_how_long_its_stop_may_take(make: Make) -> None:
    assert make().stop_slack == make(start=["true"]).stop_slack == Backend.stop_slack
    slow = make(start=["true"], stop={"command": "true", "timeout": "2m"})
    assert slow.stop_slack == 120 + Backend.stop_slack


async def test_a_stop_that_fails_says_why_and_may_be_tried_again(make: Make, tmp_path: Path) -> None:
    backend = make(start=["true"], stop=sh("test -e allowed"))
    await backend.start()
    with pytest.raises(CommandFailed, match="exit status 1"):
        await backend.stop(0)
    assert await backend.status() is Status.RUNNING
    (tmp_path / "allowed").touch()
    await backend.stop(0)
    assert await backend.status() is Status.STOPPED


async def test_stopping_waits_until_it_is_stopped(make: Make, tmp_path: Path) -> None:
    backend = make(start=sh("touch up"), stop=sh("(sleep 0.1; rm up) & echo $! > pid"), status=sh("test -e up"))
    await backend.start()
    await backend.stop(PATIENCE)
    assert not (tmp_path / "up").exists()


async def test_what_does_not_stop_is_an_error_after_the_grace(make: Make) -> None:
    backend = make(start=sh("touch up"), stop=["true"], status=sh("test -e up"))
    await backend.start()
    with pytest.raises(BackendError, match=r"still runs 0.05s after"):
        await backend.stop(0.05)


@pytest.mark.parametrize("status", [["/nonexistent"], {"command": "sleep 1000", "timeout": "50ms"}])
async def test_a_status_command_that_says_nothing_is_an_error(make: Make, status: object) -> None:
    backend = make(start=["true"], stop=["true"], status=status)
    with pytest.raises(CommandFailed):
        await backend.status()


async def test_each_command_has_its_deadline(make: Make) -> None:
    backend = make(start={"command": "sleep 1000", "timeout": "50ms"})
    with pytest.raises(CommandFailed, match=r"sleep \.\.\.: timed out after 0.05s"):
        await backend.start()


async def test_commands_know_the_name_of_the_backend(make: Make) -> None:
    backend = make(start=sh("echo $DORMANT_BACKEND in $PWD"))
    await backend.start()
    assert backend.output.tail() == [f"service in {backend.setup.directory}"]


@pytest.mark.parametrize("written", ["sleep '1'", ["sleep", 1], {"command": ["sleep", "1"]}, {"command": "sleep 1"}])
def test_a_command_may_be_written_in_several_ways(make: Make, written: object) -> None:
    assert make(start=written)._start == Action(("sleep", "1"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": ""}, "is not a command"),
        ({"start": []}, "is not a command"),
        ({"start": "'"}, "cannot be split"),
        ({"start": {"command": "true", "timeout": "soon"}}, "is not a duration"),
        ({"start": {"command": "true", "deadline": 5}}, "unknown field"),
        ({"begin": "true"}, "unknown field"),
    ],
)
def test_bad_options_are_refused(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        make(**options)
