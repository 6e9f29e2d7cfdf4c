"""What holds for every test: the event loop is never blocked, and nothing is left behind."""

from __future__ import annotations

import ctypes
import inspect
import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from tests.running import children, eventually

PR_SET_CHILD_SUBREAPER = 36


def pytest_configure() -> None:
    # Orphans come to us instead of to init, so that a test which leaves a process behind is found out.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.fixture(autouse=True)
def never_blocked(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """A blocking call in the event loop fails the test."""
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        yield None
        return
    with blockbuster_ctx(["gateway", "backends"]) as blockbuster:
        # One name in the runtime directory, which is in memory, beside the start of a process.
        blockbuster.functions["os.rename"].can_block_in("gateway/adoption.py", "belongs_to")
        blockbuster.functions["os.unlink"].can_block_in("gateway/adoption.py", "__exit__")
        yield blockbuster


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process and no descriptor survives its test."""
    before = set(children(os.getpid()))
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    try:
        eventually(lambda: not set(_living()) - before, timeout=5)
    except AssertionError:
        names = {pid: _command(pid) for pid in set(_living()) - before}
        for pid in names:
            os.kill(pid, signal.SIGKILL)
        pytest.fail(f"processes are left: {names}")
    assert len(os.listdir("/proc/self/fd")) <= descriptors, "descriptors are left open"


def _living() -> list[int]:
    while True:  # collect the orphans that came to us
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return []
        if found is None:
            break
        os.waitpid(found.si_pid, 0)
    return children(os.getpid())


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "?"


def program(name: str) -> str:
    """The path of a real program, or a skip that says it is missing."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/lib/systemd:/lib/systemd")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
