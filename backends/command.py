"""Running a helper program to its end: checked, bounded, without a shell.

Counterpart: drivers and the `exec` probe. What a helper leaves running on purpose (a daemon, a virtual machine) stays:
it is not the nursery's. Nothing else in the project runs helpers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from backends.base import BackendError, Exit
from backends.environment import inherited
from backends.output import Output
from backends.pipe import Pipe

KEPT_OUTPUT = 1 << 20  # bytes of stdout that are returned; what is beyond them is not
SHOWN_LINES = 10
SHOWN_WORDS = 1  # of the command, in messages: the words that follow may be secrets


class CommandFailed(BackendError):
    """A helper could not be run, ended with another status than 0, or took too long."""

    def __init__(self, command: Sequence[str], why: str, how: Exit | None = None, lines: Sequence[str] = ()) -> None:
        self.command = tuple(command)
        self.exit = how
        """None when it never ran, or did not end by itself"""
        self.lines = tuple(lines)
        shown = shlex.join(self.command[:SHOWN_WORDS]) + (" ..." if len(self.command) > SHOWN_WORDS else "")
        said = "; its last output:\n    " + "\n    ".join(self.lines) if self.lines else ""
        super().__init__(f"{shown}: {why}{said}")


async def run(
    command: Sequence[str],
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    output: Output | None = None,
) -> str:
    """Run a program in its own session and return what it said on stdout, at most KEPT_OUTPUT bytes.

    A relative path with a slash is relative to `cwd`; `env` is added to the gateway's environment, and never shown in
    an error; all lines go to `output` as well. After `timeout` seconds, or when cancelled, its whole group is killed
    and it is reaped before this returns. Raises CommandFailed.
    """
    said = bytearray()
    lines = (Output(), Output())
    for each in lines:
        if output is not None:
            each.listen(output.line)

    def keep(data: bytes) -> None:
        said.extend(data[: KEPT_OUTPUT - len(said)])
        lines[0].feed(data)

    with contextlib.ExitStack() as pipes:
        try:
            stdout = Pipe(keep)
            pipes.callback(stdout.finish)
            stderr = Pipe(lines[1].feed)
            pipes.callback(stderr.finish)
            process, pidfd = await _start(command, cwd, env, stdout.writer, stderr.writer)
        except OSError as error:
            where = f"cwd {cwd}: " if cwd and str(error.filename) == str(cwd) else ""
            raise CommandFailed(command, where + (error.strerror or str(error))) from None
        stdout.close_writer()
        stderr.close_writer()
        in_time = await _end(process, pidfd, timeout)
    last = [line for each in lines for line in each.tail(SHOWN_LINES)][-SHOWN_LINES:]
    if not in_time:
        raise CommandFailed(command, f"timed out after {timeout:g}s", None, last)
    if process.returncode != 0:
        code = process.returncode
        how = Exit(code=code) if code > 0 else Exit(signal=-code)
        raise CommandFailed(command, str(how), how, last)
    return said.decode(errors="replace")


async def _start(
    command: Sequence[str], cwd: Path | None, env: Mapping[str, str] | None, stdout: int, stderr: int
) -> tuple[subprocess.Popen[bytes], int]:
    """The process and its pidfd. Raises OSError. When cancelled, the program has been killed."""
    program = str(cwd / command[0]) if cwd and "/" in command[0] else command[0]

    def start() -> tuple[subprocess.Popen[bytes], int]:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=inherited(env or {}),
            start_new_session=True,
        )
        try:
            return process, os.pidfd_open(process.pid)
        except OSError:  # no descriptors left
            process.kill()
            process.wait()
            raise

    # In a thread, because Popen reads from a pipe until exec. A thread cannot be cancelled, and it needs our pipes.
    starting = asyncio.get_running_loop().run_in_executor(None, start)
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        while not starting.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([starting])
        with contextlib.suppress(OSError):
            await _end(*starting.result(), timeout=0)
        raise


async def _end(process: subprocess.Popen[bytes], pidfd: int, timeout: float) -> bool:
    """Wait for its end and reap it; after `timeout` seconds, or when cancelled, kill its group. False: not in time.

    Whoever is cancelled a second time does not wait for the end, but it is reaped all the same.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def reap() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        process.wait()
        ended.set_result(None)

    loop.add_reader(pidfd, reap)
    try:
        async with asyncio.timeout(timeout):
            await asyncio.shield(ended)
    except TimeoutError:
        return False
    finally:
        if not ended.done():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # it is not reaped, so the group is its own
            await asyncio.shield(ended)
    return True
