"""A gateway with very many sleeping backends: its start, a reload of one changed file, and what it costs to do nothing."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import peers
from tests.bench.processes import Usage, family, usage
from tests.bench.results import Result, Sample
from tests.bench.rounds import Bench
from tests.running import Gateway

NAMES = ("rest",)
PATIENCE = 180.0
SETTLED = 2.0
"""Seconds after the start from which on it is at rest."""

SPARE_DESCRIPTORS = 500


def run(bench: Bench) -> None:
    if bench.wants("rest"):
        with bench.scenario("rest"):
            scenario(bench)


def scenario(bench: Bench) -> None:
    count = min(bench.plan.sleeping, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_DESCRIPTORS)
    rounds = min(bench.plan.rounds, bench.plan.fresh_rounds)
    title = f"{count:,} sleeping backends"

    def result(name: str, what: str, unit: str) -> Result:
        made = Result(f"rest.{name}", f"{title}: {what}", unit, reference="", baseline="", less_is_better=True)
        bench.results.append(made)
        return made

    started = result("start", "exec to READY=1", "s")
    reloaded = result("reload", "reload of one changed file", "ms")
    memory = result("memory", "memory (PSS)", "MB")
    wakeups = result("wakeups", "wake-ups", "per minute")
    cpu = result("cpu", "CPU at rest", "ms per minute")
    directory = bench.directory / "rest"
    for turn in range(rounds):
        bench.progress.say(f"{title}: round {turn + 1} of {rounds}")
        with sleeping(directory, count) as (running, took):
            started.add("dormant", Sample(took))
            reloaded.add("dormant", Sample(reload(running, turn)))
            for part, pids in planes(running).items():
                used = usage(pids)
                memory.add(part, Sample(used.pss / 1e6, rss=used.rss, pss=used.pss))
            if turn == rounds - 1:
                bench.progress.say(f"{title}: at rest for {bench.plan.rest:g} s")
                for part, used in at_rest(running, bench.plan.rest).items():
                    wakeups.add(part, Sample(used.switches * 60 / bench.plan.rest))
                    cpu.add(part, Sample(used.running * 1000 * 60 / bench.plan.rest))


@contextlib.contextmanager
def sleeping(directory: Path, count: int) -> Iterator[tuple[Gateway, float]]:
    """A gateway with so many backends, and the seconds from its exec until it said READY=1."""
    directory.mkdir(exist_ok=True)
    notifications = directory / "notify.sock"
    notifications.unlink(missing_ok=True)
    (directory / "most.yaml").write_text(json.dumps({"backends": {f"site-{i}": keys(i) for i in range(1, count)}}))
    (directory / "one.yaml").write_text(json.dumps({"backends": {"site-0": keys(0)}}))
    config = {"gateway": {"drain": "1s"}, "include": ["most.yaml", "one.yaml"]}
    running = Gateway(directory, config, NOTIFY_SOCKET=str(notifications))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(notifications))
        begun = time.monotonic()
        running.process = running.launch()
        try:
            wait_until_ready(running, notified)
            yield running, time.monotonic() - begun
        finally:
            peers.stop(running)


def keys(index: int) -> dict[str, Any]:
    """One backend, at a loopback address of its own."""
    host = f"127.77.{index // 250}.{index % 250 + 1}"
    return {
        "driver": "process",
        "command": ["/bin/false"],
        "listen": f"tcp://{host}:7000",
        "endpoint": f"tcp://{host}:7001",
        "idle": "1h",
    }


def wait_until_ready(running: Gateway, notified: socket.socket) -> None:
    assert running.process is not None
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if select.select([notified], [], [], 0.5)[0]:
            if b"READY=1" in notified.recv(4096).split(b"\n"):
                return
        elif running.process.poll() is not None:
            raise AssertionError(f"the gateway ended with {running.process.returncode}: {running.log[-500:]}")
    raise AssertionError(f"the gateway was not ready within {PATIENCE:g} s")


def reload(running: Gateway, turn: int) -> float:
    """Milliseconds of a reload after the smaller of the files has changed."""
    changed = {**keys(0), "idle": f"{2 + turn}h"}
    (running.directory / "one.yaml").write_text(json.dumps({"backends": {"site-0": changed}}))
    begun = time.monotonic()
    answer = running.ask("POST", "/v1/reload")["message"]
    took = time.monotonic() - begun
    assert "0 added, 1 changed, 0 removed" in answer, answer
    return took * 1000


def planes(running: Gateway) -> dict[str, list[int]]:
    """The processes of the gateway, by what they are."""
    everybody = family(running.pid)
    workers = running.ask("GET", "/v1/status?name=site-0")["workers"]
    others = [pid for pid in everybody if pid not in (running.pid, *workers)]
    found = {"control plane": [running.pid], "data plane": workers}
    return found | ({"helpers": others} if others else {}) | {"all": everybody}


def at_rest(running: Gateway, seconds: float) -> dict[str, Usage]:
    """What each part used in so many seconds."""
    time.sleep(SETTLED)
    parts = planes(running)
    time.sleep(SETTLED)  # what that question set off
    before = {part: usage(pids) for part, pids in parts.items()}
    time.sleep(seconds)
    after = {part: usage(pids) for part, pids in parts.items()}
    names = Usage.__dataclass_fields__
    return {
        part: Usage(*(getattr(after[part], name) - getattr(before[part], name) for name in names)) for part in parts
    }
