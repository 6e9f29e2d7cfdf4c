"""The event loop: order, time, and what it survives."""

from __future__ import annotations

import functools
import math
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.plane.loop import GARBAGE, Loop, Source
from tests.running import eventually


class Recorder:
    """A source that keeps what it was told, and does what it was made for."""

    def __init__(self, sock: socket.socket, act: Callable[[], object] = lambda: None) -> None:
        self.sock = sock
        self.act = act
        self.masks: list[int] = []

    def event(self, mask: int) -> None:
        self.masks.append(mask)
        self.act()


class Abortable(Recorder):
    aborted = 0

    def abort(self) -> None:
        self.aborted += 1


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def sockets() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    pairs = [socket.socketpair() for _ in range(3)]
    yield pairs
    for pair in pairs:
        for sock in pair:
            sock.close()


Sockets = list[tuple[socket.socket, socket.socket]]


def turn(loop: Loop) -> None:
    """One turn, without waiting."""
    loop.soon(loop.stop)
    loop.run()


def fail() -> None:
    raise ValueError("a bug")


# Descriptors


def test_an_event_reaches_its_source(loop: Loop, sockets: Sockets) -> None:
    near, far = sockets[0]
    source = Recorder(near, loop.stop)
    loop.add(near.fileno(), source, select.EPOLLIN)
    assert loop.table == {near.fileno(): source}
    far.sendall(b"x")
    loop.run()
    assert source.masks == [select.EPOLLIN]


def test_modify_reports_what_is_pending(loop: Loop, sockets: Sockets) -> None:
    near, far = sockets[0]
    source = Recorder(near)
    loop.add(near.fileno(), source, select.EPOLLET)
    far.sendall(b"x")
    turn(loop)
    assert source.masks == []
    loop.modify(near.fileno(), select.EPOLLIN | select.EPOLLET)
    turn(loop)
    assert source.masks == [select.EPOLLIN]


def test_remove_is_idempotent(loop: Loop, sockets: Sockets) -> None:
    near, far = sockets[0]
    source = Recorder(near)
    loop.add(near.fileno(), source, select.EPOLLIN)
    far.sendall(b"x")
    loop.remove(near.fileno())
    loop.remove(near.fileno())
    loop.remove(-1)
    turn(loop)
    assert source.masks == [] and loop.table == {}


def test_discard_closes_after_the_batch_and_drops_stale_events(loop: Loop, sockets: Sockets) -> None:
    """Both are readable in one batch. Whoever comes first discards both, and takes the lowest free descriptor."""
    fresh: list[socket.socket] = []

    def discard_both() -> None:
        for near, _ in sockets[:2]:
            loop.discard(near)
            assert near.fileno() >= 0
        fresh.append(socket.socket())

    sources = [Recorder(near, discard_both) for near, _ in sockets[:2]]
    numbers = {near.fileno() for near, _ in sockets[:2]}
    for source, (near, far) in zip(sources, sockets, strict=False):
        loop.add(near.fileno(), source, select.EPOLLIN)
        far.sendall(b"x")
    turn(loop)
    assert len(sources[0].masks) + len(sources[1].masks) == 1
    with fresh[0]:
        assert fresh[0].fileno() not in numbers
    assert [near.fileno() for near, _ in sockets[:2]] == [-1, -1]


def test_discard_of_a_socket_with_a_copy_elsewhere(loop: Loop, sockets: Sockets) -> None:
    """The copy keeps the socket open: close(2) alone would leave it in the epoll."""
    near, far = sockets[0]
    copy = near.dup()
    source = Recorder(near)
    loop.add(near.fileno(), source, select.EPOLLIN)
    loop.discard(near)
    far.sendall(b"x")
    turn(loop)
    with copy:
        assert near.fileno() == -1
        assert loop._epoll.poll(0) == []


def test_discard_before_the_loop_runs_and_of_an_unwatched_socket(loop: Loop, sockets: Sockets) -> None:
    near = sockets[0][0]
    loop.discard(near)
    loop.discard(near)
    turn(loop)
    assert near.fileno() == -1


def test_close_closes_what_was_discarded(sockets: Sockets) -> None:
    loop = Loop()
    near, kept = sockets[0][0], sockets[1][0]
    loop.add(kept.fileno(), Recorder(kept), select.EPOLLIN)
    loop.discard(near)
    loop.close()
    loop.close()
    assert near.fileno() == -1 and kept.fileno() >= 0


# Time


def test_timers_come_in_their_order_and_not_early(loop: Loop) -> None:
    started = loop.now()
    order: list[tuple[str, float]] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: order.append((name, loop.now() - started))

    loop.later(0.02, note("second"))
    loop.later(0.03, loop.stop)
    loop.later(0.01, note("first"))
    loop.later(0.0, note("now"))
    loop.run()
    assert [name for name, _ in order] == ["now", "first", "second"]
    assert all(at >= due for (_, at), due in zip(order, (0.0, 0.01, 0.02), strict=True))


def test_timers_of_one_moment_keep_their_order(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    monkeypatch.setattr(Loop, "now", staticmethod(lambda: 1000.0))
    for number in range(10):
        loop.later(0, functools.partial(order.append, number))
    turn(loop)
    assert order == list(range(10))


def test_a_cancelled_timer_is_not_called(loop: Loop) -> None:
    called: list[str] = []

    def cancel_second() -> None:
        called.append("first")
        second.cancel()

    first = loop.later(0.001, cancel_second)
    second = loop.later(0.001, lambda: called.append("second"))
    loop.later(0.002, loop.stop)
    cancelled = loop.later(0, lambda: called.append("cancelled"))
    cancelled.cancel()
    cancelled.cancel()
    loop.run()
    first.cancel()
    assert called == ["first"]
    assert not first.pending and not second.pending


def test_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    kept = [loop.later(3600, fail) for _ in range(10)]
    for _ in range(10_000):
        loop.later(1800, fail).cancel()
    assert len(loop._timers) <= len(kept) + GARBAGE + 1
    turn(loop)
    assert sum(timer.pending for _, _, timer in loop._timers) == len(kept)
    assert loop._cancelled == len(loop._timers) - len(kept)


@pytest.mark.parametrize("delay", [1e10, math.inf])
def test_a_time_that_epoll_cannot_wait_for(loop: Loop, sockets: Sockets, delay: float) -> None:
    near, far = sockets[0]
    loop.later(delay, fail)
    loop.add(near.fileno(), Recorder(near, loop.stop), select.EPOLLIN)
    far.sendall(b"x")
    loop.run()


def test_soon_comes_in_the_next_turn_and_does_not_starve_events(loop: Loop, sockets: Sockets) -> None:
    near, far = sockets[0]
    turns = 0

    def again() -> None:
        nonlocal turns
        turns += 1
        loop.soon(again)
        if turns == 3:
            far.sendall(b"x")

    loop.soon(again)
    loop.add(near.fileno(), Recorder(near, loop.stop), select.EPOLLIN)
    loop.run()
    assert turns == 4


def test_stop_before_run(loop: Loop) -> None:
    loop.stop()
    loop.run()
    called: list[int] = []
    loop.soon(lambda: called.append(1))
    turn(loop)
    assert called == [1]


def test_it_does_not_wake_up_at_rest(loop: Loop, sockets: Sockets) -> None:
    near, far = sockets[0]
    loop.add(near.fileno(), Recorder(near, loop.stop), select.EPOLLIN)
    for _ in range(5):
        loop.later(0.01, fail).cancel()
    loop.later(3600, fail)
    thread = threading.Thread(target=loop.run)
    thread.start()
    status = Path(f"/proc/self/task/{thread.native_id}/status")

    def switches() -> int:
        return int(status.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    eventually(lambda: "State:\tS" in status.read_text())
    before = switches()
    assert not select.select([far], [], [], 0.1)[0]
    after = switches()
    far.sendall(b"x")
    thread.join()
    assert before == after


# Errors


def collect(loop: Loop) -> list[tuple[object, Exception]]:
    errors: list[tuple[object, Exception]] = []
    loop.on_error = lambda source, error: errors.append((source, error))
    return errors


def test_an_error_in_a_source_costs_nobody_else(loop: Loop, sockets: Sockets) -> None:
    errors = collect(loop)
    sources: list[Recorder] = [Abortable(near, fail) for near, _ in sockets]
    sources[1].act = lambda: None
    for source, (near, far) in zip(sources, sockets, strict=True):
        loop.add(near.fileno(), source, select.EPOLLIN)
        far.sendall(b"x")
    turn(loop)
    assert [len(source.masks) for source in sources] == [1, 1, 1]
    assert [source for source, _ in errors] == [sources[0], sources[2]]
    assert all(isinstance(error, ValueError) for _, error in errors)
    assert [source.aborted for source in sources if isinstance(source, Abortable)] == [1, 0, 1]
    assert loop.table == {sockets[1][0].fileno(): sources[1]}


def test_a_source_that_cannot_be_aborted_stays(loop: Loop, sockets: Sockets) -> None:
    errors = collect(loop)
    near, far = sockets[0]
    source = Recorder(near, fail)
    loop.add(near.fileno(), source, select.EPOLLIN)
    far.sendall(b"x")
    turn(loop)
    turn(loop)
    assert len(errors) == 2 and loop.table == {near.fileno(): source}


def test_an_abort_that_fails_too(loop: Loop, sockets: Sockets) -> None:
    errors = collect(loop)
    near, far = sockets[0]
    source = Abortable(near, fail)
    source.abort = fail  # type: ignore[method-assign]
    loop.add(near.fileno(), source, select.EPOLLIN)
    far.sendall(b"x")
    turn(loop)
    assert len(errors) == 2 and loop.table == {}


@pytest.mark.parametrize("way", ["soon", "later"])
def test_an_error_in_a_callback_costs_nobody_else(loop: Loop, sockets: Sockets, way: str) -> None:
    errors = collect(loop)
    called: list[int] = []
    source = Abortable(sockets[0][0], fail)

    def arrange(callback: Callable[[], object]) -> None:
        loop.soon(callback) if way == "soon" else loop.later(0, callback)

    arrange(fail)
    arrange(lambda: source.event(0))
    arrange(Method(source).call)
    arrange(lambda: called.append(1))
    turn(loop)
    assert len(errors) == 3 and errors[0][0] is fail
    assert called == [1]


class Method:
    """Its bound method is the callback, so the loop knows whom to abort."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.aborted = False

    def call(self) -> None:
        self.source.event(0)
        assert not self.aborted

    def abort(self) -> None:
        self.aborted = True


def test_errors_are_printed_by_default(loop: Loop, capsys: pytest.CaptureFixture[str]) -> None:
    loop.soon(fail)
    turn(loop)
    assert "ValueError: a bug" in capsys.readouterr().err


def test_nothing_is_left_open(sockets: Sockets) -> None:
    before = os.listdir("/proc/self/fd")
    loop = Loop()
    loop.add(sockets[0][0].fileno(), Recorder(sockets[0][0]), select.EPOLLIN)
    loop.close()
    assert os.listdir("/proc/self/fd") == before
