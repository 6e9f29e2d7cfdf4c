"""`backends.endpoint`: the grammar of addresses, binding them for real, and what lies in the way."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from backends.endpoint import (
    UNIX_PATH_MAX,
    AddressError,
    Endpoint,
    Inherited,
    Tcp,
    Udp,
    Unix,
    Unixgram,
    Vsock,
    VsockMux,
    bind,
    of_socket,
    parse,
    resolve,
)

HERE = Path("/srv/here")
ipv6 = pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")


@pytest.mark.parametrize(
    ("text", "endpoint", "printed"),
    [
        ("tcp://127.0.0.1:80", Tcp("127.0.0.1", 80), None),
        ("tcp://example.com:80", Tcp("example.com", 80), None),
        ("tcp://*:80", Tcp("*", 80), None),
        ("tcp://[::]:80", Tcp("::", 80), None),
        ("tcp://[fe80::1%eth0]:80", Tcp("fe80::1%eth0", 80), None),
        ("tcp://[::ffff:127.0.0.1]:65535", Tcp("::ffff:127.0.0.1", 65535), None),
        ("udp://localhost:0", Udp("localhost", 0), None),
        ("unix:/run/a.sock", Unix("/run/a.sock"), None),
        ("unix:a.sock", Unix("/srv/here/a.sock"), "unix:/srv/here/a.sock"),
        ("unix:./b/../a.sock", Unix("/srv/here/a.sock"), "unix:/srv/here/a.sock"),
        ("unix:///run/a.sock", Unix("/run/a.sock"), "unix:/run/a.sock"),
        ("unix:@name", Unix("@name"), None),
        ("unixgram:/dev/log", Unixgram("/dev/log"), None),
        ("vsock://any:80", Vsock(0xFFFFFFFF, 80), None),
        ("vsock://host:80", Vsock(2, 80), None),
        ("vsock://2:80", Vsock(2, 80), "vsock://host:80"),
        ("vsock://local:80", Vsock(1, 80), None),
        ("vsock://guest:4294967295", Vsock("guest", 0xFFFFFFFF), None),
        ("vsock://77:80", Vsock(77, 80), None),
        ("vsock-mux:/run/vm.sock:52", VsockMux("/run/vm.sock", 52), None),
        ("vsock-mux:vm:1.sock:52", VsockMux("/srv/here/vm:1.sock", 52), "vsock-mux:/srv/here/vm:1.sock:52"),
        ("fd://web", Inherited("web"), None),
        ("fd://3", Inherited("3"), None),
    ],
)
def test_every_form_is_parsed_and_printed(text: str, endpoint: Endpoint, printed: str | None) -> None:
    parsed = parse(text, HERE)
    assert parsed == endpoint
    assert type(parsed) is type(endpoint)
    assert str(parsed) == (printed or text)
    assert parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not an address; allowed: tcp://"),
        ("127.0.0.1:80", "is not an address"),
        ("http://a:80", "is not an address"),
        ("tcp:a:80", "is not an address"),
        ("tcp://a", "expected HOST:PORT"),
        ("tcp://:80", "expected HOST:PORT"),
        ("tcp://a:", "expected HOST:PORT"),
        ("tcp://a:http", "expected HOST:PORT"),
        ("tcp://a:-1", "expected HOST:PORT"),
        ("tcp://a:8\u0660", "expected HOST:PORT"),
        ("tcp://user@a:80/path", "expected HOST:PORT"),
        ("tcp://::1:80", "goes in brackets"),
        ("tcp://[::1:80", "expected HOST:PORT"),
        ("tcp://[::g]:80", "expected HOST:PORT"),
        ("tcp://[1:2]:80", "is not an IPv6 address"),
        ("tcp://a..b:80", "is not a host name"),
        ("tcp://" + "a" * 64 + ".com:80", "is not a host name"),
        ("tcp://a:65536", "is not a port; allowed: 0 to 65535"),
        ("tcp://a:" + "9" * 900, "is not a port"),
        ("tcp://" + "a" * 5000 + ":80", "is too long"),
        ("vsock://80", "is not a CID"),
        ("vsock://me:80", "'me' is not a CID; allowed: any, host, local, guest or a number"),
        ("vsock://\u00b2:80", "is not a CID"),
        ("vsock://3:\u00b2", "is not a port"),
        ("vsock://4294967296:80", "is not a CID; allowed: 0 to 4294967295"),
        ("vsock://3:4294967296", "is not a port"),
        ("vsock://3:", "is not a port"),
        ("vsock-mux:80", "expected vsock-mux:PATH:PORT"),
        ("vsock-mux:/a", "expected vsock-mux:PATH:PORT"),
        ("vsock-mux:/a:b", "is not a port"),
        ("unix:", "expected a path"),
        ("unix:a\0b", "expected a path"),
        ("unix:@", "an abstract name has 1 to 106 bytes"),
        ("unix:@" + "a" * 107, "an abstract name has 1 to 106 bytes"),
        ("unix:@a?mode=0600", "an abstract name has no mode"),
        ("unix:/" + "a" * UNIX_PATH_MAX, "longer than the 107 bytes"),
        ("unix:/a?mode=9", "is not an octal file mode"),
        ("unix:/a?mode=", "is not an octal file mode"),
        ("unix:/a?mod=0600", "unknown option 'mod'; allowed: mode, owner, group"),
        ("fd://", "expected fd://NAME"),
    ],
)
def test_what_is_not_an_address_says_what_is(text: str, said: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse(text, HERE)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_the_options_of_a_unix_socket_are_parsed() -> None:
    endpoint = parse("unix:/a?mode=0660&owner=root&group=0")
    assert isinstance(endpoint, Unix)
    assert (endpoint.path, endpoint.mode, endpoint.owner, endpoint.group) == ("/a", 0o660, "root", "0")


def test_a_directory_with_a_question_mark_is_refused() -> None:
    with pytest.raises(AddressError, match=r"/srv/what\?/a has a '\?', where options begin"):
        parse("unix:a", Path("/srv/what?"))
    mux = parse("vsock-mux:a:80", Path("/srv/what?"))
    assert parse(str(mux)) == mux


def test_the_home_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse("unix:~/a.sock", HERE) == Unix("/home/somebody/a.sock")


def test_the_longest_names_of_unix_sockets_can_be_bound(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    for text in ("unix:" + path + "a" * (UNIX_PATH_MAX - len(path)), "unix:@" + "a" * (UNIX_PATH_MAX - 1)):
        with contextlib.closing(bind(parse(text))) as sock:
            assert str(of_socket(sock)) == text


def test_equal_addresses_of_different_kinds_are_different() -> None:
    assert parse("tcp://a:1") != parse("udp://a:1")
    assert parse("unix:/a") != parse("unixgram:/a")
    assert len({parse("tcp://a:1"), parse("udp://a:1"), parse("tcp://a:1")}) == 2


@pytest.mark.parametrize(
    "text", ["tcp://127.0.0.1:0", "udp://127.0.0.1:0", "unix:a.sock", "unixgram:a.sock", "unix:@dormant-test"]
)
def test_a_bound_socket_knows_its_address_and_can_be_reached(text: str, tmp_path: Path) -> None:
    endpoint = parse(text, tmp_path)
    with contextlib.closing(bind(endpoint)) as server:
        bound = of_socket(server)
        assert type(bound) is type(endpoint)
        assert not server.getblocking()
        assert not server.get_inheritable()
        with socket.socket(server.family, server.type) as client:
            client.connect(bound.sockaddr)  # type: ignore[union-attr]


def test_accepted_tcp_connections_have_no_delay() -> None:
    with contextlib.closing(bind(Tcp("127.0.0.1", 0))) as server:
        server.setblocking(True)
        with socket.create_connection(server.getsockname()), server.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@ipv6
@pytest.mark.parametrize("host", ["*", "::"])
def test_a_dual_stack_listener_is_reached_by_both_families(host: str) -> None:
    with contextlib.closing(bind(Tcp(host, 0))) as server:
        port = server.getsockname()[1]
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, port), timeout=5).close()


@ipv6
def test_a_single_ipv6_address_leaves_the_port_of_ipv4_free() -> None:
    with contextlib.closing(bind(Tcp("::1", 0))) as six:
        port = six.getsockname()[1]
        with contextlib.closing(bind(Tcp("127.0.0.1", port))) as four:
            assert of_socket(four) == Tcp("127.0.0.1", port)


def test_a_zone_becomes_a_number() -> None:
    index = socket.if_nametoindex("lo")
    assert Tcp("fe80::1%lo", 80).sockaddr == ("fe80::1%lo".partition("%")[0], 80, 0, index)
    assert Tcp(f"fe80::1%{index}", 80).sockaddr == ("fe80::1", 80, 0, index)


def test_an_address_in_use_is_an_error_unless_the_port_is_shared() -> None:
    with contextlib.closing(bind(Tcp("127.0.0.1", 0), reuse_port=True)) as first:
        again = of_socket(first)
        bind(again, reuse_port=True).close()
        with pytest.raises(OSError, match="in use"):
            bind(again)


@pytest.mark.parametrize("wide", ["*", "0.0.0.0"])
def test_a_listener_for_all_addresses_clashes_with_one_of_them(wide: str) -> None:
    """What `gateway.clashes` says before anything is bound."""
    with contextlib.closing(bind(Tcp("127.0.0.1", 0))) as narrow, pytest.raises(OSError, match="in use"):
        bind(Tcp(wide, narrow.getsockname()[1]))


@pytest.mark.parametrize("endpoint", [Inherited("web"), VsockMux("/a", 1)])
def test_what_cannot_be_bound_says_so(endpoint: Endpoint) -> None:
    with pytest.raises(AddressError, match="cannot be bound"):
        bind(endpoint)


def test_the_cid_of_a_guest_is_not_known_here() -> None:
    with pytest.raises(AddressError, match="only the driver"):
        _ = Vsock("guest", 80).sockaddr


# What lies in the way of a Unix socket


@pytest.mark.parametrize("scheme", ["unix", "unixgram"])
def test_a_socket_file_that_was_left_behind_is_replaced(scheme: str, tmp_path: Path) -> None:
    endpoint = parse(f"{scheme}:a.sock", tmp_path)
    bind(endpoint).close()
    left = os.stat(tmp_path / "a.sock").st_ino, os.stat(tmp_path / "a.sock").st_mtime_ns
    with contextlib.closing(bind(endpoint)):
        found = os.stat(tmp_path / "a.sock")
        assert (found.st_ino, found.st_mtime_ns) != left


@pytest.mark.parametrize("scheme", ["unix", "unixgram"])
def test_a_socket_that_somebody_listens_on_is_left_alone(scheme: str, tmp_path: Path) -> None:
    endpoint = parse(f"{scheme}:a.sock", tmp_path)
    with contextlib.closing(bind(endpoint)) as first:
        with pytest.raises(OSError, match="in use"):
            bind(endpoint)
        with socket.socket(first.family, first.type) as client:
            client.connect(str(tmp_path / "a.sock"))


def test_a_listener_with_a_full_queue_is_not_taken_for_dead(tmp_path: Path) -> None:
    endpoint = parse("unix:a.sock", tmp_path)
    with contextlib.closing(bind(endpoint, backlog=0)), contextlib.ExitStack() as clients:
        for _ in range(10):
            client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            if client.connect_ex(str(tmp_path / "a.sock")) == errno.EAGAIN:
                break
        else:
            pytest.fail("the queue did not fill")
        with pytest.raises(OSError, match="in use"):
            bind(endpoint)


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_not_a_socket_is_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    if kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(OSError, match="in use"):
        bind(parse("unix:a.sock", tmp_path))
    assert os.path.lexists(path)


def test_the_mode_of_a_unix_socket_is_set(tmp_path: Path) -> None:
    with contextlib.closing(bind(parse("unix:a.sock?mode=0640", tmp_path))):
        assert stat.S_IMODE(os.stat(tmp_path / "a.sock").st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_of_a_unix_socket_is_set(tmp_path: Path) -> None:
    with contextlib.closing(bind(parse("unix:a.sock?owner=65534&group=12", tmp_path))):
        found = os.stat(tmp_path / "a.sock")
        assert (found.st_uid, found.st_gid) == (65534, 12)
    with contextlib.closing(bind(parse("unix:b.sock?group=12", tmp_path))):
        found = os.stat(tmp_path / "b.sock")
        assert (found.st_uid, found.st_gid) == (0, 12)


@pytest.mark.parametrize("option", ["owner", "group"])
def test_an_unknown_owner_is_an_error_and_leaves_nothing(option: str, tmp_path: Path) -> None:
    with pytest.raises(AddressError, match=r"there is no .* 'nobody-at-all'"):
        bind(parse(f"unix:a.sock?{option}=nobody-at-all", tmp_path))
    assert not os.path.lexists(tmp_path / "a.sock")


def test_a_directory_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bind(parse("unix:missing/a.sock", tmp_path))


# Names and inherited sockets


def test_names_are_resolved_to_numbers() -> None:
    assert Tcp("127.0.0.1", 80) in resolve(Tcp("localhost", 80))
    assert resolve(Udp("127.0.0.1", 53)) == [Udp("127.0.0.1", 53)]
    assert resolve(Tcp("*", 80)) == [Tcp("127.0.0.1", 80), Tcp("::1", 80)]
    assert resolve(Unix("/a")) == [Unix("/a")]


@pytest.mark.parametrize("host", ["fe80::1%nosuchif", "ä" * 63 + ".invalid"])
def test_a_name_that_does_not_resolve_is_an_error(host: str) -> None:
    with pytest.raises(AddressError, match=r"^tcp://.*:80: ."):
        resolve(Tcp(host, 80))


def test_an_unsupported_kind_of_inherited_socket_is_an_error() -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
        pytest.raises(AddressError, match=r"type .* is not supported"),
    ):
        of_socket(sock)
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM) as sock,
        pytest.raises(AddressError, match=r"family .* is not supported"),
    ):
        of_socket(sock)


def test_a_failed_bind_leaves_no_descriptor(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    (tmp_path / "a").write_text("")
    for text in ("unix:a", "unix:missing/a", "unix:b?owner=nobody-at-all"):
        with pytest.raises((OSError, AddressError)):
            bind(parse(text, tmp_path))
    assert set(os.listdir("/proc/self/fd")) == before
