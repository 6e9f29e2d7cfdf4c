"""The relay from outside: what goes in at one end comes out at the other, in every pair of families and every kind of end."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import random
import resource
import select
import signal
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.endpoint import Tcp, bind, of_socket
from gateway.plane.loop import Loop
from gateway.plane.relay import BULK, SIZE, End, Pipes, cut, hear, join
from tests.relaying import DEADLINE, Relayed, relayed, stream
from tests.running import eventually

PAIRS = ["tcp-tcp", "unix-tcp", "tcp-unix", "unix-unix"]
MIB = 1 << 20


class Line:
    """A relay between clients and a server, both in this process."""

    def __init__(self, relay: Relayed, server: socket.socket) -> None:
        self.relay = relay
        self.server = server

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A connected client, and what the server accepted for it."""
        client = self.relay.connect()
        return client, self.accept()

    def accept(self) -> socket.socket:
        served, _ = self.server.accept()
        served.settimeout(DEADLINE)
        return served


def address(family: str, directory: Path, name: str) -> str:
    return f"unix:{directory}/{name}" if family == "unix" else "tcp://127.0.0.1:0"


@contextlib.contextmanager
def a_line(pair: str, directory: Path) -> Iterator[Line]:
    listen, target = pair.split("-")
    with bind(stream(address(target, directory, "target"))) as server:
        server.settimeout(DEADLINE)
        with relayed(address(listen, directory, "listen"), stream(str(of_socket(server)))) as relay:
            yield Line(relay, server)


@pytest.fixture(scope="module", params=PAIRS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with a_line(request.param, tmp_path_factory.mktemp("line")) as line:
        yield line


@pytest.fixture
def line(shared: Line) -> Iterator[Line]:
    """Every case has to give back all it used, but for the spare pipes."""
    before = shared.relay.descriptors()
    yield shared
    eventually(lambda: shared.relay.descriptors() <= before + 2 * Pipes.SPARE)
    assert select.select([shared.server], [], [], 0)[0] == []


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(256 << 10):
        parts.append(part)
    return b"".join(parts)


def reset(sock: socket.socket) -> None:
    """End with an RST; a Unix socket does the like when it is closed with something unread."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def fill(sock: socket.socket) -> int:
    """Send until the other side has not taken anything for a while; how much went."""
    sock.setblocking(False)
    block, sent, poll = b"z" * SIZE, 0, select.poll()
    poll.register(sock, select.POLLOUT)
    while poll.poll(200):
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(block)
        assert sent < 200 * MIB, "no backpressure"
    sock.settimeout(DEADLINE)
    return sent


def together(*calls: Callable[[], object]) -> None:
    """Run them at once, and wait for all."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# Ends


def test_half_close_by_the_client(line: Line) -> None:
    client, served = line.pair()
    with client, served:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert read_all(served) == b"hello"
        together(lambda: send_and_close(served, 300_000), lambda: expect(client, 300_000))


def send_and_close(sock: socket.socket, size: int) -> None:
    with sock:
        sock.sendall(b"x" * size)


def expect(sock: socket.socket, size: int) -> None:
    """So many bytes, and the end."""
    assert len(read_all(sock)) == size


def test_half_close_by_the_server(line: Line) -> None:
    client, served = line.pair()
    with client, served:
        served.sendall(b"bye")
        served.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"bye"
        together(lambda: send_and_close(client, 300_000), lambda: expect(served, 300_000))


def test_request_and_end_at_once(line: Line) -> None:
    for _ in range(50):
        with line.relay.connect() as client:
            client.sendall(b"q" * 10)
            client.shutdown(socket.SHUT_WR)
            with line.accept() as served:
                assert read_all(served) == b"q" * 10
                served.sendall(b"r" * 20)
            assert read_all(client) == b"r" * 20


def test_end_without_a_byte(line: Line) -> None:
    with line.relay.connect() as client:
        client.shutdown(socket.SHUT_WR)
        with line.accept() as served:
            assert served.recv(10) == b""
        assert client.recv(10) == b""


def test_the_server_speaks_first(line: Line) -> None:
    client, served = line.pair()
    with served:
        with client:
            served.sendall(b"220 hi")
            assert client.recv(100) == b"220 hi"
        assert served.recv(1) == b""


@pytest.mark.parametrize("by", ["client", "server"])
def test_reset(line: Line, by: str) -> None:
    client, served = line.pair()
    ending, other = (client, served) if by == "client" else (served, client)
    with ending, other:
        ending.sendall(b"a")
        assert other.recv(1) == b"a"
        other.sendall(b"unread")
        assert select.select([ending], [], [], DEADLINE)[0]
        reset(ending)
        if other.family == socket.AF_UNIX:
            assert other.recv(1) == b""  # it has no way to say it
        else:
            with pytest.raises(ConnectionResetError):
                other.recv(1)


@pytest.mark.parametrize("by", ["client", "server"])
def test_reset_after_half_close(line: Line, by: str) -> None:
    client, served = line.pair()
    ending, other = (client, served) if by == "client" else (served, client)
    with ending, other:
        ending.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        other.sendall(b"unread")
        assert select.select([ending], [], [], DEADLINE)[0]
        reset(ending)
        with pytest.raises(ConnectionError):
            while True:
                other.sendall(b"into the void")
    assert line.relay.load(0.1) < 0.5


@pytest.mark.slow
def test_an_answer_that_comes_before_the_request_was_read(line: Line) -> None:
    for _ in range(20):
        client, served = line.pair()
        with client:
            client.sendall(b"P" * 200_000)
            assert select.select([served], [], [], DEADLINE)[0]
            served.sendall(b"413 too large")
            served.close()
            got = b""
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(1000):
                    got += part
            assert got == b"413 too large"


# Bytes


@pytest.mark.slow
def test_fragments_of_all_sizes(line: Line) -> None:
    chance = random.Random(1)
    sizes = [
        200_000 if n % 50 == 0 else chance.choice((1, 5, 10, 100, 1000, 30_000, SIZE, SIZE + 1)) for n in range(1500)
    ]
    pieces = [bytes([n & 255]) * size for n, size in enumerate(sizes)]
    client, served = line.pair()
    with client, served:

        def send() -> None:
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)

        def receive() -> None:
            assert read_all(served) == b"".join(pieces)

        together(send, receive)
        served.close()
        assert client.recv(1) == b""


@pytest.mark.parametrize("shared", ["unix-tcp", "unix-unix"], indirect=True)
def test_passed_descriptors_cut_reads_short(line: Line) -> None:
    client, served = line.pair()
    with client, served, open(os.devnull) as file:
        for letter in (b"A", b"C"):
            socket.send_fds(client, [letter], [file.fileno()])
            client.sendall(letter.lower())
        got = b""
        while len(got) < 4:
            got += served.recv(10)
        assert got == b"AaCc"


@pytest.mark.slow
def test_bulk_in_both_directions_at_once(line: Line) -> None:
    block = os.urandom(MIB)
    blocks = 32
    expected = hashlib.md5(block * blocks).digest()
    client, served = line.pair()
    transfer(client, served, block, 4, hashlib.md5(block * 4).digest())
    before = line.relay.resident()
    client, served = line.pair()
    transfer(client, served, block, blocks, expected)
    assert line.relay.resident() - before < 2 * MIB


def transfer(one: socket.socket, other: socket.socket, block: bytes, blocks: int, digest: bytes) -> None:
    """Both send at once, and both get what was sent."""

    def send(sock: socket.socket) -> None:
        for _ in range(blocks):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)

    def receive(sock: socket.socket) -> None:
        seen = hashlib.md5()
        while part := sock.recv(256 << 10):
            seen.update(part)
        assert seen.digest() == digest

    with one, other:
        together(*(functools.partial(call, sock) for call in (send, receive) for sock in (one, other)))


@pytest.mark.slow
def test_bulk_lets_small_messages_through(line: Line) -> None:
    client, served = line.pair()
    bulk_client, bulk_served = line.pair()
    done = threading.Event()

    def send() -> None:
        with bulk_served:
            while not done.is_set():
                bulk_served.sendall(b"z" * MIB)

    def receive() -> None:
        with bulk_client:
            while bulk_client.recv(256 << 10):
                pass

    def talk() -> None:
        try:
            for _ in range(200):
                client.sendall(b"ping")
                assert served.recv(10) == b"ping"
        finally:
            done.set()

    with client, served:
        together(send, receive, talk)


# Backpressure


@pytest.mark.slow
def test_a_slow_reader_holds_up_its_sender_only(line: Line) -> None:
    before = line.relay.resident()
    client, served = line.pair()
    with client, served:
        sent = fill(served)
        assert line.relay.load() < 0.1
        assert line.relay.resident() - before < 4 * MIB
        other_client, other_served = line.pair()
        with other_client, other_served:
            other_client.sendall(b"1")
            assert other_served.recv(1) == b"1"
        together(lambda: send_and_close(served, 1000), lambda: expect(client, sent + 1000))


@pytest.mark.slow
@pytest.mark.parametrize("block", [100, 3 * SIZE])
def test_an_end_that_comes_while_the_other_side_is_full(line: Line, block: int) -> None:
    """Its edge is reported while nothing can be read: it must be found when the bytes flow again."""
    client, served = line.pair()
    with client, served:
        served.setblocking(False)
        sent, poll = 0, select.poll()
        poll.register(served, select.POLLOUT)
        while poll.poll(200):
            with contextlib.suppress(BlockingIOError):
                sent += served.send(b"z" * block)
        served.shutdown(socket.SHUT_WR)
        assert line.relay.load(0.1) < 0.5
        expect(client, sent)
        client.sendall(b"thanks")
        client.close()
        served.settimeout(DEADLINE)
        assert read_all(served) == b"thanks"


@pytest.mark.slow
def test_a_reset_while_the_other_side_is_full(line: Line) -> None:
    client, served = line.pair()
    with client, served:
        fill(served)
        reset(served)
        assert line.relay.load() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("by", ["client", "server"])
def test_a_reset_while_both_directions_are_full(line: Line, by: str) -> None:
    client, served = line.pair()
    with client, served:
        fill(client)
        fill(served)
        gone, left = (client, served) if by == "client" else (served, client)
        reset(gone)
        poll = select.poll()
        poll.register(left, select.POLLRDHUP)
        assert poll.poll(DEADLINE * 1000)


# Urgent data: it is not passed on as such, tcp(7), and holds up nothing


def test_what_comes_after_urgent_data_is_not_stuck(tmp_path: Path) -> None:
    with a_line("tcp-tcp", tmp_path) as line:
        client, served = line.pair()
        with client, served:
            client.sendall(b"warm")
            assert served.recv(10) == b"warm"
            os.kill(line.relay.pid, signal.SIGSTOP)  # so that it finds all of it at once
            client.sendall(b"abc")
            client.send(b"!", socket.MSG_OOB)
            client.sendall(b"def")
            os.kill(line.relay.pid, signal.SIGCONT)
            received = b""
            while len(received) < 6:
                received += served.recv(10)
            assert received == b"abcdef"


@pytest.mark.parametrize("ends", [True, False])
def test_urgent_data_among_bulk_is_not_the_end(ends: bool) -> None:
    with Pair(socket.AF_INET) as pair:
        end = join(pair.loop, pair.near, pair.far, pair.owner)
        end._full = BULK
        pair.client.sendall(b"a" * 100)
        pair.client.send(b"!", socket.MSG_OOB)
        pair.client.sendall(b"b" * 100)
        if ends:
            pair.client.shutdown(socket.SHUT_WR)
        pair.turn()
        assert pair.served.recv(1000) == b"a" * 100 + b"b" * 100
        if ends:
            assert pair.served.recv(1) == b""
        cut(end)


# Many


@pytest.mark.slow
def test_thousands_of_connections_leave_nothing(line: Line) -> None:
    """Four ways to end, each 1250 times: an exchange, a reset, an end at once, a close with bytes on the way."""
    before = line.relay.descriptors()
    stop = threading.Event()

    def serve() -> None:
        line.server.settimeout(0.2)
        while True:
            try:
                served, _ = line.server.accept()
            except TimeoutError:
                if stop.is_set():
                    return
                continue
            with served, contextlib.suppress(ConnectionError):
                served.settimeout(DEADLINE)
                served.sendall(served.recv(10))

    def connect(way: int) -> None:
        for _ in range(1250):
            with socket.socket(line.relay.listen.family) as client:
                client.connect(line.relay.listen.sockaddr)  # blocking: it waits for a place in the backlog
                if way == 0:
                    client.sendall(b"x")
                    assert client.recv(10) == b"x"
                    assert client.recv(10) == b""
                elif way == 1:
                    client.sendall(b"x")
                    reset(client)
                elif way == 2:
                    client.shutdown(socket.SHUT_WR)
                else:
                    client.sendall(b"x")

    server = threading.Thread(target=serve)
    server.start()
    try:
        together(*(functools.partial(connect, way) for way in range(4)))
        eventually(lambda: line.relay.descriptors() <= before)
    finally:
        stop.set()
        server.join()
        line.server.settimeout(DEADLINE)
    assert line.relay.load(0.1) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_no_descriptors_left(pair: str, tmp_path: Path) -> None:
    with a_line(pair, tmp_path) as line:
        line.server.listen(512)
        _, hard = resource.prlimit(line.relay.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(line.relay.pid, resource.RLIMIT_NOFILE, (100, hard))
        with contextlib.ExitStack() as clients:
            for _ in range(200):
                clients.enter_context(line.relay.connect())
            eventually(lambda: line.relay.highest_descriptor() >= 98)  # a connection needs two
            assert line.relay.load() < 0.2
        resource.prlimit(line.relay.pid, resource.RLIMIT_NOFILE, (hard, hard))
        with line.relay.connect() as client:
            client.sendall(b"still here?")
            got = b""
            while not got:  # the others come first
                with line.accept() as served:
                    got = served.recv(100)
            assert got == b"still here?"


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_bulk_without_a_descriptor_for_a_pipe(pair: str, tmp_path: Path) -> None:
    with a_line(pair, tmp_path) as line:
        client, served = line.pair()
        client.sendall(b"1")
        assert served.recv(1) == b"1"
        lowest = line.relay.descriptors()
        _, hard = resource.prlimit(line.relay.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(line.relay.pid, resource.RLIMIT_NOFILE, (line.relay.highest_descriptor() + 1, hard))
        block = os.urandom(MIB)
        transfer(client, served, block, 16, hashlib.md5(block * 16).digest())
        assert line.relay.descriptors() <= lowest


# The interface, in this process


class Ended:
    """An owner that counts and stops the loop."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.ends: list[tuple[End, int, int]] = []

    def ended(self, end: End) -> None:
        self.ends.append((end, end.moved, end.peer_moved))
        cut(end)
        self.loop.stop()


class Pair:
    """Two ends of a relay in this process, and what is outside of them."""

    def __init__(self, family: int) -> None:
        self.loop = Loop()
        self.owner = Ended(self.loop)
        self.client, self.near = stream_pair(family)
        self.far, self.served = stream_pair(family)
        self.near.setblocking(False)
        self.far.setblocking(False)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.close()
        for sock in (self.client, self.near, self.far, self.served):
            sock.close()

    def turn(self) -> None:
        """One turn of the loop."""
        self.loop.soon(self.loop.stop)
        self.loop.run()


def stream_pair(family: int) -> tuple[socket.socket, socket.socket]:
    if family == socket.AF_UNIX:
        return socket.socketpair()
    with bind(Tcp("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        listener.setblocking(True)
        served, _ = listener.accept()
    client.settimeout(DEADLINE)
    served.settimeout(DEADLINE)
    return client, served


@pytest.fixture(params=[socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with Pair(request.param) as pair:
        yield pair


def test_the_owner_hears_once_and_gets_the_counts(pair: Pair) -> None:
    pair.client.sendall(b"12345")
    pair.served.sendall(b"123")
    pair.client.shutdown(socket.SHUT_WR)
    pair.served.shutdown(socket.SHUT_WR)
    end = join(pair.loop, pair.near, pair.far, pair.owner)
    assert end.client and not end.peer.client and end.owner is pair.owner
    pair.loop.run()
    cut(end)
    assert pair.owner.ends == [(end, 5, 3)]
    assert end.over and not pair.loop.table
    assert read_all(pair.served) == b"12345" and read_all(pair.client) == b"123"


def test_what_the_client_said_before_leaves_at_once(pair: Pair) -> None:
    pair.client.sendall(b"hello")
    said = hear(pair.near)
    assert said == b"hello"
    end = join(pair.loop, pair.near, pair.far, pair.owner, said)
    assert pair.served.recv(10, socket.MSG_DONTWAIT) == b"hello"
    assert end.moved == 5


def test_what_the_backend_has_already_is_not_sent_again(pair: Pair) -> None:
    end = join(pair.loop, pair.near, pair.far, pair.owner, b"hello", 3)
    assert pair.served.recv(10, socket.MSG_DONTWAIT) == b"lo"
    assert end.moved == 5


def test_a_client_that_says_nothing_at_once_is_heard_as_such(pair: Pair) -> None:
    assert hear(pair.near) == b""
    pair.client.shutdown(socket.SHUT_WR)
    assert hear(pair.near) == b""
    join(pair.loop, pair.near, pair.far, pair.owner)
    pair.turn()
    assert pair.served.recv(10) == b""


def test_a_client_that_is_gone_before_the_relay_begins() -> None:
    with Pair(socket.AF_INET) as pair:
        reset(pair.client)
        end = join(pair.loop, pair.near, pair.far, pair.owner)
        pair.turn()
        assert end.over and pair.owner.ends == [(end, 0, 0)] and not pair.loop.table
        with pytest.raises(ConnectionResetError):
            pair.served.recv(1)


def test_a_client_that_ended_and_is_gone_at_once_ends_the_pair(pair: Pair) -> None:
    """The backend may not care for the end of file; nobody is there to hear it."""
    pair.client.sendall(b"last words")
    pair.client.shutdown(socket.SHUT_WR)
    end = join(pair.loop, pair.near, pair.far, pair.owner)
    reset(pair.client)
    pair.turn()
    assert pair.owner.ends == [(end, 10, 0)] and not pair.loop.table


def test_a_client_that_is_gone_is_not_heard() -> None:
    with Pair(socket.AF_INET) as pair:
        reset(pair.client)
        assert hear(pair.near) is None


@pytest.mark.parametrize("of", ["client", "upstream"])
@pytest.mark.parametrize("hard", [False, True])
def test_cut(pair: Pair, of: str, hard: bool) -> None:
    end = join(pair.loop, pair.near, pair.far, pair.owner)
    cut(end if of == "client" else end.peer, reset=hard)
    cut(end)
    assert pair.owner.ends == [(end, 0, 0)] and not pair.loop.table
    pair.turn()
    assert pair.near.fileno() == pair.far.fileno() == -1
    for sock in (pair.client, pair.served):
        if hard and sock.family == socket.AF_INET:
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        else:
            assert sock.recv(1) == b""


def test_cut_while_bytes_wait(pair: Pair) -> None:
    """Its pipe holds bytes of this connection: no other connection may get it."""
    end = join(pair.loop, pair.near, pair.far, pair.owner)
    pair.client.setblocking(False)
    for _ in range(1000):
        with contextlib.suppress(BlockingIOError):
            pair.client.send(b"z" * 3 * SIZE)
        pair.turn()
    before = len(os.listdir("/proc/self/fd"))
    assert end._blocked
    cut(end)
    pair.turn()
    assert len(os.listdir("/proc/self/fd")) in (before - 2, before - 4)  # copied, or spliced


def test_an_unexpected_error_ends_the_pair(pair: Pair) -> None:
    errors: list[Exception] = []
    pair.loop.on_error = lambda source, error: errors.append(error)
    end = join(pair.loop, pair.near, pair.far, pair.owner)
    end._receive = None  # type: ignore[assignment]
    pair.client.sendall(b"x")
    pair.loop.run()
    assert end.over and len(pair.owner.ends) == 1 and isinstance(errors[0], TypeError)


def test_an_ended_pair_leaves_no_garbage(pair: Pair) -> None:
    gc.collect()
    gc.disable()
    try:
        cut(join(pair.loop, pair.near, pair.far, pair.owner))
        pair.owner.ends.clear()
        pair.turn()
        assert not [thing for thing in gc.get_objects() if isinstance(thing, End)]
    finally:
        gc.enable()


def test_an_idle_pair_is_small() -> None:
    count = 500
    loop = Loop()
    owner = Ended(loop)
    outside = [socket.socketpair() for _ in range(2 * count)]
    before = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        for client, upstream in zip(outside[:count], outside[count:], strict=True):
            inside = [socket.SocketType(fileno=os.dup(sock.fileno())) for sock in (client[1], upstream[1])]
            for sock in inside:
                sock.setblocking(False)
            client[0].sendall(b"123")
            join(loop, inside[0], inside[1], owner, hear(inside[0]) or b"")
            assert upstream[0].recv(3) == b"123"
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(os.listdir("/proc/self/fd")) - before == 2 * count
    for end in [end for end in loop.table.values() if isinstance(end, End) and end.client]:
        cut(end)
    loop.close()
    for sock in (sock for both in outside for sock in both):
        sock.close()
    assert size / count <= 1100  # bytes


def test_pipes_are_bounded_and_reused() -> None:
    pool = Pipes()
    pool.MOST, pool.SPARE = 3, 2
    before = len(os.listdir("/proc/self/fd"))
    taken = [pool.take() for _ in range(4)]
    assert taken[3] is None and pool.count == 3
    first, second, third = (pipe for pipe in taken if pipe)
    os.write(first[1], b"somebody else's")
    pool.give(first, empty=False)
    assert pool.count == 2
    pool.give(second, empty=True)
    pool.give(third, empty=True)
    assert pool.take() == third
    pool.give(third, empty=True)
    pool.close()
    assert pool.count == 0 and len(os.listdir("/proc/self/fd")) == before
