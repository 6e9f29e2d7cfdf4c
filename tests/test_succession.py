"""What one control plane leaves to the next beside live connections: who waits, what was counted, what is under way."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.backoff import FIRST, Backoff
from gateway.config import load
from tests.mimic import command
from tests.running import Gateway, children, eventually, free_port
from tests.test_gateway import backend, connect, greeting
from tests.test_upgrade import LASTING, crash, lasting, outside, pids, ping, restart, upgrade

__all__ = ["outside"]


def nursery(running: Gateway) -> int:
    """The process that starts the processes."""
    (pid,) = (pid for pid in children(running.pid) if b"nursery.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return pid


# Who waits


@pytest.mark.slow
def test_who_waits_for_what_changed_between_crash_and_restart_is_served_by_its_successor(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    port = free_port()
    udp = {
        "command": command("--listen", f"udp://127.0.0.1:{port}"), "listen": f"udp://127.0.0.1:{free_port()}",
        "endpoint": f"udp://127.0.0.1:{port}", "idle": "1h", "ready": {"udp": {"send": "x"}},
    }  # fmt: skip
    with lasting(tmp_path, {"web": web, "udp": udp}) as running, socket.socket(type=socket.SOCK_DGRAM) as asking:
        asking.settimeout(20)
        asking.connect(("127.0.0.1", int(udp["listen"].rpartition(":")[2])))
        running.status("web")
        crash(running)
        with connect(web["listen"]) as waiting, connect(web["listen"]) as other:
            asking.send(b"anybody?")
            changed = {name: {**one, "env": {"A": "b"}} for name, one in (("web", web), ("udp", udp))}
            running.write({"gateway": LASTING, "backends": changed})
            restart(running)
            assert greeting(waiting) == greeting(other)
            ping(waiting)
            assert asking.recv(100) == b"anybody?"


@pytest.mark.slow
def test_who_waits_for_what_fails_is_served_by_what_a_reload_makes_of_it(tmp_path: Path) -> None:
    """In the back-off, and while a start that will fail is under way."""
    broken = backend(tmp_path, idle="1h", command="false")
    stuck = {**backend(tmp_path), "command": command("--never-ready"), "endpoint": f"unix:{tmp_path}/stuck"}
    stuck["start_timeout"] = "500ms"
    with lasting(tmp_path, {"broken": broken, "stuck": stuck}) as running:
        with connect(broken["listen"]) as first:
            assert first.recv(1) == b""
        with connect(broken["listen"]) as waiting, connect(stuck["listen"]) as other:
            eventually(lambda: running.status("broken")["waiting"] == 1 and running.status("stuck")["waiting"] == 1)
            broken["command"] = backend(tmp_path)["command"]
            stuck["command"] = command("--listen", f"unix:{tmp_path}/stuck")
            running.write({"gateway": LASTING, "backends": {"broken": broken, "stuck": stuck}})
            running.signal(signal.SIGHUP)
            assert greeting(waiting) != greeting(other)


# What was counted, and what is remembered


@pytest.mark.slow
def test_totals_survive_every_upgrade(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with lasting(tmp_path, {"web": web}) as running:
        for turn in range(1, 4):
            with connect(web["listen"]) as sock:
                greeting(sock)
                ping(sock)
            upgrade(running)
            running.wait_for_line("has finished", turn)
            row = running.status("web")
            assert (row["total"], row["received"]) == (turn, 4 * turn)


@pytest.mark.slow
def test_a_failing_backend_is_left_alone_also_after_an_upgrade(tmp_path: Path) -> None:
    web = backend(tmp_path, command="false")
    with lasting(tmp_path, {"web": web}) as running:
        for turn in range(5):  # the last delay is 16 s: longer than an upgrade takes
            running.ask("POST", "/v1/backends/web/hold")  # which does not wait for it
            running.wait_for_line("start failed", turn + 1)
        with connect(web["listen"]):
            eventually(lambda: running.status("web")["waiting"] == 1)
            due = time.monotonic() + running.status("web")["retry_in"]
            upgrade(running)
            left = running.status("web")["retry_in"]
            # The time that the upgrade itself took may come on top.
            assert left is not None and time.monotonic() + left > due - 0.5
            assert running.log.count("start failed") == 5


def test_a_backoff_goes_on_in_the_next_control_plane() -> None:
    """Clocks may differ; delays do not."""
    first, second = Backoff(), Backoff()
    for _ in range(3):
        first.failed(100.0)
    first.ended(101.0, 0.5, clean=True)
    second.take_over(first.hand_over(102.0), 1002.0)
    assert (second.until - 1002.0, second.failures, second.quick_ends) == (first.until - 102.0, 3, 1)
    for backoff, now in ((first, 110.0), (second, 1010.0)):
        backoff.failed(now)
        assert backoff.until == now + 8 * FIRST


# What is under way


@pytest.mark.slow
def test_orders_that_the_nursery_has_not_taken_yet_are_handed_over(tmp_path: Path) -> None:
    padding = {f"PADDING{index}": "x" * 1000 for index in range(100)}
    backends = {"first": backend(tmp_path, idle="1h")}
    for number in range(8):
        endpoint = f"unix:{tmp_path}/{number}"
        one = {**backend(tmp_path, idle="1h"), "command": command("--listen", endpoint), "endpoint": endpoint}
        backends[f"web{number}"] = {**one, "env": padding}
    with lasting(tmp_path, backends) as running:
        with connect(backends["first"]["listen"]) as sock:
            greeting(sock)
        stopped = nursery(running)
        os.kill(stopped, signal.SIGSTOP)
        waiting = [connect(one["listen"]) for name, one in backends.items() if name != "first"]
        try:
            eventually(lambda: running.ask("GET", "/v1/status")["awake"] == len(backends))
            upgrade(running)
            os.kill(stopped, signal.SIGCONT)
            assert len({greeting(sock) for sock in waiting}) == 8
        finally:
            for sock in waiting:
                sock.close()
            os.kill(stopped, signal.SIGCONT)
        assert nursery(running) == stopped


@pytest.mark.slow
def test_a_backend_that_is_being_frozen_is_not_left_so_behind_an_open_gate(tmp_path: Path) -> None:
    web = backend(tmp_path, idle={"after": "50ms", "then": "freeze"})
    with lasting(tmp_path, {"web": web}) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
            stopped = nursery(running)
            os.kill(stopped, signal.SIGSTOP)
        try:
            # It is ready, and not about to be put to sleep: it is being frozen.
            eventually(lambda: (row := running.status("web"))["connections"] == 0 and row["sleeps_in"] is None)
            upgrade(running)
        finally:
            os.kill(stopped, signal.SIGCONT)
        with connect(web["listen"]) as sock:
            assert greeting(sock) == pid
        running.wait_state("web", "frozen")
        assert "Exception" not in running.log


# What nobody takes over


@pytest.mark.slow
def test_what_nobody_takes_over_leaves_no_zombie(tmp_path: Path, outside: dict[str, Any]) -> None:
    """The nursery of processes that are not configured any more."""
    web = backend(tmp_path, idle="1h")
    with lasting(tmp_path, {"web": web, "outside": outside}) as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
        left = nursery(running)
        running.write({"gateway": LASTING, "backends": {"outside": outside}})
        upgrade(running)
        eventually(lambda: not Path(f"/proc/{left}").exists(), "the nursery is gone")
        assert running.ask("GET", "/v1/status")["backends"][0]["name"] == "outside"


@pytest.mark.slow
def test_a_bad_entry_of_the_estate_does_no_harm_to_the_others(tmp_path: Path) -> None:
    """As another version might leave it."""
    good, bad = backend(tmp_path), {**backend(tmp_path), "endpoint": f"unix:{tmp_path}/bad.sock"}
    bad["command"] = command("--listen", f"unix:{tmp_path}/bad.sock")
    running = Gateway(tmp_path, {"gateway": LASTING, "backends": {"good": good, "bad": bad}})
    digests = {name: one.digest for name, one in load(running.file).backends.items()}
    left = {
        "descriptors": [900],
        "sockets": [{"fd": 901, "key": good["listen"]}],
        "shared": {"Spawner": {"protocol": 1}},
        "services": {
            "good": {"digest": digests["good"], "life": {"state": "stopped", "wakes": 7}},
            "bad": {"digest": digests["bad"], "life": {"state": "dreaming"}, "driver": {"run": {"serial": 1}}},
        },
    }
    estate = os.memfd_create("estate")
    try:
        os.write(estate, json.dumps(left).encode())
        running.environment["DORMANT_UPGRADE"] = str(estate)
        running.start(pass_fds=[estate])
    finally:
        os.close(estate)
    try:
        for one in (good, bad):
            with connect(one["listen"]) as sock:
                greeting(sock)
        assert running.status("good")["wakes"] == 8
        assert running.status("bad")["wakes"] == 1
        assert "bad: " in running.wait_for_line("what runs cannot be taken over")
    finally:
        assert running.process is not None
        running.process.terminate()
        assert running.process.wait(20) == 0


@pytest.mark.slow
def test_who_is_left_in_an_old_worker_after_the_drain_is_cut_by_that_name(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with lasting(tmp_path, {"web": web}, drain="0s") as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
            upgrade(running)
            assert sock.recv(1) == b""
        line = running.wait_for_line("gateway.drain: cutting")
        assert "1 connection of" in line
        eventually(lambda: len(pids(running)) == 1)
        assert "stuck" not in running.log
