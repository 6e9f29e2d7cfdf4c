"""Each form of the log: what a line looks like, and which lines there are."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from gateway.logs import JsonFormatter, TextFormatter, setup

TIME = r"\d\d:\d\d:\d\d\.\d{3}"


def record(
    message: str, *values: object, level: int = logging.INFO, error: bool = False, **extra: Any
) -> logging.LogRecord:
    caught: Any = sys.exc_info() if error else None
    made = logging.makeLogRecord(
        {"levelno": level, "levelname": logging.getLevelName(level), "msg": message, "args": values}
    )
    made.exc_info = caught
    made.__dict__.update(extra)
    return made


def failed() -> logging.LogRecord:
    try:
        raise ValueError("a bug")
    except ValueError:
        return record("unexpected error", level=logging.ERROR, error=True, backend="web")


# Text


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (record("%d backends asleep", 3), "3 backends asleep"),
        (record("awake", backend="web"), "web: awake"),
        (record("listening", backend="web", output=True), "web | listening"),
        (record("slow", level=logging.DEBUG), "debug: slow"),
        (record("died", level=logging.WARNING, backend="web"), "web: warning: died"),
        (record("died", level=logging.ERROR), "error: died"),
        (record("100 % of [x]"), "100 % of [x]"),
    ],
)
def test_a_line_for_people(entry: logging.LogRecord, line: str) -> None:
    assert re.fullmatch(f"{TIME} {re.escape(line)}", TextFormatter(colour=False).format(entry))


def test_a_line_has_the_local_time() -> None:
    entry = record("now")
    assert TextFormatter(colour=False).format(entry).startswith(f"{datetime.fromtimestamp(entry.created):%H:%M:%S}.")


@pytest.mark.parametrize(
    ("level", "output", "code"),
    [
        (logging.DEBUG, False, "2"), (logging.INFO, False, ""), (logging.INFO, True, "2"), (logging.WARNING, False, "33"),
        (logging.WARNING, True, "33"), (logging.ERROR, False, "31"), (logging.CRITICAL, False, "31"),
    ],
)  # fmt: skip
def test_a_line_has_the_colour_of_its_level(level: int, output: bool, code: str) -> None:
    entry = record("said", level=level, backend="web", output=output)
    plain = TextFormatter(colour=False).format(entry)
    assert "\033" not in plain
    assert TextFormatter(colour=True).format(entry) == (f"\033[{code}m{plain}\033[0m" if code else plain)


def test_an_error_is_told_with_its_traceback() -> None:
    first, *rest = TextFormatter(colour=False).format(failed()).splitlines()
    assert first.endswith("web: error: unexpected error")
    assert rest[0].startswith("Traceback") and rest[-1] == "ValueError: a bug"


# JSON


def parsed(entry: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(entry)
    assert "\n" not in line
    decoded: dict[str, Any] = json.loads(line)
    return decoded


def test_an_object_has_what_applies_and_nothing_else() -> None:
    entry = parsed(record("%d backends asleep", 3))
    when = datetime.fromisoformat(entry.pop("time"))
    assert when.utcoffset() is not None
    assert abs(datetime.now().astimezone() - when) < timedelta(minutes=1)
    assert entry == {"level": "info", "message": "3 backends asleep"}


def test_an_object_names_its_backend_and_whether_it_is_its_output() -> None:
    entry = parsed(record("é\n\033[1m", level=logging.WARNING, backend="web", output=True))
    del entry["time"]
    assert entry == {"level": "warning", "message": "é\n\033[1m", "backend": "web", "output": True}


def test_an_object_has_its_error_with_the_traceback() -> None:
    entry = parsed(failed())
    assert entry["message"] == "unexpected error" and entry["level"] == "error"
    assert entry["error"].startswith("Traceback") and entry["error"].endswith("ValueError: a bug")


@pytest.mark.xfail(raises=UnicodeEncodeError, reason="such a line is not logged; a traceback is")
def test_an_object_of_a_name_that_is_not_text() -> None:
    """A Unix client can choose the name that it has in the log."""
    assert "client" in parsed(record("client %s", b"\xff".decode(errors="surrogateescape")))["message"]


# Which lines there are


@pytest.fixture
def restored() -> Iterator[None]:
    """Afterwards logging is as before."""
    root = logging.getLogger()
    loggers = [root, logging.getLogger("gateway"), logging.getLogger("backends")]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("form", "terminal", "expected"),
    [
        ("text", True, f"\033\\[33m{TIME} web: warning: died\033\\[0m\n"),
        ("text", False, f"{TIME} web: warning: died\n"),
        ("json", True, r'\{"time":.*\}\n'),
        ("json", False, r'\{"time":.*\}\n'),
        ("auto", True, f"\033\\[33m{TIME} web: warning: died\033\\[0m\n"),
        ("auto", False, r'\{"time":.*\}\n'),
    ],
)
@pytest.mark.usefixtures("restored")
def test_the_form_is_what_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str, terminal: bool, expected: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    setup(form, "info")
    logging.getLogger("gateway.activation").warning("died", extra={"backend": "web"})
    assert re.fullmatch(expected, capsys.readouterr().err)


@pytest.mark.usefixtures("restored")
def test_libraries_are_quieter_than_we_are(capsys: pytest.CaptureFixture[str]) -> None:
    setup("text", "debug")
    setup("text", "info")  # once more changes, and adds nothing
    for name in ("gateway.server", "backends.process", "aiohttp"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "%s %d", name, level)
    said = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "gateway.server 20", "warning: gateway.server 30", "backends.process 20", "warning: backends.process 30",
        "warning: aiohttp 30",
    ]  # fmt: skip
