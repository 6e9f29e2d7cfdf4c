"""What operators and accidents do to a gateway meanwhile: one after the other, in turn."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.running import Gateway
from tests.soak.failures import MARGIN, Record

SOON = 15.0
"""Seconds in which a disturbance must have been dealt with."""


class Log:
    """What is new in the gateway's log: counts reloads, and finds what must not be in it."""

    def __init__(self, gateway: Gateway, record: Record) -> None:
        self.file = gateway.log_file
        self.record = record
        self.offset = 0
        self.rest = b""
        self.reloads = 0

    def follow(self) -> None:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if b"unexpected" in line or b"Traceback" in line:
                self.record.fail(f"in the log: {line.decode(errors='replace')}")
            self.reloads += b"reloaded: " in line


class Disturber:
    def __init__(
        self, gateway: Gateway, record: Record, log: Log, configs: tuple[dict[str, Any], dict[str, Any]]
    ) -> None:
        self.gateway = gateway
        self.record = record
        self.log = log
        self.configs = configs
        self.stoppable = [name for name, one in configs[0]["backends"].items() if _stoppable(one)]
        self.turn = 0
        self.kinds = {
            "reload": self.reload, "worker killed": self.kill, "upgrade": self.upgrade, "stop by hand": self.stop_one,
        }  # fmt: skip

    async def next(self) -> None:
        """The next one in turn, until it is over."""
        kind = list(self.kinds)[self.turn % len(self.kinds)]
        self.turn += 1
        try:
            await self.kinds[kind]()
        except (OSError, AssertionError) as error:
            self.record.fail(f"{kind}: {error!r}")
        else:
            self.record.disturbances[kind] += 1

    async def reload(self) -> None:
        self.configs = self.configs[::-1]
        self.gateway.write(self.configs[0])
        before = self.log.reloads
        self.gateway.signal(signal.SIGHUP)

        def reloaded() -> bool:
            self.log.follow()
            return self.log.reloads > before

        await until(reloaded, "reloaded")

    async def kill(self) -> None:
        before = await self.workers()
        victim = random.choice(before)
        cut = self.record.cut("worker killed")
        os.kill(victim, signal.SIGKILL)
        cut.over(MARGIN)
        deadline = time.monotonic() + SOON
        while victim in (now := await self.workers()) or len(now) < len(before):
            assert time.monotonic() < deadline, f"worker {victim} was not replaced: {now}"
            await asyncio.sleep(0.05)

    async def upgrade(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.cli", "upgrade", "--socket", self.gateway.admin,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(2 * SOON):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, output.decode(errors="replace")

    async def stop_one(self) -> None:
        name = random.choice(self.stoppable)
        cut = self.record.cut("stopped by hand", name)
        try:
            await asyncio.to_thread(self.gateway.ask, "POST", f"/v1/backends/{name}/stop")
        finally:
            cut.over()

    async def workers(self) -> list[int]:
        status = await asyncio.to_thread(self.gateway.ask, "GET", "/v1/status")
        workers: list[int] = status["workers"]
        return workers


def _stoppable(config: dict[str, Any]) -> bool:
    return config.get("driver") != "external" and config.get("delivery") != "accept"


async def until(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not look():
        assert time.monotonic() < deadline, f"not within {SOON:g} s: {what}"
        await asyncio.sleep(0.05)
