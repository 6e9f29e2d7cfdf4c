"""The status of a gateway as a table for people. Counterpart: `gateway.status` is what is shown."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from backends.units import Duration, Size
from gateway.status import BackendStatus, GatewayStatus

HEADINGS = (
    "NAME", "DRIVER", "STATE", "SINCE", "LISTENS ON", "CONNS", "SLEEPS IN", "WAKES", "LAST WAKE", "START+READY", "MEMORY",
)  # fmt: skip
COLOURS = {"stopped": "dim", "starting": "yellow", "ready": "green", "frozen": "cyan", "stopping": "yellow"}


def table(status: GatewayStatus) -> RenderableType:
    """One line for each backend."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in HEADINGS:
        number = heading in ("CONNS", "WAKES", "MEMORY")
        grid.add_column(heading, justify="right" if number else "left", no_wrap=heading != "LISTENS ON")
    for row in status.backends:
        grid.add_row(
            Text(row.name),
            row.driver if row.delivery == "relay" else f"{row.driver}/{row.delivery}",
            Text(row.state, style=COLOURS.get(row.state, "")),
            str(Duration(row.since)),
            Text(" ".join(row.listeners.values())),
            _connections(row),
            _sleeps(row),
            str(row.wakes),
            Text(row.last_wake or "-"),
            f"{Duration(row.start_took)} + {Duration(row.ready_took)}"
            if row.wakes and row.delivery != "accept"
            else "-",
            str(Size(row.memory)) if row.memory is not None else "-",
        )
    counts = f"{status.asleep} asleep, {status.awake} awake"
    summary = Text(f"{counts}; up {Duration(status.uptime)}, version {status.version}", style="dim")
    errors = [Text(f"{row.name}: {row.last_error}", style="red") for row in status.backends if row.last_error]
    return Group(grid, summary, *errors)


def _connections(row: BackendStatus) -> str:
    return f"{row.connections} (+{row.waiting})" if row.waiting else str(row.connections)


def _sleeps(row: BackendStatus) -> str:
    if row.retry_in is not None and row.state == "stopped":
        return f"retry in {Duration(row.retry_in)}"
    if row.held_for is not None and row.state != "stopped":
        return "held" if row.held_for < 0 else f"held {Duration(row.held_for)}"
    return "-" if row.sleeps_in is None else str(Duration(row.sleeps_in))
