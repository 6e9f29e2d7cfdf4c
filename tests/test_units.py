"""`backends.units`: what people write for durations, sizes and commands, and how it is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.units import UNITS, Command, Duration, Size, decode, schema


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("500ms", 0.5), ("30s", 30), ("5m", 300), ("1h30m", 5400), ("2d", 172800), ("1.5h", 5400), ("1m 30s", None),
        (30, 30), (0.25, 0.25), ("30", 30), ("0.5", 0.5), (0, 0), ("0s", 0), (2**31, 2**31),
        ("", None), ("s", None), ("-1s", None), (-1, None), ("5 parsecs", None), ("5M", None), ("1e3", None), (True, None),
        (None, None), ([], None), (float("inf"), None), (float("nan"), None), (10**400, None), ("9" * 400 + "d", None),
        ("99999999999d", None),
    ],
)  # fmt: skip
def test_a_duration_is_parsed_or_refused(written: Any, seconds: float | None) -> None:
    if seconds is None:
        with pytest.raises(ValueError, match="is not a duration such as"):
            Duration.parse(written)
    else:
        assert Duration.parse(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["0s", "1ms", "500ms", "1s", "1.5s", "59s", "1m", "1m30s", "1h", "1h30m", "2d", "2d3h"]
)
def test_a_duration_prints_what_it_parses(text: str) -> None:
    assert str(Duration.parse(text)) == text


def test_a_long_duration_prints_its_two_largest_units() -> None:
    assert str(Duration(86400 + 3600 + 60 + 1)) == "1d1h"
    assert str(Duration(3599.9)) == "1h"


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (4096, 4096), ("4096", 4096), ("64KiB", 65536), ("64 KiB", 65536), ("1M", 1 << 20), ("2GiB", 2 << 30), ("1TiB", 1 << 40),
        ("0", 0), (-1, None), ("-1", None), ("1.5M", None), ("1XB", None), ("", None), (True, None), (1.5, None), (None, None),
    ],
)  # fmt: skip
def test_a_size_is_parsed_or_refused(written: Any, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="is not a size such as"):
            Size.parse(written)
    else:
        assert Size.parse(written) == size


@pytest.mark.parametrize("text", ["0B", "1023B", "1KiB", "64KiB", "1MiB", "2GiB", "1TiB", "1.5KiB"])
def test_a_size_is_printed_with_the_largest_unit(text: str) -> None:
    whole = {"1.5KiB": 1536}.get(text) or Size.parse(text)
    assert str(Size(whole)) == text


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("nginx -g 'daemon off;'", ("nginx", "-g", "daemon off;")),
        (["sleep", 1, 0.5], ("sleep", "1", "0.5")),
        (["sh", "-c", "echo $HOME; exit"], ("sh", "-c", "echo $HOME; exit")),
        ("echo '' x", ("echo", "", "x")),
        ("a\\ b", ("a b",)),
        ("", None), ("   ", None), ([], None), ([""], None), ("''", None), (["a\0b"], None), ("a 'b", None), ([True], None),
        ([["a"]], None), ({"a": "b"}, None), (5, None), (None, None),
    ],
)  # fmt: skip
def test_a_command_is_split_without_a_shell_or_refused(written: Any, words: tuple[str, ...] | None) -> None:
    if words is None:
        with pytest.raises(ValueError, match=r"command|split"):
            Command.parse(written)
    else:
        assert Command.parse(written) == words


def test_a_command_prints_what_a_shell_would_take() -> None:
    assert Command.parse(str(Command(("a b", "", "$c")))) == ("a b", "", "$c")


class Options(msgspec.Struct, frozen=True):
    wait: Duration
    room: Size
    run: Command


def test_msgspec_makes_them_through_the_hook() -> None:
    options = msgspec.convert({"wait": "5m", "room": "1KiB", "run": "a b"}, Options, dec_hook=decode)
    assert options == Options(Duration(300), Size(1024), Command(("a", "b")))
    assert [type(value) for value in (options.wait, options.room, options.run)] == [Duration, Size, Command]


def test_the_hook_tells_of_a_wrong_value_and_of_a_foreign_type() -> None:
    with pytest.raises(msgspec.ValidationError, match="'soon' is not a duration"):
        msgspec.convert({"wait": "soon", "room": 1, "run": "a"}, Options, dec_hook=decode)
    with pytest.raises(NotImplementedError):
        decode(Path, "/")
    with pytest.raises(NotImplementedError):
        schema(Path)


@pytest.mark.parametrize("kind", UNITS)
def test_the_schema_of_each_allows_text(kind: type) -> None:
    assert "string" in schema(kind)["type"]
