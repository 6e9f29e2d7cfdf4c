"""What the log looks like: lines for people on a terminal, JSON lines otherwise.

Modules log through `logging` as usual; `extra={"backend": name}` says which backend a line is about.
"""

from __future__ import annotations

import logging
import sys
from datetime import datetime

import msgspec

COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31", logging.DEBUG: "2"}


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
        return msgspec.json.encode(entry).decode()


def setup(form: str, level: str) -> None:
    """Log to stderr: `form` is text, json, or auto (text on a terminal)."""
    terminal = sys.stderr.isatty()
    handler = logging.StreamHandler(sys.stderr)
    text = form == "text" or (form == "auto" and terminal)
    handler.setFormatter(TextFormatter(terminal) if text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # of libraries
    for package in ("gateway", "backends"):
        logging.getLogger(package).setLevel(level.upper())
