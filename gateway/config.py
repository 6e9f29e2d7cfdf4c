"""The configuration: YAML files to frozen, checked types, with every problem reported at once.

Counterpart: `gateway.server` and `gateway.cli` import the types from here; `dormant check`, `dormant run` and a reload
run this same code. The way of a file: `document` (YAML, variables) -> this module (includes) -> `backend` (each backend,
by `parsing`) -> `clashes` (all of them together). Nothing is bound, started or looked up here: a port that another
program uses shows when the gateway starts.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from backends.endpoint import UNIX_PATH_MAX
from gateway import clashes, document
from gateway.backend import BackendReader
from gateway.parsing import convert_struct
from gateway.problems import FAILED, ConfigError, Place, Problems
from gateway.settings import (
    BackendConfig,
    Config,
    Delivery,
    GatewayOptions,
    Idle,
    Limits,
    Listener,
    Then,
    default_admin,
    default_state_directory,
)

__all__ = [
    "BackendConfig", "Config", "ConfigError", "Delivery", "GatewayOptions", "Idle", "Limits", "Listener", "Then",
    "build", "default_admin", "default_state_directory", "load",
]  # fmt: skip

KEYS = ("backends", "gateway", "include")
INCLUDED_KEYS = ("backends", "include")


def load(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Read a file and what it includes. Blocks on the disk. Raises ConfigError with every problem that was found."""
    reading = _Reading(environment)
    reading.file(path, str(path), Place(path), ())
    return reading.finish(Place(path))


def build(document: Mapping[str, Any], directory: Path, origin: str) -> Config:
    """The same for a document made in memory, except that variables are not expanded: whoever made it has their values.

    Relative paths start from `directory`, messages from `origin`. Raises ConfigError.
    """
    reading = _Reading(os.environ)
    reading.document(dict(document), Place(origin), directory.absolute(), (), origin)
    return reading.finish(Place(origin))


class _Reading:
    """The reading of one configuration: what was found so far."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.problems = Problems()
        self.gateway: GatewayOptions = FAILED
        self.found: dict[str, tuple[Any, Place, Path]] = {}
        self.files: dict[str, tuple[Path, Place]] = {}
        """by real path: the file and where it is included"""

    def file(self, path: Path, shown: str, included_at: Place, chain: tuple[tuple[str, str], ...]) -> None:
        """Read one file; `chain` are the real path and the name of each file that it is included by, outermost first."""
        real = os.path.realpath(path)
        if any(real == outer for outer, _ in chain):
            names = " -> ".join([*(name for _, name in chain), shown])
            self.problems.add(included_at, f"include loop: {names}; allowed: each file once")
            return
        if real in self.files:
            self.problems.add(
                included_at, f"{shown} is already included at {self.files[real][1]}; allowed: each file once"
            )
            return
        self.files[real] = (path.absolute(), included_at)
        place = Place(shown)
        try:
            text = document.read(path)
            value = document.parse(text, place, self.environment, self.problems)
        except document.DocumentError as error:
            self.problems.add(place, str(error))
            return
        self.document(value, place, path.absolute().parent, (*chain, (real, shown)), shown)

    def document(
        self, value: Any, place: Place, directory: Path, chain: tuple[tuple[str, str], ...], shown: str
    ) -> None:
        main = len(chain) <= 1
        allowed = KEYS if main else INCLUDED_KEYS
        if not isinstance(value, dict):
            self.problems.wrong(place, value, f"a mapping with the keys {', '.join(allowed)}")
            return
        for key in value:
            if key == "gateway" and not main:
                self.problems.add(place / key, "stands in an included file; allowed: only in the main file")
            elif key not in allowed:
                self.problems.unknown(place / key, "unknown key", allowed)
        if main:
            self.gateway = self._gateway(value.get("gateway", {}), place / "gateway", directory)
        self._backends(value.get("backends", {}), place / "backends", directory)
        if "include" in value:
            self._include(value["include"], place / "include", directory, chain, shown)

    def _gateway(self, value: Any, place: Place, directory: Path) -> GatewayOptions:
        if isinstance(value, dict):
            value = {
                "admin": default_admin(self.environment),
                "state_directory": default_state_directory(self.environment),
                **value,
            }
        options = convert_struct(GatewayOptions, value, place, self.problems)
        if options is FAILED:
            return FAILED
        paths = {}
        for key in ("admin", "state_directory"):
            path = getattr(options, key)
            if not path or "\0" in path:
                self.problems.wrong(place / key, path, "a path")
            paths[key] = os.path.normpath(directory / os.path.expanduser(path))
        if len(os.fsencode(paths["admin"])) > UNIX_PATH_MAX:
            self.problems.add(
                place / "admin", f"{paths['admin']} is too long; allowed: {UNIX_PATH_MAX} bytes for a Unix socket"
            )
        return msgspec.structs.replace(options, **paths)

    def _backends(self, value: Any, place: Place, directory: Path) -> None:
        if not isinstance(value, dict):
            self.problems.wrong(place, value, "a mapping of names to backends")
            return
        for name, backend in value.items():
            if name in self.found:
                self.problems.add(
                    place / name, f"is defined twice, first at {self.found[name][1]}; allowed: each name once"
                )
            else:
                self.found[name] = (backend, place / name, directory)

    def _include(
        self, value: Any, place: Place, directory: Path, chain: tuple[tuple[str, str], ...], shown: str
    ) -> None:
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list):
            self.problems.wrong(place, value, "a list of file names, with * and ** as in a shell")
            return
        for index, pattern in enumerate(patterns):
            where = place / index
            if not isinstance(pattern, str) or not pattern or "\0" in pattern:
                self.problems.wrong(where, pattern, "a file name, with * and ** as in a shell")
                continue
            matches = sorted(glob.glob(os.path.expanduser(pattern), root_dir=directory, recursive=True))
            if not matches:
                self.problems.add(
                    where, f"{pattern!r} matches no file; allowed: a pattern with a match, seen from this file"
                )
            for match in matches:
                self.file(directory / match, os.path.join(os.path.dirname(shown), match), where, chain)

    def finish(self, place: Place) -> Config:
        """Check what was found; raises ConfigError with all problems."""
        reader = BackendReader(self.problems)
        read = {name: reader.read(name, *found) for name, found in self.found.items()}
        backends = {name: backend for name, backend in read.items() if backend is not None}
        if not self.found and not self.problems:
            self.problems.add(place, "there is no backend; allowed: at least one under the key backends")
        clashes.check(reader.addressed, self.gateway.admin if self.gateway is not FAILED else "", self.problems)
        if self.problems:
            raise ConfigError(self.problems)
        return Config(self.gateway, backends, tuple(path for path, _ in self.files.values()))
