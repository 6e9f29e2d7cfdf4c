"""Programs of the bench: each has a deadline and ends with its `with`; and what processes use, from /proc.

Sources: proc(5); the pages of smaps_rollup and schedstat in the kernel's documentation.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.running import children, eventually

ENDING = 5.0
"""Seconds between SIGTERM and SIGKILL."""

PLACES = ":/usr/sbin:/sbin:/usr/lib/systemd:/lib/systemd"


@dataclass(frozen=True)
class Address:
    """Where something listens: a TCP or UDP port on 127.0.0.1, or a Unix socket."""

    port: int = 0
    path: str = ""

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_UNIX if self.path else socket.AF_INET

    @property
    def sockaddr(self) -> Any:
        return self.path or ("127.0.0.1", self.port)

    def __str__(self) -> str:
        """As Dormant writes it."""
        return f"unix:{self.path}" if self.path else f"tcp://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 20.0) -> socket.socket:
        sock = socket.socket(self.family)
        sock.settimeout(timeout)
        try:
            sock.connect(self.sockaddr)
        except BaseException:
            sock.close()
            raise
        return sock

    def answers(self) -> bool:
        try:
            self.connect().close()
        except OSError:
            return False
        return True


def find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + PLACES)


@contextlib.contextmanager
def process(command: Sequence[str], address: Address | None = None, **options: Any) -> Iterator[int]:
    """A program, its PID, from its first answer at the address until it and its process group are gone."""
    running = subprocess.Popen(
        list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options
    )

    def look() -> bool:
        if running.poll() is not None:
            raise AssertionError(f"{command[0]} ended with {running.returncode}")
        return address is None or address.answers()

    try:
        eventually(look, f"{command[0]} at {address}")
        yield running.pid
    finally:
        end(running)


def end(running: subprocess.Popen[Any]) -> None:
    """End a leader of a process group, and whoever is left in the group."""
    if running.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(ENDING)
    # Also when it ended in time: its number stays taken as long as somebody is in the group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait(ENDING)


def output(command: Sequence[str], timeout: float, **options: Any) -> str:
    """What a program says on stdout. Raises AssertionError when it fails or takes too long."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=timeout, **options)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{command[0]} did not end within {timeout:g} s") from None
    if done.returncode:
        raise AssertionError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return str(done.stdout)


@dataclass(frozen=True)
class Usage:
    """What some processes use, together."""

    user: float = 0.0
    """seconds of CPU so far"""
    system: float = 0.0
    rss: int = 0
    """bytes"""
    pss: int = 0
    """bytes, with what is shared divided among those who share it"""
    descriptors: int = 0
    switches: int = 0
    """context switches so far, voluntary and not: how often it was woken"""
    running: float = 0.0
    """seconds on a CPU so far, to the nanosecond"""


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    return [pid, *children(pid)]


def usage(pids: Sequence[int]) -> Usage:
    """The sum over processes; one that is gone counts nothing."""
    total = Usage()
    for pid in pids:
        with contextlib.suppress(OSError):
            one = _usage(Path(f"/proc/{pid}"))
            total = Usage(*(getattr(total, name) + getattr(one, name) for name in Usage.__dataclass_fields__))
    return total


def _usage(proc: Path) -> Usage:
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    memory = _numbers((proc / "smaps_rollup").read_text())
    switches, running = 0, 0
    for task in (proc / "task").iterdir():
        status = _numbers((task / "status").read_text())
        switches += status["voluntary_ctxt_switches"] + status["nonvoluntary_ctxt_switches"]
        running += int((task / "schedstat").read_text().split()[0])
    return Usage(
        int(fields[11]) / tick, int(fields[12]) / tick, memory["Rss"] << 10, memory["Pss"] << 10,
        len(os.listdir(proc / "fd")), switches, running / 1e9,
    )  # fmt: skip


def _numbers(text: str) -> dict[str, int]:
    """The lines `Name:  123 kB` or `Name: 123`."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0])
    return found
