"""The listening sockets of the gateway: bound or inherited, with their files, until the end."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from backends.endpoint import Endpoint, Tcp, Unix, bind, of_socket, parse
from gateway.config import Listener
from gateway.listeners import ListenError, Listeners
from tests.running import PATIENCE


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def at(address: str, backlog: int = 64, reuse_port: bool = False) -> Listener:
    return Listener("web", parse(address), backlog, reuse_port)


def inheriting(stack: ExitStack, **sockets: socket.socket) -> Listeners:
    """Listeners of a gateway to which these sockets were passed in."""
    listeners = Listeners(sockets.items())
    stack.callback(listeners.close_inherited)
    return listeners


def connects(endpoint: Endpoint) -> bool:
    assert isinstance(endpoint, Tcp | Unix)
    with socket.socket(endpoint.family) as client:
        client.settimeout(PATIENCE)
        return client.connect_ex(endpoint.sockaddr) == 0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# Bound


def test_a_bound_listener_knows_where_it_listens_and_is_closed() -> None:
    listeners = Listeners()
    listening = listeners.open(at("tcp://127.0.0.1:0"))
    address = listening.address
    assert isinstance(address, Tcp) and address.port > 0
    assert not listening.inherited and listening.file is None
    assert connects(address)
    listeners.close(listening)
    assert not connects(address)
    assert listeners.unused == []


def test_a_socket_file_that_was_left_behind_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bind(parse(f"unix:{path}")).close()
    listeners = Listeners()
    listening = listeners.open(at(f"unix:{path}"))
    assert listening.file == (path.lstat().st_dev, path.lstat().st_ino)
    assert connects(listening.address)
    listeners.close(listening)
    assert not path.exists()


def test_a_file_that_somebody_else_put_there_meanwhile_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listeners = Listeners()
    listening = listeners.open(at(f"unix:{path}"))
    path.rename(tmp_path / "moved")  # so that its inode is not used again
    with bind(parse(f"unix:{path}")) as other:
        listeners.close(listening)
        assert connects(of_socket(other))


def test_a_file_that_is_gone_already_is_no_error(tmp_path: Path) -> None:
    listeners = Listeners()
    listening = listeners.open(at(f"unix:{tmp_path}/s"))
    (tmp_path / "s").unlink()
    listeners.close(listening)
    assert listening.socket.fileno() == -1


def test_an_abstract_name_has_no_file() -> None:
    listeners = Listeners()
    listening = listeners.open(at(f"unix:@dormant-test-{os.getpid()}"))
    address = listening.address
    assert listening.file is None and connects(address)
    listeners.close(listening)
    assert not connects(address)


def test_the_mode_of_a_socket_file_is_set_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listeners = Listeners()
    listening = listeners.open(at(f"unix:{path}?mode=0600"))
    assert mode(path) == 0o600
    listeners.take_on(listening, at(f"unix:{path}?mode=0666"))
    assert mode(path) == 0o666
    listeners.take_on(listening, at(f"unix:{path}"))
    assert mode(path) == 0o666
    listeners.close(listening)


def test_rights_that_cannot_be_set_are_told_and_the_socket_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listeners = Listeners()
    listening = listeners.open(at(f"unix:{tmp_path}/s"))
    listeners.take_on(listening, at(f"unix:{tmp_path}/s?owner=no-such-user"))
    assert "its rights stay as they are: " in caplog.text and "there is no user 'no-such-user'" in caplog.text
    assert connects(listening.address)
    listeners.close(listening)


def test_a_changed_backlog_is_taken_on(tmp_path: Path) -> None:
    """A Unix socket takes one client more than its backlog, and tells the next one."""
    listeners = Listeners()
    listening = listeners.open(at(f"unix:{tmp_path}/s", backlog=0))
    with ExitStack() as clients:

        def connect() -> int:
            client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            return client.connect_ex(str(tmp_path / "s"))

        assert [connect(), connect()] == [0, errno.EAGAIN]
        renamed = Listener("other", listening.listener.endpoint, backlog=2)
        listeners.take_on(listening, renamed)
        assert listening.listener is renamed
        assert [connect(), connect(), connect()] == [0, 0, errno.EAGAIN]
    listeners.close(listening)


def test_datagram_sockets_are_bound_and_have_no_backlog(tmp_path: Path) -> None:
    listeners = Listeners()
    for address in ("udp://127.0.0.1:0", f"unixgram:{tmp_path}/s"):
        listening = listeners.open(at(address))
        listeners.take_on(listening, at(address, backlog=1))
        assert listening.socket.type == socket.SOCK_DGRAM
        listeners.close(listening)
    assert os.listdir(tmp_path) == []


# Not bound


def test_an_address_in_use_says_so(stack: ExitStack) -> None:
    other = stack.enter_context(bind(parse("tcp://127.0.0.1:0")))
    address = str(of_socket(other))
    with pytest.raises(
        ListenError, match=f"^{address}: the address is in use, by another program or by another listener here$"
    ):
        Listeners().open(at(address))


def test_a_port_may_be_shared_with_those_who_want_it() -> None:
    listeners = Listeners()
    first = listeners.open(at("tcp://127.0.0.1:0", reuse_port=True))
    second = listeners.open(at(str(first.address), reuse_port=True))
    assert second.address == first.address
    listeners.close(first)
    listeners.close(second)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("unix:{}/none/s", "unix:{}/none/s: there is no such directory"),
        ("unix:{}/file/s", "unix:{}/file/s: Not a directory"),
        ("unix:{}/s?owner=no-such-user", "unix:{}/s: there is no user 'no-such-user'"),
        ("tcp://192.0.2.1:80", "tcp://192.0.2.1:80: this machine has no such address"),
        ("fd://web", "fd://web: no such socket was passed in; there are: none"),
    ],
)
def test_what_cannot_be_bound_says_why_and_leaves_nothing(tmp_path: Path, address: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ListenError) as caught:
        Listeners().open(at(address.format(tmp_path)))
    assert str(caught.value) == message.format(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_a_port_below_1024_says_what_helps() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first <= 1023:
        pytest.skip("here everybody may listen on a port below 1024")
    os.seteuid(65534)
    try:
        with pytest.raises(ListenError, match="no right to listen on a port below 1024; run it as root, with CAP_NET"):
            Listeners().open(at("tcp://127.0.0.1:1023"))
    finally:
        os.seteuid(0)


# Inherited


def test_an_inherited_socket_is_found_by_its_name_and_by_its_number(stack: ExitStack) -> None:
    sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    for name in ("web", sock.fileno()):
        listening = Listeners([("web", sock)]).open(at(f"fd://{name}"))
        assert listening.socket is sock and listening.inherited
        assert listening.address == of_socket(sock)
    assert not sock.getblocking()
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("bound", "configured"),
    [
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:{}"),
        ("tcp://0.0.0.0:0", "tcp://0.0.0.0:{}"),
        ("tcp://[::1]:0", "tcp://[::1]:{}"),
        ("tcp://*:0", "tcp://*:{}"),
        ("tcp://*:0", "tcp://[::]:{}"),
        ("udp://127.0.0.1:0", "udp://127.0.0.1:{}"),
        ("udp://*:0", "udp://*:{}"),
        ("unix:{}/s", "unix:{}/s"),
        ("unix:{}/s", "unix:{}/s?mode=0600"),
        ("unix:@dormant-test-{}", "unix:@dormant-test-{}"),
        ("unixgram:{}/s", "unixgram:{}/s"),
    ],
)
def test_an_inherited_socket_is_found_by_its_address(
    tmp_path: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture, bound: str, configured: str
) -> None:
    caplog.set_level(logging.INFO)
    sock = bind(parse(bound.format(tmp_path)))
    place = tmp_path if "unix" in bound else sock.getsockname()[1]
    listeners = inheriting(stack, web=sock)
    listener = at(configured.format(place))
    assert listeners.open(listener).socket is sock
    assert f"{listener.endpoint} is inherited from the service manager" in caplog.text


@pytest.mark.parametrize(
    ("inherited", "configured"),
    [
        ("tcp://127.0.0.1:0", "tcp://127.0.0.2:{}"),
        ("tcp://127.0.0.1:0", "udp://127.0.0.1:{}"),
        ("unix:{}/s", "unix:{}/t"),
        ("unix:{}/s", "unixgram:{}/t"),
    ],
)
def test_another_address_is_bound_beside_the_inherited_one(
    tmp_path: Path, stack: ExitStack, inherited: str, configured: str
) -> None:
    sock = bind(parse(inherited.format(tmp_path)))
    place = tmp_path if "unix" in inherited else sock.getsockname()[1]
    listeners = inheriting(stack, web=sock)
    listening = listeners.open(at(configured.format(place)))
    assert listening.socket is not sock and not listening.inherited
    assert listeners.unused == [f"fd://web ({of_socket(sock)})"]
    listeners.close(listening)


def test_a_name_may_stand_for_several_sockets_which_are_taken_in_order(stack: ExitStack) -> None:
    sockets = [bind(parse("tcp://127.0.0.1:0")) for _ in range(2)]
    listeners = Listeners([("web", sock) for sock in sockets])
    stack.callback(listeners.close_inherited)
    in_order = sorted(sockets, key=socket.socket.fileno)
    assert [listeners.open(at("fd://web")).socket for _ in range(2)] == in_order


def test_a_socket_that_is_not_there_says_what_is(stack: ExitStack) -> None:
    listeners = inheriting(stack, **{name: bind(parse("tcp://127.0.0.1:0")) for name in ("b", "a")})
    with pytest.raises(ListenError) as caught:
        listeners.open(at("fd://web"))
    assert str(caught.value) == "fd://web: no such socket was passed in; there are: fd://a, fd://b"


def test_an_inherited_socket_belongs_to_one_listener(stack: ExitStack) -> None:
    sock = bind(parse("tcp://127.0.0.1:0"))
    listeners = inheriting(stack, web=sock)
    assert listeners.unused == [f"fd://web ({of_socket(sock)})"]
    listeners.open(at("fd://web"))
    assert listeners.unused == []
    with pytest.raises(ListenError, match="no such socket"):
        listeners.open(at("fd://web"))
    with pytest.raises(ListenError, match="in use"):
        listeners.open(at(str(of_socket(sock))))


def test_an_inherited_socket_stays_open_and_can_be_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sock = bind(parse(f"unix:{path}"))
    listeners = Listeners([("web", sock)])
    listening = listeners.open(at("fd://web"))
    listeners.take_on(listening, at("fd://web", backlog=1))
    listeners.close(listening)
    assert listeners.unused == [f"fd://web (unix:{path})"]
    assert connects(of_socket(sock))
    assert listeners.open(at(f"unix:{path}")).socket is sock
    assert listeners.unused == []
    listeners.close_inherited()
    assert sock.fileno() == -1
    assert path.exists()  # whoever made it removes it


@pytest.mark.parametrize("times", [1, 2])
def test_a_socket_that_does_not_listen_is_refused_each_time(stack: ExitStack, times: int) -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    listeners = inheriting(stack, web=sock)
    for _ in range(times):
        with pytest.raises(ListenError, match="fd://web: the inherited socket does not listen"):
            listeners.open(at("fd://web"))


def test_a_socket_of_a_kind_that_dormant_does_not_know_disturbs_no_other(stack: ExitStack) -> None:
    """systemd passes these for ListenSequentialPacket=."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listeners = inheriting(stack, odd=sock)
    listening = listeners.open(at("tcp://127.0.0.1:0"))
    listeners.close(listening)
    assert "fd://odd" in listeners.unused[0]
