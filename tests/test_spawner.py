"""The nursery and its client: nothing is ever left behind, whoever dies first."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from backends import nursery
from backends.base import Exit, Setup, Shared, StartFailed, Status
from backends.nursery import Launch
from backends.probe import Connect
from backends.process import Process, ProcessOptions
from backends.spawner import Spawner
from backends.units import Command
from tests import mimic
from tests.drivers import line, services
from tests.running import PATIENCE, children, eventually

shared = pytest.fixture(services)

ROOT = Path(__file__).parent.parent
STUBBORN = ("--ignore-term", "--fork", "--daemonize-child", "--say", "up")


def process(shared: Shared, *arguments: object) -> Process:
    options = ProcessOptions(command=Command(mimic.command(*arguments)))
    return Process(options, Setup("mimic", Path("/"), {}, Connect(), shared))


async def family(backend: Process) -> list[int]:
    """The PIDs of a backend that runs with STUBBORN or the like."""
    child = await line(backend, "child ")
    daemon = await line(backend, "daemon ")
    return [main_of(backend), int(child.split()[1]), int(daemon.split()[1])]


def main_of(backend: Process) -> int:
    assert backend._child is not None
    assert backend._child.pid is not None
    return backend._child.pid


def helper() -> int:
    """The PID of the one nursery of this process."""
    (pid,) = (pid for pid in children(os.getpid()) if b"nursery.py" in command_line(pid))
    return pid


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def test_the_end_of_the_main_process_is_the_end_of_all(shared: Shared) -> None:
    backend = process(shared, *STUBBORN)
    await backend.start()
    pids = await family(backend)
    assert all(map(alive, pids))
    os.kill(pids[0], signal.SIGKILL)
    assert await asyncio.wait_for(backend.wait(), PATIENCE) == Exit(signal=signal.SIGKILL)
    assert not any(map(alive, pids))


async def test_a_daemon_is_found_although_it_cleared_its_environment(shared: Shared) -> None:
    backend = process(shared, *STUBBORN, "--forget-environment")
    await backend.start()
    pids = await family(backend)
    await backend.stop(0)
    assert not any(map(alive, pids))


async def test_the_daemons_of_others_are_left_alone(shared: Shared) -> None:
    one, other = process(shared, *STUBBORN), process(shared, *STUBBORN)
    await one.start()
    await other.start()
    gone, kept = await family(one), await family(other)
    await one.stop(0)
    assert not any(map(alive, gone))
    assert all(map(alive, kept))
    await other.stop(0)


async def test_a_killed_helper_takes_all_with_it_and_is_replaced(shared: Shared) -> None:
    backends = [process(shared, *STUBBORN) for _ in range(3)]
    pids = []
    for backend in backends:
        await backend.start()
        pids += await family(backend)
    first = helper()
    os.kill(first, signal.SIGKILL)
    await asyncio.wait_for(asyncio.gather(*(backend.wait() for backend in backends)), PATIENCE)
    assert not any(map(alive, pids))
    assert {await backend.status() for backend in backends} == {Status.STOPPED}
    again = process(shared, "--say", "up")
    await again.start()
    await line(again, "up")
    assert helper() != first
    await again.stop(PATIENCE)


async def test_a_start_that_the_helper_does_not_survive_fails(shared: Shared) -> None:
    await process(shared, "--exit-after", 0).start()
    pid = helper()
    os.kill(pid, signal.SIGSTOP)
    starting = asyncio.create_task(process(shared).start())
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StartFailed, match="died"):
        await asyncio.wait_for(starting, PATIENCE)


async def test_what_was_meant_for_the_gateway_does_not_end_the_helper(shared: Shared) -> None:
    backend = process(shared, "--say", "up")
    await backend.start()
    pid = helper()
    assert os.getsid(pid) == pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(pid, number)
    await backend.stop(PATIENCE)
    await backend.start()
    assert helper() == pid
    await backend.stop(PATIENCE)


async def test_a_slow_helper_holds_up_nobody(shared: Shared) -> None:
    running = process(shared, "--say", "up")
    await running.start()
    await line(running, "up")
    pid = helper()
    os.kill(pid, signal.SIGSTOP)
    try:
        late = process(shared, "--say", "late")
        starting = asyncio.create_task(late.start())
        os.kill(main_of(running), signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            while await running.status() is not Status.STOPPED:  # seen by its pidfd
                await asyncio.sleep(0)
        assert not starting.done()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await asyncio.wait_for(running.wait(), PATIENCE) == Exit(signal=signal.SIGKILL)
    await late.stop(PATIENCE)
    assert await late.status() is Status.STOPPED


async def test_orders_that_the_socket_does_not_take_are_kept(shared: Shared) -> None:
    await process(shared, "--exit-after", 0).start()
    pid = helper()
    os.kill(pid, signal.SIGSTOP)
    padding = {f"PADDING{index}": "x" * 1000 for index in range(100)}
    backends = []
    for index in range(10):
        options = ProcessOptions(command=Command(["/bin/echo", f"number {index}"]), env=padding)
        backends.append(Process(options, Setup("echo", Path("/"), {}, Connect(), shared)))
    starts = [asyncio.create_task(backend.start()) for backend in backends]
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGCONT)
    await asyncio.wait_for(asyncio.gather(*starts), PATIENCE)
    await asyncio.wait_for(asyncio.gather(*(backend.wait() for backend in backends)), PATIENCE)
    assert [backend.output.tail() for backend in backends] == [[f"number {index}"] for index in range(10)]


async def test_the_helper_keeps_no_descriptor_and_no_process(shared: Shared) -> None:
    first = process(shared, "--exit-after", 0)
    await first.start()
    await asyncio.wait_for(first.wait(), PATIENCE)
    before = len(os.listdir(f"/proc/{helper()}/fd"))
    backends = [process(shared, "--exit-after", 0, "--daemonize-child") for _ in range(8)]
    backends += [Process(ProcessOptions(command=Command(["/none"])), backends[0].setup) for _ in range(8)]
    results = await asyncio.gather(*(backend.start() for backend in backends), return_exceptions=True)
    assert [type(result) for result in results] == [type(None)] * 8 + [StartFailed] * 8
    await asyncio.wait_for(asyncio.gather(*(backend.wait() for backend in backends)), PATIENCE)
    eventually(lambda: children(helper()) == [], "all reaped")
    assert len(os.listdir(f"/proc/{helper()}/fd")) == before


async def test_a_command_that_does_not_fit_is_refused(shared: Shared) -> None:
    with pytest.raises(StartFailed, match="longer than 128 KiB"):
        await process(shared, "--say", "x" * nursery.LARGEST).start()


async def test_without_an_interpreter_the_start_fails(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    backend = Process(ProcessOptions(command=Command(["true"])), Setup("true", Path("/"), {}, Connect(), shared))
    with pytest.raises(StartFailed, match="/nonexistent/python: No such file or directory"):
        await asyncio.wait_for(backend.start(), PATIENCE)
    monkeypatch.undo()
    await backend.start()
    assert await asyncio.wait_for(backend.wait(), PATIENCE) == Exit(code=0)


@pytest.mark.slow
async def test_closing_ends_everything() -> None:
    services = Shared()
    polite, stubborn = process(services, "--say", "up"), process(services, *STUBBORN)
    for backend in (polite, stubborn):
        await backend.start()
        await line(backend, "up")
    pids = [helper(), main_of(polite), *await family(stubborn)]
    await asyncio.wait_for(services.close(), PATIENCE)
    assert not any(map(alive, pids))
    assert await polite.wait() == Exit(signal=signal.SIGTERM)
    assert await stubborn.wait() == Exit(signal=signal.SIGKILL)


async def test_closing_what_was_never_used_does_nothing() -> None:
    spawner = Spawner()
    await spawner.close()
    await spawner.close()
    assert children(os.getpid()) == []


GATEWAY = """
import asyncio
from pathlib import Path
from backends.base import Setup, Shared
from backends.probe import Connect
from backends.process import Process, ProcessOptions
from backends.units import Command
from tests import mimic

async def main():
    shared = Shared()
    for index, arguments in enumerate((("--ignore-term", "--fork", "--daemonize-child"), ("--fork",), ())):
        options = ProcessOptions(command=Command(mimic.command(*arguments, "--say", "up")))
        backend = Process(options, Setup(f"backend{index}", Path("/"), {}, Connect(), shared))
        backend.output.listen(lambda line: print(line, flush=True))
        await backend.start()
        print("main", backend._child.pid, flush=True)
    await backend.freeze()
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_gateway_leaves_no_process_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", GATEWAY], cwd=ROOT, stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        try:
            pids: set[int] = set()
            while len(pids) < 6:
                word, _, number = gateway.stdout.readline().strip().partition(" ")
                assert word in ("main", "child", "daemon", "up"), "the gateway of the test failed"
                pids |= {int(number)} if number else set()
            assert set(children(gateway.pid)) > pids, "the helper is missing"
            pids.update(children(gateway.pid))
            assert all(map(alive, pids))
        finally:
            gateway.kill()
    eventually(lambda: not any(map(alive, pids)), "everything is gone", timeout=5)


def test_a_mark_is_inherited_and_read() -> None:
    mark = nursery.mark_of(12345, 678)
    pid = os.fork()
    if pid == 0:
        nursery._mark(mark)
        os.execv("/bin/sh", ["sh", "-c", "sleep 1000 & wait"])
    try:
        (child,) = eventually(lambda: children(pid))
        assert nursery.read_mark(pid) == nursery.read_mark(child) == mark
        assert nursery.read_mark(os.getpid()) is None
        assert nursery.read_mark(2**22 + 1) is None
        assert not nursery.purge(54321, patience=0)
        assert nursery.purge(54321)
        assert alive(pid)
        assert nursery.purge(12345)
        assert not alive(pid)
        assert not alive(child)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_messages_survive_the_way() -> None:
    launch = Launch([b"a", b"\xff"], {b"K": b"\xfe"}, b"/", rlimits={"core": (0, -1)})
    for order in (nursery.Spawn(1, launch, (-1, 0, 0), ["web"]), nursery.Signal(1, 9, True)):
        assert nursery.decode_order(nursery.encode(order)) == order
    for report in (nursery.Started(1, 2), nursery.Failed(1, nursery.Step.USER, 1), nursery.Ended(1, None, 9)):
        assert nursery.decode_report(nursery.encode(report)) == report
    with pytest.raises(msgspec.MsgspecError):
        nursery.decode_order(nursery.encode(nursery.Started(1, 2)))
