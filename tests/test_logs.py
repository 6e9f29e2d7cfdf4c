"""Each form of the log: what a line looks like, and which lines there are."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from gateway import logs
from gateway.logs import KEPT, OUTPUT_LINES, JsonFormatter, OutputLog, TextFormatter, flush, setup
from tests.running import PATIENCE

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


def test_an_object_of_a_name_that_is_not_text() -> None:
    """Such as that of a file."""
    assert parsed(record("no %s", b"\xff".decode(errors="surrogateescape")))["message"] == "no \\udcff"


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
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str, terminal: bool, expected: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    setup(form, "info")
    logging.getLogger("gateway.activation").warning("died", extra={"backend": "web"})
    flush()
    assert re.fullmatch(expected, capfd.readouterr().err)


@pytest.mark.usefixtures("restored")
def test_libraries_are_quieter_than_we_are(capfd: pytest.CaptureFixture[str]) -> None:
    setup("text", "debug")
    setup("text", "info")  # once more changes, and adds nothing
    for name in ("gateway.server", "backends.process", "aiohttp"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "%s %d", name, level)
    flush()
    said = [line.split(" ", 1)[1] for line in capfd.readouterr().err.splitlines()]
    assert said == [
        "gateway.server 20", "warning: gateway.server 30", "backends.process 20", "warning: backends.process 30",
        "warning: aiohttp 30",
    ]  # fmt: skip


@pytest.mark.usefixtures("restored")
def test_a_stalled_reader_of_stderr_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many lines as are kept are written when it reads again; how many are missing is said where they are."""
    monkeypatch.setattr(logs, "FLUSH_TIME", 0.01)
    reader, writer = os.pipe()
    flush()
    monkeypatch.setattr(logs, "STDERR", writer)
    setup("text", "info")
    log = logging.getLogger("gateway")
    begun = time.monotonic()
    for number in range(2 * KEPT):
        log.info("%d %s", number, "x" * 100)
    flush()
    assert time.monotonic() - begun < PATIENCE / 2
    said, ended = b"", False
    while not said.endswith(b"the end\n"):
        said += os.read(reader, 1 << 16)
        if not ended and logs._queued.queue.qsize() < KEPT // 2:
            log.info("the end")
            ended = True
    lines = [text.partition(" ")[2] for text in said.decode().splitlines()]
    assert lines.pop() == "the end"
    shown = [int(text.split()[0]) for text in lines if not text.startswith("warning: ")]
    missing = [int(text.split()[1]) for text in lines if text.startswith("warning: ")]
    assert shown == sorted(set(shown)) and shown[:KEPT] == list(range(KEPT))
    assert missing and len(shown) + sum(missing) == 2 * KEPT
    assert all(
        "lines were left out here: stderr was not read" in text for text in lines if text.startswith("warning: ")
    )
    flush()
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("restored")
def test_an_end_of_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    setup("text", "info")
    monkeypatch.setattr(logs, "STDERR", writer)
    logging.getLogger("gateway").info("said to nobody")
    flush()
    os.close(writer)
    assert capfd.readouterr().err == ""


def test_the_last_lines_are_written_before_the_end() -> None:
    script = "import logging; from gateway import logs; logs.setup('text', 'info')\n"
    script += "for number in range(1000): logging.getLogger('gateway').info('%d', number)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert [text.split()[1] for text in said.splitlines()] == list(map(str, range(1000)))


# The output of backends


async def test_a_flood_of_output_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway")
    output = OutputLog("web")
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for number in range(OUTPUT_LINES + 20):
        output(str(number))
    assert caplog.messages == list(map(str, range(OUTPUT_LINES)))
    assert {(entry.__dict__["backend"], entry.__dict__["output"]) for entry in caplog.records} == {("web", True)}
    caplog.clear()
    async with asyncio.timeout(PATIENCE):
        while not caplog.messages:
            await asyncio.sleep(0.01)  # a log record is no event that could be awaited
    assert caplog.messages == ["20 lines of its output were left out of the log"]
    assert caplog.records[0].__dict__["backend"] == "web" and loop.time() - begun >= 1
    caplog.clear()
    output("in the next second")
    assert caplog.messages == ["in the next second"]


async def test_nothing_is_counted_that_would_not_be_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "gateway")
    output = OutputLog("web")
    for _ in range(2 * OUTPUT_LINES):
        output("x")
    caplog.set_level(logging.INFO, "gateway")
    output("y")
    assert caplog.messages == ["y"]
