"""The kept lines of a backend."""

from __future__ import annotations

import asyncio
import os

from backends.output import KEPT_LINES, LONGEST_LINE, Output
from backends.pipe import Pipe


def test_lines_are_put_together_from_pieces() -> None:
    output = Output()
    for piece in (b"on", b"e\ntw", b"o\r\n\nth", b"ree"):
        output.feed(piece)
    assert output.tail() == ["one", "two", ""]
    output.feed(b"")
    assert output.tail() == ["one", "two", "", "three"]
    output.feed(b"")
    assert output.tail(1) == ["three"]


def test_only_the_last_lines_are_kept() -> None:
    output = Output()
    for number in range(KEPT_LINES + 5):
        output.feed(b"%d\n" % number)
    assert output.tail() == [str(number) for number in range(5, KEPT_LINES + 5)]
    assert output.tail(2) == [str(KEPT_LINES + 3), str(KEPT_LINES + 4)]
    assert output.tail(0) == []


def test_a_line_without_an_end_does_not_grow_for_ever() -> None:
    output = Output()
    for _ in range(100):
        output.feed(b"x" * 1000)
    output.feed(b"")
    assert max(map(len, output.tail())) <= LONGEST_LINE
    assert "".join(output.tail()) == "x" * 100_000


def test_what_is_not_text_is_shown_all_the_same() -> None:
    output = Output()
    output.feed(b"caf\xc3\xa9 \xff\n")
    assert output.tail() == ["café \N{REPLACEMENT CHARACTER}"]


def test_fresh_lines_are_of_this_life() -> None:
    output = Output()
    assert output.fresh() == []
    output.feed(b"before\n")
    assert output.fresh() == ["before"]
    output.begin()
    assert output.fresh() == []
    output.feed(b"one\ntwo\nthree\n")
    assert output.fresh() == ["one", "two", "three"]
    assert output.fresh(2) == ["two", "three"]
    assert output.fresh(0) == []
    assert output.tail() == ["before", "one", "two", "three"]


def test_listeners_hear_each_line_until_they_leave() -> None:
    output = Output()
    heard: list[str] = []
    forget = output.listen(heard.append)
    output.feed(b"one\n")
    forget()
    output.feed(b"two\n")
    assert heard == ["one"]


async def test_following_gives_new_lines_and_ends_with_its_reader() -> None:
    output = Output()
    output.line("old")
    followed = output.follow()
    first = asyncio.create_task(anext(followed))
    await asyncio.sleep(0)
    output.line("new")
    assert await first == "new"
    for number in range(20 * KEPT_LINES):  # a reader that is too slow loses lines
        output.line(str(number))
    assert await anext(followed) == "0"
    await followed.aclose()  # type: ignore[attr-defined]
    assert not output._listeners


async def test_a_flood_leaves_others_their_turn() -> None:
    """Each line costs time: what a full pipe holds is not read in one turn of the loop."""
    pieces: list[bytes] = []
    pipe = Pipe(pieces.append)
    os.write(pipe.writer, bytes(64 << 10))
    while not pieces:
        await asyncio.sleep(0)
    assert [len(piece) for piece in pieces] == [16 << 10]
    pipe.finish()
    assert [len(piece) for piece in pieces] == [16 << 10] * 4 + [0]
