"""What the processes of a backend use, read from /proc (proc(5)). Blocks: call it in a thread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from backends.base import Usage
from backends.nursery import children

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def of_family(pid: int) -> Usage:
    """A process and all its living descendants; an empty Usage when it is gone."""
    family, seen = [pid], 0
    while seen < len(family):
        family += children(family[seen])
        seen += 1
    memory, cpu = 0, 0.0
    for member in family:
        with contextlib.suppress(OSError, ValueError, IndexError):
            cpu += _cpu(member)
            memory += _memory(member)
    return Usage(memory, cpu) if memory else Usage()


def _cpu(pid: int) -> float:
    """Seconds, of the process and of those of its children that have ended."""
    after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return sum(map(int, after_name[11:15])) / _TICK


def _memory(pid: int) -> int:
    """Bytes: the proportional share of what is mapped; where that is not ours to see, the resident pages."""
    with contextlib.suppress(OSError):
        return _field(Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines(), "Pss:") * 1024
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def _field(lines: Iterable[str], name: str) -> int:
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
