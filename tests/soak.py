"""`make soak DURATION=30m`: a mixed load with disturbances on one gateway, whose memory and descriptors must stay flat.

Everything is bounded: a few threads that pause between their clients. What is counted as a failure: a client that is not
served, unless its worker was killed or its backend stopped by hand in that moment; wrong bytes; an unexpected error in the
log; a backend that does not sleep afterwards; memory or descriptors that grow.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from backends.units import Duration
from tests.mimic import command
from tests.running import Gateway, descriptors, eventually, free_port
from tests.test_gateway import connect, greeting

DISTURB_EVERY = 5.0  # seconds
FORGIVEN = 2.0  # seconds after a kill or a stop by hand in which the connections that it cost end
RESET = b"\1\0\0\0\0\0\0\0"
LOST = (ConnectionResetError, BrokenPipeError, AssertionError, TimeoutError)
"""What a client sees whose worker or backend is ended; that nobody listens is never forgiven."""


@dataclass
class Soak:
    """One run: what is served, what was done, what failed."""

    running: Gateway
    backends: dict[str, dict[str, Any]]
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    samples: list[dict[str, int]] = field(default_factory=list)
    hurt: list[float] = field(default_factory=list)
    """when connections were cut on purpose"""
    over: threading.Event = field(default_factory=threading.Event)

    def address(self, name: str) -> str:
        return str(self.backends[name]["listen"])

    # Clients

    def talk(self) -> None:
        with connect(self.address(random.choice(["unix", "tcp", "outside", "passed", "each"]))) as sock:
            greeting(sock)
            for _ in range(3):
                said = os.urandom(200)
                sock.sendall(said)
                assert _exactly(sock, len(said)) == said, "wrong bytes"

    def half_close(self) -> None:
        with connect(self.address("half")) as sock:
            sock.sendall(b"question")
            sock.shutdown(socket.SHUT_WR)
            greeting(sock)
            assert _exactly(sock, 8) == b"question", "wrong bytes"

    def leave(self) -> None:
        connect(self.address(random.choice(["unix", "tcp"]))).close()

    def reset(self) -> None:
        with connect(self.address("tcp")) as sock:
            sock.sendall(b"x" * 1000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def read_slowly(self) -> None:
        """More than all buffers hold: the backend and the relay have to wait for us."""
        with connect(self.address("tcp")) as sock:
            greeting(sock)
            said = b"y" * (1 << 20)
            writer = threading.Thread(target=_quietly, args=(sock.sendall, said))
            writer.start()
            got = 0
            try:
                while got < len(said):
                    data = sock.recv(1 << 15)
                    assert data, "closed"
                    got += len(data)
                    time.sleep(0.005)
            finally:
                sock.close()
                writer.join()

    def flood(self) -> None:
        """Many at once on a backend that sleeps, probably."""
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(self.address("flooded"))) for _ in range(50)]
            for sock in clients:
                greeting(sock)

    def datagram(self) -> None:
        host, _, port = self.address("datagrams").removeprefix("udp://").rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.connect((host, int(port)))
            said = os.urandom(64)
            sock.send(said)
            assert sock.recv(100) == said, "wrong bytes"

    def go_on(self, kind: Callable[[], None], pause: float) -> None:
        """One thread: clients of one kind, one after the other."""
        while not self.over.wait(pause):
            begun = time.monotonic()
            try:
                kind()
            except LOST as error:
                if "wrong bytes" in str(error) or not self.was_hurt(begun):
                    self.failures.append(f"{kind.__name__} at {self.log_time()}: {error!r}")
            except Exception as error:
                self.failures.append(f"{kind.__name__} at {self.log_time()}: {error!r}")
            self.done[kind.__name__] += 1

    def was_hurt(self, since: float) -> bool:
        return any(since - FORGIVEN <= when for when in self.hurt)

    @staticmethod
    def log_time() -> str:
        return time.strftime("%H:%M:%S")

    # Disturbances

    def reload(self) -> None:
        changed = dict(self.backends)
        if self.done["reload"] % 2:
            changed["extra"] = {**_mimic(self.running.directory, "extra")}
            changed["tcp"] = {**changed["tcp"], "limits": {"connections": 5000}}
        self.running.write({"gateway": GATEWAY, "backends": changed})
        self.running.signal(signal.SIGHUP)

    def kill_worker(self) -> None:
        self.hurt.append(time.monotonic())
        os.kill(random.choice(self.running.ask("GET", "/v1/status")["workers"]), signal.SIGKILL)
        self.hurt.append(time.monotonic())

    def upgrade(self) -> None:
        # Old workers end after gateway.drain, so that a client that is slower than that is cut.
        arguments = [sys.executable, "-m", "gateway.cli", "upgrade", "--socket", self.running.admin]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def stop_by_hand(self) -> None:
        self.hurt.append(time.monotonic())
        self.running.ask("POST", f"/v1/backends/{random.choice(['unix', 'tcp', 'passed'])}/stop")
        self.hurt.append(time.monotonic())

    def disturb(self) -> None:
        for kind in itertools.cycle((self.reload, self.kill_worker, self.upgrade, self.stop_by_hand)):
            if self.over.wait(DISTURB_EVERY):
                return
            try:
                kind()
            except Exception as error:
                self.failures.append(f"{kind.__name__} at {self.log_time()}: {error!r}")
            self.done[kind.__name__] += 1

    # What it costs

    def sample(self) -> None:
        try:
            workers = self.running.ask("GET", "/v1/status")["workers"]
            found = {"control memory": _pss(self.running.pid), "control fds": descriptors(self.running.pid)}
            found["worker memory"] = max(map(_pss, workers))
            found["worker fds"] = max(map(descriptors, workers))
        except OSError:  # a worker that was killed a moment ago
            return
        self.samples.append(found)

    def growth(self) -> list[str]:
        """The medians of the second and of the last quarter of the time; what grew more than it may."""
        quarter = len(self.samples) // 4
        if quarter < 3:
            return []
        grown = []
        for what in self.samples[0]:
            then, now = (
                statistics.median(sample[what] for sample in part)
                for part in (self.samples[quarter : 2 * quarter], self.samples[-quarter:])
            )
            allowed = then + 10 if what.endswith("fds") else max(then * 1.1, then + (3 << 20))
            if now > allowed:
                grown.append(f"{what}: {then:,.0f} in the second quarter, {now:,.0f} in the last one")
        return grown


def _exactly(sock: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        data = sock.recv(count - len(got))
        assert data, "closed"
        got += data
    return got


def _quietly(call: Callable[[bytes], None], data: bytes) -> None:
    with contextlib.suppress(OSError):
        call(data)


def _pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


GATEWAY = {"workers": 2, "orphan_time": "20s", "drain": "10s"}


def _mimic(directory: Path, name: str, *options: object, **keys: Any) -> dict[str, Any]:
    endpoint = f"unix:{directory}/{name}.backend"
    listen = f"unix:{directory}/{name}.sock"
    return {"command": command("--listen", endpoint, *options), "endpoint": endpoint, "listen": listen, **keys}


def _backends(directory: Path, outside: str) -> dict[str, dict[str, Any]]:
    port = free_port(8)
    tcp, udp = f"tcp://127.0.0.1:{port + 1}", f"udp://127.0.0.1:{port + 3}"
    return {
        "unix": _mimic(directory, "unix", idle="200ms", listen=f"tcp://127.0.0.1:{port}"),
        "tcp": {"command": command("--listen", tcp), "endpoint": tcp, "listen": f"tcp://127.0.0.1:{port + 2}", "idle": "1s"},
        "half": _mimic(directory, "half", "--half-close", idle="100ms"),
        "flooded": _mimic(directory, "flooded", "--after", 0.1, idle="500ms", listen=f"tcp://127.0.0.1:{port + 4}"),
        "outside": {"driver": "external", "endpoint": outside, "listen": f"tcp://127.0.0.1:{port + 5}"},
        "datagrams": {
            "command": command("--listen", udp), "endpoint": udp, "listen": f"udp://127.0.0.1:{port + 6}",
            "ready": {"udp": {"send": "x"}}, "idle": "200ms", "limits": {"flow_timeout": "2s"},
        },
        "passed": {
            "command": command("--inherit"), "delivery": "pass", "listen": f"tcp://127.0.0.1:{port + 7}", "idle": "1s",
        },
        "each": {"command": command("--stdio"), "delivery": "accept", "listen": f"unix:{directory}/each.sock"},
    }  # fmt: skip


@contextlib.contextmanager
def _gateway(directory: Path) -> Iterator[Soak]:
    outside = f"unix:{directory}/outside.backend"
    service = subprocess.Popen(command("--listen", outside))
    backends = _backends(directory, outside)
    running = Gateway(directory, {"gateway": GATEWAY, "backends": backends})
    try:
        yield Soak(running.start(), backends)
    finally:
        with contextlib.suppress(AssertionError):
            running.stop()
        service.kill()
        service.wait()


def soak(directory: Path, seconds: float, say: Callable[[str], None] = lambda _: None) -> Soak:
    """Run it; the failures are in what is returned."""
    with _gateway(directory) as run:
        kinds = [
            (run.talk, 0.01), (run.talk, 0.02), (run.half_close, 0.1), (run.leave, 0.1), (run.reset, 0.1),
            (run.read_slowly, 1.0), (run.flood, 4.0), (run.datagram, 0.05),
        ]  # fmt: skip
        threads = [threading.Thread(target=run.go_on, args=kind) for kind in kinds]
        threads.append(threading.Thread(target=run.disturb))
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        gap = min(2.0, seconds / 20)
        said = 0.0
        try:
            while time.monotonic() < end:
                time.sleep(gap)
                run.sample()
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    counts = f"{sum(run.done.values())} done, {len(run.failures)} failures"
                    say(f"{Duration(end - said)} left, {counts}, {run.samples[-1:]}")
        finally:
            run.over.set()
            for thread in threads:
                thread.join()
        _after(run)
    return run


def _after(run: Soak) -> None:
    """Everything sleeps, nothing is left open, nothing unexpected was logged."""
    for name, backend in run.backends.items():
        if backend.get("driver") == "external":
            continue
        try:
            eventually(lambda name=name: run.running.status(name)["state"] == "stopped", f"{name} sleeps", 20)  # type: ignore[misc]
            assert run.running.status(name)["connections"] == 0
        except AssertionError as error:
            run.failures.append(f"{name}: {error}")
    run.failures += run.growth()
    log = run.running.log
    run.failures += [line for line in log.splitlines() if "unexpected" in line or "Traceback" in line]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--duration", default="30m", show_default=True, help="How long, such as 90s or 30m.")
def main(duration: str) -> None:
    """Load a gateway for a long time with everything at once; exit status 1 if anything failed."""
    directory = Path(tempfile.mkdtemp(prefix="dormant-soak-"))
    run = soak(directory, Duration.parse(duration), lambda text: click.echo(text, err=True))
    for kind, count in sorted(run.done.items()):
        click.echo(f"{kind:14} {count:8}")
    for part in (0.25, 0.5, 0.75, 1.0):
        if run.samples:
            sample = run.samples[max(0, int(len(run.samples) * part) - 1)]
            click.echo(f"at {part:4.0%}  " + ", ".join(f"{what} {value:,}" for what, value in sample.items()))
    for failure in run.failures[:50]:
        click.echo(failure)
    click.echo(f"{len(run.failures)} failures in {duration}")
    if run.failures:
        click.echo(f"the gateway's log: {run.running.log_file}")
        sys.exit(1)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
