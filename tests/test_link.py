"""The link between the planes: what one side says arrives at the other as it was, or not at all."""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest

from gateway.plane import link as say
from gateway.plane.link import LARGEST, MOST_FDS, AnyMessage, Link, LinkClosed, Message

EXAMPLES: list[Message] = [
    say.Serve(1, "blog", "abc", 100, 50, 5.0, 0.0, 30.0, 16, 2**20),
    say.Listen(7, 1, "http", "tcp://*:80"),
    say.Unlisten(7, accept_waiting=True),
    say.Open(1, {"": "tcp://127.0.0.1:80", "db": "unix:/run/db é"}),
    say.Close(1, 2),
    say.Reject(1),
    say.Move(1, 2),
    say.Cut(1),
    say.Forget(1),
    say.Count(2**40),
    say.Quit(),
    say.Hello(say.VERSION, 4711),
    say.Wake(1, "[::1]:50000"),
    say.Busy(1),
    say.Quiet(1, 12345.678901234),
    say.Closed(1, 3),
    say.Refused(1, "connection refused"),
    say.Counted(5, [say.Tally(1, 2, 3, 4, 2**50, 6, 7), say.Tally(2, 0, 0, 0, 0, 0, 0)], more=True),
    say.Limited(1, "limits.pending", 12, "10.0.0.1:1"),
    say.Tell(),
    say.Retire(30.0, sockets=True),
    say.Serving(1, "blog", "abc", {"": "tcp://127.0.0.1:80"}),
    say.Serving(2, "wiki", "def", None),
    say.Held(7, 1, "http", "tcp://*:80"),
    say.Patience(60.0),
    say.Told(retiring=False),
    say.Retired(),
    say.Trouble("no descriptors are left\nat all"),
]

Links = tuple[Link, Link]


@pytest.fixture
def links() -> Iterator[Links]:
    near, far = map(Link, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    yield near, far
    near.close()
    far.close()


def descriptors() -> set[int]:
    listed = map(int, os.listdir("/proc/self/fd"))
    return {fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}  # without the one that was open for listing


def fill(link: Link) -> int:
    """Send until something has to wait; how many datagrams were sent or queued."""
    count = 0
    while not link.pending:
        link.send(say.Refused(count, "x" * 1000))
        count += 1
    return count


def drain(link: Link) -> list[Message]:
    messages: list[Message] = []
    while (datagram := link.receive()) is not None:
        messages += datagram[0]
    return messages


def test_there_is_an_example_of_every_message() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(AnyMessage)) == set(Message.__subclasses__())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was(links: Links, message: Message) -> None:
    near, far = links
    near.send(message)
    assert far.receive() == ([message], [])
    assert far.receive() is None


def test_messages_keep_their_order_within_a_datagram_and_between_them(links: Links) -> None:
    near, far = links
    near.send(*EXAMPLES)
    near.send(*reversed(EXAMPLES))
    assert far.receive() == (EXAMPLES, [])
    assert far.receive() == (EXAMPLES[::-1], [])


def test_both_sides_may_speak_at_once(links: Links) -> None:
    near, far = links
    near.send(say.Count(1))
    far.send(say.Counted(1, []))
    assert near.receive() == ([say.Counted(1, [])], [])
    assert far.receive() == ([say.Count(1)], [])


def test_last_words_of_somebody_who_did_not_listen_are_heard(links: Links) -> None:
    near, far = links
    near.send(say.Count(1))
    far.send(say.Counted(0, []))
    far.close()
    with pytest.raises(LinkClosed):
        near.send(say.Count(2), say.Count(3))
    assert near.receive() == ([say.Counted(0, [])], [])
    with pytest.raises(LinkClosed):
        near.receive()


def test_last_words_are_heard_also_without_an_answer(links: Links) -> None:
    near, far = links
    near.send(say.Count(1))
    far.send(say.Counted(0, []))
    far.close()
    assert near.receive() == ([say.Counted(0, [])], [])


# Descriptors


def test_descriptors_arrive_in_their_order_and_are_closed_on_exec(links: Links) -> None:
    near, far = links
    pipes = [os.pipe() for _ in range(20)]
    ends = [reading for reading, _ in pipes]
    near.send(*(say.Listen(number, 1, "", "") for number in range(20)), fds=ends)
    datagram = far.receive()
    assert datagram is not None
    messages, fds = datagram
    assert [message.listener for message in messages] == list(range(20))
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(fd).st_ino for fd in ends]
    assert not set(fds) & set(ends)
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
    for fd in (*fds, *(fd for pipe in pipes for fd in pipe)):
        os.close(fd)


def test_as_many_descriptors_as_promised_fit_in_a_datagram(links: Links) -> None:
    near, far = links
    near.send(say.Listen(1, 1, "", ""), fds=[0] * MOST_FDS)
    datagram = far.receive()
    assert datagram is not None and len(datagram[1]) == MOST_FDS
    for fd in datagram[1]:
        os.close(fd)


# A full socket


def test_what_a_full_socket_does_not_take_is_sent_later_in_order(links: Links) -> None:
    near, far = links
    sent = fill(near)
    near.send(say.Listen(1, 1, "", ""), fds=[near.fileno()])
    near.send(say.Count(1))
    near.flush()
    assert near.pending  # nobody has read yet
    rejects = drain(far)
    near.flush()
    assert not near.pending
    late = far.receive()
    assert late is not None
    rejects += late[0]
    assert [message.backend for message in rejects if isinstance(message, say.Refused)] == list(range(sent))
    listen = far.receive()
    assert listen is not None and listen[0] == [say.Listen(1, 1, "", "")]
    assert [os.fstat(fd).st_ino for fd in listen[1]] == [os.fstat(near.fileno()).st_ino]
    os.close(listen[1][0])
    assert far.receive() == ([say.Count(1)], [])


def test_it_becomes_writable_when_the_other_side_reads(links: Links) -> None:
    near, far = links
    fill(near)
    assert not select.select([], [near], [], 0)[1]
    drain(far)
    assert select.select([], [near], [], 0)[1]


# The end


def test_the_end_comes_after_what_was_said_before(links: Links) -> None:
    near, far = links
    near.send(say.Quit())
    near.close()
    assert far.receive() == ([say.Quit()], [])
    with pytest.raises(LinkClosed, match="end of file"):
        far.receive()
    with pytest.raises(LinkClosed, match="Broken pipe"):
        far.send(say.Quit())


def test_what_is_queued_for_someone_who_is_gone_is_an_error(links: Links) -> None:
    near, far = links
    fill(near)
    far.close()
    with pytest.raises(LinkClosed):
        near.flush()


def test_a_closed_link_is_an_error_and_closing_it_again_is_none(links: Links) -> None:
    near, _ = links
    near.close()
    near.close()
    with pytest.raises(LinkClosed):
        near.receive()
    with pytest.raises(LinkClosed):
        near.send(say.Quit())


encode = msgspec.msgpack.encode
GARBAGE = {
    "no msgpack": b"\xc1",
    "not a list": encode({"Quit": []}),
    "not a message": encode([1, "two"]),
    "unknown message": encode([["Explode", 1]]),
    "too few fields": encode([["Close"]]),
    "wrong type": encode([["Close", "one"]]),
    "half a message": encode([say.Trouble("x" * 100)])[:-1],
    "trailing bytes": encode([say.Quit()]) + b"\0",
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_what_is_not_understood_closes_the_link(links: Links, data: bytes) -> None:
    near, far = links
    near.socket.send(data)
    with pytest.raises(LinkClosed, match="not understood"):
        far.receive()


@pytest.mark.parametrize(("spare", "whole"), [(0, True), (-1, False)])
def test_a_message_that_is_too_long_is_not_taken_for_a_whole_one(links: Links, spare: int, whole: bool) -> None:
    near, far = links
    overhead = len(encode([say.Trouble("x" * (1 << 16))])) - (1 << 16)
    message = say.Trouble("x" * (LARGEST - overhead - spare))
    near.send(message)
    if whole:
        assert far.receive() == ([message], [])
    else:
        with pytest.raises(LinkClosed, match="cut off"):
            far.receive()


@pytest.mark.parametrize("data", [b"\xc1", b"\xc1" * (LARGEST + 1), encode([say.Quit()])], ids=["bad", "long", "many"])
def test_descriptors_beside_a_refused_datagram_are_closed(links: Links, data: bytes) -> None:
    near, far = links
    count = MOST_FDS + 2 if data == encode([say.Quit()]) else 3  # the kernel takes two more than we have room for
    before = descriptors()
    near.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * count))])
    with pytest.raises(LinkClosed):
        far.receive()
    left = descriptors() - before
    for fd in left:
        os.close(fd)
    assert not left
