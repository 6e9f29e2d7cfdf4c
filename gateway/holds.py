"""Holds outlive a restart of the gateway: they are kept in one small file of the state directory.

Wall-clock time is right here: it is the only clock that two runs of the gateway share.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import msgspec

log = logging.getLogger(__name__)


class Holds:
    """Backend name -> seconds since the epoch until which it is held; null in the file: until released."""

    def __init__(self, directory: str, owner: str = "") -> None:
        """`owner` tells the gateways apart that share a directory."""
        self._path = Path(directory, f"holds{quote(owner, safe='')[-200:]}.json")
        self._until: dict[str, float | None] = {}
        self._saving = asyncio.Lock()

    def load(self) -> dict[str, float | None]:
        """Read the file, which blocks: backend name -> seconds that are left, None: until released.

        A broken file is said and ignored.
        """
        try:
            self._until = msgspec.json.decode(self._path.read_bytes(), type=dict[str, float | None])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("holds are not restored: %s: %s", self._path, error)
            return {}
        now = _now()
        self._until = {name: until for name, until in self._until.items() if until is None or until > now}
        return {name: None if until is None else until - now for name, until in self._until.items()}

    async def set(self, name: str, seconds: float | None) -> None:
        """Note a hold for so long; None: until released. Returns when it is on the disk."""
        self._until[name] = None if seconds is None else _now() + seconds
        await self._save()

    async def remove(self, name: str) -> None:
        if self._until.pop(name, math.nan) is not math.nan:
            await self._save()

    async def _save(self) -> None:
        async with self._saving:
            await asyncio.to_thread(self._write, msgspec.json.encode(self._until))

    def _write(self, data: bytes) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_suffix(".new")
            fresh.write_bytes(data)
            os.replace(fresh, self._path)
        except OSError as error:
            log.warning("holds are not kept over a restart: %s", error)


def _now() -> float:
    return datetime.now(UTC).timestamp()
