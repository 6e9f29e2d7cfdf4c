"""The control plane is replaced by itself, or by the next one after its death: who is connected does not notice."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mimic import command
from tests.running import Gateway, children, eventually, free_port, gateway, receive_all
from tests.streams import Streams
from tests.test_gateway import backend, connect, greeting

LASTING = {"orphan_time": "20s", "drain": "20s"}


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A backend that lives outside, and outlives every gateway."""
    endpoint = f"unix:{tmp_path}/outside.sock"
    service = subprocess.Popen(command("--listen", endpoint))
    yield {
        "driver": "external", "start": "true", "stop": "true",
        "listen": f"tcp://127.0.0.1:{free_port()}", "endpoint": endpoint, "idle": "1h",
    }  # fmt: skip
    service.kill()
    service.wait()


@contextlib.contextmanager
def lasting(directory: Path, backends: dict[str, Any], **options: Any) -> Iterator[Gateway]:
    """A gateway whose workers outlive it; at the end they are gone, too."""
    with gateway(directory, {"gateway": {**LASTING, **options}, "backends": backends}) as running:
        try:
            yield running
        except BaseException:
            for pid in pids(running):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise


def pids(running: Gateway) -> list[int]:
    """The workers, also those that a gateway which is dead left behind."""
    return [int(path.stem) for path in Path(f"{running.admin}.workers").glob("*.sock")]


def upgrade(running: Gateway) -> None:
    arguments = ["upgrade", "--socket", running.admin]
    done = subprocess.run([sys.executable, "-m", "gateway.cli", *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + running.log
    assert "has taken over" in done.stdout


def crash(running: Gateway) -> None:
    running.signal(signal.SIGKILL)
    assert running.process is not None
    running.process.wait()


def restart(running: Gateway) -> None:
    running.process = running.launch()
    running.wait_for_line("listening; pid", running.log.count("listening; pid") + 1)


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ping(sock: socket.socket) -> None:
    sock.sendall(b"ping")
    assert sock.recv(4) == b"ping"


# Upgrades


@pytest.mark.slow
def test_an_upgrade_keeps_processes_connections_and_their_state(tmp_path: Path, outside: dict[str, Any]) -> None:
    web = backend(tmp_path, "--say", "hello there", idle="500ms")
    with lasting(tmp_path, {"web": web, "outside": outside}) as running:
        with connect(web["listen"]) as sock, connect(outside["listen"]) as other:
            pid = greeting(sock)
            greeting(other)
            before, workers = running.status("web"), running.ask("GET", "/v1/status")["workers"]
            upgrade(running)
            ping(sock), ping(other)
            after = running.status("web")
            for key in ("state", "wakes", "last_wake", "start_took", "ready_took", "connections", "total"):
                assert after[key] == before[key], key
            assert not set(running.ask("GET", "/v1/status")["workers"]) & set(workers)
            with connect(web["listen"]) as fresh:
                assert greeting(fresh) == pid
            assert running.status("outside")["connections"] == 1
        eventually(lambda: not set(pids(running)) & set(workers))  # the old workers have finished
        eventually(lambda: running.status("web")["total"] == 2)  # what they had counted is not lost with them
        running.wait_state("web", "stopped")
        with connect(web["listen"]) as sock:
            assert greeting(sock) != pid


@pytest.mark.slow
def test_an_upgrade_by_signal_in_every_state(tmp_path: Path) -> None:
    """Sleeping, starting, frozen, stopping, handed over and one per connection: each goes on."""
    starting, frozen = backend(tmp_path, "--after", 1, idle="1h"), {**backend(tmp_path)}
    frozen["command"] = command("--listen", f"unix:{tmp_path}/frozen.sock")
    frozen |= {"endpoint": f"unix:{tmp_path}/frozen.sock", "idle": {"after": "10ms", "then": "freeze"}}
    stopping = {"command": command("--listen", f"unix:{tmp_path}/stopping.sock", "--ignore-term")}
    stopping |= {"endpoint": f"unix:{tmp_path}/stopping.sock", "listen": f"unix:{tmp_path}/stops", "idle": "10ms"}
    stopping |= {"stop_grace": "1500ms"}
    passed = {"command": command("--inherit"), "delivery": "pass", "listen": f"tcp://127.0.0.1:{free_port()}"}
    each = {"command": command("--stdio"), "delivery": "accept", "listen": f"tcp://127.0.0.1:{free_port()}"}
    backends = {"starting": starting, "frozen": frozen, "stopping": stopping, "passed": passed, "each": each}
    with lasting(tmp_path, backends) as running, contextlib.ExitStack() as stack:
        with connect(frozen["listen"]) as sock:
            frozen_pid = greeting(sock)
        passed_client, instance = (stack.enter_context(connect(one["listen"])) for one in (passed, each))
        passed_pid, _ = greeting(passed_client), greeting(instance)
        running.wait_state("frozen", "frozen")
        with connect(stopping["listen"]) as sock:
            stopping_pid = greeting(sock)
        waiting = stack.enter_context(connect(starting["listen"]))
        running.wait_state("stopping", "stopping")
        running.signal(signal.SIGUSR2)
        running.wait_for_line("listening; pid", 2)
        assert greeting(waiting)
        ping(passed_client), ping(instance)
        assert running.status("each")["connections"] == 1
        instance.close()
        eventually(lambda: running.status("each")["connections"] == 0)
        with connect(passed["listen"]) as sock:
            assert greeting(sock) == passed_pid
        assert running.status("frozen")["state"] == "frozen"
        with connect(frozen["listen"]) as sock:
            assert greeting(sock) == frozen_pid
        with connect(stopping["listen"]) as sock:
            assert greeting(sock) != stopping_pid


@pytest.mark.slow
def test_an_upgrade_that_would_not_start_changes_nothing(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        greeting(sock)
        worker = running.worker
        running.file.write_text("backends: {web: {drvier: x}}")
        arguments = [sys.executable, "-m", "gateway.cli", "upgrade", "--socket", running.admin]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "drvier" in done.stderr
        running.signal(signal.SIGUSR2)
        assert "drvier" in running.wait_for_line("drvier")
        ping(sock)
        assert running.worker == worker


@pytest.mark.slow
def test_an_upgrade_follows_the_configuration_of_that_moment(tmp_path: Path) -> None:
    """What is not configured any more is ended, with its process; what is new listens."""
    web, gone = backend(tmp_path, idle="1h"), backend(tmp_path, idle="1h")
    gone |= {"command": command("--listen", f"unix:{tmp_path}/gone"), "endpoint": f"unix:{tmp_path}/gone"}
    with lasting(tmp_path, {"web": web, "gone": gone}) as running, connect(web["listen"]) as sock:
        pid = greeting(sock)
        with connect(gone["listen"]) as leaving:
            gone_pid = greeting(leaving)
        fresh = {**backend(tmp_path), "listen": f"unix:{tmp_path}/fresh.sock"}
        running.write({"gateway": LASTING, "backends": {"web": web, "fresh": fresh}})
        upgrade(running)
        ping(sock)
        with connect(web["listen"]) as second:
            assert greeting(second) == pid
        eventually(lambda: gone_pid not in children(running.pid))
        with pytest.raises(ConnectionRefusedError):
            connect(gone["listen"])
        connect(fresh["listen"]).close()


# Crashes


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_who_uses_what_lives_outside_does_not_notice_a_crash(
    tmp_path: Path, outside: dict[str, Any], workers: int
) -> None:
    with lasting(tmp_path, {"outside": outside}, workers=workers) as running:
        with connect(outside["listen"]) as first, connect(outside["listen"]) as second:
            pid = greeting(first)
            greeting(second)
            crash(running)
            ping(first)
            with connect(outside["listen"]) as meanwhile:
                assert greeting(meanwhile) == pid
                second.close()
                old = set(pids(running))
                restart(running)
                running.wait_for_line("still awake")
                ping(first), ping(meanwhile)
                row = running.status("outside")
                assert (row["state"], row["connections"], row["total"]) == ("ready", 2, 3)
                assert set(running.ask("GET", "/v1/status")["workers"]) == old
        # It is known how many there were, so it sleeps when they are gone.
        running.write({"gateway": LASTING, "backends": {"outside": {**outside, "idle": "50ms"}}})
        running.signal(signal.SIGHUP)
        running.wait_state("outside", "stopped")


@pytest.mark.slow
def test_processes_end_with_a_control_plane_that_was_killed_and_start_again(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with lasting(tmp_path, {"web": web}) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
            crash(running)
            with contextlib.suppress(ConnectionResetError):
                assert receive_all(sock) == b""
        eventually(lambda: not runs(pid))  # what is about to die may still take connections
        with connect(web["listen"]) as waiting:  # nobody could start it now
            restart(running)
            assert greeting(waiting) != pid
        assert running.status("web")["wakes"] == 1


@pytest.mark.slow
def test_clients_of_a_sleeping_backend_wait_for_the_next_control_plane(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with lasting(tmp_path, {"web": web}) as running:
        running.status("web")  # the worker has taken its orders
        crash(running)
        with connect(web["listen"]) as first, connect(web["listen"]) as second:
            restart(running)
            assert greeting(first) == greeting(second)


@pytest.mark.slow
def test_a_crash_during_an_upgrade_is_survived(tmp_path: Path, outside: dict[str, Any]) -> None:
    """Workers that finish and workers that accept are told apart."""
    with lasting(tmp_path, {"outside": outside}) as running, connect(outside["listen"]) as sock:
        greeting(sock)
        upgrade(running)
        workers = running.ask("GET", "/v1/status")["workers"]
        crash(running)
        restart(running)
        assert running.ask("GET", "/v1/status")["workers"] == workers
        ping(sock)
        with connect(outside["listen"]) as fresh:
            greeting(fresh)
            assert running.status("outside")["connections"] == 2


def test_workers_without_a_control_plane_end_after_their_time(tmp_path: Path) -> None:
    web = backend(tmp_path)
    with gateway(tmp_path, {"gateway": {"orphan_time": "100ms"}, "backends": {"web": web}}) as running:
        worker = running.worker
        crash(running)
        with connect(web["listen"]) as sock:
            assert receive_all(sock) == b""
        eventually(lambda: not Path(f"/proc/{worker}").exists() or pids(running) == [])
        assert pids(running) == []


@pytest.mark.slow
def test_500_live_transfers_survive_upgrade_reload_and_crash(tmp_path: Path, outside: dict[str, Any]) -> None:
    """Done when 3: no connection is cut, no byte is lost; what was used sleeps when it is quiet."""
    outside, web = {**outside, "idle": "200ms"}, backend(tmp_path, idle="200ms")
    port, other = (int(one["listen"].rpartition(":")[2]) for one in (outside, web))
    backends = {"outside": outside, "web": web}
    with lasting(tmp_path, backends, workers=2) as running, Streams() as streams:
        lasts, processed = streams.begin(250, port), streams.begin(250, other)
        streams.flow()
        upgrade(running)
        streams.flow()
        running.write(
            {"gateway": LASTING, "backends": {name: {**one, "idle": "100ms"} for name, one in backends.items()}}
        )
        running.signal(signal.SIGHUP)
        running.wait_for_line("reloaded: 0 added, 2 changed")
        streams.flow()
        assert [running.status(name)["connections"] for name in backends] == [250, 250]
        streams.end(processed)
        running.wait_state("web", "stopped")
        lasts += streams.begin(250, port)
        streams.flow()
        crash(running)
        streams.flow()
        restart(running)
        streams.flow()
        assert running.status("outside")["connections"] == 500
        streams.end(lasts)
        for name in backends:
            assert running.wait_state(name, "stopped")["connections"] == 0


@pytest.mark.slow
def test_an_upgrade_that_cannot_bind_what_is_new_changes_nothing(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with socket.create_server(("127.0.0.1", 0)) as taken, lasting(tmp_path, {"web": web}) as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
            worker = running.worker
            clash = {**backend(tmp_path), "listen": f"tcp://127.0.0.1:{taken.getsockname()[1]}"}
            running.write({"gateway": LASTING, "backends": {"web": web, "clash": clash}})
            arguments = [sys.executable, "-m", "gateway.cli", "upgrade", "--socket", running.admin]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
            assert done.returncode == 1 and "in use" in done.stderr
            ping(sock)
            assert running.worker == worker


@pytest.mark.slow
def test_an_upgrade_lets_what_changed_finish_first(tmp_path: Path) -> None:
    """Its connections get the time that a reload gives them; nobody is answered by the old one afterwards."""
    web = backend(tmp_path, idle="1h")
    with lasting(tmp_path, {"web": web}) as running:
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
            running.write({"gateway": LASTING, "backends": {"web": {**web, "env": {"A": "b"}}}})
            running.signal(signal.SIGUSR2)
            running.wait_for_line("reloaded")
            ping(sock)
        running.wait_for_line("listening; pid", 2)
        with connect(web["listen"]) as sock:
            assert greeting(sock) != pid


@pytest.mark.slow
def test_an_upgrade_with_workers_that_would_not_wait_at_all(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with lasting(tmp_path, {"web": web}, orphan_time="0s") as running, connect(web["listen"]) as sock:
        greeting(sock)
        upgrade(running)
        ping(sock)


@pytest.mark.slow
def test_an_upgrade_leaves_handed_over_sockets_as_the_backend_wants_them(tmp_path: Path) -> None:
    """A backend that waits in accept(2) must not be told that there is nobody."""
    listen = f"tcp://127.0.0.1:{free_port()}"
    script = (
        "import socket\ns = socket.socket(fileno=3)\nwhile True:\n"
        "    c, _ = s.accept()\n    c.sendall(b'hello 1\\n')\n    c.close()"
    )
    web = {"command": [sys.executable, "-c", script], "delivery": "pass", "listen": listen, "idle": "1h"}
    with lasting(tmp_path, {"web": web}) as running:
        for _ in range(2):
            with connect(listen) as sock:
                greeting(sock)
            upgrade(running)
        with connect(listen) as sock:
            greeting(sock)
        assert running.status("web")["wakes"] == 1


@pytest.mark.slow
def test_after_a_crash_each_socket_is_in_one_worker(tmp_path: Path, outside: dict[str, Any]) -> None:
    """Places of workers are given out anew; a small limit stays exact."""
    limited = {**outside, "limits": {"connections": 2}}
    with lasting(tmp_path, {"outside": limited}, workers=2) as running:
        for number in range(2):
            os.kill(running.ask("GET", "/v1/status")["workers"][number], signal.SIGKILL)
            running.wait_for_line("another takes its place", number + 1)
            with connect(outside["listen"]) as sock:
                greeting(sock)
            eventually(lambda: len(pids(running)) == 2)
        crash(running)
        restart(running)
        with contextlib.ExitStack() as stack:
            eventually(lambda: running.status("outside")["connections"] == 0)
            for _ in range(2):
                greeting(stack.enter_context(connect(outside["listen"])))
            for _ in range(4):
                with connect(outside["listen"]) as sock, contextlib.suppress(ConnectionResetError):
                    assert sock.recv(1) == b""


@pytest.mark.slow
def test_a_listener_may_change_its_delivery_between_crash_and_restart(tmp_path: Path) -> None:
    web = backend(tmp_path)
    gone = {**backend(tmp_path), "listen": f"unix:{tmp_path}/gone.sock"}
    with lasting(tmp_path, {"web": web, "gone": gone}) as running:
        running.status("web")
        crash(running)
        each = {"command": command("--stdio"), "delivery": "accept", "listen": web["listen"]}
        running.write({"gateway": LASTING, "backends": {"web": each}})
        restart(running)
        for _ in range(3):
            with connect(web["listen"]) as sock:
                greeting(sock)
        assert not (tmp_path / "gone.sock").exists()


@pytest.mark.slow
def test_a_worker_that_is_stuck_does_not_keep_the_next_control_plane_out(tmp_path: Path) -> None:
    web = backend(tmp_path)
    with lasting(tmp_path, {"web": web}) as running:
        stuck = running.worker
        os.kill(stuck, signal.SIGSTOP)
        crash(running)
        restart(running)
        running.wait_for_line("cannot be taken over")
        assert running.worker != stuck
        with connect(web["listen"]) as sock:
            greeting(sock)
