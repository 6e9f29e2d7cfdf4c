"""The one table, as text, as Markdown and as JSON, with what it was measured on and the aims beside it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from gateway import __version__
from tests.bench.processes import find
from tests.bench.results import Result
from tests.bench.rounds import Plan

VERSIONS = {
    "haproxy": ["haproxy", "-v"],
    "nginx": ["nginx", "-v"],
    "systemd-socket-proxyd": ["systemd-socket-proxyd", "--version"],
    "wrk": ["wrk", "-v"],
    "redis": ["redis-server", "--version"],
    "busybox": ["busybox"],
}

HEADINGS = (
    "scenario", "peer", "median", "unit", "ratio", "spread", "/direct", "p50 us", "p99 us", "CPU us user+sys", "RSS MB", "PSS MB",
    "notes",
)  # fmt: skip
LEFT = {"scenario", "peer", "unit", "notes"}

LEGEND = (
    "median: over the rounds. ratio: median of the ratios against the reference in the same round, spread: their least and"
    " greatest. The reference is HAProxy (nbthread 1, splice) where nothing else stands in brackets. /direct: the same"
    " ratio against what it is without a relay. p50, p99: of what the scenario is about. CPU: microseconds for each request,"
    " MB or answer in all processes of the peer, RSS and PSS: their memory at the end of a sample; Dormant is its control"
    " plane, its workers and its helper together."
)

CLIENTS = (
    "Clients: wrk -t1 for requests over TCP (1 KiB from nginx with one worker); redis-benchmark for requests over Unix"
    " sockets (1 KiB from redis-server), which wrk cannot dial; Python with blocks of 256 KiB for bulk, Python for idle"
    " connections, cold starts (busybox httpd) and datagrams."
)


# Aims


@dataclass(frozen=True)
class Aim:
    """What is to be reached. `measure` names a figure of the result; `least` or `most` bounds it."""

    result: str
    text: str
    measure: str
    least: float = -math.inf
    most: float = math.inf


AIMS = (
    Aim("relay.keepalive.tcp.1", "keep-alive, 1 connection: >= 1.0 of HAProxy", "ratio", least=1.0),
    Aim("relay.keepalive.tcp.32", "keep-alive, 32 connections: >= 1.0 of HAProxy", "ratio", least=1.0),
    Aim("relay.keepalive.tcp.256", "keep-alive, 256 connections: >= 1.0 of HAProxy", "ratio", least=1.0),
    Aim("relay.new.tcp", "new connections: >= 1.0 of HAProxy", "ratio", least=1.0),
    Aim("relay.bulk.tcp.down.1", "bulk down, one stream: >= 1.1 of HAProxy", "ratio", least=1.1),
    Aim("relay.bulk.tcp.up.1", "bulk up, one stream: >= 1.1 of HAProxy", "ratio", least=1.1),
    Aim("relay.bulk.tcp.down.4", "bulk down, four streams: >= 1.3 of HAProxy", "ratio", least=1.3),
    Aim("relay.bulk.tcp.up.4", "bulk up, four streams: >= 1.3 of HAProxy", "ratio", least=1.3),
    Aim("cold.one", "cold overhead: <= 3 ms at p50", "added p50", most=3.0),
    Aim("cold.one", "cold overhead: <= 10 ms at p99", "added p99", most=10.0),
    Aim("relay.idle.tcp.memory", "idle connections: <= 1.5 KB each", "median", most=1500.0),
    Aim("relay.idle.tcp.descriptors", "idle connections: <= 2 descriptors each", "median", most=2.05),
)


def aims(results: Sequence[Result], peer: str = "dormant") -> list[tuple[str, str, str]]:
    """The text, the figure and `reached` or `not reached` of each aim that was measured."""
    by_name = {result.name: result for result in results}
    lines = []
    for aim in AIMS:
        result = by_name.get(aim.result)
        value = math.nan if result is None else figure(result, peer, aim.measure)
        if result is None or math.isnan(value):
            continue
        spread = f" ({_spread(result.ratios(peer, result.reference))})" if aim.measure == "ratio" else ""
        verdict = "reached" if aim.least <= round(value, 2) <= aim.most else "not reached"
        lines.append((aim.text, f"{_number(value)}{spread}", verdict))
    return lines


def figure(result: Result, peer: str, measure: str) -> float:
    if measure == "ratio":
        return _median(result.ratios(peer, result.reference))
    if measure.startswith("added"):
        return result.added(peer, ranked=False)[measure.endswith("p99")]
    return result.median(peer)


# The table


def rows(results: Sequence[Result]) -> list[list[str]]:
    """One row for each scenario and peer, in the order of HEADINGS."""
    made = []
    for result in results:
        title = result.title
        if result.reference not in ("haproxy", ""):
            title += f" [{result.reference}]"
        for peer in result.peers:
            made.append([title, *_row(result, peer)])
            title = ""
    return made


def _row(result: Result, peer: str) -> list[str]:
    ratios = result.ratios(peer, result.reference)
    notes = [note for note in (result.notes.get(peer, ""), result.error(peer)) if note]
    user, system = result.median(peer, "user"), result.median(peer, "system")
    return [
        peer,
        _number(result.median(peer)),
        f"{result.unit}{' (less is better)' if result.less_is_better else ''}" if peer in result.samples else "",
        _number(_median(ratios), 2),
        _spread(ratios),
        _number(_median(result.ratios(peer, result.baseline)), 2) if result.baseline != result.reference else "",
        _number(_some(result.median(peer, "p50")), 0),
        _number(_some(result.median(peer, "p99")), 0),
        f"{user:.1f}+{system:.1f}" if user + system > 0 else "",
        _number(_some(result.median(peer, "rss") / 1e6), 1),
        _number(_some(result.median(peer, "pss") / 1e6), 1),
        "; ".join(notes),
    ]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _spread(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else ""


def _some(value: float) -> float:
    """Zero means: not measured."""
    return value or math.nan


def _number(value: float, places: int | None = None) -> str:
    """With three digits or so; nothing for NaN."""
    if math.isnan(value):
        return ""
    if places is None:
        places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{places}f}"


def table(results: Sequence[Result]) -> Table:
    """For a terminal."""
    grid = Table(
        box=None, padding=(0, 2, 0, 0), header_style="bold", caption=f"{LEGEND} {CLIENTS}", caption_justify="left"
    )
    for heading in HEADINGS:
        side: Literal["left", "right"] = "left" if heading in LEFT else "right"
        grid.add_column(heading, justify=side, overflow="fold", no_wrap=heading != "notes")
    for row in rows(results):
        grid.add_row(*row)
    return grid


def markdown(results: Sequence[Result], plan: Plan, machine: dict[str, str], command: str) -> str:
    """The whole report as a file."""
    lines = ["# Results of `make bench`", "", f"Made by `{command}`.", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [f"- {plan.rounds} rounds in turns, {plan.seconds:g} s of load for one sample", ""]
    found = aims(results)
    if found:
        lines += ["## Aims", "", "| aim | measured | |", "|---|---|---|"]
        lines += [f"| {' | '.join(aim)} |" for aim in found]
        lines.append("")
    lines += ["## Everything", "", f"| {' | '.join(HEADINGS)} |"]
    lines.append("|" + "|".join("---" if heading in LEFT else "--:" for heading in HEADINGS) + "|")
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(results)]
    return "\n".join([*lines, "", LEGEND, "", CLIENTS, ""])


def as_json(results: Sequence[Result], plan: Plan, machine: dict[str, str]) -> str:
    """Every sample."""
    document = {
        "machine": machine,
        "plan": dataclasses.asdict(plan),
        "results": [dataclasses.asdict(result) for result in results],
        "aims": [dict(zip(("aim", "measured", "verdict"), aim, strict=True)) for aim in aims(results)],
    }
    return json.dumps(_finite(document), indent=1, default=str)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


# What it was measured on


def machine() -> dict[str, str]:
    """Date, machine, and versions."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": f"{_processor()}, {os.cpu_count()} cores",
        "Dormant": f"{__version__} {_commit()}".strip(),
        "Python": platform.python_version(),
    }
    for name, command in VERSIONS.items():
        facts[name] = _version(command)
    return facts


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown CPU"


def _commit() -> str:
    return _said(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])


def _version(command: Sequence[str]) -> str:
    program = find(command[0])
    if program is None:
        return "not installed"
    found = re.search(r"\d+\.\d+[\w.+-]*|systemd \d+|\d{3}", _said([program, *command[1:]]))
    return found[0] if found else "unknown version"


def _said(command: Sequence[str]) -> str:
    """The first line that a program says; some say their version on stderr, and some end with an error after it."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter((done.stdout or done.stderr).strip().splitlines()), "")
