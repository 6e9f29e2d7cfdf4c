"""The life of a connection in a real worker process; the tests are its control plane."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.endpoint import parse
from gateway.plane import link as say
from gateway.plane.dial import Failure, attempt, dial, target
from gateway.plane.gate import Client, Gate, Settling
from gateway.plane.loop import Loop
from gateway.plane.worker import MOST_DIALS, Worker
from tests.plane import LIMITS, Plane, Upstream, connect, plane
from tests.running import cpu, descriptors, eventually, receive_all

RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def worker() -> Iterator[Plane]:
    with plane() as running:
        yield running


def test_parked_client_wakes_once_and_is_dialled_when_the_gate_opens(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream, connect(address) as first, connect(address) as second:
        first.sendall(b"one")
        second.sendall(b"two")
        woken = worker.hear(say.Wake)
        assert woken.backend == 1
        assert woken.source == "{}:{}".format(*first.getsockname())
        eventually(lambda: worker.count()[1].parked == 2)
        assert worker.said_nothing_of(say.Wake)
        worker.open(1, upstream.endpoint)
        with upstream.accept() as a, upstream.accept() as b:
            assert {a.recv(10), b.recv(10)} == {b"one", b"two"}
            assert worker.count()[1].connections == 2
            assert worker.hear(say.Busy).backend == 1


def test_open_gate_relays_and_tells_busy_and_quiet(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        before = time.monotonic()
        with connect(address) as client, upstream.accept() as server:
            client.sendall(b"question")
            assert server.recv(100) == b"question"
            server.sendall(b"answer!")
            assert client.recv(100) == b"answer!"
            worker.hear(say.Busy)
        quiet = worker.hear(say.Quiet)
        assert before < quiet.since < time.monotonic()
        tally = worker.count()[1]
        assert (tally.total, tally.connections, tally.received, tally.sent) == (1, 0, 8, 7)


def test_short_connections_in_a_row_cost_the_control_plane_nothing(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        for _ in range(200):
            with connect(address) as client, upstream.accept() as server:
                client.sendall(b"x")
                assert server.recv(1) == b"x"
        worker.hear(say.Quiet)
        busy = 1 + sum(isinstance(message, say.Busy) for message in worker.heard)
        assert worker.count()[1].total == 200
        assert busy < 20


def test_live_bytes_are_counted(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        with connect(address) as client, upstream.accept() as server:
            client.sendall(b"12345")
            assert server.recv(10) == b"12345"
            assert worker.count()[1].received == 5


def test_counting_looks_once_at_each_connection() -> None:
    """However many backends there are: nothing else moves meanwhile."""

    class Table(dict[int, Any]):
        looks = 0

        def values(self) -> Any:
            self.looks += 1
            return super().values()

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        worker = Worker(theirs, -1, "", 0)
        for number in range(8):
            worker.serve(say.Serve(number, f"backend-{number}", "", **LIMITS), [])
            worker.gates[number].enter()
        table = worker.loop.table = Table(worker.loop.table)
        worker.count(say.Count(1), [])
        worker.loop.close()
    assert table.looks == 1


def test_an_unexpected_error_shuts_nobody_else_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[Client] = []

    def connect(client: Client) -> None:
        dialled.append(client)
        if len(dialled) == 1:
            raise ZeroDivisionError

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    first, second = socket.socketpair()
    with ours, theirs, first, second:
        worker = Worker(theirs, -1, "", 0)
        monkeypatch.setattr(worker, "connect", connect)
        worker.serve(say.Serve(1, "one", "", **LIMITS), [])
        for sock in (first, second):
            worker.admit(Client(worker.gates[1], "", sock, ""))
        with pytest.raises(ZeroDivisionError):
            worker.open(say.Open(1, {"": "tcp://127.0.0.1:1"}), [])
        worker.open(say.Open(1, {"": "tcp://127.0.0.1:1"}), [])
        worker.loop.close()
    assert [client.sock for client in dialled] == [first, second]


def test_who_cannot_be_watched_shuts_nobody_else_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """fs.epoll.max_user_watches: clients were let in together, the gate has closed, and one of them cannot be parked."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, contextlib.ExitStack() as stack:
        worker = Worker(theirs, -1, "", 0)
        worker.serve(say.Serve(1, "one", "", **LIMITS), [])
        worker.open(say.Open(1, {"": "tcp://127.0.0.1:1"}), [])
        gate, add, lacks = worker.gates[1], Loop.add, [errno.ENOSPC]

        def watch(loop: Loop, fd: int, source: Any, mask: int) -> None:
            if isinstance(source, Client) and lacks:
                raise OSError(lacks.pop(), "")
            add(loop, fd, source, mask)

        monkeypatch.setattr(Loop, "add", watch)
        monkeypatch.setattr(worker.loop, "on_error", lambda source, error: None)
        for _ in range(3):
            near, _ = map(stack.enter_context, socket.socketpair())
            worker.admit(Client(gate, "", near, ""))
        worker.close(say.Close(1, 5), [])
        worker.loop.soon(worker.loop.stop)
        worker.loop.run()
        assert (gate.connections, len(gate.parked)) == (0, 2)
        worker.loop.close()


def test_close_answers_with_what_is_left(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        with connect(address) as client, upstream.accept() as server:
            worker.send(say.Close(1, 5))
            assert worker.hear(say.Closed).connections == 1
            with connect(address) as late:
                worker.hear(say.Wake)
                worker.open(1, upstream.endpoint)
                with upstream.accept() as second:
                    late.sendall(b"served all the same")
                    assert second.recv(100) == b"served all the same"
            client.sendall(b"and so is this")
            assert server.recv(100) == b"and so is this"
        worker.send(say.Close(1, 5))


def test_who_waits_for_a_turn_when_the_gate_closes_wakes_the_backend(worker: Plane, tmp_path: Path) -> None:
    """Nobody else might come."""
    address = worker.serve()
    with contextlib.ExitStack() as stack, Upstream(f"unix:{tmp_path}/up", backlog=0) as full:
        stack.enter_context(connect(full.endpoint))
        worker.open(1, full.endpoint)
        tally = worker.count().get(1)
        while tally is None or not tally.parked:
            stack.enter_context(connect(address))
            tally = worker.count().get(1)
        assert worker.said_nothing_of(say.Wake)
        worker.send(say.Close(1, 5))
        assert worker.hear(say.Wake).backend == 1
        assert worker.hear(say.Closed).connections >= MOST_DIALS
        worker.send(say.Cut(1))


def test_who_waits_moves_to_another_backend_and_wakes_it(worker: Plane) -> None:
    address, _ = worker.serve(1), worker.serve(2, pending=2)
    with Upstream() as upstream, contextlib.ExitStack() as stack:
        worker.open(1, upstream.endpoint)
        with connect(address) as relayed, upstream.accept() as server:
            worker.send(say.Close(1, 5))
            waiting = [stack.enter_context(connect(address)) for _ in range(3)]
            eventually(lambda: worker.count()[1].parked == 3)
            assert worker.hear(say.Wake).backend == 1
            worker.send(say.Move(1, 2))
            assert worker.hear(say.Wake).backend == 2
            assert waiting[2].recv(1) == b""  # there is no room for it
            tallies = worker.count()
            assert (tallies[1].parked, tallies[2].parked, tallies[2].refused) == (0, 2, 1)
            relayed.sendall(b"stays")
            assert server.recv(5) == b"stays"
            worker.send(say.Forget(1))
            worker.open(2, upstream.endpoint)
            with upstream.accept() as first, upstream.accept():
                waiting[0].sendall(b"served")
                assert first.recv(6) == b"served"
            worker.send(say.Cut(1), say.Cut(2))


def test_who_waits_for_nothing_known_stays(worker: Plane) -> None:
    address = worker.serve(1)
    with connect(address):
        worker.hear(say.Wake)
        worker.send(say.Move(1, 2), say.Move(2, 1), say.Move(1, 1))
        assert worker.count()[1].parked == 1
        worker.send(say.Reject(1))


def test_reject_closes_the_parked_and_the_next_client_wakes_again(worker: Plane) -> None:
    address = worker.serve()
    with connect(address) as client:
        worker.hear(say.Wake)
        worker.send(say.Reject(1))
        assert client.recv(1) == b""
    with connect(address):
        worker.hear(say.Wake)


def test_parked_client_that_resets_is_forgotten(worker: Plane) -> None:
    address = worker.serve()
    client = connect(address)
    worker.hear(say.Wake)
    reset(client)
    eventually(lambda: not worker.count().get(1) or worker.count()[1].parked == 0)


def test_parked_unix_client_that_closes_is_forgotten(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(listen=f"unix:{tmp_path}/s")
    before = descriptors(worker.pid)
    client = connect(address)
    assert worker.hear(say.Wake).source == f"pid {os.getpid()} uid {os.getuid()}"
    client.close()
    eventually(lambda: descriptors(worker.pid) == before)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def test_parked_client_that_resets_while_it_is_dialled_in(worker: Plane, tmp_path: Path) -> None:
    address, other = worker.serve(1, connect_timeout=0.1), worker.serve(2)
    with Upstream(f"unix:{tmp_path}/up", backlog=0) as full, connect(full.endpoint), Upstream() as upstream:
        worker.open(2, upstream.endpoint)
        worker.count()
        open_files = descriptors(worker.pid)
        client = connect(address)
        worker.hear(say.Wake)
        worker.open(1, full.endpoint)
        worker.count()
        reset(client)
        with connect(other) as stranger, upstream.accept() as server:
            eventually(lambda: worker.count()[1].connections == 0)
            stranger.sendall(b"nothing to do with it")
            assert server.recv(100) == b"nothing to do with it"
        eventually(lambda: descriptors(worker.pid) == open_files)
        assert (worker.count()[1].connections, worker.count()[1].parked) == (0, 0)


def a_gate(loop: Loop) -> Gate:
    limits = say.Serve(1, "one", "", 9, 9, 0.01, 0.0, 30.0, 16, 1 << 20)
    return Gate(loop, limits, lambda message: None, Settling(loop, print))


def test_a_dial_has_one_outcome(tmp_path: Path) -> None:
    """Also when the outcome itself fails, and the loop asks it to give up."""
    outcomes: list[str] = []

    def outcome(client: Client, sock: object, *why: object) -> None:
        outcomes.append(client.listener)
        raise ValueError("by the test")

    loop, errors = Loop(), []
    loop.on_error = lambda source, error: (errors.append(error), loop.stop())
    gate = a_gate(loop)
    near, far = socket.socketpair()
    with near, far, Upstream(f"unix:{tmp_path}/up", backlog=0) as full, connect(full.endpoint):
        dial(loop, Client(gate, "first", near, ""), target(full.endpoint), outcome)
        assert len(gate.dials) == 1
        loop.run()
    loop.close()
    assert outcomes == ["first"] and len(errors) == 1
    assert not gate.dials


def test_parked_half_closed_client_is_served(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream, connect(address) as client:
        client.sendall(b"all I have")
        client.shutdown(socket.SHUT_WR)
        worker.hear(say.Wake)
        worker.open(1, upstream.endpoint)
        with upstream.accept() as server:
            assert receive_all(server) == b"all I have"
            server.sendall(b"the answer")
        assert receive_all(client) == b"the answer"


def test_refused_client_is_parked_again_not_failed(worker: Plane) -> None:
    address = worker.serve()
    upstream = Upstream()
    endpoint = upstream.endpoint
    upstream.close()
    worker.open(1, endpoint)
    with connect(address) as client:
        client.sendall(b"hello")
        refused = worker.hear(say.Refused)
        assert "refused" in refused.error
        worker.hear(say.Wake)
        with Upstream(str(endpoint)) as again:
            worker.open(1, again.endpoint)
            with again.accept() as server:
                assert server.recv(10) == b"hello"


def test_a_client_is_counted_once_however_often_it_is_dialled_in(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        endpoint = upstream.endpoint
    worker.open(1, endpoint)
    with connect(address):
        worker.hear(say.Refused)
        with Upstream(str(endpoint)) as again:
            worker.open(1, again.endpoint)
            with again.accept():
                assert worker.count()[1].total == 1


def test_who_is_let_in_and_has_to_wait_after_all_is_counted_once(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve()
    with contextlib.ExitStack() as stack, Upstream(f"unix:{tmp_path}/up", backlog=0) as full:
        stack.enter_context(connect(full.endpoint))
        worker.open(1, full.endpoint)
        worker.count()
        worker.process.send_signal(signal.SIGSTOP)
        clients = [stack.enter_context(connect(address)) for _ in range(3 * MOST_DIALS)]
        worker.process.send_signal(signal.SIGCONT)
        full.accept().close()
        for _ in clients:
            stack.enter_context(full.accept())
        eventually(lambda: worker.count()[1].parked == 0)
        assert worker.count()[1].total == len(clients)


@pytest.mark.parametrize("ends_first", [False, True])
def test_clients_that_reset_before_they_are_dialled_leave_it_quiet(worker: Plane, ends_first: bool) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        worker.count()
        worker.process.send_signal(signal.SIGSTOP)
        for number in range(10):
            client = connect(address)
            client.sendall(b"x" * (number % 2))
            if ends_first:
                client.shutdown(socket.SHUT_WR)
            reset(client)
        worker.process.send_signal(signal.SIGCONT)
        worker.hear(say.Quiet)
        assert worker.count()[1].connections == 0


def test_what_a_refused_client_has_said_arrives_once(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        endpoint = upstream.endpoint
    with connect(address) as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        worker.hear(say.Wake)
        worker.open(1, endpoint)  # nobody listens there: what was said is read already
        worker.hear(say.Refused)
        with Upstream(str(endpoint)) as again:
            worker.open(1, again.endpoint)
            with again.accept() as server:
                assert receive_all(server) == b"hello"
        assert receive_all(client) == b""
    assert eventually(lambda: (tally := worker.count()[1]).connections == 0 and tally).received == 5  # type: ignore[union-attr]


def test_a_backend_that_speaks_first_sees_its_client_at_once(worker: Plane) -> None:
    """Only what is said at once may hold back the end of the handshake, which would else take 40 ms (TCP_DELACK_MIN)."""
    address = worker.serve()
    with Upstream() as upstream:
        sock, code, sent = attempt(target(upstream.endpoint), b"")
        assert sock is not None and (code, sent) == (0, 0)
        assert select.select([upstream.socket], [], [], 0.02)[0]
        sock.close()
        upstream.accept().close()
        worker.open(1, upstream.endpoint)
        with connect(address) as client, upstream.accept() as server:
            server.sendall(b"220 welcome")
            assert client.recv(100) == b"220 welcome"


def test_refused_again_and_again_is_given_up(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        endpoint = upstream.endpoint
    with connect(address) as client:
        worker.hear(say.Wake)
        for _ in range(2):
            worker.open(1, endpoint)
            worker.hear(say.Refused)
        worker.open(1, endpoint)
        assert client.recv(1) == b""
    assert "refused" in worker.hear(say.Limited).limit


def test_limit_of_connections(worker: Plane) -> None:
    address = worker.serve(connections=2)
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        with connect(address), connect(address), upstream.accept(), upstream.accept():
            with connect(address) as third:
                assert third.recv(1) == b""
            limited = worker.hear(say.Limited)
            assert (limited.limit, limited.count) == ("limits.connections", 1)
        eventually(lambda: worker.count()[1].connections == 0)
        with connect(address), upstream.accept():
            pass


def test_limit_of_parked_clients(worker: Plane) -> None:
    address = worker.serve(pending=3)
    clients = [connect(address) for _ in range(3)]
    eventually(lambda: 1 in (count := worker.count()) and count[1].parked == 3)
    with connect(address) as fourth:
        assert fourth.recv(1) == b""
    assert worker.hear(say.Limited).limit == "limits.pending"
    assert worker.count()[1].refused == 1
    for client in clients:
        client.close()


@pytest.mark.slow
def test_silent_connection_is_cut_and_a_talking_one_is_not(worker: Plane) -> None:
    address = worker.serve(idle_timeout=0.4)
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        with connect(address) as silent, upstream.accept(), connect(address) as talking, upstream.accept() as server:
            silent.setblocking(False)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                talking.sendall(b"x")
                assert server.recv(1) == b"x"
                try:
                    assert silent.recv(1) == b""
                    break
                except BlockingIOError:
                    continue
            assert worker.hear(say.Limited).limit == "limits.idle_timeout"
            talking.sendall(b"still here")
            assert server.recv(100) == b"still here"


@pytest.mark.parametrize("before", [0.0, 3600.0])
def test_a_new_idle_timeout_is_for_those_who_are_there_already(worker: Plane, before: float) -> None:
    address = worker.serve(idle_timeout=before)
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        with connect(address) as silent, upstream.accept():
            worker.hear(say.Busy)
            worker.send(say.Serve(1, "backend-1", "", **{**LIMITS, "idle_timeout": 0.1}))
            assert silent.recv(1) == b""
            assert worker.hear(say.Limited).limit == "limits.idle_timeout"


def test_listener_names_choose_the_endpoint(worker: Plane) -> None:
    address = worker.serve(name="db")
    with Upstream() as web, Upstream() as db:
        worker.send(say.Open(1, {"web": str(web.endpoint), "db": str(db.endpoint)}))
        with connect(address) as client, db.accept() as server:
            client.sendall(b"select")
            assert server.recv(10) == b"select"


@pytest.mark.parametrize("bad", ["tcp://[fe80::1%nosuch0]:80", "fd://web", "gopher://x"])
def test_an_endpoint_that_is_no_good_is_left_out(worker: Plane, bad: str) -> None:
    address = worker.serve(name="db")
    other = worker.listen(1, "tcp://127.0.0.1:0", "web", 50)
    with Upstream() as upstream, connect(address) as waiting:
        worker.hear(say.Wake)
        worker.send(say.Open(1, {"": str(upstream.endpoint), "db": bad}))
        assert bad in worker.hear(say.Trouble).text
        assert waiting.recv(1) == b""
        assert worker.hear(say.Limited).limit == "endpoints: none for listener 'db'"
        with connect(other) as client, upstream.accept() as server:
            client.sendall(b"web")
            assert server.recv(10) == b"web"


def test_a_gate_opens_without_a_descriptor_to_spare(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream, connect(address) as client:
        client.sendall(b"waits")
        worker.hear(say.Wake)
        before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        used = set(map(int, os.listdir(f"/proc/{worker.pid}/fd")))
        lowest_free = min(set(range(1000)) - used)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        worker.open(1, upstream.endpoint)
        worker.count()
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)
        with upstream.accept() as server:
            assert server.recv(10) == b"waits"


def test_full_backlog_costs_no_second(worker: Plane) -> None:
    """A backend with a tiny backlog that accepts slowly: the kernel would let the others wait for a retransmission."""
    address = worker.serve()
    with Upstream(backlog=1) as upstream:
        worker.open(1, upstream.endpoint)
        clients = [connect(address) for _ in range(20)]
        for client in clients:
            client.sendall(b"x")
        for _ in clients:
            with upstream.accept() as server:
                assert server.recv(1) == b"x"
        for client in clients:
            client.close()


def test_unix_endpoint_with_a_full_backlog(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve()
    with Upstream(f"unix:{tmp_path}/up", backlog=1) as upstream:
        worker.open(1, upstream.endpoint)
        clients = [connect(address) for _ in range(20)]
        for _ in clients:
            upstream.accept().close()
        for client in clients:
            assert client.recv(1) == b""
            client.close()


def test_connect_timeout_has_its_name(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(connect_timeout=0.05)
    with Upstream(f"unix:{tmp_path}/up", backlog=0) as upstream, connect(upstream.endpoint):
        worker.open(1, upstream.endpoint)
        with connect(address) as client:
            assert client.recv(1) == b""
        assert worker.hear(say.Limited).limit == "limits.connect_timeout"
        # It is alive, only slow: nobody is to look after it, and the next client is dialled in.
        assert worker.said_nothing_of(say.Refused)
        upstream.accept().close()
        with connect(address) as client, upstream.accept() as server:
            client.sendall(b"next")
            assert server.recv(10) == b"next"


def test_a_dial_of_an_earlier_opening_closes_no_gate(worker: Plane, tmp_path: Path) -> None:
    """It was put off by a full backlog, the backend came back elsewhere, and then the old place was gone."""
    address = worker.serve()
    with Upstream(f"unix:{tmp_path}/old", backlog=0) as old, connect(old.endpoint), Upstream() as new:
        worker.open(1, old.endpoint)
        with connect(address) as client:
            client.sendall(b"patient")
            eventually(lambda: 1 in (count := worker.count()) and count[1].connections == 1)
            worker.open(1, new.endpoint)
            worker.count()
            os.unlink(tmp_path / "old")
            with new.accept() as server:
                assert server.recv(10) == b"patient"
        assert worker.said_nothing_of(say.Refused)


def test_ports_that_run_out_do_not_close_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every port of ours to that address is taken: that passes, and the backend has nothing to do with it."""
    codes = [errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL, errno.ENOENT]
    monkeypatch.setattr("gateway.plane.dial.attempt", lambda where, said: (None, codes.pop(0), 0))
    outcomes: list[Failure] = []

    def outcome(client: Client, sock: object, failure: Failure) -> None:
        outcomes.append(failure)
        loop.stop()

    loop = Loop()
    near, far = socket.socketpair()
    with near, far:
        dial(loop, Client(a_gate(loop), "", near, ""), target(parse("tcp://127.0.0.1:1")), outcome)
        assert not outcomes
        loop.run()
    loop.close()
    assert outcomes == [Failure(os.strerror(errno.ENOENT), gone=True)]


def test_unlisten_takes_in_who_waits_already(worker: Plane) -> None:
    address = worker.serve()
    worker.process.send_signal(signal.SIGSTOP)
    clients = [connect(address) for _ in range(100)]
    worker.send(say.Unlisten(101, accept_waiting=True))
    worker.listening.pop().close()
    worker.process.send_signal(signal.SIGCONT)
    eventually(lambda: 1 in (count := worker.count()) and count[1].parked == 100)
    worker.count()  # a turn later: the listener is closed at the end of the one that it ended in
    with pytest.raises(ConnectionRefusedError):
        connect(address)
    for client in clients:
        client.close()


def test_cut_closes_everything_of_one_backend_only(worker: Plane) -> None:
    address, other = worker.serve(1), worker.serve(2)
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        worker.open(2, upstream.endpoint)
        with connect(address) as client, upstream.accept(), connect(other) as safe, upstream.accept() as server:
            worker.send(say.Cut(1))
            assert client.recv(1) == b""
            safe.sendall(b"alive")
            assert server.recv(10) == b"alive"


def test_cut_ends_what_is_being_dialled_in(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve()
    with Upstream(f"unix:{tmp_path}/up", backlog=0) as full, connect(full.endpoint):
        worker.open(1, full.endpoint)
        worker.count()
        open_files = descriptors(worker.pid)
        with connect(address) as client:
            eventually(lambda: 1 in (count := worker.count()) and count[1].connections == 1)
            worker.send(say.Cut(1))
            assert client.recv(1) == b""
        full.accept().close()
        worker.hear(say.Quiet)
        assert worker.count()[1].connections == 0
        assert descriptors(worker.pid) == open_files
        full.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            full.accept()


def test_forgotten_backend_lives_until_its_last_connection(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        with connect(address) as client, upstream.accept() as server:
            worker.send(say.Unlisten(101, accept_waiting=True), say.Forget(1))
            client.sendall(b"still")
            assert server.recv(10) == b"still"
            assert worker.count()[1].connections == 1
        eventually(lambda: not worker.count())


def test_descriptors_run_out_and_come_back(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        limit = descriptors(worker.pid) + 30
        before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
        clients = [connect(address) for _ in range(60)]
        worker.hear(say.Trouble)
        used = cpu(worker.pid)
        worker.count()
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)
        for _ in clients:
            upstream.accept().close()
        assert cpu(worker.pid) - used < 0.5
        for client in clients:
            client.close()


def test_clients_leave_descriptors_for_orders_and_backends() -> None:
    with plane(limit=80) as worker, Upstream() as upstream:
        many, other = worker.serve(1), worker.serve(2)
        clients = [connect(many) for _ in range(100)] + [connect(other) for _ in range(2)]
        assert "few descriptors" in worker.hear(say.Trouble).text
        assert worker.count()[1].parked < 60
        third = worker.serve(3)  # an order with a descriptor
        worker.open(1, upstream.endpoint)
        for _ in range(10):  # and sockets to the backend
            upstream.accept().close()
        for client in clients:
            client.close()
        with connect(third):

            def third_is_in() -> bool:
                worker.send(say.Cut(1), say.Cut(2))
                return 3 in worker.count()

            eventually(third_is_in)


def test_the_same_trouble_is_said_once_in_a_while(worker: Plane) -> None:
    addresses = [worker.serve(number) for number in range(1, 6)]
    before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (descriptors(worker.pid), before[1]))
    clients = [connect(address) for address in addresses]
    worker.hear(say.Trouble)
    time.sleep(0.2)  # several times CAPACITY_PAUSE: it has met the trouble again and again
    assert worker.said_nothing_of(say.Trouble)
    worker.hear(say.Trouble)  # but it is not forgotten
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)
    for client in clients:
        client.close()


def test_worker_ends_when_the_control_plane_is_gone() -> None:
    with plane() as running:
        running.serve()


def test_worker_does_not_end_by_the_signals_of_a_terminal(worker: Plane) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        worker.process.send_signal(number)
    worker.count()
    assert worker.process.poll() is None


def test_worker_at_rest_does_not_wake(worker: Plane) -> None:
    address = worker.serve()
    with Upstream() as upstream:
        worker.open(1, upstream.endpoint)
        with connect(address), upstream.accept():
            worker.count()
            switches = _switches(worker.pid)
            connect(upstream.endpoint).close()  # something takes its time elsewhere
            assert _switches(worker.pid) <= switches + 1


def _switches(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)


# vsock-mux: the endpoint is a Unix socket that wants `CONNECT port` first.


def test_vsock_mux_is_asked_and_what_follows_ok_belongs_to_the_client(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve()
    with Upstream(f"unix:{tmp_path}/mux") as mux:
        worker.open(1, f"vsock-mux:{tmp_path}/mux:52")
        with connect(address) as client, mux.accept() as server:
            client.sendall(b"early")
            assert server.recv(100) == b"CONNECT 52\n"
            server.sendall(b"OK 1073741824\nbanner")
            assert client.recv(100) == b"banner"
            assert server.recv(100) == b"early"


@pytest.mark.parametrize("answer", [b"", b"NO\n", b"OK\n", b"x" * 70, b"OK garbage\n"])
def test_vsock_mux_that_does_not_say_ok(worker: Plane, tmp_path: Path, answer: bytes) -> None:
    address = worker.serve()
    with Upstream(f"unix:{tmp_path}/mux") as mux:
        worker.open(1, f"vsock-mux:{tmp_path}/mux:52")
        with connect(address), mux.accept() as server:
            server.recv(100)
            if answer:
                server.sendall(answer)
            else:
                server.close()
            assert "OK" in worker.hear(say.Refused).error


def test_vsock_mux_that_gives_half_an_answer(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve()
    with Upstream(f"unix:{tmp_path}/mux") as mux:
        worker.open(1, f"vsock-mux:{tmp_path}/mux:52")
        with connect(address) as client, mux.accept() as server:
            server.recv(100)
            server.sendall(b"OK 12")
            worker.count()
            used = cpu(worker.pid)
            time.sleep(0.2)  # nothing happens in it: the CPU used meanwhile is what is looked at
            assert cpu(worker.pid) - used < 0.1
            server.sendall(b"34\nbanner")
            assert client.recv(100) == b"banner"
