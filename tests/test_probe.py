"""Readiness: each probe against something real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends import probe
from backends.base import Exited, Setup, Shared, StartFailed
from backends.endpoint import Endpoint, Tcp, Unix, bind, of_socket, parse
from backends.output import Output
from backends.probe import KINDS, Connect, Delay, Exec, Http, Log, Notify, Probed, Query, Readiness
from backends.process import Process, ProcessOptions
from backends.units import Command, Duration, decode
from tests import mimic
from tests.drivers import services
from tests.running import PATIENCE, free_port

shared = pytest.fixture(services)

Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path, shared: Shared) -> Start:
    """Start `mimic.py`; a backend that was started and is not waited for."""

    async def start(*arguments: object, readiness: Readiness, **endpoints: Endpoint) -> Process:
        named = {name.strip("_"): endpoint for name, endpoint in endpoints.items()}
        setup = Setup("mimic", tmp_path, named, readiness, shared)
        backend = Process(ProcessOptions(command=Command(mimic.command(*arguments))), setup)
        await backend.start()
        return backend

    return start


def probed(directory: Path, troubles: list[str] | None = None, **endpoints: Endpoint) -> Probed:
    report = (lambda _: None) if troubles is None else troubles.append
    return Probed({name.strip("_"): e for name, e in endpoints.items()}, Output(), directory, report=report)


async def ready(backend: Process) -> dict[str, Endpoint]:
    return dict(await asyncio.wait_for(backend.ready(), PATIENCE))


async def first(troubles: list[str]) -> str:
    """The first trouble, once there is one."""
    async with asyncio.timeout(PATIENCE):
        while not troubles:
            await asyncio.sleep(0)
    return troubles[0]


# Configuration


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("connect", {}, Connect()),
        ("http", {"path": "/health", "status": 204, "host": "a.example"}, Http("/health", 204, "a.example")),
        ("udp", {"send": "ping"}, Query("ping", "")),
        ("udp", {"send": "hex:00 ff", "expect": "hex:0a"}, Query("hex:00 ff", "hex:0a")),
        ("exec", {"command": "true x", "timeout": "1s"}, Exec(Command(("true", "x")), Duration(1))),
        ("notify", {}, Notify()),
        ("log", {"pattern": "ready$"}, Log("ready$")),
        ("delay", {"time": "100ms"}, Delay(Duration(0.1))),
    ],
)
def test_each_kind_is_parsed(kind: str, value: dict[str, Any], expected: Readiness) -> None:
    assert msgspec.convert(value, KINDS[kind], dec_hook=decode) == expected


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("http", {"path": "health"}, "'health' is not a path such as /health"),
        ("http", {"path": "/a b"}, "is not a path"),
        ("http", {"path": "/\r\nX: y"}, "is not a path"),
        ("http", {"status": 99}, "99 is not an HTTP status"),
        ("udp", {}, "missing required field `send`"),
        ("udp", {"send": "hex:0"}, "'hex:0' does not go on in hexadecimal digits such as hex:00ff"),
        ("udp", {"send": "x", "expect": "hex:xy"}, "does not go on in hexadecimal digits"),
        ("udp", {"send": "x" * 65508}, "is longer than a datagram, 65507 bytes"),
        ("log", {"pattern": "("}, "is not a regular expression"),
        ("exec", {"command": []}, "is not a command"),
        ("delay", {"time": "soon"}, "is not a duration"),
        ("connect", {"port": 1}, "unknown field"),
    ],
)
def test_bad_ones_are_refused(kind: str, value: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(value, KINDS[kind], dec_hook=decode)


# connect


async def test_connect_waits_for_every_endpoint(start: Start, tmp_path: Path) -> None:
    tcp, unix = Tcp("localhost", free_port()), Unix(str(tmp_path / "s"))
    backend = await start("--listen", f"tcp://127.0.0.1:{tcp.port}", readiness=Connect(), web=tcp, admin=unix)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(backend.ready(), 0.1)
    assert backend.trouble == f"{unix}: No such file or directory"
    with bind(unix):
        assert await ready(backend) == {"web": Tcp("127.0.0.1", tcp.port), "admin": unix}
    await backend.stop(PATIENCE)


async def test_connect_of_a_refused_port_says_so(tmp_path: Path) -> None:
    troubles: list[str] = []
    endpoint = Tcp("127.0.0.1", free_port())
    waiting = asyncio.create_task(probe.wait(Connect(), probed(tmp_path, troubles, _=endpoint)))
    assert await first(troubles) == f"{endpoint}: Connection refused"
    with bind(endpoint):
        assert await asyncio.wait_for(waiting, PATIENCE) == {"": endpoint}


async def test_connect_returns_the_address_that_answers(tmp_path: Path) -> None:
    port = free_port()
    with bind(Tcp("127.0.0.1", port)):
        for host in ("localhost", "*"):
            found = await asyncio.wait_for(probe.wait(Connect(), probed(tmp_path, _=Tcp(host, port))), PATIENCE)
            assert found == {"": Tcp("127.0.0.1", port)}


async def test_a_name_that_does_not_resolve_is_trouble(tmp_path: Path) -> None:
    troubles: list[str] = []
    waiting = asyncio.create_task(probe.wait(Connect(), probed(tmp_path, troubles, _=Tcp("no-such-host.invalid", 1))))
    assert (await first(troubles)).startswith("tcp://no-such-host.invalid:1: ")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_connect_has_nothing_to_ask_where_the_sockets_are_handed_over(tmp_path: Path) -> None:
    assert await probe.wait(Connect(), probed(tmp_path)) == {}


@pytest.mark.slow
async def test_an_address_that_swallows_packets_is_tried_again(tmp_path: Path) -> None:
    troubles: list[str] = []
    with socket.socket() as full:  # nobody accepts, so that its queue is full
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
            waiting = asyncio.create_task(probe.wait(Connect(), probed(tmp_path, troubles, _=Tcp("127.0.0.1", port))))
            assert await first(troubles) == f"tcp://127.0.0.1:{port}: no answer within 1s"
        while not waiting.done():
            full.accept()[0].close()
            await asyncio.wait([waiting], timeout=0.05)
        assert await waiting == {"": Tcp("127.0.0.1", port)}


SELF_CONNECT = """
import asyncio, subprocess, sys
from pathlib import Path
from backends.endpoint import Tcp, bind
from backends.output import Output
from backends.probe import Connect, Probed, wait

async def main():
    troubles = []
    endpoint = Tcp("127.0.0.1", 40000)
    waiting = asyncio.create_task(wait(Connect(), Probed({"": endpoint}, Output(), Path("/"), report=troubles.append)))
    async with asyncio.timeout(20):
        while len(troubles) < 5:
            await asyncio.sleep(0)
            assert not waiting.done(), "it took itself for the backend"
        print(*set(troubles), sep="; ")
        with bind(endpoint):
            await waiting
    print("ready")

Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40001")
asyncio.run(main())
"""


async def test_a_connection_to_itself_is_no_answer() -> None:
    """In a network of its own, in which the kernel has hardly another port to give than the one that is dialled."""
    words = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" -c "$1"', sys.executable, SELF_CONNECT]
    root = Path(__file__).parent.parent
    done = await asyncio.to_thread(subprocess.run, words, cwd=root, capture_output=True, text=True, timeout=PATIENCE)
    if "Operation not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("no right to make a network namespace")
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["tcp://127.0.0.1:40000: nobody listens", "ready"]


async def test_the_port_of_a_guest_is_asked_for_through_its_vmm(tmp_path: Path) -> None:
    asked: list[bytes] = []

    async def vmm(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        if len(asked) > 2:
            writer.write(b"OK 1073741824\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(vmm, tmp_path / "vmm")
    async with server:
        troubles: list[str] = []
        endpoint = parse(f"vsock-mux:{tmp_path}/vmm:8200")
        found = await asyncio.wait_for(probe.wait(Connect(), probed(tmp_path, troubles, _=endpoint)), PATIENCE)
    assert found == {"": endpoint}
    assert asked == [b"CONNECT 8200\n"] * 3
    assert troubles == [f"{endpoint}: the guest does not listen"] * 2


async def test_readiness_is_seen_soon(tmp_path: Path) -> None:
    """About a tenth of the time that it took is lost at most; what is asked for here leaves room for a busy machine."""
    loop = asyncio.get_running_loop()
    for after in (0.01, 0.03, 0.1):
        endpoint = Unix(str(tmp_path / f"after{after}"))
        begun: list[float] = []
        listening: list[socket.socket] = []

        def listen(endpoint: Unix = endpoint, listening: list[Any] = listening, begun: list[float] = begun) -> None:
            listening.append(bind(endpoint))
            begun.append(loop.time())

        loop.call_later(after, listen)
        await asyncio.wait_for(probe.wait(Connect(), probed(tmp_path, _=endpoint)), PATIENCE)
        assert loop.time() - begun[0] < max(0.5 * after, 0.02)
        listening[0].close()


# http


async def test_http_waits_for_the_status(start: Start, tmp_path: Path) -> None:
    unix, tcp = Unix(str(tmp_path / "s")), Tcp("localhost", free_port())
    listen = ("--listen", unix, "--listen", f"tcp://127.0.0.1:{tcp.port}")
    backend = await start(*listen, "--http", 302, readiness=Http(), web=tcp, admin=unix)
    assert await ready(backend) == {"web": Tcp("127.0.0.1", tcp.port), "admin": unix}
    await backend.stop(PATIENCE)


@pytest.mark.parametrize(
    ("readiness", "status", "enough"),
    [(Http("/h"), 503, False), (Http("/h"), 404, False), (Http("/h", 404), 404, True), (Http("/h", 200), 201, False)],
)
async def test_http_is_particular_about_the_status(
    start: Start, tmp_path: Path, readiness: Http, status: int, enough: bool
) -> None:
    endpoint = Unix(str(tmp_path / "s"))
    backend = await start("--listen", endpoint, "--http", status, readiness=readiness, _=endpoint)
    if enough:
        await ready(backend)
    else:
        waiting = asyncio.create_task(backend.ready())
        async with asyncio.timeout(PATIENCE):
            while backend.trouble != f"{endpoint}: GET /h answered {status}":
                await asyncio.sleep(0.001)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await backend.stop(PATIENCE)


async def test_http_asks_for_the_path_and_names_the_host(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # the first only connects
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    for endpoint, readiness, host in (
        (Tcp("localhost", free_port()), Http("/a?b=%2F"), "localhost:{}"),
        (Tcp("127.0.0.1", free_port()), Http("/", host="a.example"), "a.example"),
    ):
        async with await asyncio.start_server(web, "127.0.0.1", endpoint.port):
            await asyncio.wait_for(probe.wait(readiness, probed(tmp_path, _=endpoint)), PATIENCE)
        head = heads.pop().decode().splitlines()
        assert head[0] == f"GET {readiness.path} HTTP/1.1"
        assert f"Host: {host.format(endpoint.port)}" in head


@pytest.mark.parametrize("answer", [b"", b"220 smtp.example ESMTP\r\n", b"HTTP/1.1 abc\r\n\r\n"])
async def test_what_is_not_http_is_trouble(tmp_path: Path, answer: bytes) -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    troubles: list[str] = []
    server = await asyncio.start_unix_server(other, tmp_path / "s")
    async with server:
        endpoint = Unix(str(tmp_path / "s"))
        waiting = asyncio.create_task(probe.wait(Http(), probed(tmp_path, troubles, _=endpoint)))
        assert (await first(troubles)).startswith(f"{endpoint}: ")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


# udp


async def test_udp_waits_for_an_answer_of_every_datagram_endpoint(start: Start, tmp_path: Path) -> None:
    udp, unix, tcp = parse(f"udp://localhost:{free_port()}"), parse(f"unixgram:{tmp_path}/s"), Tcp("localhost", 1)
    address = str(udp).replace("localhost", "127.0.0.1")
    backend = await start("--listen", address, readiness=Query("ping"), dns=udp, local=unix, web=tcp)
    waiting = asyncio.create_task(backend.ready())
    async with asyncio.timeout(PATIENCE):
        while backend.trouble != f"{unix}: No such file or directory":
            await asyncio.sleep(0.001)
    assert not waiting.done()
    with bind(unix) as sock:
        await _answered(sock, b"pong")
        found = await asyncio.wait_for(waiting, PATIENCE)
    assert found.pop("web") in (Tcp("127.0.0.1", 1), Tcp("::1", 1))  # resolved, although nobody listens there
    assert found == {"dns": parse(address), "local": unix}
    await backend.stop(PATIENCE)


async def _answered(sock: socket.socket, *answers: bytes) -> list[bytes]:
    """Answer as many questions, which are returned."""
    loop = asyncio.get_running_loop()
    questions = []
    for answer in answers:
        question, sender = await asyncio.wait_for(loop.sock_recvfrom(sock, 65536), PATIENCE)
        questions.append(question)
        sock.sendto(answer, sender)
    return questions


async def test_udp_where_nobody_listens_is_refused(tmp_path: Path) -> None:
    troubles: list[str] = []
    endpoint = parse(f"udp://127.0.0.1:{free_port()}")
    waiting = asyncio.create_task(probe.wait(Query("x"), probed(tmp_path, troubles, _=endpoint)))
    assert await first(troubles) == f"{endpoint}: Connection refused"
    with bind(endpoint) as sock:
        await _answered(sock, b"")
        assert await asyncio.wait_for(waiting, PATIENCE) == {"": endpoint}


async def test_udp_asks_again_until_the_answer_is_the_expected_one(tmp_path: Path) -> None:
    troubles: list[str] = []
    with bind(parse("udp://127.0.0.1:0")) as sock:
        endpoint = of_socket(sock)
        query = Query("hex:0001ff", "hex:0a0b")
        waiting = asyncio.create_task(probe.wait(query, probed(tmp_path, troubles, _=endpoint)))
        questions = await _answered(sock, b"", b"\x0b\x0a", b"..\x0a\x0b..")
        assert await asyncio.wait_for(waiting, PATIENCE) == {"": endpoint}
    assert questions == [b"\0\x01\xff"] * 3
    assert f"{endpoint}: 'hex:0a0b' is not in its answer" in troubles


@pytest.mark.parametrize("address", ["udp://127.0.0.1:0", "unixgram:s"])
async def test_udp_hears_a_late_answer(tmp_path: Path, address: str) -> None:
    """The answer to a question that was asked again meanwhile."""
    loop = asyncio.get_running_loop()
    troubles: list[str] = []
    with bind(parse(address, tmp_path)) as sock:
        endpoint = of_socket(sock)
        waiting = asyncio.create_task(probe.wait(Query("x"), probed(tmp_path, troubles, _=endpoint)))
        _, sender = await asyncio.wait_for(loop.sock_recvfrom(sock, 65536), PATIENCE)
        assert await first(troubles) == f"{endpoint}: no answer"
        sock.sendto(b"late", sender)
        assert await asyncio.wait_for(waiting, PATIENCE) == {"": endpoint}


async def test_udp_goes_on_when_its_questions_are_not_read(tmp_path: Path) -> None:
    """Ten fill the queue of a Unix socket."""
    troubles: list[str] = []
    with bind(parse("unixgram:s", tmp_path)) as sock:
        waiting = asyncio.create_task(probe.wait(Query("x"), probed(tmp_path, troubles, _=of_socket(sock))))
        with contextlib.suppress(BlockingIOError), bind(parse("unixgram:other", tmp_path)) as other:
            other.connect(str(tmp_path / "s"))
            while True:
                other.send(b"y")
        await first(troubles)
        data = b"y"
        while data == b"y":
            data, sender = await asyncio.wait_for(asyncio.get_running_loop().sock_recvfrom(sock, 10), PATIENCE)
        sock.sendto(b"", sender)
        await asyncio.wait_for(waiting, PATIENCE)


# The others


async def test_exec_waits_for_the_command(start: Start, tmp_path: Path) -> None:
    endpoint = Tcp("localhost", 1)
    backend = await start("--never-ready", readiness=Exec(Command(("test", "-e", "flag"))), _=endpoint)
    waiting = asyncio.create_task(backend.ready())
    async with asyncio.timeout(PATIENCE):
        while backend.trouble != "test ...: exit status 1":
            await asyncio.sleep(0.001)
    (tmp_path / "flag").touch()
    (found,) = (await asyncio.wait_for(waiting, PATIENCE)).values()  # resolved, although nobody listens there
    assert found in (Tcp("127.0.0.1", 1), Tcp("::1", 1))
    await backend.stop(PATIENCE)


async def test_an_exec_that_hangs_is_tried_again(tmp_path: Path) -> None:
    script = "test -e again && exit; touch again; sleep 1000"
    troubles: list[str] = []
    hanging = Exec(Command(("/bin/sh", "-c", script)), Duration(0.1))
    await asyncio.wait_for(probe.wait(hanging, probed(tmp_path, troubles)), PATIENCE)
    assert troubles == ["/bin/sh ...: timed out after 0.1s"]


async def test_an_exec_that_cannot_be_run_is_trouble(tmp_path: Path) -> None:
    troubles: list[str] = []
    waiting = asyncio.create_task(probe.wait(Exec(Command(["./none"])), probed(tmp_path, troubles)))
    assert await first(troubles) == "./none: No such file or directory"
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_log_sees_what_was_said_before_and_after(tmp_path: Path) -> None:
    looked_at = probed(tmp_path)
    looked_at.output.line("port 80 is open")
    assert await asyncio.wait_for(probe.wait(Log(r"port \d+"), looked_at), PATIENCE) == {}
    waiting = asyncio.create_task(probe.wait(Log("^ready$"), looked_at))
    await asyncio.sleep(0)
    looked_at.output.feed(b"already\nrea")
    await asyncio.sleep(0)
    assert not waiting.done()
    looked_at.output.feed(b"dy\n")
    await asyncio.wait_for(waiting, PATIENCE)
    assert not looked_at.output._listeners


async def test_delay_lets_time_pass(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await probe.wait(Delay(Duration(0.05)), probed(tmp_path))
    assert loop.time() - begun >= 0.049


async def test_what_can_never_work_fails_at_once(tmp_path: Path, start: Start) -> None:
    with pytest.raises(probe.Impossible, match="`notify` is not possible with this driver"):
        await probe.wait(Notify(), probed(tmp_path))
    backend = await start("--never-ready", readiness=Http(), _=parse("udp://127.0.0.1:1"))
    with pytest.raises(StartFailed, match=r"`http` is not possible at udp://127\.0\.0\.1:1"):
        await asyncio.wait_for(backend.ready(), PATIENCE)
    await backend.stop(PATIENCE)
    for readiness, endpoint in ((Connect(), "udp://127.0.0.1:1"), (Query("x"), "tcp://127.0.0.1:1")):
        with pytest.raises(probe.Impossible, match=f"is not possible at {endpoint}"):
            await probe.wait(readiness, probed(tmp_path, _=parse(endpoint)))


async def test_connect_and_http_ask_the_stream_endpoints(start: Start, tmp_path: Path) -> None:
    unix, udp = Unix(str(tmp_path / "s")), parse("udp://127.0.0.1:1")
    for readiness in (Connect(), Http()):
        backend = await start("--listen", unix, "--http", 200, readiness=readiness, web=unix, dns=udp)
        assert await ready(backend) == {"web": unix, "dns": udp}
        await backend.stop(PATIENCE)


async def test_a_guest_that_the_driver_does_not_know_cannot_be_asked(start: Start) -> None:
    for readiness in (Connect(), Delay(Duration(0))):
        backend = await start("--never-ready", readiness=readiness, _=parse("vsock://guest:80"))
        with pytest.raises(StartFailed, match="vsock://guest:80 is not possible with this driver"):
            await asyncio.wait_for(backend.ready(), PATIENCE)
        await backend.stop(PATIENCE)


async def test_an_error_of_one_endpoint_ends_the_probes_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = Unix(str(tmp_path / "none")), Unix(str(tmp_path / "bad"))
    reach = probe._reach

    async def broken(endpoint: Endpoint) -> None:
        if endpoint == bad:
            raise ValueError("a bug")
        await reach(endpoint)

    monkeypatch.setattr(probe, "_reach", broken)
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(probe.wait(Connect(), probed(tmp_path, a=good, b=bad)), PATIENCE)
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize(
    "readiness",
    [
        Connect(),
        Http(),
        Query("x"),
        Exec(Command(["false"])),
        Exec(Command(["sleep", "1000"])),
        Notify(),
        Log("x"),
        Delay(Duration(99)),
    ],
)
async def test_death_ends_every_wait_at_once(start: Start, tmp_path: Path, readiness: Readiness) -> None:
    endpoint = parse("unixgram:s" if isinstance(readiness, Query) else "unix:s", tmp_path)
    backend = await start("--say", "last words", "--exit-after", 0.05, readiness=readiness, _=endpoint)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(Exited, match="exit status 0") as caught:
        await asyncio.wait_for(backend.ready(), PATIENCE)
    assert caught.value.lines == ("last words",)
    assert loop.time() - begun < 5


@pytest.mark.parametrize(
    "readiness", [Connect(), Http(), Query("x"), Exec(Command(["sleep", "9"])), Log("x"), Delay(Duration(99))]
)
async def test_a_cancelled_wait_leaves_nothing(tmp_path: Path, readiness: Readiness) -> None:
    port = free_port()
    streams = {"a": Unix(str(tmp_path / "none")), "b": Tcp("localhost", port)}
    datagrams = {"c": parse("unixgram:none", tmp_path), "d": parse(f"udp://localhost:{port}")}
    looked_at = probed(tmp_path, **streams, **datagrams)
    before = os.listdir("/proc/self/fd")
    for turns in (0, 1, 3, 10):
        waiting = asyncio.create_task(probe.wait(readiness, looked_at))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert len(asyncio.all_tasks()) == 1
    assert not looked_at.output._listeners
    assert len(os.listdir("/proc/self/fd")) <= len(before)
