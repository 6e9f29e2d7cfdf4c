"""What is measured: a backend (nginx), Dormant in front of it, and the programs that people use today.

Each peer is started by itself on loopback, owns its processes and ends them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.running import Gateway, children, eventually, free_port

SYSTEMD = ":/usr/sbin:/usr/lib/systemd:/lib/systemd"


@dataclass(frozen=True)
class Peer:
    """Something that answers at a port, and the processes whose CPU time counts."""

    name: str
    port: int
    pids: tuple[int, ...] = ()

    @property
    def cpu(self) -> tuple[float, float]:
        """Seconds in user and in kernel mode so far."""
        user = kernel = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                user, kernel = user + int(fields[11]), kernel + int(fields[12])
        tick = os.sysconf("SC_CLK_TCK")
        return user / tick, kernel / tick


def find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + SYSTEMD)


@contextlib.contextmanager
def process(command: list[str], port: int, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program of the bench, from its first answer until it is gone."""
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options
    )
    try:
        eventually(lambda: _answers(port), f"{command[0]} on port {port}")
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGTERM)
        running.wait(10)


def _answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def nginx_command(directory: Path, port: int) -> list[str]:
    """A static site with one file of 1 KiB (`/k`); writes its configuration."""
    www = directory / "www"
    www.mkdir(exist_ok=True)
    (www / "k").write_bytes(b"x" * 1024)
    scratch = "".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (directory / f"nginx-{port}.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {directory}/nginx-{port}.pid; error_log /dev/null;\n"
        f"events {{ worker_connections 8192; }}\n"
        f"http {{ access_log off; keepalive_requests 100000000; {scratch}\n"
        f"  server {{ listen 127.0.0.1:{port} backlog=4096; root {www}; }} }}\n"
    )
    nginx = find("nginx")
    assert nginx is not None
    return [nginx, "-p", str(directory), "-c", str(directory / f"nginx-{port}.conf"), "-e", "/dev/null"]


@contextlib.contextmanager
def direct(directory: Path) -> Iterator[Peer]:
    port = free_port()
    with process(nginx_command(directory, port), port) as running:
        yield Peer("direct", port, (running.pid, *children(running.pid)))


@contextlib.contextmanager
def haproxy(directory: Path, backend: int) -> Iterator[Peer]:
    port = free_port()
    (directory / "haproxy.cfg").write_text(
        "global\n  nbthread 1\n  maxconn 6000\n"
        "defaults\n  mode tcp\n  option splice-auto\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n"
        f"frontend f\n  bind 127.0.0.1:{port} backlog 4096\n  default_backend b\n"
        f"backend b\n  server s 127.0.0.1:{backend}\n"
    )
    with process(["/usr/sbin/haproxy", "-db", "-q", "-f", str(directory / "haproxy.cfg")], port) as running:
        yield Peer("haproxy", port, (running.pid,))


@contextlib.contextmanager
def socket_proxyd(backend: int) -> Iterator[Peer]:
    port = free_port()
    proxyd = find("systemd-socket-proxyd")
    assert proxyd is not None
    with socket.create_server(("127.0.0.1", port), backlog=4096) as listening:
        fd = listening.fileno()
        # It wants its socket at descriptor 3 and its own PID in the environment.
        script = f'exec 3<&{fd}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$0" "$@"'
        command = ["bash", "-c", script, proxyd, "-c", "8000", f"127.0.0.1:{backend}"]
        with process(command, port, pass_fds=[fd]) as running:
            yield Peer("socket-proxyd", port, (running.pid,))


@contextlib.contextmanager
def dormant(directory: Path, backend: int) -> Iterator[Peer]:
    """A gateway before the same backend, which it takes as always there."""
    port = free_port()
    keys = {"driver": "external", "listen": f"tcp://127.0.0.1:{port}", "endpoint": f"tcp://127.0.0.1:{backend}"}
    running = Gateway(directory, {"backends": {"site": keys}}).start()
    try:
        eventually(lambda: _answers(port))
        yield Peer("dormant", port, (running.worker,))
    finally:
        running.stop()
