"""The status as a table: what people see of what is known."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from rich.console import Console

from gateway.show import table
from gateway.status import BackendStatus, GatewayStatus

WEB = BackendStatus(
    name="web", driver="process", delivery="relay", state="stopped", since=90.0,
    listeners={"listen": "tcp://127.0.0.1:80"}, endpoints={}, connections=0, waiting=0, total=0, received=0, sent=0,
    refused=0, dropped=0, wakes=0, last_wake="", start_took=0.0, ready_took=0.0, sleeps_in=None, held_for=None, memory=None,
    cpu=None, last_error="", retry_in=None,
)  # fmt: skip
HEADINGS = [
    "NAME", "DRIVER", "STATE", "SINCE", "LISTENS ON", "CONNS", "SLEEPS IN", "WAKES", "LAST WAKE", "START+READY", "MEMORY",
]  # fmt: skip


def backend(**changes: Any) -> BackendStatus:
    return msgspec.structs.replace(WEB, **changes)


def printed(*rows: BackendStatus, width: int = 200, colour: bool = False) -> list[str]:
    status = GatewayStatus("1.2.3", 1, [2], 5.0, 3700.0, len(rows), 0, list(rows))
    console = Console(width=width, force_terminal=colour, color_system="standard" if colour else None, no_color=False)
    with console.capture() as capture:
        console.print(table(status))
    return [line.rstrip() for line in capture.get().splitlines()]


def cells(**changes: Any) -> dict[str, str]:
    """What the columns say of a backend."""
    heading, row, _ = (re.split(" {2,}", line) for line in printed(backend(**changes)))
    return dict(zip(heading, row, strict=True))


def test_one_that_was_never_awake() -> None:
    expected = ["web", "process", "stopped", "1m30s", "tcp://127.0.0.1:80", "0", "-", "0", "-", "-", "-"]
    assert list(cells().values()) == expected
    assert list(cells()) == HEADINGS


def test_one_that_is_awake_and_used() -> None:
    said = cells(
        state="ready", since=0.25, listeners={"web": "tcp://[::1]:80", "local": "unix:/run/web"}, connections=3, waiting=2,
        wakes=17, last_wake="10.0.0.1:5000", start_took=0.004, ready_took=1.25, memory=5 << 20,
    )  # fmt: skip
    assert list(said.values()) == [
        "web", "process", "ready", "250ms", "tcp://[::1]:80 unix:/run/web", "3 (+2)", "-", "17", "10.0.0.1:5000",
        "4ms + 1.2s", "5MiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "column", "said"),
    [
        ({"delivery": "pass"}, "DRIVER", "process/pass"),
        ({"delivery": "accept", "wakes": 3, "start_took": 0.1}, "START+READY", "-"),
        ({"connections": 2}, "CONNS", "2"),
        ({"waiting": 500}, "CONNS", "0 (+500)"),
        ({"state": "ready", "sleeps_in": 30.0}, "SLEEPS IN", "30s"),
        ({"state": "ready", "sleeps_in": 0.0}, "SLEEPS IN", "0s"),
        ({"state": "ready", "held_for": -1.0}, "SLEEPS IN", "held"),
        ({"state": "frozen", "held_for": 5400.0, "sleeps_in": 30.0}, "SLEEPS IN", "held 1h30m"),
        ({"state": "stopped", "held_for": -1.0}, "SLEEPS IN", "held"),
        ({"state": "stopped", "retry_in": 2.5, "held_for": -1.0}, "SLEEPS IN", "retry in 2.5s"),
        ({"state": "ready", "retry_in": 2.5}, "SLEEPS IN", "-"),
        ({"memory": 0}, "MEMORY", "0B"),
        ({"memory": 1536 << 10}, "MEMORY", "1.5MiB"),
        ({"listeners": {"web": "tcp://[::1]:80"}}, "LISTENS ON", "tcp://[::1]:80"),
    ],
)
def test_what_a_column_says(changes: dict[str, Any], column: str, said: str) -> None:
    assert cells(**changes)[column] == said


@pytest.mark.parametrize("text", ["[fe80::1]:5000", "[2001:db8:a:b::1]:5000", "client [/b]", "[red]"])
def test_an_address_or_a_name_is_shown_as_it_is(text: str) -> None:
    assert cells(last_wake=text)["LAST WAKE"] == text
    assert cells(listeners={"web": f"tcp://{text}"})["LISTENS ON"] == f"tcp://{text}"
    assert cells(name=text)["NAME"] == text


def test_numbers_stand_under_each_other() -> None:
    heading, first, second, _ = printed(backend(connections=5), backend(connections=1000))
    end = heading.index("CONNS") + len("CONNS")
    assert first[:end].endswith("    5") and second[:end].endswith(" 1000")


def test_the_summary_and_each_error_come_below() -> None:
    error = "it ended (exit status 1); its last output:\n    [error] no :key: in /etc/x"
    said = printed(backend(), backend(name="api", last_error=error), backend(name="db", last_error="no such program"))
    assert said[4:] == [
        "3 asleep, 0 awake; up 1h1m, version 1.2.3",
        "api: it ended (exit status 1); its last output:",
        "    [error] no :key: in /etc/x",
        "db: no such program",
    ]


def test_many_listeners_take_several_lines_and_the_other_columns_one() -> None:
    listeners = {f"door{number}": f"tcp://127.0.0.1:{number}" for number in range(8001, 8009)}
    lines = printed(backend(listeners=listeners), width=140)
    assert all(address in "".join(lines) for address in listeners.values())
    assert len(lines) > 3
    assert [line.split()[0] for line in lines if "process" in line] == ["web"]


@pytest.mark.parametrize(
    ("state", "code"), [("stopped", "2"), ("starting", "33"), ("ready", "32"), ("frozen", "36"), ("stopping", "33")]
)
def test_each_state_has_its_colour_on_a_terminal(state: str, code: str) -> None:
    assert f"\033[{code}m{state}" in printed(backend(state=state), colour=True)[1]


def test_nothing_is_shown_of_nothing() -> None:
    heading, summary = printed()
    assert heading == "  ".join(HEADINGS)
    assert summary.startswith("0 asleep, 0 awake")
