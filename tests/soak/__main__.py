"""`python -m tests.soak`: a gateway under mixed load and disturbances for long; nothing may fail, leak or stay awake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from backends.units import Duration
from tests.mimic import command
from tests.running import PATIENCE, Gateway, children, cpu, free_port
from tests.soak.disturb import Disturber, Log
from tests.soak.failures import Record
from tests.soak.load import Load, datagrams, echo, half_close, leave, read_slowly, reset, stay
from tests.soak.measure import ROLES, Measures

PROGRESS = 30.0
SLEEPS_WITHIN = 10.0
LONG_ENOUGH = 30.0
"""Seconds; growth in a shorter time is warming up."""
SHOWN = 30


class Parsed(click.ParamType):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Duration:
        try:
            return Duration.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--duration", type=Parsed(), default="30m", show_default=True, help="Of the load, such as 40s, 30m, 2h.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="gateway.workers.")
def main(duration: Duration, workers: int) -> None:
    """Run a gateway under a mixed load while it is reloaded, upgraded and its workers are killed.

    Exits with 1 when a client was not served, the gateway's log has a surprise, a backend stayed awake or a count was
    wrong at the end, or memory or descriptors grew (not judged below 30 s).
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="dormant-soak-", ignore_cleanup_errors=True) as directory:
        soak = Soak(Path(directory), float(duration), workers)
        try:
            asyncio.run(soak.run())
        except BaseException as error:
            soak.record.fail(f"the soak itself: {error!r}")
            raise
        finally:
            soak.end()
            soak.tell()
            if soak.record.failures:
                kept = Path(tempfile.gettempdir()) / f"dormant-soak-{os.getpid()}.log"
                with contextlib.suppress(OSError):
                    shutil.copyfile(soak.gateway.log_file, kept)
                    click.echo(f"the gateway's log: {kept}")
    sys.exit(1 if soak.record.failures else 0)


class Soak:
    def __init__(self, directory: Path, duration: float, workers: int) -> None:
        self.duration = duration
        self.record = Record()
        self.measures = Measures()
        self.outside = f"unix:{directory}/outside"
        configs = configurations(directory, workers, self.outside)
        self.listen = {name: one["listen"] for name, one in configs[0]["backends"].items()}
        self.gateway = Gateway(directory, configs[0])
        self.log = Log(self.gateway, self.record)
        self.disturber = Disturber(self.gateway, self.record, self.log, configs)
        self.service: subprocess.Popen[bytes] | None = None

    async def run(self) -> None:
        self.service = subprocess.Popen(
            command("--listen", self.outside), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await asyncio.to_thread(self.gateway.start)
        self.record.begun = time.monotonic()
        stop = asyncio.Event()
        self.load = Load(self.record, stop)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.interrupted, stop)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.clients())
            tasks.create_task(self.disturb())
            tasks.create_task(self.watch())
            await self.load.pause(self.duration)
            stop.set()
        await self.quiet()

    def interrupted(self, stop: asyncio.Event) -> None:
        self.record.fail("interrupted")
        stop.set()

    async def clients(self) -> None:
        """About 100 new ones a second, on average."""
        load, at = self.load, self.listen
        mixed = [echo, echo, echo, half_close, reset, leave]
        async with asyncio.TaskGroup() as tasks:
            start = tasks.create_task
            start(load.play("tcp-unix", at["tcp-unix"], mixed, rate=60, burst=1, quiet=1.5))
            start(load.play("unix-tcp", at["unix-tcp"], mixed, rate=60, burst=1, quiet=1.2))
            start(load.play("tcp-tcp", at["tcp-tcp"], mixed, rate=40, burst=2, quiet=3))
            start(load.play("half", at["half"], [half_close], rate=20, burst=1, quiet=2))
            start(load.play("slow", at["slow"], [read_slowly], rate=2, burst=2, quiet=5))
            start(load.play("outside", at["outside"], [echo, echo, stay], rate=10, burst=10, quiet=1))
            start(load.play("passed", at["passed"], [echo, half_close, reset], rate=20, burst=1, quiet=2))
            start(load.play("each", at["each"], [echo, half_close], rate=2, burst=2, quiet=2))
            start(load.play("udp", at["udp"], [datagrams], rate=20, burst=1, quiet=2.5))
            start(load.flood("flood", at["flood"], quiet=2))
            start(load.flood("flood-tcp", at["flood-tcp"], quiet=3))

    async def disturb(self) -> None:
        every = min(5.0, self.duration / 8)
        await self.load.pause(every)
        while not self.load.stop.is_set():
            await self.disturber.next()
            await self.load.pause(every)

    async def watch(self) -> None:
        every = min(2.0, self.duration / 20)
        told = time.monotonic()
        while not self.load.stop.is_set():
            self.log.follow()
            try:
                await asyncio.to_thread(self.measures.take, self.gateway)
            except (OSError, AssertionError) as error:
                # While it is replaced nobody answers there.
                self.record.excused[f"no sample: {type(error).__name__}"] += 1
            if time.monotonic() - told >= PROGRESS:
                told = time.monotonic()
                self.progress()
            await self.load.pause(every)

    def progress(self) -> None:
        """One line for people who wait."""
        if not self.measures.samples:
            return
        _, sample = self.measures.samples[-1]
        roles = ", ".join(f"{role} {use.pss / 1024:.1f} MiB {use.fds:g} fds" for role, use in sample.items())
        clients, disturbed = self.record.traffic.total(), self.record.disturbances.total()
        click.echo(
            f"{time.monotonic() - self.record.begun:.0f} s: {clients} clients, {self.load.live} now, {disturbed} disturbances,"
            f" {self.measures.status['awake']} awake; {roles}; {len(self.record.failures)} failures",
            err=True,
        )

    async def quiet(self) -> None:
        """The load is over: everybody sleeps, nobody is counted, nothing has grown."""
        deadline = time.monotonic() + SLEEPS_WITHIN
        while problems := self.awake():
            if time.monotonic() > deadline:
                for problem in problems:
                    self.record.fail(f"{SLEEPS_WITHIN:g} s after the load: {problem}")
                break
            await asyncio.sleep(0.1)
        if time.monotonic() - self.record.begun >= LONG_ENOUGH:
            for growth in self.measures.growth():
                self.record.fail(growth)

    def awake(self) -> list[str]:
        problems = []
        try:
            rows = self.gateway.ask("GET", "/v1/status")["backends"]
        except OSError as error:
            return [f"the gateway does not answer: {error!r}"]
        for row in rows:
            name = row["name"]
            if row["connections"] or row["waiting"]:
                problems.append(f"{name} has {row['connections']} connections, {row['waiting']} wait")
            if name != "outside" and row["state"] != "stopped":
                problems.append(f"{name} is {row['state']}")
        return problems

    # The end

    def end(self) -> None:
        """All that was started, in the usual way if it can be."""
        try:
            self.gateway.stop()
        except AssertionError as error:
            self.record.fail(f"the end of the gateway: {str(error).partition(chr(10))[0]}")
        finally:
            for pid in self.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.service is not None:
                self.service.kill()
                self.service.wait()
        if self.gateway.log_file.exists():
            self.log.follow()

    def left(self) -> Iterator[int]:
        process = self.gateway.process
        if process is None:
            return
        if process.poll() is None:
            yield from children(process.pid)
            process.kill()
            process.wait(PATIENCE)
        for path in Path(f"{self.gateway.admin}.workers").glob("*.sock"):
            yield int(path.stem)

    def tell(self) -> None:
        console = Console(width=140)
        if self.measures.samples:
            table = Table("", *(f"{part} %" for part in (25, 50, 75, 100)), "2nd quarter", "4th quarter")
            for role in ROLES:
                uses = [self.measures.at(role, part) for part in (0.25, 0.5, 0.75, 1)]
                uses += [self.measures.between(role, 0.25, 0.5), self.measures.between(role, 0.75, 1)]
                table.add_row(f"{role}: memory, MiB", *(f"{use.pss / 1024:.1f}" if use else "-" for use in uses))
                table.add_row(f"{role}: descriptors", *(f"{use.fds:g}" if use else "-" for use in uses))
            console.print(table)
        record = self.record
        took = time.monotonic() - record.begun
        counted = (("clients", record.traffic), ("disturbances", record.disturbances), ("excused", record.excused))
        for what, counts in counted:
            click.echo(f"{what}: {', '.join(f'{kind} {count}' for kind, count in counts.most_common()) or 'none'}")
        wakes = sum(row["wakes"] for row in self.measures.status.get("backends", []))
        click.echo(f"{took:.0f} s, {wakes} wakes; the load itself used {cpu(os.getpid()) / took:.2f} cores")
        click.echo(f"failures: {len(record.failures)}")
        for failure in record.failures[:SHOWN]:
            click.echo(f"  {failure}")


def configurations(directory: Path, workers: int, outside: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two that reloads alternate between."""

    def mimic(listen: str, endpoint: str, idle: str, *options: object, **keys: Any) -> dict[str, Any]:
        return {
            "listen": listen,
            "endpoint": endpoint,
            "idle": idle,
            "command": command("--listen", endpoint, *options),
            **keys,
        }

    def tcp(scheme: str = "tcp") -> str:
        return f"{scheme}://127.0.0.1:{free_port()}"

    def unix(name: str) -> str:
        return f"unix:{directory}/{name}"

    backends: dict[str, Any] = {
        "tcp-unix": mimic(tcp(), unix("a"), "300ms"),
        "unix-tcp": mimic(unix("b"), tcp(), "200ms"),
        "tcp-tcp": mimic(tcp(), tcp(), "1s"),
        "half": mimic(tcp(), unix("c"), "500ms", "--half-close"),
        "slow": mimic(tcp(), unix("d"), "2s"),
        "flood": mimic(unix("e"), unix("f"), "200ms"),
        "flood-tcp": mimic(tcp(), unix("g"), "300ms"),
        "udp": mimic(tcp("udp"), tcp("udp"), "300ms", ready={"udp": {"send": "x"}}, limits={"flow_timeout": "500ms"}),
        "passed": {"listen": tcp(), "delivery": "pass", "idle": "500ms", "command": command("--inherit")},
        "each": {"listen": tcp(), "delivery": "accept", "command": command("--stdio")},
        "outside": {"driver": "external", "listen": tcp(), "endpoint": outside, "idle": "never"},
    }
    more = {
        **backends,
        "tcp-tcp": {**backends["tcp-tcp"], "limits": {"connections": 5000, "pending": 5000}, "idle": "700ms"},
        "more": mimic(tcp(), unix("h"), "200ms"),
    }
    options = {"workers": workers, "orphan_time": "20s", "drain": "20s"}
    return {"gateway": options, "backends": backends}, {"gateway": options, "backends": more}


if __name__ == "__main__":
    main()
