"""A gateway in a process of its own, as a user runs it: what the end-to-end tests stand on."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MIMIC = str(Path(__file__).with_name("mimic.py"))
PATIENCE = 20.0
"""Seconds after which something that should have happened has not."""


def eventually(look: Callable[[], T], what: str = "", timeout: float = PATIENCE) -> T:
    """Look again until the answer is true; for states of other processes, of which no event tells. Returns the answer."""
    deadline = time.monotonic() + timeout
    while not (answer := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or look}")
        time.sleep(0.005)
    return answer


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that nobody listens on, outside of the range from which clients get theirs."""
    for start in range(20000 + os.getpid() % 1000 * 10, 32000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(start, start + count):
                    sock = stack.enter_context(socket.socket())
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            if start in _given:
                continue
            _given.update(range(start, start + count))
            return start
    raise AssertionError("no free port")


_given: set[int] = set()


class UnixHttp(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self.path)


class Gateway:
    """`dormant run` on a configuration that is given as text or as a document."""

    def __init__(self, directory: Path, config: str | dict[str, Any], *arguments: str, **environment: str) -> None:
        self.directory = directory
        self.file = directory / "dormant.yaml"
        self.admin = str(directory / "admin.sock")
        self.log_file = directory / "log"
        self.write(config)
        self.arguments = arguments
        self.environment = {**os.environ, **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def write(self, config: str | dict[str, Any]) -> None:
        document = {"backends": {}} if isinstance(config, str) else dict(config)
        gateway = {"admin": self.admin, "state_directory": str(self.directory / "state"), "log": "text"}
        gateway["orphan_time"] = "0s"  # a test that kills the gateway means all of it
        document["gateway"] = {**gateway, **document.get("gateway", {})}
        text = json.dumps(document)
        if isinstance(config, str):
            text = f"gateway: {json.dumps(gateway)}\n{config}"
        self.file.write_text(text)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "gateway.cli", "run", str(self.file), *self.arguments]

    def start(self, command: list[str] | None = None, **options: Any) -> Gateway:
        self.process = self.launch(command, **options)
        self.wait_for_line("asleep, listening")
        return self

    def launch(self, command: list[str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        with self.log_file.open("ab") as log:
            return subprocess.Popen(command or self.command, stderr=log, stdout=log, env=self.environment, **options)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_for_line(self, text: str, count: int = 1, timeout: float = PATIENCE) -> str:
        def look() -> list[str] | None:
            lines = [line for line in self.log.splitlines() if text in line]
            if len(lines) < count and self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"the gateway ended with {self.process.returncode}:\n{self.log}")
            return lines if len(lines) >= count else None

        try:
            return eventually(look, f"log line {text!r}", timeout)[count - 1]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def ask(self, method: str, path: str) -> Any:
        connection = UnixHttp(self.admin)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
            if response.status >= 400:
                raise AssertionError(f"{method} {path}: {response.status} {body!r}")
            return json.loads(body)
        finally:
            connection.close()

    def status(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = self.ask("GET", f"/v1/status?name={name}")["backends"][0]
        return row

    def wait_state(self, name: str, state: str, timeout: float = PATIENCE) -> dict[str, Any]:
        try:
            return eventually(lambda: (row := self.status(name))["state"] == state and row, f"{name} {state}", timeout)  # type: ignore[return-value]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    @property
    def worker(self) -> int:
        worker: int = self.ask("GET", "/v1/status")["workers"][0]
        return worker

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """End it in the usual way; it must do so cleanly."""
        if self.process is None or self.process.poll() is not None:
            return
        self.signal(signal.SIGTERM)
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the gateway did not end\n{self.log}") from None
        assert code == 0, f"exit status {code}\n{self.log}"
        assert "unexpected" not in self.log and "Traceback" not in self.log, self.log


@contextlib.contextmanager
def gateway(directory: Path, config: str | dict[str, Any], *arguments: str, **environment: str) -> Iterator[Gateway]:
    running = Gateway(directory, config, *arguments, **environment)
    try:
        yield running.start()
        running.stop()
    finally:
        if running.process is not None and running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """All living descendants."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *children(child)]
    return found


def receive_all(sock: socket.socket) -> bytes:
    chunks = []
    while chunk := sock.recv(1 << 18):
        chunks.append(chunk)
    return b"".join(chunks)
