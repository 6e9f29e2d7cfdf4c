"""Helper programs: checked, bounded, and gone when they should be."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from backends.base import Exit
from backends.command import KEPT_OUTPUT, CommandFailed, run
from backends.output import Output
from tests import mimic
from tests.running import PATIENCE, children, eventually

SHELL = ("/bin/sh", "-c")


async def sh(script: str, timeout: float = PATIENCE, **options: object) -> str:
    return await run((*SHELL, script), timeout=timeout, **options)  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


async def test_it_returns_what_the_program_said_on_stdout() -> None:
    output = Output()
    assert await sh("echo one; echo two >&2; printf three", output=output) == "one\nthree"
    assert sorted(output.tail()) == ["one", "three", "two"]


async def test_its_stdin_is_empty_and_its_session_its_own() -> None:
    assert await sh("cat") == ""
    pid, session = (await sh("cut -d' ' -f1,6 /proc/$$/stat")).split()
    assert pid == session != str(os.getsid(0))


async def test_no_descriptor_leaks_into_it() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        said = await run(mimic.command("--fd-report", "--exit-after", 0), timeout=PATIENCE)
        assert said.startswith("fds 0,1,2 None ")
    finally:
        os.close(reader)
        os.close(writer)


async def test_the_environment_is_the_gateways_and_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("KEPT", "yes")
    assert await sh('echo "$KEPT $ADDED $NOTIFY_SOCKET"', env={"ADDED": "too"}) == "yes too \n"


async def test_paths_are_relative_to_its_folder(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\npwd\n")
    script.chmod(0o755)
    assert await run(["./script"], timeout=PATIENCE, cwd=tmp_path) == f"{tmp_path}\n"


async def test_a_failure_says_what_ended_how_and_the_last_lines() -> None:
    with pytest.raises(CommandFailed) as caught:
        await sh("seq 20; echo oops >&2; exit 3", env={"SECRET": "hunter2"})
    error = caught.value
    assert error.exit == Exit(code=3)
    assert error.lines[-1] == "oops"
    assert len(error.lines) == 10
    assert str(error).startswith("/bin/sh ...: exit status 3; its last output:\n    ")
    assert "hunter2" not in str(error)


async def test_words_that_may_be_secret_are_not_shown() -> None:
    with pytest.raises(CommandFailed) as caught:
        await run(["/bin/false", "--password=hunter2"], timeout=PATIENCE)
    assert str(caught.value) == "/bin/false ...: exit status 1"
    assert caught.value.command == ("/bin/false", "--password=hunter2")


async def test_a_signal_is_named() -> None:
    with pytest.raises(CommandFailed, match="killed by signal 15") as caught:
        await sh("kill $$")
    assert caught.value.exit == Exit(signal=15)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("/nonexistent", "No such file or directory"),
        ("no-such-program", "No such file or directory"),
        ("/etc/passwd", "Permission denied"),
        ("/", "Permission denied"),
    ],
)
async def test_what_cannot_be_run_says_why(program: str, why: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        await run([program], timeout=PATIENCE)
    assert str(caught.value) == f"{program}: {why}"
    assert caught.value.exit is None


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=f"true: cwd {tmp_path}/none: No such file or directory"):
        await run(["true"], timeout=PATIENCE, cwd=tmp_path / "none")


async def test_after_its_deadline_its_whole_group_is_killed() -> None:
    output = Output()
    with pytest.raises(CommandFailed, match=r"timed out after 0.2s; its last output:\n    \d+") as caught:
        await sh("trap '' TERM; sleep 1000 & echo $!; echo $$; wait", timeout=0.2, output=output)
    assert caught.value.exit is None
    sleeper, shell = map(int, output.tail())
    assert gone(shell)
    eventually(lambda: gone(sleeper))


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 10])
async def test_when_cancelled_it_is_killed_and_reaped(turns: int) -> None:
    running = asyncio.create_task(sh("sleep 1000"))
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_when_cancelled_in_the_middle_its_group_is_killed() -> None:
    output = Output()
    said = asyncio.Event()
    output.listen(lambda _: said.set())
    running = asyncio.create_task(sh("sleep 1000 & echo $!; wait", output=output))
    await asyncio.wait_for(said.wait(), PATIENCE)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    eventually(lambda: gone(int(output.tail()[0])))


@pytest.mark.parametrize("turns", [0, 1, 2, None])
async def test_whoever_is_cancelled_again_leaves_nothing(turns: int | None) -> None:
    """Neither a process, nor a descriptor, nor a reader that keeps the loop busy."""
    before = len(os.listdir("/proc/self/fd"))
    output = Output()
    running = asyncio.create_task(sh("echo $$; exec sleep 1000", output=output))
    for _ in range(turns or 0):
        await asyncio.sleep(0)
    while turns is None and not output.tail():
        await asyncio.sleep(0.001)
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(PATIENCE):
        while len(os.listdir("/proc/self/fd")) > before:
            await asyncio.sleep(0.001)
    cpu = time.process_time()
    await asyncio.sleep(0.1)  # nothing happens in it: the CPU used meanwhile is what is looked at
    assert time.process_time() - cpu < 0.05
    assert not children(os.getpid())


async def test_whoever_is_cancelled_is_cancelled_also_when_it_could_not_be_run() -> None:
    running = asyncio.create_task(run(["/nonexistent"], timeout=PATIENCE))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_daemon_that_keeps_its_output_open_holds_up_nobody_and_lives_on() -> None:
    pid = int(await asyncio.wait_for(sh("setsid sleep 1000 & echo $!"), PATIENCE))
    assert not gone(pid)
    os.kill(pid, signal.SIGKILL)


async def test_what_it_says_is_bounded() -> None:
    output = Output()
    said = await sh(f"yes 0123456 | head -c {KEPT_OUTPUT + 100_000}; echo end", output=output)
    assert len(said) == KEPT_OUTPUT
    assert output.tail(1)[0].endswith("end")


async def test_many_at_a_time() -> None:
    assert await asyncio.gather(*(sh(f"echo {n}") for n in range(50))) == [f"{n}\n" for n in range(50)]
