"""Holds outlive a restart: what one gateway noted, the next one finds; nothing about the file can keep it from starting."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest

from backends.units import Duration
from gateway import holds
from gateway.config import Idle
from gateway.holds import Holds
from gateway.states import State
from tests.test_activation import FREEZE, SLEEP, SOON, START, Make, let_time_pass, stages

stage = pytest.fixture(stages)


class Clock:
    """The wall clock, which only the test moves."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(holds, "_now", clock)
    return clock


async def loaded(directory: Path) -> dict[str, float | None]:
    """What the next gateway finds."""
    return await asyncio.to_thread(Holds(str(directory)).load)


async def test_the_next_gateway_finds_them_with_the_time_that_is_left(tmp_path: Path, clock: Clock) -> None:
    first = Holds(str(tmp_path))
    await first.set("web", 60.0)
    await first.set("db", None)
    clock.now += 20
    assert await loaded(tmp_path) == {"web": 40.0, "db": None}


async def test_the_state_directory_is_made(tmp_path: Path, clock: Clock) -> None:
    await Holds(str(tmp_path / "a" / "b")).set("web", 60.0)
    assert await loaded(tmp_path / "a" / "b") == {"web": 60.0}


async def test_the_last_word_counts(tmp_path: Path, clock: Clock) -> None:
    first = Holds(str(tmp_path))
    for seconds in (60.0, None, 30.0):
        await first.set("web", seconds)
    assert await loaded(tmp_path) == {"web": 30.0}


@pytest.mark.parametrize(("passed", "left"), [(59.0, {"web": 1.0}), (60.0, {}), (61.0, {})])
async def test_one_that_ended_meanwhile_is_forgotten(
    tmp_path: Path, clock: Clock, passed: float, left: dict[str, float]
) -> None:
    await Holds(str(tmp_path)).set("web", 60.0)
    clock.now += passed
    assert await loaded(tmp_path) == left


async def test_one_that_ended_does_not_return_with_the_next_one(tmp_path: Path, clock: Clock) -> None:
    await Holds(str(tmp_path)).set("web", 60.0)
    clock.now += 100
    second = Holds(str(tmp_path))
    await asyncio.to_thread(second.load)
    await second.set("db", 5.0)
    assert json.loads((tmp_path / "holds.json").read_bytes()) == {"db": clock.now + 5}


async def test_what_was_loaded_is_kept_when_another_is_set(tmp_path: Path, clock: Clock) -> None:
    await Holds(str(tmp_path)).set("web", 60.0)
    second = Holds(str(tmp_path))
    await asyncio.to_thread(second.load)
    await second.set("db", None)
    assert await loaded(tmp_path) == {"web": 60.0, "db": None}


@pytest.mark.parametrize("seconds", [60.0, None])
async def test_a_removed_one_is_gone(tmp_path: Path, clock: Clock, seconds: float | None) -> None:
    first = Holds(str(tmp_path))
    await first.set("web", seconds)
    await first.set("db", 5.0)
    await first.remove("web")
    assert await loaded(tmp_path) == {"db": 5.0}


async def test_removing_what_is_not_held_writes_nothing(tmp_path: Path) -> None:
    await Holds(str(tmp_path)).remove("web")
    assert list(tmp_path.iterdir()) == []


async def test_without_a_file_nothing_is_held_and_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert await loaded(tmp_path) == {}
    assert caplog.messages == []


BROKEN = {
    "empty": b"",
    "torn": b'{"web": 17',
    "list": b"[1]",
    "text for a time": b'{"web": "soon"}',
    "not a number": b'{"web": NaN}',
    "not UTF-8": b'{"\xff": 1.0}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
async def test_a_broken_file_is_said_and_ignored_and_then_written_anew(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    file = tmp_path / "holds.json"
    file.write_bytes(content)
    second = Holds(str(tmp_path))
    assert await asyncio.to_thread(second.load) == {}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"holds are not restored: {file}: ")
    await second.set("web", 60.0)
    assert await loaded(tmp_path) == {"web": 60.0}


async def test_a_file_that_cannot_be_read_is_said_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "holds.json").mkdir()  # root may read every file, so this is what fails for everybody
    assert await loaded(tmp_path) == {}
    (message,) = caplog.messages
    assert message.startswith("holds are not restored: ") and "Is a directory" in message


async def test_an_unwritable_directory_is_said_and_the_hold_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    first = Holds(str(tmp_path / "file" / "state"))
    await first.set("web", 60.0)
    await first.remove("web")
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith("holds are not kept over a restart: ")


async def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = Holds(str(tmp_path))
    await first.set("web", 60.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", _disk_full)
        await first.set("db", 60.0)
    assert "No space left" in caplog.text
    assert await loaded(tmp_path) == {"web": 60.0}
    await first.set("mail", None)  # the next one takes the lost one along
    assert await loaded(tmp_path) == {"web": 60.0, "db": 60.0, "mail": None}


def _disk_full(path: Path, data: bytes) -> int:
    with path.open("wb") as file:
        file.write(data[:5])
    raise OSError(28, "No space left on device")


async def test_many_at_once_are_all_kept(tmp_path: Path, clock: Clock) -> None:
    first = Holds(str(tmp_path))
    names = [f"site{number}" for number in range(30)]
    await asyncio.gather(*(first.set(name, 60.0) for name in names))
    await asyncio.gather(*(first.remove(name) for name in names[::2]), *(first.set(name, None) for name in names[1::2]))
    assert await loaded(tmp_path) == dict.fromkeys(names[1::2])
    assert [file.name for file in tmp_path.iterdir()] == ["holds.json"]


async def test_each_returns_only_when_it_is_on_the_disk(tmp_path: Path, clock: Clock) -> None:
    """Also the one that came while another was being written."""
    first = Holds(str(tmp_path))

    async def set_and_look(name: str) -> bool:
        await first.set(name, 60.0)
        return name in json.loads((tmp_path / "holds.json").read_bytes())

    assert all(await asyncio.gather(*(set_and_look(f"site{number}") for number in range(10))))


# At work, in an activation


async def test_a_hold_wakes_it_and_keeps_it_awake_until_it_is_released(stage: Make) -> None:
    web = stage(SOON)
    web.life.hold(None)
    await web.reach(State.READY)
    await let_time_pass(stage)
    assert web.did == START
    assert (web.life.last_wake, web.life.sleeps_at) == ("a hold", float("inf"))
    web.life.release()
    await web.asked("arm")
    assert web.did == [*START, *SLEEP]


async def test_a_hold_ends_by_itself(stage: Make) -> None:
    web = stage(Idle(after=Duration(0)))
    begun = asyncio.get_running_loop().time()
    web.life.hold(0.03)
    await web.asked("arm")
    assert web.did == [*START, *SLEEP] and web.at["close"] >= begun + 0.03


async def test_a_later_hold_replaces_the_earlier_one(stage: Make) -> None:
    web = stage(SOON)
    web.life.hold(None)
    await web.reach(State.READY)
    web.life.hold(0.0)
    await web.asked("arm")
    assert web.did == [*START, *SLEEP]


async def test_a_hold_thaws_what_is_frozen_and_keeps_it_awake(stage: Make) -> None:
    web = stage(FREEZE)
    await web.begin()
    await web.reach(State.FROZEN)
    web.life.hold(None)
    await web.reach(State.READY)
    await let_time_pass(stage)
    assert web.did == ["close", "freeze", "arm", "thaw", "open"]


async def test_a_release_does_not_cut_connections(stage: Make) -> None:
    web = stage(SOON)
    web.life.hold(None)
    await web.reach(State.READY)
    web.life.busy()
    web.life.release()
    await let_time_pass(stage)
    assert web.did == START
