"""Datagrams end to end: a real DNS server that sleeps, very many clients at once, and what must not disturb them."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.endpoint import parse
from tests.conftest import program
from tests.mimic import command
from tests.running import PATIENCE, Gateway, cpu, eventually, free_port, gateway
from tests.test_datagram import client

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent / "config" / "dns.yaml"

ECHOED = {"udp": {"send": "ready?", "expect": "ready?"}}


def backend(*options: object, **keys: Any) -> dict[str, Any]:
    """A mimic that sends each datagram back, behind a port of the gateway."""
    endpoint = f"udp://127.0.0.1:{free_port()}"
    return {
        "command": command("--listen", endpoint, *options),
        "listen": f"udp://127.0.0.1:{free_port()}",
        "endpoint": endpoint,
        "ready": ECHOED,
        "idle": "1h",
        **keys,
    }


def asked(sock: socket.socket, question: bytes = b"question") -> bytes:
    sock.send(question)
    return sock.recv(100)


@contextlib.contextmanager
def clients(address: str, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(client(parse(address))) for _ in range(count)]


def answers(socks: list[socket.socket], count: int) -> dict[int, list[bytes]]:
    """What each client heard, once each heard as many answers."""
    heard: dict[int, list[bytes]] = {sock.fileno(): [] for sock in socks}
    by_number = {sock.fileno(): sock for sock in socks}
    poll = select.epoll()
    try:
        for number in heard:
            poll.register(number, select.EPOLLIN)
        while any(len(datagrams) < count for datagrams in heard.values()):
            ready = poll.poll(PATIENCE)
            silent = sum(len(datagrams) < count for datagrams in heard.values())
            assert ready, f"{silent} of {len(socks)} did not hear everything"
            for number, _ in ready:
                heard[number].append(by_number[number].recv(100))
    finally:
        poll.close()
    return heard


# A real server


def dig(port: int, *options: str) -> str:
    """One query, sent once; the answer alone."""
    words = [program("dig"), "@127.0.0.1", "-p", str(port), "+tries=1", "+retry=0", "+time=10", "+short", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_dig_is_answered_by_a_sleeping_dns_server_on_its_first_datagram(tmp_path: Path) -> None:
    """Done when 2; it is the example of config/dns.yaml with other ports and shorter times."""
    dnsmasq = program("dnsmasq")
    port = free_port(2)
    text = EXAMPLE.read_text().replace("5353", str(port)).replace("5354", str(port + 1))
    text = text.replace("/usr/sbin/dnsmasq", dnsmasq)
    text = re.sub("idle: 10m", "idle: 300ms", re.sub("flow_timeout: 10s", "flow_timeout: 300ms", text))
    with gateway(tmp_path, text) as running:
        for turn in (1, 2):
            assert running.status("dns")["state"] == "stopped"
            assert dig(port, f"turn-{turn}.box.example") == "192.0.2.1"
            assert running.wait_state("dns", "stopped")["wakes"] == turn
        assert dig(port, "+tcp", "streams.box.example") == "192.0.2.1"
        assert dig(port, "datagrams.box.example") == "192.0.2.1"
        row = running.wait_state("dns", "stopped")
        assert (row["wakes"], row["total"], row["dropped"], row["refused"]) == (3, 4, 0, 0)


@pytest.mark.parametrize(("listen", "bound"), [("fd://door", "0.0.0.0:PORT"), ("udp://*:PORT", "PORT")])
def test_dig_is_answered_on_an_inherited_socket(tmp_path: Path, listen: str, bound: str) -> None:
    """The datagram that started the gateway itself. The socket is found by its name, or because it is the same."""
    activate, dnsmasq = program("systemd-socket-activate"), program("dnsmasq")
    port = free_port(2)
    text = EXAMPLE.read_text().replace("5354", str(port + 1)).replace("/usr/sbin/dnsmasq", dnsmasq)
    listen, bound = listen.replace("PORT", str(port)), bound.replace("PORT", str(port))
    text = text.replace("udp://127.0.0.1:5353 ", listen).replace("tcp://127.0.0.1:5353", f"unix:{tmp_path}/s")
    running = Gateway(tmp_path, text)
    words = [activate, "--datagram", "-l", bound, "--fdname=door", *running.command]
    running.process = running.launch(words)
    try:
        eventually(lambda: "Listening on" in running.log)
        assert dig(port, "-b", "127.0.0.1", "first.box.example") == "192.0.2.1"
        assert "127.0.0.1" in running.wait_for_line("awake: woken by ")
    finally:
        running.stop()


# Very many clients


@pytest.mark.parametrize(("each", "workers"), [(1, 1), (3, 1), (3, 2)])
def test_a_thousand_clients_at_once_on_a_sleeping_backend_lose_nothing(tmp_path: Path, each: int, workers: int) -> None:
    """Done when 2: all that they sent is answered, in the order in which each of them sent it, by one start."""
    web = backend("--after", 0.5)
    document = {"gateway": {"workers": workers}, "backends": {"web": web}}
    with gateway(tmp_path, document) as running, clients(web["listen"], 1000) as socks:
        assert (
            running.status("web")["state"] == "stopped"
        )  # the worker is there; before, the kernel has room for some 500
        for number in range(each):
            for sock in socks:
                sock.send(b"%d" % number)
        heard = answers(socks, each)
        expected = [b"%d" % number for number in range(each)]
        assert all(datagrams == expected for datagrams in heard.values())
        row = running.status("web")
        assert (row["wakes"], row["connections"], row["waiting"], row["total"]) == (1, 1000, 0, 1000)
        assert (row["dropped"], row["refused"]) == (0, 0)
        assert (row["received"], row["sent"]) == (1000 * each, 1000 * each)


def test_beyond_the_bounds_the_oldest_are_dropped_and_counted(tmp_path: Path) -> None:
    web = backend("--after", 0.1, limits={"flow_datagrams": 2})
    with gateway(tmp_path, {"backends": {"web": web}}) as running, clients(web["listen"], 1) as (sock,):
        for number in range(5):
            sock.send(b"%d" % number)
        assert answers([sock], 2)[sock.fileno()] == [b"3", b"4"]
        assert running.status("web")["dropped"] == 3


# Nobody waits for somebody else


def test_flows_of_a_backend_that_never_starts_delay_no_others(tmp_path: Path) -> None:
    """Done when 2: neither those of a backend that is awake, nor those that wait for another one to start."""
    dead = backend("--never-ready", start_timeout="1h")
    awake, asleep = backend(), backend("--after", 0.1)
    backends = {"dead": dead, "awake": awake, "asleep": asleep}
    with gateway(tmp_path, {"backends": backends}) as running, clients(dead["listen"], 500) as hopeless:
        with client(parse(awake["listen"])) as sock, client(parse(asleep["listen"])) as other:
            assert asked(sock) == b"question"
            alone = median_time(sock)
            for waiting in hopeless:
                for _ in range(20):  # and more than are kept
                    waiting.send(b"x" * 100)
            eventually(lambda: running.status("dead")["waiting"] == 500)
            assert asked(other) == b"question"
            hopeless[0].send(b"once more")
            assert median_time(sock) < 5 * alone + 0.002
        assert running.status("dead")["state"] == "starting"
        assert running.status("dead")["dropped"] >= 500 * 4
        row = running.status("awake")
        assert (row["dropped"], row["waiting"]) == (0, 0)
        running.ask("POST", "/v1/backends/dead/stop")


def median_time(sock: socket.socket) -> float:
    """Seconds from a question to its answer."""
    times = []
    for _ in range(101):
        begun = time.monotonic()
        assert asked(sock) == b"question"
        times.append(time.monotonic() - begun)
    return sorted(times)[50]


# A life


def test_a_flow_keeps_its_backend_awake_and_only_so_long(tmp_path: Path) -> None:
    web = backend(idle="100ms", limits={"flow_timeout": "400ms"})
    with gateway(tmp_path, {"backends": {"web": web}}) as running, client(parse(web["listen"])) as sock:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert asked(sock) == b"question"
        row = running.status("web")
        assert (row["state"], row["wakes"], row["connections"]) == ("ready", 1, 1)
        row = running.wait_state("web", "stopped")
        assert (row["wakes"], row["connections"]) == (1, 0)
        assert asked(sock) == b"question"  # the same client
        assert running.status("web")["wakes"] == 2


def test_a_failed_start_drops_what_was_kept_and_the_next_datagram_tries_again(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    web = backend()
    real = web["command"]
    with (
        gateway(tmp_path, {"backends": {"web": {**web, "command": [str(tool)]}}}) as running,
        client(parse(web["listen"])) as sock,
    ):
        sock.send(b"lost")
        running.wait_for_line("start failed")
        eventually(lambda: running.status("web")["dropped"] == 1)
        tool.write_text("#!/bin/sh\nexec " + " ".join(real) + "\n")
        tool.chmod(0o755)
        assert asked(sock) == b"question"
        assert running.status("web")["dropped"] == 1


def test_the_next_datagram_after_a_crash_is_answered_by_the_next_process(tmp_path: Path) -> None:
    web = backend("--started", tmp_path / "starts")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, client(parse(web["listen"])) as sock:
        assert asked(sock) == b"question"
        os.kill(int((tmp_path / "starts").read_text()), signal.SIGKILL)
        running.wait_for_line("killed by signal 9")
        running.wait_state("web", "stopped")
        assert asked(sock) == b"question"
        row = running.status("web")
        assert (row["wakes"], row["dropped"], row["connections"]) == (2, 0, 1)


def test_one_that_does_not_answer_any_more_is_looked_at_and_the_client_waits(tmp_path: Path) -> None:
    """An external backend: nobody tells of its end, but the kernel says that nobody listens there."""
    web = backend()
    served = subprocess.Popen(web.pop("command"))
    try:
        elsewhere = {"backends": {"web": {"driver": "external", **web}}}
        with gateway(tmp_path, elsewhere) as running, client(parse(web["listen"])) as sock:
            assert asked(sock) == b"question"
            served.kill()
            served.wait()
            with client(parse(web["listen"])) as fresh:
                fresh.send(b"for the next one")
                running.wait_for_line("does not answer any more: Connection refused")
                used = cpu(running.worker)
                eventually(lambda: running.status("web")["waiting"] == 1)
                served = subprocess.Popen(command("--listen", web["endpoint"]))
                assert fresh.recv(100) == b"for the next one"
                assert asked(sock) == b"question"
                assert running.status("web")["dropped"] == 0
                assert cpu(running.worker) - used < 0.2
    finally:
        served.kill()
        served.wait()


def test_unix_datagrams_of_a_program_that_has_no_name(tmp_path: Path) -> None:
    """logger(1) does not wait for an answer, nor could it be given one."""
    logger = program("logger")
    heard = tmp_path / "heard"
    log = {
        "command": ["socat", "-u", f"UNIX-RECV:{tmp_path}/back", f"CREATE:{heard}"],
        "listen": f"unixgram:{tmp_path}/front",
        "endpoint": f"unixgram:{tmp_path}/back",
        "ready": {"exec": ["test", "-S", f"{tmp_path}/back"]},
        "idle": "1h",
    }
    program("socat")
    with gateway(tmp_path, {"backends": {"log": log}}) as running:
        for number in range(3):
            subprocess.run(
                [logger, "--socket", f"{tmp_path}/front", "--socket-errors=on", f"message {number}"], check=True
            )
        eventually(lambda: heard.exists() and "message 2" in heard.read_text())
        assert [f"message {number}" in heard.read_text() for number in range(3)] == [True] * 3
        assert running.status("log")["dropped"] == 0


def test_a_reload_hands_the_socket_to_the_successor(tmp_path: Path) -> None:
    web = backend()
    with gateway(tmp_path, {"backends": {"web": web}}) as running, client(parse(web["listen"])) as sock:
        assert asked(sock) == b"question"
        changed = {**web, "command": [*web["command"], "--say", "the new one"]}
        running.write({"backends": {"web": changed}})
        running.signal(signal.SIGHUP)
        running.wait_for_line("reloaded")
        assert asked(sock) == b"question"
        running.wait_for_line("the new one")
        assert "cutting" not in running.log


def test_silent_flows_do_not_hold_up_the_end(tmp_path: Path) -> None:
    web = backend(limits={"flow_timeout": "1h"})
    with gateway(tmp_path, {"backends": {"web": web}}) as running, client(parse(web["listen"])) as sock:
        assert asked(sock) == b"question"
        running.signal(signal.SIGTERM)
        assert running.process is not None
        assert running.process.wait(10) == 0
        assert "cutting" not in running.log
