"""Delivery `pass`, end to end: the backend is handed the listening sockets and accepts by itself."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from backends.endpoint import parse
from tests.conftest import program
from tests.mimic import command
from tests.running import (
    Gateway,
    children,
    cpu,
    eventually,
    free_port,
    gateway,
    receive_all,
)
from tests.test_datagram import client
from tests.test_gateway import connect, greeting

FINISHES_FIRST = """
import os, socket
listening = socket.socket(fileno=3)
while True:
    client, _ = listening.accept()
    client.sendall(b"hello %d\\n" % os.getpid())
    client.shutdown(socket.SHUT_WR)
    with open(os.environ["HEARD"], "wb", buffering=0) as heard:
        while data := client.recv(4096):
            heard.write(data)
    client.close()
"""
"""A server that ends its sending first and goes on receiving."""


def passed(*options: object, **keys: Any) -> dict[str, Any]:
    """A mimic that serves the socket it is handed."""
    return {
        "command": command("--inherit", *options),
        "delivery": "pass",
        "listen": f"tcp://127.0.0.1:{free_port()}",
        "idle": "300ms",
        **keys,
    }


def starts(file: Path) -> int:
    return len(file.read_text().split()) if file.exists() else 0


def pause(seconds: float) -> None:
    """Let time pass in which nothing must happen."""
    end = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > end)


DOORS = ("web", "web6", "local")


@pytest.mark.parametrize("door", DOORS)
def test_named_sockets_arrive_in_order_and_any_of_them_wakes(tmp_path: Path, door: str) -> None:
    port = free_port()
    listen = {"web": f"tcp://127.0.0.1:{port}", "web6": f"tcp://[::1]:{port}", "local": f"unix:{tmp_path}/s"}
    with gateway(tmp_path, {"backends": {"web": passed("--fd-report", listen=listen)}}) as running:
        with connect(listen[door].replace("[::1]", "::1")) as first:
            pid = greeting(first)
            for address in listen.values():
                with connect(address.replace("[::1]", "::1")) as other:
                    assert greeting(other) == pid
        # stdin, stdout, stderr, three sockets and nothing else; LISTEN_PID is its own.
        running.wait_for_line("fds 0,1,2,3,4,5 3 True web:web6:local")
        assert f"a client at {listen[door]}" in running.wait_for_line("awake:")


@pytest.mark.slow
def test_nginx_takes_the_socket_over(tmp_path: Path) -> None:
    """nginx speaks no LISTEN_FDS, but takes over the listening sockets that the variable NGINX names."""
    nginx, curl = program("nginx"), program("curl")
    port = free_port()
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "index.html").write_text("handed over\n")
    (tmp_path / "nginx.conf").write_text(
        f"user root; pid {tmp_path}/pid; daemon off; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}/t1; proxy_temp_path {tmp_path}/t2;"
        f" fastcgi_temp_path {tmp_path}/t3; uwsgi_temp_path {tmp_path}/t4; scgi_temp_path {tmp_path}/t5;"
        f" server {{ listen 127.0.0.1:{port}; root {tmp_path}/www; }} }}\n"
    )
    web = {
        "command": [nginx, "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
        "env": {"NGINX": "3;"},
        "delivery": "pass",
        "listen": f"tcp://127.0.0.1:{port}",
        "idle": "300ms",
    }
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        for turn in (1, 2):
            page = subprocess.run(
                [curl, "-sS", f"http://127.0.0.1:{port}/"], capture_output=True, text=True, timeout=20
            )
            assert (page.returncode, page.stdout) == (0, "handed over\n"), page.stderr
            assert running.wait_state("web", "stopped")["wakes"] == turn


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["", "client", "server"])
@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_sleeps_when_the_last_connection_is_gone_and_not_before(tmp_path: Path, family: str, ended: str) -> None:
    """Also while only one direction of it is open."""
    heard = tmp_path / "heard"
    web = passed(idle="200ms")
    if family == "unix":
        web["listen"] = f"unix:{tmp_path}/front.sock"
    if ended == "server":
        web |= {"command": [sys.executable, "-I", "-S", "-c", FINISHES_FIRST], "env": {"HEARD": str(heard)}}
    elif ended == "client":
        # Reads to the end of file and answers only when the test says so.
        web["command"] = [sys.executable, "-I", "-S", "-c", ANSWERS_LATE.format(file=str(heard))]
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as first:
            if ended == "client":
                first.sendall(b"x")
                first.shutdown(socket.SHUT_WR)
            else:
                pid = greeting(first)
            eventually(lambda: (row := running.status("web"))["connections"] == 1 and row["sleeps_in"] is None)
            pause(0.7)
            assert running.status("web")["connections"] == 1
            if ended == "client":
                heard.write_text("go on")
                assert receive_all(first) == b"late answer"
            elif ended == "server":
                assert receive_all(first) == b""
                first.sendall(b"still heard")
                eventually(lambda: heard.read_text() == "still heard")
            else:
                with connect(web["listen"]) as second:
                    assert greeting(second) == pid
                first.sendall(b"ping")
                assert first.recv(4) == b"ping"
            assert running.log.count("asleep:") == 0
        running.wait_state("web", "stopped")
        assert len(children(running.pid)) <= 2  # the worker and the nursery


ANSWERS_LATE = """
import os, socket, time
listening = socket.socket(fileno=3)
while True:
    client, _ = listening.accept()
    if not client.recv(1):
        client.close()
        continue
    while client.recv(4096):
        pass
    while not os.path.exists({file!r}):
        time.sleep(0.01)  # a program of the test: it knows of no event for a file
    client.sendall(b"late answer")
    client.close()
"""


@pytest.mark.parametrize(("code", "line"), [(0, "it ended by itself"), (3, "died after")])
def test_watches_again_when_the_backend_ends_by_itself(tmp_path: Path, code: int, line: str) -> None:
    web = passed("--die-on-connect", "--exit-code", code, "--started", tmp_path / "starts", idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        for turn in (1, 2):
            with connect(web["listen"]) as sock:
                assert receive_all(sock) == b""
            running.wait_for_line(line, turn)
            running.wait_state("web", "stopped")
        assert starts(tmp_path / "starts") == 2


def test_watches_again_after_a_kill(tmp_path: Path) -> None:
    web = passed(idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as first:
            pid = greeting(first)
            os.kill(pid, signal.SIGKILL)
            assert receive_all(first) == b""
        running.wait_for_line("killed by signal 9")
        with connect(web["listen"]) as second:
            assert greeting(second) != pid


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["udp", "unixgram"])
def test_datagrams_wake_it_and_it_answers_by_itself(tmp_path: Path, scheme: str) -> None:
    """The gateway sees no datagrams: without a connection it sleeps after `idle`, and the next datagram wakes it again."""
    listen = f"udp://127.0.0.1:{free_port()}" if scheme == "udp" else f"unixgram:{tmp_path}/front"
    name = "" if scheme == "unixgram" else None
    with gateway(tmp_path, {"backends": {"web": passed(listen=listen)}}) as running:
        with client(parse(listen), name) as sock, client(parse(listen), name) as other:
            for turn in (1, 2):
                for number in range(5):
                    sock.send(b"%d" % number)
                other.send(b"other")
                assert [sock.recv(100) for _ in range(5)] == [b"%d" % number for number in range(5)]
                assert other.recv(100) == b"other"
                assert f"a client at {listen}" in running.wait_for_line("awake:", turn)
                assert running.wait_state("web", "stopped")["wakes"] == turn


@pytest.mark.slow
def test_datagrams_and_streams_are_handed_over_together_and_a_connection_keeps_both(tmp_path: Path) -> None:
    port = free_port()
    listen = {"dns": f"udp://127.0.0.1:{port}", "dns-tcp": f"tcp://127.0.0.1:{port}"}
    with gateway(tmp_path, {"backends": {"web": passed("--fd-report", listen=listen, idle="100ms")}}) as running:
        with client(parse(listen["dns"])) as sock, connect(listen["dns-tcp"]) as stream:
            pid = greeting(stream)
            running.wait_for_line("fds 0,1,2,3,4 2 True dns:dns-tcp")
            eventually(lambda: running.status("web")["connections"] == 1)
            pause(0.3)
            sock.send(b"question")
            assert sock.recv(100) == b"question"
            os.kill(pid, 0)
        running.wait_state("web", "stopped")


@pytest.mark.slow
@pytest.mark.parametrize(("code", "most"), [(0, 22), (1, 4)])
def test_one_that_dies_with_a_datagram_in_the_queue_is_backed_off(tmp_path: Path, code: int, most: int) -> None:
    """It is not spun, nor is the gateway; and the datagram that waits is answered when it starts after all."""
    cure, count = tmp_path / "cure", tmp_path / "starts"
    script = f"echo $$$$ >>{count}; test -e {cure} || exit {code}; exec {shlex.join(command('--inherit'))}"
    listen = f"udp://127.0.0.1:{free_port()}"
    with gateway(tmp_path, {"backends": {"web": passed(command=["sh", "-c", script], listen=listen)}}) as running:
        with client(parse(listen)) as sock:
            sock.send(b"first")
            running.wait_for_line("before the next start")
            used, settled = cpu(running.pid), starts(count)
            pause(0.8)
            assert cpu(running.pid) - used < 0.1
            assert starts(count) <= settled + 1
            cure.touch()
            assert sock.recv(100) == b"first"
        assert starts(count) <= most


@pytest.mark.slow
@pytest.mark.parametrize(("code", "most"), [(0, 22), (1, 4)])
def test_one_that_dies_with_a_client_in_the_queue_is_backed_off(tmp_path: Path, code: int, most: int) -> None:
    """It is not spun, nor is the gateway; and the client that waits is served when it starts after all."""
    cure, count = tmp_path / "cure", tmp_path / "starts"
    serve = shlex.join(command("--inherit"))
    script = f"echo $$$$ >>{count}; test -e {cure} || exit {code}; exec {serve}"
    with gateway(tmp_path, {"backends": {"web": passed(command=["sh", "-c", script])}}) as running:
        with connect(running_address(running)) as sock:
            running.wait_for_line("before the next start")
            used = cpu(running.pid)
            settled = starts(count)
            pause(0.8)
            assert cpu(running.pid) - used < 0.1
            assert starts(count) <= settled + 1
            assert running.status("web")["retry_in"] is not None
            cure.touch()
            greeting(sock)
        assert starts(count) <= most
        assert running.status("web")["last_error"] == ""


def running_address(running: Gateway) -> str:
    address: str = running.status("web")["listeners"]["listen"]
    return address


@pytest.mark.slow
def test_a_missing_program_is_tried_again_for_the_client_that_waits(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    with gateway(tmp_path, {"backends": {"web": passed(command=[str(tool)])}}) as running:
        with connect(running_address(running)) as sock:
            assert str(tool) in running.wait_for_line("start failed")
            tool.write_text(f"#!/bin/sh\nexec {shlex.join(command('--inherit'))}\n")
            tool.chmod(0o755)
            greeting(sock)


@pytest.mark.slow
def test_podman_service_answers_and_sleeps(tmp_path: Path) -> None:
    """Done when 7: `podman --remote info` wakes the API of podman; after its idle time it is gone."""
    podman, _ = program("podman"), program("runc")
    settings = tmp_path / "containers.conf"
    settings.write_text(
        '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    with tempfile.TemporaryDirectory() as runroot:  # for which podman takes no path of more than 50 characters
        storage = ["--storage-driver", "vfs", "--root", str(tmp_path / "root"), "--runroot", runroot]
        api = {
            "command": [podman, *storage, "system", "service", "-t", "0"],
            "env": {"CONTAINERS_CONF": str(settings), "TMPDIR": str(tmp_path)},
            "delivery": "pass",
            "listen": f"unix:{tmp_path}/podman.sock?mode=0600",
            "idle": "500ms",
        }
        with gateway(tmp_path, {"backends": {"api": api}}) as running:
            for turn in (1, 2):
                info = subprocess.run(
                    [podman, "--remote", "--url", f"unix://{tmp_path}/podman.sock", "info"],
                    capture_output=True, text=True, timeout=20,
                )  # fmt: skip
                assert info.returncode == 0, info.stderr + running.log
                assert str(tmp_path / "root") in info.stdout
                assert running.wait_state("api", "stopped")["wakes"] == turn
                assert len(children(running.pid)) <= 2  # the worker and the nursery


@pytest.mark.parametrize("idle", ["1h", "never", "0s"])
@pytest.mark.slow
def test_sigterm_lets_connections_end(tmp_path: Path, idle: str) -> None:
    web = passed(idle={"after": idle, "min_uptime": "1h"})
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        assert running.process is not None
        with connect(web["listen"]) as first:
            greeting(first)
        with connect(web["listen"]) as sock:
            greeting(sock)
            running.signal(signal.SIGTERM)
            running.wait_for_line("stopping")
            used = cpu(running.pid)
            pause(0.5)
            assert cpu(running.pid) - used < 0.2  # it looks now and then; it does not spin
            sock.sendall(b"still here")
            assert sock.recv(100) == b"still here"
            assert running.process.poll() is None
        assert running.process.wait(20) == 0
        with pytest.raises(ConnectionRefusedError):
            connect(web["listen"])


def test_the_second_signal_cuts(tmp_path: Path) -> None:
    web = passed(idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        greeting(sock)
        running.signal(signal.SIGTERM)
        running.wait_for_line("stopping")
        running.signal(signal.SIGINT)
        assert receive_all(sock) == b""


def test_reload_leaves_an_unchanged_one_alone_and_adjusts_its_idle_time(tmp_path: Path) -> None:
    web = passed(idle="never")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
            running.write({"backends": {"web": {**web, "idle": "100ms"}}})
            running.signal(signal.SIGHUP)
            running.wait_for_line("reloaded: 0 added, 1 changed")
            pause(0.2)
            sock.sendall(b"ping")
            assert sock.recv(4) == b"ping"
            with connect(web["listen"]) as other:
                assert greeting(other) == pid
        running.wait_state("web", "stopped")


def test_reload_replaces_one_in_use_when_its_connections_have_ended(tmp_path: Path) -> None:
    """The same socket goes to the successor: no client is refused, and one that waits is served by it."""
    web = passed(idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
            running.write({"backends": {"web": {**web, "command": command("--inherit", "--say", "the new one")}}})
            running.signal(signal.SIGHUP)
            running.wait_for_line("reloaded")
            sock.sendall(b"ping")
            assert sock.recv(4) == b"ping"
        running.wait_for_line("asleep:")
        with connect(web["listen"]) as sock:
            assert greeting(sock) != pid
        running.wait_for_line("the new one")


def test_reload_removes_one_in_use(tmp_path: Path) -> None:
    web, other = passed(idle="1h"), passed(idle="1h")
    with gateway(tmp_path, {"backends": {"web": web, "other": other}}) as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
            running.write({"backends": {"other": other}})
            running.signal(signal.SIGHUP)
            running.wait_for_line("1 removed")
            sock.sendall(b"ping")
            assert sock.recv(4) == b"ping"
        running.wait_for_line("asleep:")
        with pytest.raises(ConnectionRefusedError):
            connect(web["listen"])
        with connect(other["listen"]) as sock:
            greeting(sock)


@pytest.mark.slow
def test_connections_are_looked_at_also_when_no_descriptors_are_left(tmp_path: Path) -> None:
    """The gateway cannot ask the kernel then; a backend in use is left alone, and sleeps later."""
    prlimit = program("prlimit")
    web = passed(idle="200ms")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
            eventually(lambda: running.status("web")["connections"] == 1)
            subprocess.run([prlimit, f"--pid={running.pid}", "--nofile=3:20000"], check=True)
            pause(0.7)
            sock.sendall(b"ping")
            assert sock.recv(4) == b"ping"
            subprocess.run([prlimit, f"--pid={running.pid}", "--nofile=20000:20000"], check=True)
            assert running.wait_state("web", "ready")["wakes"] == 1
            os.kill(pid, 0)
        running.wait_state("web", "stopped")
        assert "connections cannot be counted" in running.log
        assert "unexpected" not in running.log
