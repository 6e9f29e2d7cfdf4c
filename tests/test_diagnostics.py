"""The connections of listening sockets, as the kernel knows them."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from backends.endpoint import Endpoint, bind, of_socket, parse
from gateway import diagnostics
from gateway.diagnostics import connections
from tests.plane import connect
from tests.running import PATIENCE, eventually

TCP = ["tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://*:0"]
ABSTRACT = f"unix:@dormant-test-{os.getpid()}"
DOORS = [*TCP, "unix:{}/s", pytest.param(ABSTRACT, id="abstract")]


class Door:
    """A listening socket, and whoever came through it."""

    def __init__(self, stack: ExitStack, address: str) -> None:
        self.stack = stack
        self.socket = stack.enter_context(bind(parse(address)))
        self.socket.settimeout(PATIENCE)
        self.endpoint = of_socket(self.socket)

    def knock(self) -> socket.socket:
        return self.stack.enter_context(connect(self.endpoint))

    def accept(self) -> socket.socket:
        return self.stack.enter_context(self.socket.accept()[0])

    @property
    def count(self) -> int:
        return connections([self.endpoint])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def door(request: pytest.FixtureRequest, stack: ExitStack, tmp_path: Path) -> Door:
    return Door(stack, request.param.format(tmp_path))


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_nobody_is_there(door: Door) -> None:
    assert door.count == 0
    assert connections([]) == 0


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_each_client_counts_until_both_sides_have_left(door: Door) -> None:
    client, server = door.knock(), door.accept()
    assert door.count == 1
    others = door.knock(), door.accept()
    assert door.count == 2
    for sock in (client, *others):
        sock.close()
    eventually(lambda: door.count == 1)  # here the server may still have something to do
    server.close()
    eventually(lambda: door.count == 0)


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_clients_in_the_backlog_count(door: Door) -> None:
    door.knock()
    door.knock().shutdown(socket.SHUT_WR)
    assert door.count == 2
    door.accept()
    assert door.count == 2


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_a_client_that_ended_its_sending_still_counts(door: Door) -> None:
    client, server = door.knock(), door.accept()
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    assert door.count == 1


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_a_server_that_ended_its_sending_still_counts(door: Door) -> None:
    client, server = door.knock(), door.accept()
    server.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    assert door.count == 1


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_what_the_server_closed_does_not_count_while_the_client_keeps_it_open(door: Door) -> None:
    """TCP calls it FIN_WAIT2, which lasts for a minute."""
    client = door.knock()
    door.accept().close()
    assert client.recv(1) == b""
    assert door.count == 0


def test_a_connection_counts_at_the_door_that_it_came_through(stack: ExitStack, tmp_path: Path) -> None:
    doors = [Door(stack, address) for address in ("tcp://127.0.0.1:0", f"unix:{tmp_path}/a", f"unix:{tmp_path}/ab")]
    port = doors[0].socket.getsockname()[1]
    doors += [Door(stack, f"tcp://127.0.0.2:{port}"), Door(stack, f"tcp://[::1]:{port}")]
    for number, door in enumerate(doors):
        door.knock()
        door.accept()
        assert [other.count for other in doors] == [1] * (number + 1) + [0] * (len(doors) - number - 1)
    assert connections(door.endpoint for door in doors) == len(doors)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_door_for_all_addresses_counts_the_clients_of_each(stack: ExitStack, host: str) -> None:
    door = Door(stack, "tcp://*:0")
    stack.enter_context(socket.create_connection((host, door.socket.getsockname()[1])))
    door.accept()
    assert door.count == 1


def test_a_door_for_all_addresses_of_ipv4_does_not_count_clients_of_ipv6(stack: ExitStack) -> None:
    door = Door(stack, "tcp://0.0.0.0:0")
    other = Door(stack, f"tcp://[::1]:{door.socket.getsockname()[1]}")
    other.knock()
    other.accept()
    assert (other.count, door.count) == (1, 0)


def test_a_look_asks_once_and_takes_one_descriptor(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question about Unix sockets is answered with all that there are."""
    doors = [Door(stack, f"unix:{tmp_path}/{number}") for number in range(3)]
    port = Door(stack, "tcp://127.0.0.1:0").socket.getsockname()[1]
    doors += [Door(stack, f"tcp://127.0.0.{number}:{port}") for number in (2, 3)]
    assert connections(door.endpoint for door in doors) == 0  # the first look also imports a library
    asked: list[int] = []
    dump = diagnostics._dump
    monkeypatch.setattr(diagnostics, "_dump", lambda *words: asked.append(words[1]) or dump(*words))
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/dev/null") as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 2, hard))
        try:
            assert connections(door.endpoint for door in doors) == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert asked == [socket.AF_INET, socket.AF_UNIX]
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_error_of_the_kernel_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "SOCK_DIAG_BY_FAMILY", 99)
    with pytest.raises(OSError, match="Invalid argument"):
        connections([parse("unix:/s")])


def test_datagram_sockets_have_no_connections(stack: ExitStack) -> None:
    udp = stack.enter_context(bind(parse("udp://127.0.0.1:0")))
    client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.connect(udp.getsockname())
    client.send(b"x")
    endpoints: list[Endpoint] = [of_socket(udp), parse("vsock://any:3000")]
    assert connections(endpoints) == 0
