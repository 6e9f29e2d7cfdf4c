"""What the log looks like: lines for people on a terminal, JSON lines otherwise.

Modules log through `logging` as usual; `extra={"backend": name}` says which backend a line is about. A thread writes the
lines, so that a stalled reader of stderr, such as a stopped terminal, does not stop the event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import queue
import sys
from datetime import datetime
from logging.handlers import QueueHandler, QueueListener

import msgspec

COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31", logging.DEBUG: "2"}

STDERR = 2
KEPT = 10_000  # lines that wait for the reader of stderr
FLUSH_TIME = 1.0  # seconds that are waited for it before the end
OUTPUT_LINES = 500  # of one backend in a second

log = logging.getLogger(__name__)


class TextFormatter(logging.Formatter):
    """`12:34:56 blog: awake: woken by ...`"""

    def __init__(self, colour: bool) -> None:
        super().__init__()
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        backend = getattr(record, "backend", None)
        output = getattr(record, "output", False)
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        who = f"{backend}{' |' if output else ':'} " if backend else ""
        level = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        line = f"{when} {who}{level}{text}"
        code = COLOURS.get(record.levelno) or ("2" if output else "")
        return f"\033[{code}m{line}\033[0m" if self.colour and code else line


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339), level, message, and where they apply: backend, output, error."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        for key in ("backend", "output"):
            if hasattr(record, key):
                entry[key] = getattr(record, key)
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        # What is not UTF-8, such as the name of a file, has lone surrogates.
        texts = {key: _encode(value).decode() if isinstance(value, str) else value for key, value in entry.items()}
        return msgspec.json.encode(texts).decode()


def _encode(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


class OutputLog:
    """Puts the output of one backend into the log: at most OUTPUT_LINES a second; how many were left out is said then."""

    __slots__ = ("_begun", "_count", "_left_out", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = float("-inf")
        """when the second began that is counted"""
        self._count = 0
        self._left_out = 0

    def __call__(self, line: str) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - self._begun >= 1:
            self._begun, self._count = now, 0
        self._count += 1
        if self._count <= OUTPUT_LINES:
            log.info("%s", line, extra={"backend": self._name, "output": True})
            return
        if not self._left_out:
            loop.call_at(self._begun + 1, self._tell)
        self._left_out += 1

    def _tell(self) -> None:
        log.info("%d lines of its output were left out of the log", self._left_out, extra={"backend": self._name})
        self._left_out = 0


class _Queued(QueueHandler):
    """Leaves the lines to a thread; what it cannot keep is counted."""

    queue: queue.Queue[logging.LogRecord]

    def __init__(self) -> None:
        super().__init__(queue.Queue(KEPT))
        self._left_out = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._left_out:
                said = "%d lines were left out here: stderr was not read"
                self.queue.put_nowait(log.makeRecord(log.name, logging.WARNING, "", 0, said, (self._left_out,), None))
                self._left_out = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self._left_out += 1


class _Stderr(logging.Handler):
    """Writes the lines. Used by one thread, so it takes no lock: the end of the program must not wait for a stalled one."""

    def handle(self, record: logging.LogRecord) -> bool:
        try:
            line = _encode(self.format(record) + "\n")
            while line:
                line = line[os.write(STDERR, line) :]
        except OSError:
            pass  # there is nobody to tell
        except Exception:
            self.handleError(record)
        return True


_queued = _Queued()
_stderr = _Stderr()


@functools.cache
def _begin() -> None:
    """Start the thread, once."""
    QueueListener(_queued.queue, _stderr).start()
    atexit.register(flush)


def flush() -> None:
    """Wait until the lines so far are written, unless nobody reads them. To be called before exec(2)."""
    written = _queued.queue.all_tasks_done
    with written:
        written.wait_for(lambda: not _queued.queue.unfinished_tasks, FLUSH_TIME)


def setup(form: str, level: str) -> None:
    """Log to stderr: `form` is text, json, or auto (text on a terminal)."""
    terminal = sys.stderr.isatty()
    text = form == "text" or (form == "auto" and terminal)
    flush()
    _stderr.setFormatter(TextFormatter(terminal) if text else JsonFormatter())
    _begin()
    root = logging.getLogger()
    root.handlers[:] = [_queued]
    root.setLevel(logging.WARNING)  # of libraries
    for package in ("gateway", "backends"):
        logging.getLogger(package).setLevel(level.upper())
