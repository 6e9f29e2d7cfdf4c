"""What is measured: Dormant, and the programs that people use today, each on loopback before the same backend.

Each is a context that starts its processes and ends them. One that is not installed, or that refuses its configuration,
raises Unavailable with the reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.processes import Address, Usage, family, find, process, usage
from tests.running import Gateway, eventually, free_port

NGINX_MODULES = Path("/usr/lib/nginx/modules")
BACKLOG = 4096


class Unavailable(Exception):
    """This peer cannot be measured here."""


@dataclass(frozen=True)
class Peer:
    """Something that answers at an address, and the processes that it is made of."""

    name: str
    address: Address
    roots: tuple[int, ...] = ()
    """these and their descendants; none for a direct connection"""
    note: str = ""
    tools: Any = field(default=None, compare=False)
    """what a scenario needs to know of it"""

    @property
    def available(self) -> bool:
        return self.address != Address()

    @property
    def usage(self) -> Usage:
        return usage([pid for root in self.roots for pid in family(root)])


def reserve(directory: Path, name: str, unix: bool) -> Address:
    """An address for a peer to listen on; a socket file that an earlier one left is removed."""
    if not unix:
        return Address(free_port())
    path = directory / f"{name}.sock"
    path.unlink(missing_ok=True)
    return Address(path=str(path))


def need(name: str) -> str:
    found = find(name)
    if found is None:
        raise Unavailable("not installed")
    return found


# nginx


def nginx(directory: Path, name: str, blocks: str, modules: str = "") -> list[str]:
    """The command of an nginx with one worker; writes its configuration."""
    program = need("nginx")
    user = "user root;" if os.geteuid() == 0 else ""
    file = directory / f"{name}.conf"
    file.write_text(
        f"{modules}{user} daemon off; worker_processes 1; pid {directory}/{name}.pid; error_log /dev/null;\n"
        f"events {{ worker_connections 16384; }}\n{blocks}"
    )
    return [program, "-p", str(directory), "-c", str(file), "-e", "/dev/null"]


def site(directory: Path, name: str, address: Address) -> list[str]:
    """The command of a static site with one file of 1 KiB, `/k`."""
    www = directory / "www"
    www.mkdir(exist_ok=True)
    (www / "k").write_bytes(b"x" * 1024)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    scratch = "".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    return nginx(
        directory,
        name,
        f"http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; {scratch}\n"
        f"  server {{ listen 127.0.0.1:{address.port} backlog={BACKLOG}; root {www}; }} }}\n",
    )


@contextlib.contextmanager
def nginx_stream(directory: Path, listen: Address, backend: Address, udp: bool = False) -> Iterator[Peer]:
    module = NGINX_MODULES / "ngx_stream_module.so"
    if not module.exists():
        raise Unavailable("not installed: libnginx-mod-stream")
    where = f"unix:{listen.path}" if listen.path else f"127.0.0.1:{listen.port}"
    upstream = f"unix:{backend.path}" if backend.path else f"127.0.0.1:{backend.port}"
    kind = "udp" if udp else f"backlog={BACKLOG}"
    blocks = f"stream {{ server {{ listen {where} {kind}; proxy_pass {upstream}; proxy_timeout 1h; }} }}\n"
    command = nginx(directory, "nginx-stream", blocks, f"load_module {module};\n")
    with process(command, None if udp else listen) as pid:
        if udp:
            eventually(lambda: len(family(pid)) > 1, "the worker of nginx")
        yield Peer("nginx-stream", listen, (pid,))


# The others


@contextlib.contextmanager
def haproxy(directory: Path, listen: Address, backend: Address) -> Iterator[Peer]:
    where = f"unix@{listen.path}" if listen.path else f"127.0.0.1:{listen.port}"
    upstream = f"unix@{backend.path}" if backend.path else f"127.0.0.1:{backend.port}"
    file = directory / "haproxy.cfg"
    file.write_text(
        "global\n  nbthread 1\n  maxconn 6000\n"
        "defaults\n  mode tcp\n  option splice-auto\n"
        "  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n"
        f"frontend f\n  bind {where} backlog {BACKLOG}\n  default_backend b\n"
        f"backend b\n  server s {upstream}\n"
    )
    with process([need("haproxy"), "-db", "-q", "-f", str(file)], listen) as pid:
        yield Peer("haproxy", listen, (pid,))


@contextlib.contextmanager
def socket_proxyd(directory: Path, listen: Address, backend: Address) -> Iterator[Peer]:
    program = need("systemd-socket-proxyd")
    with socket.socket(listen.family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(listen.sockaddr)
        listening.listen(BACKLOG)
        # It wants its socket at descriptor 3 and its own PID in the environment.
        script = f'exec 3<&{listening.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$0" "$@"'
        upstream = backend.path or f"127.0.0.1:{backend.port}"
        command = ["bash", "-c", script, program, "-c", "8000", upstream]
        with process(command, listen, pass_fds=[listening.fileno()]) as pid:
            yield Peer("socket-proxyd", listen, (pid,))


# Dormant


@contextlib.contextmanager
def gateway(directory: Path, config: dict[str, Any], checkout: Path | None = None) -> Iterator[Gateway]:
    """A gateway on a configuration, which `dormant check` looks at first; `checkout`: another tree than this one."""
    directory.mkdir(exist_ok=True)
    config["gateway"] = {"drain": "1s", **config.get("gateway", {})}
    places = {} if checkout is None else {"PYTHONPATH": str(checkout)}
    running = Gateway(directory, config, **places)
    where: dict[str, Any] = {} if checkout is None else {"cwd": checkout}
    check(running, **where)
    try:
        yield running.start(**where)
    finally:
        stop(running)


def check(running: Gateway, **where: Any) -> None:
    """Raises Unavailable when the configuration is refused: a version without that feature, perhaps."""
    command = [sys.executable, "-m", "gateway.cli", "check", str(running.file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=running.environment, **where)
    if done.returncode:
        problems = re.findall(rf"^\s*{re.escape(str(running.file))}: (.*)", done.stderr, re.M)
        why = problems[0] if problems else done.stderr.strip() or f"`dormant check` ended with {done.returncode}"
        raise Unavailable(f"not supported ({why.partition(';')[0][:80]})")


def stop(running: Gateway) -> None:
    """End it. What is wrong then is worth a line, and costs no figure."""
    if running.process is None:
        return
    try:
        running.stop()
    except AssertionError as error:
        print(f"\ndormant did not end well: {error}", file=sys.stderr)
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@contextlib.contextmanager
def dormant(
    directory: Path,
    listen: Address,
    backend: Address,
    name: str = "dormant",
    workers: int | None = None,
    checkout: Path | None = None,
) -> Iterator[Peer]:
    """Dormant before a backend that it takes as always there."""
    keys = {"driver": "external", "listen": str(listen), "endpoint": str(backend), "idle": "1h"}
    options = {} if workers is None else {"workers": workers}
    with gateway(directory / name, {"gateway": options, "backends": {"site": keys}}, checkout) as running:
        eventually(listen.answers, f"{name} at {listen}")
        yield Peer(name, listen, (running.pid,), tools=running)


# All of them


def relays(
    directory: Path, backend: Address, workers: int | None = None, compare: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Everybody who can stand before a backend of streams, by name: contexts of a Peer, not entered yet."""
    unix = bool(backend.path)

    def reserved(name: str) -> Address:
        return reserve(directory, name, unix)

    contexts: dict[str, Any] = {
        "haproxy": haproxy(directory, reserved("haproxy"), backend),
        "nginx-stream": nginx_stream(directory, reserved("nginx-stream"), backend),
        "socket-proxyd": socket_proxyd(directory, reserved("socket-proxyd"), backend),
        "dormant": dormant(directory, reserved("dormant"), backend),
    }
    if workers is not None:
        name = f"dormant-{workers}"
        contexts[name] = dormant(directory, reserved(name), backend, name, workers)
    for checkout in compare:
        name = f"dormant@{checkout.name}"
        contexts[name] = dormant(directory, reserved(name), backend, name, checkout=checkout.absolute())
    return contexts


def start(stack: ExitStack, contexts: dict[str, Any]) -> list[Peer]:
    """Enter the contexts; for what is unavailable, a peer without an address whose note says why."""
    found = []
    for name, context in contexts.items():
        try:
            found.append(stack.enter_context(context))
        except Unavailable as error:
            found.append(Peer(name, Address(), note=str(error)))
        except (AssertionError, OSError) as error:
            found.append(Peer(name, Address(), note=f"did not start: {str(error).strip()[:300]}"))
    return found
