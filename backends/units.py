"""Types of configuration values that YAML does not have: durations, sizes, commands.

Each parses what people write and prints it again. `decode` is the hook through which msgspec makes them; the gateway's
own options and the drivers' use the same ones.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

LONGEST = 1e10  # seconds, some 300 years; what is longer is a mistake, and the kernel's timers do not take it
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {
    "": 1,
    "B": 1,
    "K": 1 << 10,
    "KiB": 1 << 10,
    "M": 1 << 20,
    "MiB": 1 << 20,
    "G": 1 << 30,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}


class Duration(float):
    """Seconds, written `500ms`, `30s`, `5m`, `1h30m`, `2d`, or as a plain number of seconds."""

    __slots__ = ()
    expected = "a duration such as 500ms, 30s, 5m or 1h"

    @classmethod
    def parse(cls, value: Any) -> Duration:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST:
            return cls(value)
        if isinstance(value, str) and len(value) <= 40:
            if re.fullmatch(r"\d+(\.\d+)?", value):
                return cls.parse(float(value))
            if re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h|d))+", value):
                return cls.parse(
                    sum(float(n) * _SECONDS[unit] for n, unit in re.findall(r"([\d.]+)(ms|s|m|h|d)", value))
                )
        raise ValueError(f"{value!r} is not {cls.expected}")

    def __str__(self) -> str:
        if round(self * 1000) < 1000:
            return f"{round(self * 1000)}ms" if self else "0s"
        if self < 60:
            return f"{round(float(self), 1):g}s"
        parts, rest = [], round(self)
        for unit in ("d", "h", "m", "s"):
            count, rest = divmod(rest, int(_SECONDS[unit]))
            if count:
                parts.append(f"{count}{unit}")
        return "".join(parts[:2])


class Size(int):
    """Bytes, written `64KiB`, `1M`, `2GiB`, or as a plain number."""

    __slots__ = ()
    expected = "a size such as 4096, 64KiB or 2GiB"

    @classmethod
    def parse(cls, value: Any) -> Size:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(value)
        match = re.fullmatch(r"(\d+) ?([A-Za-z]*)", value) if isinstance(value, str) else None
        if match and match[2] in _BYTES:
            return cls(int(match[1]) * _BYTES[match[2]])
        raise ValueError(f"{value!r} is not {cls.expected}")

    def __str__(self) -> str:
        for unit in ("TiB", "GiB", "MiB", "KiB"):
            if self >= _BYTES[unit]:
                return f"{self / _BYTES[unit]:.3g}{unit}"
        return f"{int(self)}B"


class Command(tuple[str, ...]):
    """A program and its arguments: a list, or a string split as a shell splits it. No shell runs."""

    __slots__ = ()
    expected = "a command: a list of words, or a string that is split as a shell splits it"

    @classmethod
    def parse(cls, value: Any) -> Command:
        if isinstance(value, str):
            try:
                words = shlex.split(value)
            except ValueError as error:
                raise ValueError(f"{value!r} cannot be split into words: {error}") from None
        elif isinstance(value, list) and all(
            isinstance(word, (str, int, float)) and not isinstance(word, bool) for word in value
        ):
            words = [str(word) for word in value]
        else:
            words = []
        if not words or not words[0] or any("\0" in word for word in words):
            raise ValueError(f"{value!r} is not {cls.expected}")
        return cls(words)

    def __str__(self) -> str:
        return shlex.join(self)


UNITS = (Duration, Size, Command)


def decode(kind: type, value: Any) -> Any:
    """msgspec's `dec_hook` for these types. Raises ValueError."""
    if kind in UNITS:
        return kind.parse(value)
    raise NotImplementedError(f"{kind} is not a type of configuration values")


def schema(kind: type) -> dict[str, Any]:
    """msgspec's `schema_hook` for these types."""
    if kind is Command:
        return {"type": ["string", "array"], "items": {"type": ["string", "number"]}, "description": Command.expected}
    if kind in UNITS:
        return {"type": ["string", "number"], "description": kind.expected}
    raise NotImplementedError(kind)
