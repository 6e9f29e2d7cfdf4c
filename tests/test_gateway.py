"""The whole path, as a user meets it: a gateway process, real programs, real clients."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import program
from tests.mimic import command
from tests.running import (
    Gateway,
    children,
    cpu,
    descriptors,
    eventually,
    free_port,
    gateway,
    memory,
    receive_all,
)


def backend(directory: Path, *options: object, **keys: Any) -> dict[str, Any]:
    """A mimic that listens on a Unix socket, behind a TCP port."""
    endpoint = f"unix:{directory}/backend.sock"
    return {
        "driver": "process",
        "command": command("--listen", endpoint, *options),
        "listen": f"tcp://127.0.0.1:{free_port()}",
        "endpoint": endpoint,
        "idle": "300ms",
        **keys,
    }


def connect(address: str) -> socket.socket:
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(address.removeprefix("unix:"))
        return sock
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def greeting(sock: socket.socket) -> int:
    """The PID in the mimic's greeting."""
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        assert byte, f"closed after {line!r}"
        line += byte
    return int(line.split()[1])


@pytest.mark.slow
def test_nginx_wakes_serves_sleeps_and_wakes_again(tmp_path: Path) -> None:
    """Done when 2: curl gets the page on the first try; after its idle time nothing of nginx is left."""
    nginx, curl = program("nginx"), program("curl")
    port = free_port(2)
    (tmp_path / "www").mkdir(mode=0o755)
    (tmp_path / "www" / "index.html").write_text("good morning\n")
    for directory in (tmp_path, *list(tmp_path.parents)[:2]):
        directory.chmod(0o755)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; daemon off; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}/t1; proxy_temp_path {tmp_path}/t2;"
        f" fastcgi_temp_path {tmp_path}/t3; uwsgi_temp_path {tmp_path}/t4; scgi_temp_path {tmp_path}/t5;"
        f" server {{ listen 127.0.0.1:{port + 1}; root {tmp_path}/www; }} }}\n"
    )
    config = {
        "web": {
            "driver": "process",
            "command": [nginx, "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
            "listen": f"tcp://127.0.0.1:{port}",
            "endpoint": f"tcp://127.0.0.1:{port + 1}",
            "idle": "500ms",
        }
    }
    with gateway(tmp_path, {"backends": config}) as running:
        asleep = children(running.pid)
        for turn in (1, 2):
            page = subprocess.run(
                [curl, "-sS", f"http://127.0.0.1:{port}/"], capture_output=True, text=True, timeout=20
            )
            assert (page.returncode, page.stdout) == (0, "good morning\n"), page.stderr
            row = running.status("web")
            assert row["state"] == "ready"
            assert row["wakes"] == turn
            running.wait_state("web", "stopped")
            assert _named("nginx", running.pid) == []
            assert len(children(running.pid)) <= len(asleep) + 1  # the nursery stays


def _named(name: str, pid: int) -> list[int]:
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == name:
                found.append(child)
    return found


@pytest.mark.slow
def test_five_hundred_clients_at_once_cause_one_start(tmp_path: Path) -> None:
    """Done when 3."""
    web = backend(tmp_path, "--after", 1, "--started", tmp_path / "starts")
    answers = []

    def ask() -> None:
        with connect(web["listen"]) as sock:
            answers.append(greeting(sock))

    with gateway(tmp_path, {"backends": {"web": web}}):
        threads = [threading.Thread(target=ask) for _ in range(500)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 500
        assert len(set(answers)) == 1
        assert len((tmp_path / "starts").read_text().split()) == 1


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_reply_after_client_half_close_on_a_cold_backend(tmp_path: Path, family: str) -> None:
    """Done when 4: `printf x | nc -N` against a sleeping backend that answers after the end of file."""
    nc = program("nc")
    web = backend(tmp_path, "--half-close")
    if family == "unix":
        web["listen"] = f"unix:{tmp_path}/front.sock"
    where = ["-U", f"{tmp_path}/front.sock"] if family == "unix" else ["127.0.0.1", web["listen"].rpartition(":")[2]]
    with gateway(tmp_path, {"backends": {"web": web}}):
        answer = subprocess.run([nc, "-N", *where], input=b"x", capture_output=True, timeout=20).stdout
        assert answer.startswith(b"hello ")
        assert answer.endswith(b"x")


@pytest.mark.slow
def test_large_transfer_both_ways_in_flat_memory(tmp_path: Path) -> None:
    """Done when 5: 200 MB in both directions at once, bytes equal, flat memory."""
    size, block = 200 << 20, os.urandom(1 << 20)
    web = backend(tmp_path)
    received = hashlib.sha256()
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        greeting(sock)
        before = memory(running.worker)

        def send() -> None:
            for _ in range(size // len(block)):
                sock.sendall(block)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got = 0
        while chunk := sock.recv(1 << 20):
            received.update(chunk)
            got += len(chunk)
        sender.join()
        expected = hashlib.sha256()
        for _ in range(size // len(block)):
            expected.update(block)
        assert got == size
        assert received.digest() == expected.digest()
        assert memory(running.worker) - before < 8 << 20
        row = running.status("web")
        assert row["received"] == size
        assert row["sent"] > size


def test_inherited_socket_serves(tmp_path: Path) -> None:
    """Done when 6: systemd-socket-activate -l PORT dormant run."""
    activate = program("systemd-socket-activate")
    web = backend(tmp_path)
    port = web["listen"].rpartition(":")[2]
    running = Gateway(tmp_path, {"backends": {"web": web}})
    # It waits for the first client itself, then becomes the gateway.
    running.process = running.launch([activate, "-l", f"127.0.0.1:{port}", *running.command])
    with contextlib.ExitStack() as stack:
        stack.callback(running.stop)
        sock = stack.enter_context(eventually(lambda: try_connect(web["listen"])))
        greeting(sock)
        assert "inherited" in running.log


def try_connect(address: str) -> socket.socket | None:
    try:
        return connect(address)
    except OSError:
        return None


def test_inherited_socket_by_name(tmp_path: Path) -> None:
    activate = program("systemd-socket-activate")
    web = backend(tmp_path)
    port = web["listen"].rpartition(":")[2]
    running = Gateway(tmp_path, {"backends": {"web": {**web, "listen": "fd://front"}}})
    running.process = running.launch([activate, "-l", f"127.0.0.1:{port}", "--fdname=front", *running.command])
    with contextlib.ExitStack() as stack:
        stack.callback(running.stop)
        greeting(stack.enter_context(eventually(lambda: try_connect(web["listen"]))))


def test_next_client_after_a_crash_is_served(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as first:
        pid = greeting(first)
        os.kill(pid, signal.SIGKILL)
        assert receive_all(first) == b""
        running.wait_for_line("killed by signal 9")
        with connect(web["listen"]) as second:
            assert greeting(second) != pid


def test_client_that_comes_while_it_stops_is_served(tmp_path: Path) -> None:
    web = backend(tmp_path, "--ignore-term", idle="50ms", stop_grace="500ms")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as first:
            pid = greeting(first)
        running.wait_state("web", "stopping")
        with connect(web["listen"]) as second:
            assert greeting(second) != pid


def test_failed_start_says_why_backs_off_and_recovers(tmp_path: Path) -> None:
    """The program is missing at first; once it is there, the next try serves."""
    tool = tmp_path / "tool"
    web = backend(tmp_path)
    real = web["command"]
    web["command"] = [str(tool)]
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            assert sock.recv(1) == b""
        assert str(tool) in running.wait_for_line("start failed")
        row = running.status("web")
        assert row["state"] == "stopped"
        assert row["retry_in"] > 0
        tool.write_text("#!/bin/sh\nexec {}\n".format(" ".join(real)))
        tool.chmod(0o755)
        with connect(web["listen"]) as sock:
            greeting(sock)
        assert running.status("web")["last_error"] == ""


def test_program_that_exits_at_once_shows_its_last_words(tmp_path: Path) -> None:
    web = backend(tmp_path, "--say", "no licence found", "--exit-after", 0, "--exit-code", 3, "--never-ready")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            assert sock.recv(1) == b""
        running.wait_for_line("exit status 3")
        assert "no licence found" in running.log


def test_program_that_never_listens_is_given_up(tmp_path: Path) -> None:
    web = backend(tmp_path, "--never-ready", start_timeout="200ms")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            assert sock.recv(1) == b""
        line = running.wait_for_line("start_timeout")
        assert "backend.sock" in line
        assert len(children(running.pid)) <= 2  # the worker and the nursery


@pytest.mark.slow
def test_control_plane_killed_leaves_nothing(tmp_path: Path) -> None:
    """Done when 8: SIGKILL of the control plane leaves no process behind after 5 s."""
    web = backend(tmp_path, "--fork", "--daemonize-child", "--ignore-term", idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
        family = children(running.pid)
        assert len(family) >= 5  # worker, nursery, the program, its child, its daemon
        running.signal(signal.SIGKILL)
        assert running.process is not None
        running.process.wait()
        eventually(lambda: not any(_runs(pid) for pid in family), timeout=5)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_worker_killed_costs_its_connections_only(tmp_path: Path) -> None:
    """Done when 8: the next client is served, by the same backend, which sleeps when quiet."""
    web = backend(tmp_path)
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as first:
            pid = greeting(first)
            os.kill(running.worker, signal.SIGKILL)
            assert receive_all(first) == b""
            with connect(web["listen"]) as second:
                assert greeting(second) == pid
        running.wait_state("web", "stopped")


def test_worker_killed_while_clients_are_parked(tmp_path: Path) -> None:
    web = backend(tmp_path, "--after", 0.5, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as lost:
        running.wait_state("web", "starting")
        os.kill(running.worker, signal.SIGKILL)
        assert receive_all(lost) == b""
        with connect(web["listen"]) as next_client:
            greeting(next_client)


@pytest.mark.slow
def test_twenty_thousand_connections_leave_no_descriptor(tmp_path: Path) -> None:
    """Done when 8."""
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
        eventually(lambda: running.status("web")["connections"] == 0)
        before = descriptors(running.worker), descriptors(running.pid)

        def ask(count: int) -> None:
            for _ in range(count):
                with connect(web["listen"]) as sock:
                    greeting(sock)

        threads = [threading.Thread(target=ask, args=(5000,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: running.status("web")["connections"] == 0)
        assert running.status("web")["total"] == 20001
        eventually(lambda: (descriptors(running.worker), descriptors(running.pid)) <= before)


def test_traffic_flows_while_the_control_plane_is_stopped(tmp_path: Path) -> None:
    """Done when 9: a stopped process is as busy as a control plane can be."""
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as warm:
        greeting(warm)
        running.signal(signal.SIGSTOP)
        try:
            for _ in range(100):
                warm.sendall(b"ping")
                assert warm.recv(4) == b"ping"
                with connect(web["listen"]) as fresh:
                    greeting(fresh)
        finally:
            running.signal(signal.SIGCONT)


def test_sigterm_lets_connections_end(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        greeting(sock)
        running.signal(signal.SIGTERM)
        running.wait_for_line("stopping")
        with pytest.raises(OSError):
            eventually(lambda: not connect(web["listen"]).close() and None, timeout=2)
        sock.sendall(b"still here")
        assert sock.recv(100) == b"still here"
        sock.close()
        assert running.process is not None
        assert running.process.wait(20) == 0


def test_second_signal_cuts(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        greeting(sock)
        running.signal(signal.SIGTERM)
        running.wait_for_line("stopping")
        running.signal(signal.SIGINT)
        assert receive_all(sock) == b""
        running.wait_for_line("second signal")


def test_drain_ends(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    config = {"gateway": {"drain": "200ms"}, "backends": {"web": web}}
    with gateway(tmp_path, config) as running, connect(web["listen"]) as sock:
        greeting(sock)
        running.signal(signal.SIGTERM)
        assert receive_all(sock) == b""
        running.wait_for_line("gateway.drain")


def test_idle_gateway_uses_no_cpu_and_makes_no_wakeups(tmp_path: Path) -> None:
    web = backend(tmp_path)
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
        running.wait_state("web", "stopped")
        planes = (running.pid, running.worker)
        used, switches = [cpu(pid) for pid in planes], [_switches(pid) for pid in planes]
        deadline = time.monotonic() + 1
        eventually(lambda: time.monotonic() > deadline)
        assert sum(cpu(pid) for pid in planes) - sum(used) < 0.025  # two ticks of the clock that counts it
        assert sum(_switches(pid) for pid in planes) - sum(switches) <= 2


def _switches(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def test_freeze_and_thaw(tmp_path: Path) -> None:
    web = backend(tmp_path, idle={"after": "100ms", "then": "freeze"})
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
        running.wait_state("web", "frozen")
        eventually(lambda: "\nState:\tT" in Path(f"/proc/{pid}/status").read_text())
        with connect(web["listen"]) as sock:
            assert greeting(sock) == pid
        running.wait_state("web", "frozen")


def test_frozen_for_long_enough_is_stopped(tmp_path: Path) -> None:
    web = backend(tmp_path, idle={"after": "50ms", "then": "freeze", "stop_after": "100ms"})
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
        running.wait_state("web", "stopped")


def test_min_uptime(tmp_path: Path) -> None:
    web = backend(tmp_path, idle={"after": "0s", "min_uptime": "1s"})
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
        assert 0 < eventually(lambda: running.status("web")["sleeps_in"]) <= 1
        with connect(web["listen"]) as sock:
            assert greeting(sock) == pid
        running.wait_state("web", "stopped")


def test_permanent_service_beside_sleeping_ones(tmp_path: Path) -> None:
    """Driver external without commands: simply always there."""
    endpoint = f"unix:{tmp_path}/permanent.sock"
    config = {
        "permanent": {
            "driver": "external",
            "listen": f"tcp://127.0.0.1:{free_port()}",
            "endpoint": endpoint,
            "idle": "50ms",
        }
    }
    service = subprocess.Popen(command("--listen", endpoint))
    try:
        with gateway(tmp_path, {"backends": config}) as running:
            with connect(config["permanent"]["listen"]) as sock:
                assert greeting(sock) == service.pid
            assert running.status("permanent")["sleeps_in"] is None
    finally:
        service.kill()
        service.wait()


def test_reload_during_live_transfers_drops_none(tmp_path: Path) -> None:
    """Done when 8."""
    web, other = backend(tmp_path, idle="1h"), {**backend(tmp_path), "listen": f"unix:{tmp_path}/other.sock"}
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        pid = greeting(sock)
        for turn in range(5):
            running.write(
                {
                    "backends": {
                        "web": {**web, "limits": {"connections": 10 + turn}},
                        **({"other": other} if turn % 2 else {}),
                    }
                }
            )
            running.signal(signal.SIGHUP)
            running.wait_for_line("reloaded", turn + 1)
            sock.sendall(b"x" * 100_000)
            got = 0
            while got < 100_000:
                got += len(sock.recv(100_000))
        with connect(web["listen"]) as second:
            assert greeting(second) == pid


def test_reload_with_errors_changes_nothing(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        greeting(sock)
        running.write({"backends": {"web": {**web, "idel": "1s"}}})
        running.signal(signal.SIGHUP)
        assert "nothing was reloaded" in running.wait_for_line("idel")
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"


def test_reload_that_cannot_bind_changes_nothing(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with socket.create_server(("127.0.0.1", 0)) as taken, gateway(tmp_path, {"backends": {"web": web}}) as running:
        clash = {**backend(tmp_path), "listen": f"tcp://127.0.0.1:{taken.getsockname()[1]}"}
        fresh = {**backend(tmp_path), "listen": f"unix:{tmp_path}/fresh.sock"}
        running.write({"backends": {"fresh": fresh, "clash": clash}})
        running.signal(signal.SIGHUP)
        running.wait_for_line("in use")
        assert not (tmp_path / "fresh.sock").exists()
        with connect(web["listen"]) as sock:
            greeting(sock)


def test_reload_removes_and_replaces(tmp_path: Path) -> None:
    """A removed backend drains and stops; a changed one is replaced on the same socket, and no client fails."""
    web, old = backend(tmp_path, idle="1h"), backend(tmp_path, idle="1h")
    old["command"] = command("--listen", f"unix:{tmp_path}/old.sock")
    old["endpoint"] = f"unix:{tmp_path}/old.sock"
    with gateway(tmp_path, {"backends": {"web": web, "old": old}}) as running:
        with connect(web["listen"]) as sock, connect(old["listen"]) as leaving:
            pid, old_pid = greeting(sock), greeting(leaving)
            running.write({"backends": {"web": {**web, "env": {"A": "b"}}}})
            running.signal(signal.SIGHUP)
            running.wait_for_line("reloaded")
            running.status("web")  # the worker answers: it has taken the new orders
            sock.sendall(b"x")
            leaving.sendall(b"x")
            assert (sock.recv(1), leaving.recv(1)) == (b"x", b"x")
            fresh = connect(web["listen"])  # waits until the old one is gone
        with fresh:
            assert greeting(fresh) != pid
        eventually(lambda: not _runs(old_pid))
        with pytest.raises(ConnectionRefusedError):
            connect(old["listen"])


def test_two_gateways_on_one_admin_socket(tmp_path: Path) -> None:
    web = backend(tmp_path)
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        second = subprocess.run(running.command, capture_output=True, text=True, timeout=20)
        assert second.returncode == 1
        assert "admin socket" in second.stderr
        assert "Traceback" not in second.stderr
        with connect(web["listen"]) as sock:
            greeting(sock)
