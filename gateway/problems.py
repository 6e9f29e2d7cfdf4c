"""What is wrong with a configuration, and where: every problem is one line, and all of them are found before any is told.

Counterpart: `gateway.document`, `gateway.parsing`, `gateway.clashes` and `gateway.config` add to one `Problems`; whoever
loads a configuration gets them as one ConfigError. A value that was found wrong goes on as FAILED, so that what depends
on it is not reported as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Never, cast

MOST_WORDS = 40  # listed in a message
LONGEST_PROBLEM = 1000  # characters, beside the place
LONGEST_VALUE = 60  # characters of a value in a message


class ConfigError(Exception):
    """The configuration cannot be used. `problems` has one line for each thing that is wrong."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class _Failed:
    def __repr__(self) -> str:
        return "FAILED"


FAILED: Final[Never] = cast("Never", _Failed())
"""Stands for a value whose problem is already known, whatever its type should have been."""


class Place:
    """A place in a file: `FILE: KEY.PATH`. Made for every value, printed for few, so it only points at its parent."""

    __slots__ = ("key", "parent")

    def __init__(self, parent: Place | str | Path, key: str | int = "") -> None:
        self.parent = parent
        self.key = key

    def __truediv__(self, key: str | int) -> Place:
        return Place(self, key)

    def __str__(self) -> str:
        if not isinstance(self.parent, Place):
            return str(self.parent)
        if isinstance(self.key, int):
            return f"{self.parent}[{self.key}]"
        key = self.key if self.key.isprintable() and self.key else repr(self.key)
        separator = "." if isinstance(self.parent.parent, Place) else ": "
        return f"{self.parent}{separator}{key}"


class Problems(list[str]):
    """The problems found so far."""

    def add(self, place: Place | str, what: str) -> None:
        self.append(f"{place}: {' '.join(what.split())[:LONGEST_PROBLEM]}")

    def unknown(self, place: Place, found: str, allowed: Iterable[str]) -> None:
        """A word that is not among the allowed ones: names the nearest, then all of them."""
        words = sorted(allowed)
        self.add(place, f"{found}{nearest(str(place.key), words)} {listed(words)}")

    def wrong(self, place: Place, value: Any, allowed: str) -> None:
        """A value that is not what is allowed here. FAILED is passed over: its problem is known."""
        if value is not FAILED:
            self.add(place, f"found {show(value)}; allowed: {allowed}")


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` when one of the words is near, else `;`."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ";"


def listed(words: Iterable[str]) -> str:
    """`allowed: a, b, c`, cut off when there are very many."""
    several = list(words)
    if not several:
        return "allowed: nothing here"
    rest = f" and {len(several) - MOST_WORDS} more" if len(several) > MOST_WORDS else ""
    return f"allowed: {', '.join(several[:MOST_WORDS])}{rest}"


def show(value: Any) -> str:
    """A value in a message: short, whatever it holds."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, str):
        return repr(value[:LONGEST_VALUE] + "..." if len(value) > LONGEST_VALUE else str(value))
    return str(value)[:LONGEST_VALUE]
