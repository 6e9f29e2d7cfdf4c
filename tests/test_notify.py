"""What the service manager passes in, and what it is told: the test is the service manager."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway import notify
from gateway.notify import Notifier, inherited_sockets
from tests.running import PATIENCE

FIRST = 900
"""What is passed in begins here instead of at 3, which pytest uses."""

PID = str(os.getpid())


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(notify, "FIRST_FD", FIRST)
    with ExitStack() as stack:
        yield stack


def passed_in(stack: ExitStack, count: int) -> list[str]:
    """Pass sockets in, which survive an exec; their addresses."""
    addresses = []
    for index in range(count):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            os.dup2(sock.fileno(), FIRST + index, inheritable=True)
            addresses.append(sock.getsockname())
    return addresses


def taken(stack: ExitStack, environment: dict[str, str]) -> list[tuple[str, socket.socket]]:
    found = inherited_sockets(environment)
    for _, sock in found:
        stack.enter_context(sock)
    return found


# Sockets that are passed in


def test_sockets_come_with_their_names_and_are_not_passed_on(stack: ExitStack) -> None:
    addresses = passed_in(stack, 2)
    environment = {
        "LISTEN_PID": PID, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "web:db", "LISTEN_PIDFDID": "1", "HOME": "/",
    }  # fmt: skip
    found = taken(stack, environment)
    assert [name for name, _ in found] == ["web", "db"]
    assert [sock.getsockname() for _, sock in found] == addresses
    assert [sock.fileno() for _, sock in found] == [FIRST, FIRST + 1]
    assert [sock.get_inheritable() for _, sock in found] == [False, False]
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ["unknown", "unknown"]),
        ("", ["unknown", "unknown"]),
        ("web", ["web", "unknown"]),
        (":db", ["unknown", "db"]),
        ("web:web:more", ["web", "web"]),
    ],
)
def test_a_socket_without_a_name_is_unknown(stack: ExitStack, names: str | None, expected: list[str]) -> None:
    passed_in(stack, 2)
    environment = {"LISTEN_PID": PID, "LISTEN_FDS": "2"} | ({} if names is None else {"LISTEN_FDNAMES": names})
    assert [name for name, _ in taken(stack, environment)] == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": PID},
        {"LISTEN_PID": PID, "LISTEN_FDS": "one"},
        {"LISTEN_PID": PID, "LISTEN_FDS": "-1"},
        {"LISTEN_PID": PID, "LISTEN_FDS": "0"},
    ],
)
def test_what_is_meant_for_somebody_else_is_left_alone(stack: ExitStack, environment: dict[str, str]) -> None:
    passed_in(stack, 1)
    stack.callback(os.close, FIRST)
    assert taken(stack, environment) == []
    assert environment == {}
    assert os.get_inheritable(FIRST)


def test_descriptors_that_are_no_sockets_are_passed_over(stack: ExitStack) -> None:
    (address,) = passed_in(stack, 1)
    os.dup2(FIRST, FIRST + 2)
    os.close(FIRST)  # a hole
    with open("/dev/null") as file:
        os.dup2(file.fileno(), FIRST + 1)
    stack.callback(os.close, FIRST + 1)
    found = taken(stack, {"LISTEN_PID": PID, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "hole:file:web"})
    assert [(name, sock.getsockname()) for name, sock in found] == [("web", address)]
    os.fstat(FIRST + 1)


# What is told


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """A socket as that of the service manager."""
    name = str(tmp_path / "notify") if request.param == "path" else f"\0dormant-test-{PID}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.setblocking(False)  # what was told is here already
        yield sock


def environment_of(manager: socket.socket, **more: str) -> dict[str, str]:
    name = os.fsdecode(manager.getsockname()).replace("\0", "@")
    return {"NOTIFY_SOCKET": name, **more}


def heard(manager: socket.socket) -> str:
    return manager.recv(1000).decode()


def silent(manager: socket.socket) -> bool:
    try:
        manager.recv(1000)
    except BlockingIOError:
        return True
    return False


async def test_each_state_is_told(manager: socket.socket) -> None:
    notifier = Notifier(environment_of(manager))
    notifier.ready()
    assert heard(manager) == "READY=1"
    notifier.status("2 asleep, 1 awake")
    assert heard(manager) == "STATUS=2 asleep, 1 awake"
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, _, since = heard(manager).partition("\nMONOTONIC_USEC=")
    assert first == "RELOADING=1"
    assert before <= int(since) <= time.monotonic_ns() // 1000
    notifier.stopping()
    assert heard(manager) == "STOPPING=1"
    notifier.close()
    assert silent(manager)


def test_children_do_not_see_the_variables(manager: socket.socket) -> None:
    environment = environment_of(manager, WATCHDOG_USEC="1000000", WATCHDOG_PID=PID, HOME="/")
    Notifier(environment).close()
    assert environment == {"HOME": "/"}


async def test_the_watchdog_is_fed_twice_in_its_time_until_the_end(manager: socket.socket) -> None:
    """From the event loop, so that a loop that is stuck is noticed."""
    loop = asyncio.get_running_loop()
    notifier = Notifier(environment_of(manager, WATCHDOG_USEC="100000", WATCHDOG_PID=PID))
    assert silent(manager)
    started = loop.time()
    notifier.ready()
    notifier.ready()  # after a reload
    assert [heard(manager) for _ in range(3)] == ["READY=1", "WATCHDOG=1", "READY=1"]
    for _ in range(2):
        assert await asyncio.wait_for(loop.sock_recv(manager, 1000), PATIENCE) == b"WATCHDOG=1"
    assert loop.time() - started >= 0.1
    notifier.close()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(loop.sock_recv(manager, 1000), 0.08)


@pytest.mark.parametrize(
    "watchdog",
    [
        {},
        {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getppid())},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
    ],
)
async def test_a_watchdog_that_does_not_watch_this_process_is_not_fed(
    manager: socket.socket, watchdog: dict[str, str]
) -> None:
    notifier = Notifier(environment_of(manager, **watchdog))
    notifier.ready()
    notifier.close()
    assert heard(manager) == "READY=1"
    assert silent(manager)


async def test_without_a_service_manager_nothing_is_told(manager: socket.socket) -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000"})
    notifier.ready()
    notifier.reloading()
    notifier.status("?")
    notifier.stopping()
    notifier.close()
    assert silent(manager)


async def test_a_service_manager_that_does_not_listen_does_not_matter(tmp_path: Path, manager: socket.socket) -> None:
    alone = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    alone.ready()
    alone.close()
    notifier = Notifier(environment_of(manager))
    for _ in range(1000):  # more than it takes while nobody reads
        notifier.status("x" * 1000)
    while not silent(manager):
        pass
    notifier.stopping()
    assert heard(manager) == "STOPPING=1"
    notifier.close()
    notifier.stopping()  # is told nobody, and fails for nobody
    assert silent(manager)


def test_the_manager_is_told_also_when_no_descriptors_are_left(manager: socket.socket) -> None:
    notifier = Notifier(environment_of(manager))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        notifier.status("no descriptors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert heard(manager) == "STATUS=no descriptors"
    notifier.close()
