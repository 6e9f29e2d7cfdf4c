"""Flows of datagrams in a real worker process; the tests are its control plane."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.endpoint import Endpoint, bind, parse
from gateway.plane import link as say
from gateway.plane.datagram import LAST_ANSWERS
from tests.plane import LIMITS, Plane, Upstream, connect, plane
from tests.running import PATIENCE, cpu, descriptors, eventually

UDP = "udp://127.0.0.1:0"


@pytest.fixture
def worker() -> Iterator[Plane]:
    with plane() as running:
        yield running


class Datagrams(Upstream):
    """A datagram socket that plays the backend."""

    def __init__(self, address: Endpoint | str = UDP) -> None:
        super().__init__(str(address))

    def hear(self) -> bytes:
        """The next datagram; `answer` goes to who sent it."""
        data, self.sender = self.socket.recvfrom(1 << 17)
        return data

    def answer(self, data: bytes) -> None:
        self.socket.sendto(data, self.sender)

    def echo(self) -> bytes:
        data = self.hear()
        self.answer(data)
        return data


def client(address: Endpoint | Any, name: Any = None) -> socket.socket:
    """A socket that is connected to a listener; `name`: its own address."""
    sock = socket.socket(address.family, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    if name is not None:
        sock.bind(name)
    sock.connect(address.sockaddr)
    return sock


@contextlib.contextmanager
def clients(address: Any, count: int, name: Any = None) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(client(address, name)) for _ in range(count)]


def tally(worker: Plane, backend: int = 1) -> say.Tally:
    return worker.count().get(backend) or say.Tally(backend, 0, 0, 0, 0, 0, 0, 0)


def waits(worker: Plane, clients: int) -> None:
    eventually(lambda: tally(worker).parked == clients, f"{clients} waiting")


def has(worker: Plane, **expected: int) -> None:
    """Counters of the worker, once it has come so far."""
    try:
        eventually(lambda: all(getattr(tally(worker), name) == value for name, value in expected.items()))
    except AssertionError as error:
        raise AssertionError(f"{tally(worker)} is not {expected}") from error


# An open gate


def test_open_gate_relays_both_ways_and_counts(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, client(address) as sock:
        worker.open(1, backend.endpoint)
        sock.send(b"question")
        assert backend.hear() == b"question"
        backend.answer(b"answer!")
        backend.answer(b"and more")
        assert sock.recv(100) == b"answer!"
        assert sock.recv(100) == b"and more"
        assert worker.hear(say.Busy).backend == 1
        has(worker, connections=1, parked=0, total=1, received=8, sent=15, refused=0, dropped=0)
        sock.send(b"another")
        assert backend.echo() == b"another"
        assert sock.recv(100) == b"another"
        has(worker, connections=1, total=1)


def test_each_client_has_its_own_flow(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, client(address) as one, client(address) as two:
        worker.open(1, backend.endpoint)
        senders = set()
        for sock, data in ((one, b"one"), (two, b"two"), (one, b"three")):
            sock.send(data)
            assert backend.echo() == data
            senders.add(backend.sender)
            assert sock.recv(100) == data
        assert len(senders) == 2
        has(worker, connections=2, total=2)


@pytest.mark.parametrize("size", [0, 1, 1472, 65507])
def test_a_datagram_of_any_size_stays_one(worker: Plane, size: int) -> None:
    address = worker.serve(listen=UDP)
    data = os.urandom(size)
    with Datagrams() as backend, client(address) as sock:
        worker.open(1, backend.endpoint)
        for _ in range(2):  # the second one takes the short way
            sock.send(data)
            assert backend.echo() == data
            assert sock.recv(1 << 17) == data
        has(worker, received=2 * size, sent=2 * size, dropped=0)


def test_a_kept_datagram_of_any_size_stays_one(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    sent = [os.urandom(65507), b"", b"x", os.urandom(65507)]
    with Datagrams() as backend, client(address) as sock:
        for data in sent:
            sock.send(data)
        waits(worker, 1)
        worker.open(1, backend.endpoint)
        assert [backend.hear() for _ in sent] == sent


def test_many_at_once_arrive_in_order(worker: Plane) -> None:
    """More than a batch."""
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, client(address) as sock:
        worker.open(1, backend.endpoint)
        sent = [b"%d" % number for number in range(200)]
        for data in sent:
            sock.send(data)
        assert [backend.hear() for _ in sent] == sent
        for data in sent:
            backend.answer(data)
        assert [sock.recv(100) for _ in sent] == sent


# Where answers come from


def test_ipv6(worker: Plane) -> None:
    address = worker.serve(listen="udp://[::1]:0")
    with Datagrams("udp://[::1]:0") as backend, client(address) as sock:
        worker.open(1, backend.endpoint)
        sock.send(b"six")
        assert backend.echo() == b"six"
        assert sock.recv(100) == b"six"


@pytest.mark.parametrize("awake", [True, False])
@pytest.mark.parametrize("listen", ["udp://0.0.0.0:0", "udp://*:0", "udp://[::]:0"])
def test_a_wildcard_socket_answers_from_the_address_that_was_asked(worker: Plane, listen: str, awake: bool) -> None:
    address: Any = worker.serve(listen=listen)
    with Datagrams() as backend, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(PATIENCE)
        if awake:
            worker.open(1, backend.endpoint)
        asked = [("127.0.0.1", address.port), ("127.0.0.2", address.port)]
        for number, to in enumerate(asked * 2):
            sock.sendto(b"%d" % number, to)
        if not awake:
            waits(worker, 2)
            worker.open(1, backend.endpoint)
        senders = {}
        for _ in range(4):
            data = backend.echo()
            senders[data] = backend.sender
        assert senders[b"0"] == senders[b"2"] != senders[b"1"] == senders[b"3"]
        answers = dict(sock.recvfrom(100) for _ in range(4))
        assert answers == {b"%d" % number: to for number, to in enumerate(asked * 2)}
        has(worker, connections=2)


def test_a_dual_stack_socket_serves_both_families(worker: Plane) -> None:
    address: Any = worker.serve(listen="udp://[::]:0")
    with Datagrams() as backend:
        worker.open(1, backend.endpoint)
        for host in ("::1", "127.0.0.1", "127.0.0.3"):
            with client(
                parse(f"udp://[{host}]:{address.port}" if ":" in host else f"udp://{host}:{address.port}")
            ) as sock:
                sock.send(host.encode())
                assert backend.echo() == host.encode()
                assert sock.recv(100) == host.encode()  # connected: it takes nothing from another address


def test_what_came_before_the_worker_is_answered_from_the_right_address(worker: Plane) -> None:
    """The kernel notes the address to answer from only once it is asked to."""
    early = bind(parse("udp://0.0.0.0:0"))
    worker.listening.append(early)
    port = early.getsockname()[1]
    with Datagrams() as backend, client(parse(f"udp://127.0.0.2:{port}")) as sock:
        sock.send(b"early")
        worker.send(say.Serve(1, "one", "", 9, 9, 5.0, 0.0, 30.0, 16, 1 << 20))
        worker.send(say.Listen(101, 1, "", ""), fds=[early.fileno()])
        worker.open(1, backend.endpoint)
        assert backend.echo() == b"early"
        assert sock.recv(100) == b"early"


# Unix


def test_unixgram_is_answered(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(listen=f"unixgram:{tmp_path}/front")
    with Datagrams(f"unixgram:{tmp_path}/back") as backend:
        worker.open(1, backend.endpoint)
        for name in (f"{tmp_path}/client", "\0dormant-test-client", ""):
            with client(address, name) as sock:
                for data in (b"one", b"two"):
                    sock.send(data)
                    assert backend.echo() == data
                    assert sock.recv(100) == data
        has(worker, connections=3, dropped=0)


def test_unnamed_unix_clients_are_heard_and_do_no_harm(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(listen=f"unixgram:{tmp_path}/front")
    with Datagrams(f"unixgram:{tmp_path}/back") as backend, client(address) as one, client(address) as two:
        one.send(b"one")
        two.send(b"two")
        assert worker.hear(say.Wake).source == "unnamed Unix clients"
        worker.open(1, backend.endpoint)
        assert [backend.echo(), backend.echo()] == [b"one", b"two"]
        has(worker, connections=1, dropped=2)  # what nobody can be told
        with client(address, "") as named:
            named.send(b"three")
            assert backend.echo() == b"three"
            assert named.recv(100) == b"three"


def test_the_families_mix(worker: Plane, tmp_path: Path) -> None:
    outer, inner = worker.serve(1, UDP), worker.serve(2, f"unixgram:{tmp_path}/front")
    with Datagrams(f"unixgram:{tmp_path}/back") as local, Datagrams() as remote:
        worker.open(1, local.endpoint)
        worker.open(2, remote.endpoint)
        for address, backend, name in ((outer, local, None), (inner, remote, "")):
            with client(address, name) as sock:
                sock.send(b"hello")
                assert backend.echo() == b"hello"
                assert sock.recv(100) == b"hello"


def test_what_is_larger_than_the_buffer_is_dropped_and_never_cut_off(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(listen=f"unixgram:{tmp_path}/front")
    with Datagrams(f"unixgram:{tmp_path}/back") as backend, client(address, "") as sock:
        worker.open(1, backend.endpoint)
        sock.send(b"x" * (64 << 10))
        sock.send(b"x" * ((64 << 10) + 1))
        sock.send(b"the next")
        assert backend.hear() == b"x" * (64 << 10)
        assert backend.hear() == b"the next"
        backend.answer(b"y" * ((64 << 10) + 1))
        backend.answer(b"the next")
        assert sock.recv(1 << 17) == b"the next"
        has(worker, dropped=2)


@pytest.mark.parametrize("awake", [True, False])
def test_a_full_unix_backend_makes_them_wait_and_loses_nothing(worker: Plane, tmp_path: Path, awake: bool) -> None:
    """Its queue has ten places (net.unix.max_dgram_qlen)."""
    address = worker.serve(listen=f"unixgram:{tmp_path}/front", flow_datagrams=100)
    sent = [b"%d" % number for number in range(100)]
    with Datagrams(f"unixgram:{tmp_path}/back") as backend, client(address, "") as sock:
        if awake:
            worker.open(1, backend.endpoint)
        for data in sent:
            sock.send(data)
        if not awake:
            waits(worker, 1)
            worker.open(1, backend.endpoint)
        used = cpu(worker.pid)
        has(worker, connections=1, parked=0)
        assert cpu(worker.pid) - used < 0.2
        assert [backend.hear() for _ in sent] == sent
        has(worker, dropped=0, received=sum(map(len, sent)))


def test_many_flows_wait_for_one_full_unix_backend(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(listen=f"unixgram:{tmp_path}/front")
    with Datagrams(f"unixgram:{tmp_path}/back") as backend, clients(address, 100, "") as socks:
        for number, sock in enumerate(socks):
            sock.send(b"%d" % number)
        waits(worker, 100)
        worker.open(1, backend.endpoint)
        assert {backend.echo() for _ in socks} == {b"%d" % number for number in range(100)}
        for number, sock in enumerate(socks):
            assert sock.recv(100) == b"%d" % number
        has(worker, dropped=0, connections=100)


# A closed gate


def test_first_datagrams_are_kept_and_delivered_in_order(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, client(address) as one, client(address) as two:
        for number in range(3):
            one.send(b"one %d" % number)
        woken = worker.hear(say.Wake)
        assert woken.source == "{}:{}".format(*one.getsockname())
        two.send(b"two")
        waits(worker, 2)
        assert worker.said_nothing_of(say.Wake) and worker.said_nothing_of(say.Busy)
        has(worker, connections=0, total=0, parked=2)
        worker.open(1, backend.endpoint)
        assert [backend.hear() for _ in range(3)] == [b"one 0", b"one 1", b"one 2"]
        backend.answer(b"done")
        assert backend.echo() == b"two"
        assert (one.recv(10), two.recv(10)) == (b"done", b"two")
        worker.hear(say.Busy)
        has(worker, connections=2, total=2, parked=0, dropped=0)


def test_bound_of_each_flow_drops_its_oldest(worker: Plane) -> None:
    address = worker.serve(listen=UDP, flow_datagrams=4)
    with Datagrams() as backend, client(address) as one, client(address) as two:
        two.send(b"two")
        waits(worker, 1)
        for number in range(10):
            one.send(b"%d" % number)
        has(worker, dropped=6, parked=2)
        worker.open(1, backend.endpoint)
        assert [backend.hear() for _ in range(5)] == [b"two", b"6", b"7", b"8", b"9"]
        has(worker, dropped=6)


def test_bound_of_the_backend_drops_what_was_kept_for_longest(worker: Plane) -> None:
    address = worker.serve(listen=UDP, flow_bytes=1000)
    with Datagrams() as backend, clients(address, 5) as socks:
        for number, sock in enumerate(socks[:4]):
            sock.send(b"%d" % number + b"x" * 299)
            waits(worker, min(number + 1, 3))
        has(worker, dropped=1, parked=3)
        socks[4].send(b"x" * 1001)  # there can be no room for it, and nobody else pays for it
        has(worker, dropped=2, parked=3)
        worker.open(1, backend.endpoint)
        assert [backend.hear()[:1] for _ in range(3)] == [b"1", b"2", b"3"]


def test_one_flow_cannot_push_out_the_others(worker: Plane) -> None:
    address = worker.serve(listen=UDP, flow_bytes=1000)
    with Datagrams() as backend, client(address) as modest, client(address) as greedy:
        modest.send(b"modest")
        waits(worker, 1)
        for number in range(20):
            greedy.send(b"%d" % number + b"x" * 300)
        has(worker, dropped=17, parked=2)
        worker.open(1, backend.endpoint)
        assert backend.hear() == b"modest"
        assert [backend.hear()[:2] for _ in range(3)] == [b"17", b"18", b"19"]


def test_no_more_flows_wait_than_clients_may(worker: Plane) -> None:
    address = worker.serve(listen=UDP, pending=2)
    stream: Any = worker.listen(1, "tcp://127.0.0.1:0", "web", 50)
    with client(address) as one, connect(stream), client(address) as third:
        one.send(b"1")
        waits(worker, 2)
        third.send(b"3")
        limited = worker.hear(say.Limited)
        assert (limited.limit, limited.count) == ("limits.pending", 1)
        assert limited.source == "{}:{}".format(*third.getsockname())
        with connect(stream) as fourth:
            assert fourth.recv(1) == b""
        one.send(b"more of who waits already")
        has(worker, parked=2, refused=2, dropped=1)


def test_reject_drops_what_waits_and_the_next_datagram_wakes_anew(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, client(address) as sock:
        sock.send(b"1")
        sock.send(b"2")
        worker.hear(say.Wake)
        waits(worker, 1)
        worker.send(say.Reject(1))
        has(worker, parked=0, dropped=2)
        sock.send(b"3")
        worker.hear(say.Wake)
        worker.open(1, backend.endpoint)
        assert backend.echo() == b"3"
        assert sock.recv(10) == b"3"


def test_what_waits_moves_to_another_backend_and_wakes_it(worker: Plane) -> None:
    """As when a control plane finds the socket, which means another backend now."""
    address = worker.serve(1, UDP)
    worker.send(say.Serve(2, "backend-2", "", **LIMITS))
    with Datagrams() as backend, client(address) as one:
        one.send(b"first")
        assert worker.hear(say.Wake).backend == 1
        worker.send(say.Listen(900, 2, "", str(address)), fds=[worker.listening[-1].fileno()])
        worker.send(say.Unlisten(101, accept_waiting=False), say.Move(1, 2), say.Forget(1))
        assert worker.hear(say.Wake).backend == 2
        one.send(b"second")
        eventually(lambda: tally(worker, 2).parked == 1 and 1 not in worker.count())
        worker.open(2, backend.endpoint)
        assert [backend.echo(), backend.echo()] == [b"first", b"second"]
        assert [one.recv(100), one.recv(100)] == [b"first", b"second"]
        assert tally(worker, 2).dropped == 0


@pytest.mark.parametrize(("old", "new"), [(UDP, UDP), (UDP, "udp://0.0.0.0:0"), ("udp://0.0.0.0:0", UDP)])
def test_what_waits_at_another_address_than_its_successor_listens_at_is_left(worker: Plane, old: str, new: str) -> None:
    """Its answer would come from an address that the client has not asked."""
    address, _ = worker.serve(1, old), worker.serve(2, new)
    with client(parse(f"udp://127.0.0.1:{address.port}")) as sock:  # type: ignore[union-attr]
        sock.send(b"question")
        assert worker.hear(say.Wake).backend == 1
        worker.send(say.Move(1, 2))
        assert (tally(worker, 1).parked, tally(worker, 2).parked) == (1, 0)
        assert worker.said_nothing_of(say.Trouble)


def test_a_flow_waits_again_while_the_gate_is_closed_and_keeps_its_socket(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, client(address) as sock:
        worker.open(1, backend.endpoint)
        sock.send(b"1")
        assert backend.hear() == b"1"
        before = backend.sender
        worker.send(say.Close(1, 7))
        assert worker.hear(say.Closed).connections == 1
        backend.answer(b"late answer")
        assert sock.recv(100) == b"late answer"
        sock.send(b"2")
        worker.hear(say.Wake)
        has(worker, connections=1, parked=1)
        worker.open(1, backend.endpoint)
        assert backend.echo() == b"2"
        assert sock.recv(100) == b"2"
        assert backend.sender == before
        has(worker, connections=1, total=1, parked=0)


def test_a_flow_follows_its_backend_to_another_address(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as old, Datagrams() as new, client(address) as sock:
        worker.open(1, old.endpoint)
        sock.send(b"1")
        assert old.echo() == b"1"
        worker.send(say.Close(1, 7))
        worker.open(1, new.endpoint)
        worker.count()
        sock.send(b"2")
        assert new.echo() == b"2"
        assert [sock.recv(10), sock.recv(10)] == [b"1", b"2"]
        has(worker, connections=1)


def test_what_was_kept_is_not_poured_out_at_once(worker: Plane) -> None:
    """A socket has room for 256 small datagrams by default: more of them come as the backend answers or time passes."""
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, clients(address, 400) as socks:
        for sock in socks:
            sock.send(b"x")
        waits(worker, 400)
        worker.open(1, backend.endpoint)
        assert 200 < tally(worker).parked < 400
        for _ in socks:
            assert backend.echo() == b"x"
        for sock in socks:
            assert sock.recv(10) == b"x"
        has(worker, parked=0, connections=400, dropped=0)


# Ends of flows


def test_a_silent_flow_ends_and_then_it_is_quiet(worker: Plane) -> None:
    address = worker.serve(listen=UDP, flow_timeout=0.04)
    with Datagrams() as backend, client(address) as sock:
        worker.open(1, backend.endpoint)
        before, open_files = time.monotonic(), descriptors(worker.pid)
        sock.send(b"1")
        assert backend.echo() == b"1"
        worker.hear(say.Busy)
        assert worker.hear(say.Quiet).since - before >= 0.04
        has(worker, connections=0, total=1, received=1, sent=1)
        assert descriptors(worker.pid) == open_files
        sock.send(b"2")
        assert backend.echo() == b"2"
        worker.hear(say.Busy)


def test_a_new_flow_timeout_is_for_flows_that_are_there_already(worker: Plane) -> None:
    address = worker.serve(listen=UDP, flow_timeout=3600.0)
    with Datagrams() as backend, client(address) as sock:
        worker.open(1, backend.endpoint)
        sock.send(b"1")
        assert backend.hear() == b"1"
        worker.send(say.Serve(1, "backend-1", "", **{**LIMITS, "flow_timeout": 0.1}))
        worker.hear(say.Quiet)


@pytest.mark.slow
@pytest.mark.parametrize("talks", ["client", "backend"])
def test_a_flow_lives_by_datagrams_in_either_direction(worker: Plane, talks: str) -> None:
    address = worker.serve(listen=UDP, flow_timeout=0.5)
    with Datagrams() as backend, client(address) as silent, client(address) as sock:
        worker.open(1, backend.endpoint)
        silent.send(b"silent")
        backend.hear()
        sock.send(b"talks")
        backend.hear()

        def silent_is_over() -> bool:
            if talks == "client":
                sock.send(b"x")
                assert backend.hear() == b"x"
            else:
                backend.answer(b"x")
                assert sock.recv(10) == b"x"
            return tally(worker).connections == 1

        eventually(silent_is_over)
        assert tally(worker).total == 2


@pytest.mark.slow
def test_a_waiting_flow_does_not_time_out(worker: Plane) -> None:
    address = worker.serve(listen=UDP, flow_timeout=0.04)
    with Datagrams() as backend, client(address) as sock, client(address) as other:
        sock.send(b"patient")
        waits(worker, 1)
        for _ in range(2):  # others come and go meanwhile
            worker.open(1, backend.endpoint)
            assert backend.hear() == b"patient"
            worker.send(say.Close(1, 7))
            worker.hear(say.Closed)
            sock.send(b"patient")
            other.send(b"other")
            waits(worker, 2)
            end = time.monotonic() + 0.1
            eventually(lambda end=end: time.monotonic() > end)  # type: ignore[misc]
            assert tally(worker).parked == 2
            worker.open(1, backend.endpoint)
            assert {backend.hear(), backend.hear()} == {b"patient", b"other"}
            worker.send(say.Close(1, 7))
            worker.hear(say.Closed)
            sock.send(b"patient")
            worker.hear(say.Wake)


def test_cut_ends_the_flows_of_one_backend_only(worker: Plane) -> None:
    address, other = worker.serve(1, UDP), worker.serve(2, UDP)
    waiting = worker.listen(1, UDP, "second", 50)
    with Datagrams() as backend, client(address) as sock, client(other) as safe, client(waiting) as third:
        worker.open(1, backend.endpoint)
        worker.open(2, backend.endpoint)
        sock.send(b"1")
        assert backend.hear() == b"1"
        safe.send(b"2")
        assert backend.hear() == b"2"
        worker.send(say.Close(1, 7))
        worker.hear(say.Closed)
        third.send(b"waits")
        has(worker, connections=1, parked=1)
        worker.send(say.Cut(1))
        has(worker, connections=0, parked=0, dropped=1)
        backend.answer(b"still")
        assert safe.recv(10) == b"still"


@pytest.mark.slow
def test_a_retired_worker_reads_no_more_and_ends_with_its_last_flow(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, client(address) as sock, client(address) as late:
        worker.open(1, backend.endpoint)
        sock.send(b"1")
        assert backend.hear() == b"1"
        worker.send(say.Retire(60, sockets=True))
        worker.hear(say.Retired)
        late.send(b"for the next worker")
        backend.answer(b"late answer")
        assert sock.recv(100) == b"late answer"
        has(worker, connections=1, total=1)
        assert worker.listening[-1].recv(100) == b"for the next worker"
        worker.process.wait(LAST_ANSWERS + PATIENCE)


def test_a_retired_worker_ends_when_what_waits_is_dropped(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with client(address) as sock:
        sock.send(b"1")
        worker.hear(say.Wake)
        worker.send(say.Retire(60, sockets=False))
        worker.hear(say.Retired)
        has(worker, parked=1)
        worker.send(say.Reject(1))
        worker.process.wait(PATIENCE)


def test_unlisten_takes_in_what_is_there_and_answers_still_leave(worker: Plane) -> None:
    worker.count()
    open_files = descriptors(worker.pid)
    address = worker.serve(listen=UDP, flow_timeout=0.1, flow_datagrams=100)
    with Datagrams() as backend, client(address) as sock:
        worker.process.send_signal(signal.SIGSTOP)
        for number in range(100):
            sock.send(b"%d" % number)
        worker.send(say.Unlisten(101, accept_waiting=True))
        worker.listening.pop().close()
        worker.process.send_signal(signal.SIGCONT)
        waits(worker, 1)
        worker.open(1, backend.endpoint)
        assert [backend.hear() for _ in range(100)] == [b"%d" % number for number in range(100)]
        backend.answer(b"to all")
        assert sock.recv(10) == b"to all"
        worker.hear(say.Quiet)
        eventually(lambda: descriptors(worker.pid) == open_files)


def test_a_worker_that_retires_gives_its_sockets_and_ends_with_its_last_flow(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, client(address) as sock, client(address) as waiting:
        worker.open(1, backend.endpoint)
        sock.send(b"1")
        assert backend.hear() == b"1"
        worker.send(say.Close(1, 7))
        worker.hear(say.Closed)
        waiting.send(b"2")
        has(worker, connections=1, parked=1)
        worker.send(say.Retire(60.0, sockets=True))
        held = worker.hear(say.Held)
        assert (held.listener, held.backend, held.address) == (101, 1, UDP)
        worker.hear(say.Retired)
        sock.send(b"not for this one")
        backend.answer(b"late answer")
        assert sock.recv(100) == b"late answer"
        worker.open(1, backend.endpoint)
        assert backend.echo() == b"2"
        assert waiting.recv(10) == b"2"
        assert worker.process.wait(PATIENCE) == 0


def test_the_next_control_plane_is_told_of_flows_that_wait_and_that_live(worker: Plane) -> None:
    one, two = worker.serve(1, UDP), worker.serve(2, UDP)
    with Datagrams() as backend, client(one) as sock, client(two) as waiting:
        worker.open(1, backend.endpoint)
        sock.send(b"1")
        assert backend.hear() == b"1"
        waiting.send(b"2")
        worker.hear(say.Busy)
        worker.hear(say.Wake)
        worker.send(say.Tell())
        worker.hear(say.Told)
        assert worker.hear(say.Busy).backend == 1
        woken = worker.hear(say.Wake)
        assert (woken.backend, woken.source) == (2, "{}:{}".format(*waiting.getsockname()))


def test_a_successor_takes_the_socket_over(worker: Plane) -> None:
    """As a reload does it: what comes from now on is the successor's, answers of the predecessor still leave."""
    address = worker.serve(1, UDP)
    with Datagrams() as old, Datagrams() as new, client(address) as sock:
        worker.open(1, old.endpoint)
        sock.send(b"1")
        assert old.hear() == b"1"
        worker.send(say.Unlisten(101, accept_waiting=False), say.Forget(1))
        worker.send(say.Serve(2, "two", "", 9, 9, 5.0, 0.0, 30.0, 16, 1 << 20))
        worker.send(say.Listen(102, 2, "", ""), fds=[worker.listening[0].fileno()])
        worker.open(2, new.endpoint)
        worker.count()
        sock.send(b"2")
        assert new.echo() == b"2"
        old.answer(b"late")
        assert {sock.recv(10), sock.recv(10)} == {b"2", b"late"}
        assert worker.count().keys() == {1, 2}
        worker.send(say.Cut(1))
        eventually(lambda: worker.count().keys() == {2})
        sock.send(b"3")
        assert new.echo() == b"3"
        assert sock.recv(10) == b"3"


@pytest.mark.slow
def test_flows_of_a_closed_listener_do_not_hold_it_up_for_long(worker: Plane) -> None:
    address = worker.serve(listen=UDP, flow_timeout=3600.0)
    with Datagrams() as backend, client(address) as sock:
        worker.open(1, backend.endpoint)
        sock.send(b"1")
        assert backend.echo() == b"1"
        worker.hear(say.Busy)
        before = time.monotonic()
        worker.send(say.Unlisten(101, accept_waiting=True), say.Forget(1))
        eventually(lambda: not worker.count())
        assert LAST_ANSWERS / 2 < time.monotonic() - before < 2 * LAST_ANSWERS + 1


# What goes wrong


@pytest.mark.parametrize("scheme", ["udp", "unixgram"])
def test_a_refused_flow_waits_and_its_first_datagram_is_not_lost(worker: Plane, tmp_path: Path, scheme: str) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams(UDP if scheme == "udp" else f"unixgram:{tmp_path}/back") as backend:
        endpoint = backend.endpoint
    worker.open(1, endpoint)
    with client(address) as sock, client(address) as other:
        sock.send(b"1")
        refused = worker.hear(say.Refused)
        assert (refused.backend, refused.error) == (1, "Connection refused")
        worker.hear(say.Wake)
        sock.send(b"2")
        other.send(b"other")
        has(worker, connections=0, parked=2, dropped=0)
        with Datagrams(endpoint) as again:
            worker.open(1, endpoint)
            assert [again.hear() for _ in range(3)] == [b"1", b"2", b"other"]
            has(worker, connections=2, parked=0, dropped=0)
    assert worker.said_nothing_of(say.Refused)


@pytest.mark.parametrize("scheme", ["udp", "unixgram"])
def test_a_flow_in_use_whose_backend_goes_away_waits_for_the_next_one(
    worker: Plane, tmp_path: Path, scheme: str
) -> None:
    address = worker.serve(listen=UDP)
    with client(address) as sock:
        with Datagrams(UDP if scheme == "udp" else f"unixgram:{tmp_path}/back") as backend:
            endpoint = backend.endpoint
            worker.open(1, endpoint)
            sock.send(b"1")
            assert backend.hear() == b"1"
        sock.send(b"2")  # between Unix sockets this one is known not to have arrived
        worker.hear(say.Refused)
        sock.send(b"3")
        waits(worker, 1)
        with Datagrams(endpoint) as again:
            worker.open(1, endpoint)
            if scheme == "unixgram":
                assert again.hear() == b"2"
            assert again.echo() == b"3"
            assert sock.recv(10) == b"3"


@pytest.mark.parametrize("scheme", ["udp", "unixgram"])
def test_a_socket_of_the_backend_before_proves_nothing(worker: Plane, tmp_path: Path, scheme: str) -> None:
    """The backend slept, or died, and came back, while the flow lived on."""
    address = worker.serve(listen=UDP)
    with client(address) as sock:
        with Datagrams(UDP if scheme == "udp" else f"unixgram:{tmp_path}/back") as backend:
            endpoint = backend.endpoint
            worker.open(1, endpoint)
            sock.send(b"1")
            assert backend.hear() == b"1"
            worker.send(say.Close(1, 7))
            worker.hear(say.Closed)
        with Datagrams(endpoint) as again:
            worker.open(1, endpoint)
            for data in (b"2", b"3"):
                sock.send(data)
                assert again.echo() == data
                assert sock.recv(10) == data
    assert worker.said_nothing_of(say.Refused)
    has(worker, dropped=0)


def test_nothing_is_lost_to_a_backend_that_is_not_there_after_all(worker: Plane) -> None:
    """The gate opens, but the backend of a flow that lived on is gone."""
    address = worker.serve(listen=UDP)
    with client(address) as sock:
        with Datagrams() as backend:
            endpoint = backend.endpoint
            worker.open(1, endpoint)
            sock.send(b"1")
            assert backend.hear() == b"1"
            worker.send(say.Close(1, 7))
            worker.hear(say.Closed)
        sock.send(b"2")
        waits(worker, 1)
        worker.open(1, endpoint)
        worker.hear(say.Refused)
        waits(worker, 1)
        with Datagrams(endpoint) as again:
            worker.open(1, endpoint)
            assert again.echo() == b"2"
            assert sock.recv(10) == b"2"
    has(worker, dropped=0)


def test_refused_again_and_again_is_given_up(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend:
        endpoint = backend.endpoint
    with client(address) as sock:
        sock.send(b"x")
        worker.hear(say.Wake)
        for _ in range(2):
            worker.open(1, endpoint)
            worker.hear(say.Refused)
        used = cpu(worker.pid)
        worker.open(1, endpoint)
        assert worker.hear(say.Limited).limit == "Connection refused"
        has(worker, parked=0, connections=0, dropped=1, refused=1)
        assert cpu(worker.pid) - used < 0.1
        sock.send(b"y")  # the next one has its tries
        worker.hear(say.Refused)


def test_a_unix_endpoint_that_is_not_there_is_refused(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(listen=UDP)
    worker.open(1, f"unixgram:{tmp_path}/back")
    with client(address) as sock:
        sock.send(b"x")
        assert worker.hear(say.Refused).error == "No such file or directory"
        with Datagrams(f"unixgram:{tmp_path}/back") as backend:
            worker.open(1, backend.endpoint)
            assert backend.echo() == b"x"
            assert sock.recv(10) == b"x"


def test_a_datagram_that_cannot_be_sent_on_is_dropped_and_the_flow_goes_on(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(listen=f"unixgram:{tmp_path}/front")
    with Datagrams() as backend, client(address, "") as sock:
        worker.open(1, backend.endpoint)
        for _ in range(2):
            sock.send(b"x" * 65536)  # more than UDP can
            sock.send(b"fits")
            assert backend.echo() == b"fits"
            assert sock.recv(10) == b"fits"
        has(worker, dropped=2, connections=1)


def test_a_client_that_does_not_read_is_dropped_for_and_blocks_nobody(worker: Plane, tmp_path: Path) -> None:
    address: Any = worker.serve(listen=f"unixgram:{tmp_path}/front")
    with (
        Datagrams(f"unixgram:{tmp_path}/back") as backend,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf,
        client(address, "") as other,
    ):
        worker.open(1, backend.endpoint)
        deaf.bind("")
        deaf.sendto(b"tell me", address.sockaddr)
        backend.hear()
        for _ in range(100):
            backend.answer(b"x")
        eventually(lambda: tally(worker).dropped > 50)
        other.send(b"and me")
        assert backend.echo() == b"and me"
        assert other.recv(10) == b"and me"


def test_a_unix_client_that_is_gone_does_no_harm(worker: Plane, tmp_path: Path) -> None:
    address = worker.serve(listen=f"unixgram:{tmp_path}/front")
    with Datagrams(f"unixgram:{tmp_path}/back") as backend:
        worker.open(1, backend.endpoint)
        with client(address, f"{tmp_path}/client") as sock:
            sock.send(b"1")
            backend.hear()
        backend.answer(b"too late")
        has(worker, dropped=1)


def test_descriptors_run_out_and_come_back(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, clients(address, 30) as socks:
        for sock in socks[:20]:  # half of them wait
            sock.send(b"x")
        waits(worker, 20)
        before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (descriptors(worker.pid) + 5, before[1]))
        worker.open(1, backend.endpoint)
        eventually(lambda: tally(worker).parked == 0)
        for sock in socks[20:]:
            sock.send(b"x")
        eventually(lambda: tally(worker).dropped + tally(worker).connections == 30)
        assert "Too many open files" in worker.hear(say.Limited).limit
        connections = tally(worker).connections
        assert 0 < connections < 20
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)
        for _ in range(connections):
            backend.hear()
        socks[-1].send(b"again")
        assert backend.echo() == b"again"
        assert socks[-1].recv(10) == b"again"


@pytest.mark.slow
@pytest.mark.parametrize("awake", [True, False])
def test_limit_of_connections(worker: Plane, awake: bool) -> None:
    address = worker.serve(listen=UDP, connections=2, flow_timeout=0.3)
    with Datagrams() as backend, clients(address, 3) as socks:
        if awake:
            worker.open(1, backend.endpoint)
        for sock in socks:
            sock.send(b"x")
        if not awake:
            waits(worker, 3)
            worker.open(1, backend.endpoint)
        limited = worker.hear(say.Limited)
        assert (limited.limit, limited.count) == ("limits.connections", 1)
        assert limited.source == "{}:{}".format(*socks[2].getsockname())
        has(worker, refused=1, dropped=1, total=2)
        has(worker, connections=0)
        socks[2].send(b"now")
        assert [backend.hear() for _ in range(3)] == [b"x", b"x", b"now"]


def test_a_flood_from_ever_new_clients_is_told_once_a_second(worker: Plane) -> None:
    address = worker.serve(listen=UDP, connections=1)
    with Datagrams() as backend:
        worker.open(1, backend.endpoint)
        for _ in range(300):
            with client(address) as sock:
                sock.send(b"x")
        eventually(lambda: tally(worker).refused == 299)
        assert sum(isinstance(message, say.Limited) for message in worker.heard) <= 2


def test_datagrams_and_streams_of_one_backend(worker: Plane) -> None:
    datagrams = worker.serve(listen=UDP, name="dns")
    streams = worker.listen(1, "tcp://127.0.0.1:0", "dns-tcp", 50)
    with Datagrams() as backend, Upstream() as upstream, client(datagrams) as sock, connect(streams) as stream:
        sock.send(b"datagram")
        stream.sendall(b"stream")
        waits(worker, 2)
        worker.send(say.Open(1, {"dns": str(backend.endpoint), "": str(upstream.endpoint)}))
        with upstream.accept() as server:
            assert server.recv(10) == b"stream"
            assert backend.echo() == b"datagram"
            assert sock.recv(10) == b"datagram"
            has(worker, connections=2)


def test_endpoints_of_the_wrong_type_are_said_so(worker: Plane) -> None:
    """The configuration is checked, but of an inherited socket only the worker knows the type."""
    datagrams = worker.serve(1, UDP, "dns")
    streams = worker.serve(2, name="web")
    with Datagrams() as backend, Upstream() as upstream, client(datagrams) as sock:
        worker.open(1, upstream.endpoint)
        worker.open(2, backend.endpoint)
        sock.send(b"x")
        assert worker.hear(say.Limited).limit == "endpoints: none for listener 'dns'"
        with connect(streams) as stream:
            assert stream.recv(1) == b""
        assert worker.hear(say.Limited).limit == "endpoints: none for listener 'web'"


def test_flows_at_rest_cost_one_descriptor_and_no_cpu(worker: Plane) -> None:
    address = worker.serve(listen=UDP)
    with Datagrams() as backend, clients(address, 100) as socks:
        worker.open(1, backend.endpoint)
        before = descriptors(worker.pid)
        for sock in socks:
            sock.send(b"x")
            assert backend.echo() == b"x"
            assert sock.recv(10) == b"x"
        assert descriptors(worker.pid) == before + 100
        used = cpu(worker.pid)
        end = time.monotonic() + 0.1
        eventually(lambda: time.monotonic() > end)
        assert cpu(worker.pid) - used < 0.02


OWN_PORT = """
import pathlib, socket, sys
sys.path.insert(0, {root!r})
pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40001")
from gateway.plane import link as say
from tests.plane import plane
from tests.test_datagram import Datagrams, client
with plane() as worker:
    address = worker.serve(listen="udp://127.0.0.1:5000")
    for _ in range(20):  # the kernel has hardly another port to give than the one that is dialled
        worker.open(1, "udp://127.0.0.1:40000")
        with client(address, ("127.0.0.1", 5001)) as sock:
            sock.send(b"x")
            assert worker.hear(say.Refused).error == "Connection refused"
        worker.send(say.Cut(1))
        worker.count()
    with Datagrams("udp://127.0.0.1:40000") as backend, client(address, ("127.0.0.1", 5001)) as sock:
        worker.open(1, backend.endpoint)
        sock.send(b"y")
        assert backend.echo() == b"y"
        assert sock.recv(10) == b"y"
print("well")
"""


@pytest.mark.slow
def test_a_flow_is_not_connected_to_itself() -> None:
    words = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" -c "$1"', sys.executable]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*words, OWN_PORT.format(root=str(root))], cwd=root, capture_output=True, text=True, timeout=30
    )
    if "Operation not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("no right to make a network namespace")
    assert (done.stdout, done.stderr) == ("well\n", "")
