"""A YAML file as plain values: mappings with unique text keys, lists, text, numbers, true, false and nothing.

Counterpart: `gateway.parsing` turns the values into types. Read from the parser's events, which is several times faster
than PyYAML's constructors and sees duplicate keys. Scalars are those of YAML 1.2 (`no` and `12:30` are text), and `0777`
is octal as in YAML 1.1. Variables are expanded in values that were parsed already, so what they hold cannot change the
structure. Custom tags are not understood, on purpose; aliases and merge keys (`<<`) are.

Sources: https://yaml.org/spec/1.2.2/#1032-tag-resolution (core schema), https://yaml.org/type/merge.html
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gateway.problems import FAILED, Place, Problems, show

LARGEST_FILE = 16 << 20  # bytes
MOST_VALUES = 1_000_000  # in a file, with each alias counted as what it stands for: no alias bomb gets further
DEEPEST = 50

_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_OCTAL = re.compile(r"0o?([0-7]{1,30})")
_HEXADECIMAL = re.compile(r"0x([0-9a-fA-F]{1,30})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_REFERENCE = re.compile(r"\$\$|\$\{([^}]*)(\}?)")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-([^{]*))?")
_TAG = "tag:yaml.org,2002:"
_UNREADABLE = {errno.ENOENT: "does not exist", errno.EISDIR: "is a directory; allowed: a YAML file"}


class DocumentError(Exception):
    """The file cannot be read, or is not YAML; the message is one line without the name of the file."""


class Variable(str):
    """Text that came from one `${VAR}` alone: where text is not allowed, `value` may stand in for it."""

    __slots__ = ()

    @property
    def value(self) -> Any:
        """What the text would be, had it been written there plainly."""
        return plain(str(self))


def read(path: Path) -> str:
    """The text of a file. Raises DocumentError."""
    try:
        # Not blocking: a FIFO among the included files must not hold up a reload.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DocumentError("is not a regular file; allowed: a YAML file")
            data = file.read(LARGEST_FILE + 1)
    except ValueError as error:  # a NUL in the path
        raise DocumentError(f"cannot be read: {error}") from error
    except OSError as error:
        raise DocumentError(_UNREADABLE.get(error.errno or 0) or f"cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_FILE:
        raise DocumentError(f"is larger than {LARGEST_FILE >> 20} MiB")
    if b"\0" in data:
        raise DocumentError("is a binary file; allowed: YAML in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DocumentError(
            f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8; allowed: YAML in UTF-8"
        ) from error


def parse(text: str, place: Place, environment: Mapping[str, str], problems: Problems) -> Any:
    """The value of the one document in `text`.

    Problems with single values are added, and such a value is FAILED. Raises DocumentError when it is not YAML at all.
    """
    try:
        return _Composer(text, environment, problems).document(place)
    except yaml.MarkedYAMLError as error:
        what = ": ".join(part for part in (error.context, error.problem) if part)
        raise DocumentError(f"{_line(error.problem_mark or error.context_mark)}{what}") from error
    except yaml.reader.ReaderError as error:
        raise DocumentError(f"character {error.character!r} is not allowed: {error.reason}") from error
    except yaml.YAMLError as error:
        raise DocumentError(" ".join(str(error).split())) from error


def plain(text: str) -> Any:
    """What a scalar without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789":
        return text
    if _DECIMAL.fullmatch(text):
        return int(text)
    if match := _OCTAL.fullmatch(text):
        return int(match[1], 8)
    if match := _HEXADECIMAL.fullmatch(text):
        return int(match[1], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Composer:
    """Makes values of the events of one text."""

    def __init__(self, text: str, environment: Mapping[str, str], problems: Problems) -> None:
        self.next = _Loader(text).get_event
        self.environment = environment
        self.problems = problems
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.scalars: dict[str, Any] = {}  # so that equal text is kept once
        self.count = 0
        self.depth = 0

    def document(self, place: Place) -> Any:
        self.next()  # the stream starts
        if isinstance(self.next(), yaml.StreamEndEvent):
            raise DocumentError("is empty; allowed: a mapping with the key backends")
        value = self.value(self.next(), place)
        self.next()  # the document ends
        event = self.next()
        if not isinstance(event, yaml.StreamEndEvent):
            raise DocumentError(f"{_line(event.start_mark)}a second document starts; allowed: one in a file")
        return value

    def value(self, event: Any, place: Place) -> Any:
        before = self.count
        self.count += 1
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event, place)
        elif isinstance(event, yaml.AliasEvent):
            value = self.alias(event)
        else:
            self.depth += 1
            if self.depth > DEEPEST:
                raise DocumentError(f"{_line(event.start_mark)}nested more than {DEEPEST} levels deep")
            value = self.mapping(place) if isinstance(event, yaml.MappingStartEvent) else self.sequence(place)
            self.depth -= 1
            if event.tag not in (None, "!", _TAG + "map", _TAG + "seq"):
                value = self.refuse_tag(event, place)
        if self.count > MOST_VALUES:
            raise DocumentError(f"{_line(event.start_mark)}more than {MOST_VALUES} values, aliases included")
        if event.anchor is not None and not isinstance(event, yaml.AliasEvent):
            self.anchors[event.anchor] = (value, self.count - before)
        return value

    def mapping(self, place: Place) -> Any:
        result: dict[str, Any] = {}
        merged: list[Any] = []
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key = self.key(event, place)
            if key == "<<" and event.implicit[0]:
                merged.append(self.value(self.next(), place / key))
            elif key is FAILED:
                self.value(self.next(), place)
            elif key in result:
                self.problems.add(place / key, f"{_line(event.start_mark)}a second value for this key; allowed: one")
                self.value(self.next(), place / key)
            else:
                result[key] = self.value(self.next(), place / key)
        for value in merged:
            self.merge(result, value, place)
        return result

    def key(self, event: Any, place: Place) -> Any:
        key = self.alias(event) if isinstance(event, yaml.AliasEvent) else FAILED
        if isinstance(event, yaml.ScalarEvent):
            key = plain(event.value) if event.implicit[0] else event.value
            key = self.scalars.setdefault(key, key) if isinstance(key, str) else key
        elif not isinstance(event, yaml.AliasEvent):
            self.value(event, place)
        if isinstance(key, str):
            return key
        found = "a mapping or a list" if key is FAILED else show(key)
        hint = " (write it in quotes)" if isinstance(event, yaml.ScalarEvent) else ""
        self.problems.add(place, f"{_line(event.start_mark)}found {found} as a key; allowed: text{hint}")
        return FAILED

    def merge(self, result: dict[str, Any], value: Any, place: Place) -> None:
        """What `<<` names are defaults for the keys that are not there; earlier ones in a list win."""
        for source in value if isinstance(value, list) else [value]:
            if isinstance(source, dict):
                self.count += len(source)
                for key, item in source.items():
                    result.setdefault(key, item)
            elif source is not FAILED:
                self.problems.wrong(place / "<<", source, "a mapping, or a list of mappings")

    def sequence(self, place: Place) -> Any:
        result: list[Any] = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            result.append(self.value(event, place / len(result)))
        return result

    def alias(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            raise DocumentError(
                f"{_line(event.start_mark)}alias *{event.anchor} has no anchor before it, or stands inside of it"
            )
        value, count = self.anchors[event.anchor]
        self.count += count
        return value

    def scalar(self, event: Any, place: Place) -> Any:
        text = event.value
        if event.tag not in (None, "!", _TAG + "str"):
            return self.refuse_tag(event, place)
        if "$" in text:
            return self.expand(text, place)
        if not event.implicit[0] or event.tag:
            return self.scalars.setdefault(text, text)
        value = plain(text)
        return self.scalars.setdefault(text, text) if isinstance(value, str) else value

    def refuse_tag(self, event: Any, place: Place) -> Any:
        tag = event.tag.replace(_TAG, "!!")
        self.problems.add(place, f"{_line(event.start_mark)}found the tag {show(tag)}; allowed: no tags but !!str")
        return FAILED

    def expand(self, text: str, place: Place) -> Any:
        failed = False

        def replace(match: re.Match[str]) -> str:
            nonlocal failed
            if match[0] == "$$":
                return "$"
            variable = _VARIABLE.fullmatch(match[1]) if match[2] else None
            if variable is None:
                failed = True
                self.problems.add(
                    place,
                    f"{show(match[0])} is not a variable; allowed: ${{NAME}}, ${{NAME:-default}}, and $$ for a dollar sign",
                )
                return ""
            name, default = variable[1], variable[2]
            value = self.environment.get(name)
            if default is not None:
                return value or default
            if value is None:
                failed = True
                self.problems.add(
                    place, f"the variable {name} is not set; allowed: a variable that is set, or ${{{name}:-default}}"
                )
            return value or ""

        expanded = _REFERENCE.sub(replace, text)
        if failed:
            return FAILED
        whole = _REFERENCE.fullmatch(text)
        return Variable(expanded) if whole and whole[0] != "$$" else expanded


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
