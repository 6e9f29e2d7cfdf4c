"""Several workers: connections are spread, counted together, and a worker that dies costs its own only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.running import eventually, gateway, receive_all
from tests.test_gateway import backend, connect, greeting


def two(**backends: Any) -> dict[str, Any]:
    return {"gateway": {"workers": 2}, "backends": backends}


def sockets_of(pid: int) -> int:
    return sum(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:") for fd in os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_connections_spread_evenly(tmp_path: Path) -> None:
    """The kernel chooses by a hash: of 400 connections, each of two workers gets 200, give or take 60 (six sigma)."""
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, two(web=web)) as running, contextlib.ExitStack() as stack:
        with connect(web["listen"]) as sock:
            greeting(sock)
        workers = running.ask("GET", "/v1/status")["workers"]
        assert len(workers) == 2
        eventually(lambda: running.status("web")["connections"] == 0)
        before = [sockets_of(pid) for pid in workers]
        for _ in range(400):
            greeting(stack.enter_context(connect(web["listen"])))
        assert running.status("web")["connections"] == 400
        shares = [(sockets_of(pid) - then) / 2 for pid, then in zip(workers, before, strict=True)]
        assert sum(shares) == 400
        assert all(abs(share - 200) <= 60 for share in shares), shares


def test_a_unix_socket_is_shared(tmp_path: Path) -> None:
    web = {**backend(tmp_path), "listen": f"unix:{tmp_path}/web.sock"}
    with gateway(tmp_path, two(web=web)) as running:
        for worker in running.ask("GET", "/v1/status")["workers"]:
            with connect(web["listen"]) as sock:
                greeting(sock)
            os.kill(worker, signal.SIGSTOP)  # the other one serves alone
            with connect(web["listen"]) as sock:
                greeting(sock)
            os.kill(worker, signal.SIGCONT)


def test_a_small_limit_is_exact(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h", limits={"connections": 3})
    with gateway(tmp_path, two(web=web)) as running, contextlib.ExitStack() as stack:
        for _ in range(3):
            greeting(stack.enter_context(connect(web["listen"])))
        for _ in range(3):
            with connect(web["listen"]) as sock, contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        row = running.status("web")
        assert (row["connections"], row["refused"]) == (3, 3)


def test_a_port_that_somebody_has_is_not_shared_with_them(tmp_path: Path) -> None:
    """Even somebody who would share it: the workers' own sharing must not hide a second gateway."""
    web = backend(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with gateway(tmp_path, two(web=web)), pytest.raises(AssertionError, match="in use"):
        with gateway(other, two(web=web)):
            pass


@pytest.mark.slow
def test_a_worker_that_is_killed_under_load_costs_its_connections_only(tmp_path: Path) -> None:
    """No new client fails, the count is right, and the backend sleeps when quiet."""
    web = backend(tmp_path, idle="300ms")
    failed: list[str] = []
    served = [0]
    stop = threading.Event()

    def ask() -> None:
        """New clients; one whose worker dies while it is served is not a new client any more."""
        while not stop.is_set():
            with connect(web["listen"]) as sock:
                try:
                    greeting(sock)
                except AssertionError as error:
                    failed.append(str(error))
                except OSError as error:
                    failed.append(repr(error))
                else:
                    served[0] += 1

    with gateway(tmp_path, two(web=web)) as running:
        workers = running.ask("GET", "/v1/status")["workers"]
        with contextlib.ExitStack() as stack:
            live = [stack.enter_context(connect(web["listen"])) for _ in range(100)]
            for sock in live:
                greeting(sock)
            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            eventually(lambda: served[0] > 200)
            os.kill(workers[0], signal.SIGKILL)
            running.wait_for_line("its connections are lost")
            so_far = served[0]
            eventually(lambda: served[0] > so_far + 200)
            stop.set()
            for thread in threads:
                thread.join()
            # Those in its hands at that moment are lost with it: at most one of each thread.
            assert len(failed) <= len(threads), failed
            gone = [sock for sock in live if _is_gone(sock)]
            assert 0 < len(gone) < 100
            eventually(lambda: running.status("web")["connections"] == 100 - len(gone))
            assert running.status("web")["state"] == "ready"
            assert workers[0] not in running.ask("GET", "/v1/status")["workers"]
        running.wait_state("web", "stopped")


def _is_gone(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"x")
        return sock.recv(1) == b""
    except OSError:
        return True


@pytest.mark.slow
def test_a_gate_is_closed_in_all_workers_before_its_backend_sleeps(tmp_path: Path) -> None:
    """A worker that does not answer counts as busy: nothing is stopped in use."""
    web = backend(tmp_path, idle="2s")
    with gateway(tmp_path, two(web=web)) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
        eventually(lambda: running.status("web")["sleeps_in"] is not None)  # it is known to be quiet
        stuck = running.ask("GET", "/v1/status")["workers"][1]
        os.kill(stuck, signal.SIGSTOP)
        try:
            running.wait_for_line("does not answer")
            assert Path(f"/proc/{pid}").exists()
        finally:
            os.kill(stuck, signal.SIGCONT)
        running.wait_state("web", "stopped")
        with connect(web["listen"]) as sock:
            assert greeting(sock) != pid
            sock.shutdown(socket.SHUT_WR)
            assert receive_all(sock) == b""
