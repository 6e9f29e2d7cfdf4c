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


NEEDS = {"LISTENS ON": 150, "DRIVER": 110, "LAST WAKE": 110, "START+READY": 90}
"""The terminal must be so wide for these columns."""


def table(status: GatewayStatus, width: int = 1000) -> RenderableType:
    """One line for each backend, with the columns that fit into so many characters."""
    shown = [heading for heading in HEADINGS if width >= NEEDS.get(heading, 0)]
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in shown:
        number = heading in ("CONNS", "WAKES", "MEMORY")
        grid.add_column(heading, justify="right" if number else "left", no_wrap=heading != "LISTENS ON")
    for row in status.backends:
        cells = _cells(row)
        grid.add_row(*(cells[heading] for heading in shown))
    counts = f"{status.asleep} asleep, {status.awake} awake"
    summary = Text(f"{counts}; up {Duration(status.uptime)}, version {status.version}", style="dim")
    errors = [Text(f"{row.name}: {row.last_error}", style="red") for row in status.backends if row.last_error]
    return Group(grid, summary, *errors)


def _cells(row: BackendStatus) -> dict[str, RenderableType]:
    started = row.wakes and row.delivery != "accept"
    return {
        "NAME": Text(row.name),
        "DRIVER": row.driver if row.delivery == "relay" else f"{row.driver}/{row.delivery}",
        "STATE": Text(row.state, style=COLOURS.get(row.state, "")),
        "SINCE": str(Duration(row.since)),
        "LISTENS ON": Text(" ".join(row.listeners.values())),
        "CONNS": _connections(row),
        "SLEEPS IN": _sleeps(row),
        "WAKES": str(row.wakes),
        "LAST WAKE": Text(row.last_wake or "-"),
        "START+READY": f"{Duration(row.start_took)} + {Duration(row.ready_took)}" if started else "-",
        "MEMORY": str(Size(row.memory)) if row.memory is not None else "-",
    }


def _connections(row: BackendStatus) -> str:
    return f"{row.connections} (+{row.waiting})" if row.waiting else str(row.connections)


def _sleeps(row: BackendStatus) -> str:
    if row.retry_in is not None and row.state == "stopped":
        return f"retry in {Duration(row.retry_in)}"
    if row.held_for is not None:
        return "held" if row.held_for < 0 else f"held {Duration(row.held_for)}"
    return "-" if row.sleeps_in is None else str(Duration(row.sleeps_in))
