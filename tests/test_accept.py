"""Delivery `accept`, end to end: one instance for each connection, as inetd does it."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import program
from tests.mimic import command
from tests.running import (
    children,
    cpu,
    descriptors,
    eventually,
    free_port,
    gateway,
    receive_all,
)
from tests.test_gateway import connect, greeting


def accepted(*words: object, **keys: Any) -> dict[str, Any]:
    """A backend that runs this for each connection; a mimic unless there are words."""
    return {
        "command": [str(word) for word in words] or command("--stdio"),
        "delivery": "accept",
        "listen": f"tcp://127.0.0.1:{free_port()}",
        **keys,
    }


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_cat_echoes_and_ends_with_its_client(tmp_path: Path, family: str) -> None:
    web = accepted("cat")
    if family == "unix":
        web["listen"] = f"unix:{tmp_path}/front.sock"
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        before = descriptors(running.pid)
        with connect(web["listen"]) as sock:
            sock.sendall(b"hello\n")
            assert sock.recv(10) == b"hello\n"
            row = running.status("web")
            assert (row["state"], row["connections"], row["total"]) == ("ready", 1, 1)
        running.wait_for_line("exit status 0")
        row = running.wait_state("web", "stopped")
        assert (row["connections"], row["total"], row["wakes"]) == (0, 1, 1)
        with connect(web["listen"]) as sock:
            sock.sendall(b"again\n")
            assert sock.recv(10) == b"again\n"
        running.wait_for_line("exit status 0", 2)
        eventually(lambda: descriptors(running.pid) <= before + 2)  # the nursery's socket stays, its pidfd may


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_half_close_gets_its_reply(tmp_path: Path, family: str) -> None:
    """`printf x | nc -N`: the instance answers after the end of file."""
    nc = program("nc")
    web = accepted(*command("--stdio", "--half-close"))
    where = ["127.0.0.1", web["listen"].rpartition(":")[2]]
    if family == "unix":
        web["listen"] = f"unix:{tmp_path}/front.sock"
        where = ["-U", f"{tmp_path}/front.sock"]
    with gateway(tmp_path, {"backends": {"web": web}}):
        answer = subprocess.run([nc, "-N", *where], input=b"x", capture_output=True, timeout=20).stdout
        assert answer.startswith(b"hello ")
        assert answer.endswith(b"x")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_instance_knows_who_its_client_is(tmp_path: Path, host: str) -> None:
    shown = f"[{host}]" if ":" in host else host
    port = free_port()
    web = accepted("sh", "-c", 'echo "$REMOTE_ADDR $REMOTE_PORT $${LISTEN_FDS:-none}"')
    # Both families by one socket: an IPv4 client is told by its IPv4 address all the same.
    with gateway(tmp_path, {"backends": {"web": web | {"listen": f"tcp://*:{port}"}}}) as running:
        with connect(f"tcp://{host}:{port}") as sock:
            mine = sock.getsockname()[1]
            assert receive_all(sock) == f"{host} {mine} none\n".encode()
        running.wait_for_line("exit status 0")
        assert f"{shown if host == '127.0.0.1' else host}:{mine}" in running.log


def test_stderr_goes_to_the_log_not_to_the_client(tmp_path: Path) -> None:
    web = accepted("sh", "-c", "echo oops >&2; echo fine")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        assert receive_all(sock) == b"fine\n"
        running.wait_for_line("web | oops")


def test_the_end_of_its_output_reaches_the_client_while_the_instance_goes_on(tmp_path: Path) -> None:
    """The gateway keeps no copy of the connection: with the instance's own, the last one is closed."""
    web = accepted("sh", "-c", "echo bye; exec <&- >&-; while [ ! -e go ]; do sleep 0.01; done; echo over >&2")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            assert receive_all(sock) == b"bye\n"
            assert running.status("web")["connections"] == 1
            (tmp_path / "go").touch()
        running.wait_for_line("web | over")


def test_a_daemon_that_an_instance_leaves_is_ended_with_it(tmp_path: Path) -> None:
    web = accepted("sh", "-c", "setsid sleep 600 >&2 & echo $!")
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        daemon = int(receive_all(sock))
        running.wait_for_line("ended after")
        assert not Path(f"/proc/{daemon}").exists()


def test_a_client_that_leaves_ends_no_other(tmp_path: Path) -> None:
    web = accepted("sh", "-c", 'echo "hello $$$$"; exec cat')
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as stays, connect(web["listen"]) as leaves, connect(web["listen"]) as resets:
            pids = {greeting(sock) for sock in (stays, leaves, resets)}
            assert len(pids) == 3
            leaves.close()
            resets.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            resets.close()
            running.wait_for_line("ended after", 2)
            stays.sendall(b"ping")
            assert stays.recv(4) == b"ping"
            assert running.status("web")["connections"] == 1


def test_at_the_limit_clients_wait_in_the_backlog_and_are_served_later(tmp_path: Path) -> None:
    web = accepted(limits={"connections": 2})
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as first, connect(web["listen"]) as second, connect(web["listen"]) as third:
            greeting(first), greeting(second)
            running.wait_for_line("limits.connections")
            used = cpu(running.pid)
            third.settimeout(0.2)
            with pytest.raises(TimeoutError):
                third.recv(1)
            assert cpu(running.pid) - used < 0.1
            assert running.status("web")["connections"] == 2
            third.settimeout(20)
            first.close()
            greeting(third)


def test_a_limit_that_is_raised_lets_the_waiting_in(tmp_path: Path) -> None:
    web = accepted(limits={"connections": 1})
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as first, connect(web["listen"]) as second:
            greeting(first)
            running.wait_for_line("limits.connections")
            running.write({"backends": {"web": {**web, "limits": {"connections": 2}}}})
            running.signal(signal.SIGHUP)
            greeting(second)


def test_sigterm_at_the_limit_lets_the_instances_end(tmp_path: Path) -> None:
    """The one that ends makes no room: nobody is accepted any more."""
    web = accepted(limits={"connections": 2})
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with connect(web["listen"]) as first, connect(web["listen"]) as second:
            greeting(first), greeting(second)
            running.wait_for_line("limits.connections")
            running.signal(signal.SIGTERM)
            running.wait_for_line("stopping")
            first.close()
            running.wait_for_line("ended after")
            second.sendall(b"ping")
            assert second.recv(4) == b"ping"
        assert running.process is not None
        assert running.process.wait(20) == 0
        assert "rror" not in running.log, running.log


def test_an_instance_that_ignores_everything_is_gone_after_shutdown(tmp_path: Path) -> None:
    web = accepted(*command("--stdio", "--ignore-term", "--fork", "--daemonize-child"))
    with gateway(tmp_path, {"gateway": {"drain": "100ms"}, "backends": {"web": web}}) as running:
        with connect(web["listen"]) as sock:
            assert sock.recv(6) == b"child "
            eventually(lambda: len(children(running.pid)) >= 5)  # worker, nursery, instance, its child, its daemon
            family = children(running.pid)
            running.signal(signal.SIGTERM)
            receive_all(sock)
        assert running.process is not None
        assert running.process.wait(20) == 0
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
        assert "gateway.drain" in running.log


def test_a_missing_program_closes_the_connection_and_says_why(tmp_path: Path) -> None:
    web, other = accepted("/no/such/program"), accepted("cat")
    with gateway(tmp_path, {"backends": {"web": web, "other": other}}) as running:
        before = descriptors(running.pid)
        for turn in (1, 2):
            with connect(web["listen"]) as sock:
                assert receive_all(sock) == b""
            running.wait_for_line("/no/such/program: No such file or directory", turn)
        assert "/no/such/program" in running.status("web")["last_error"]
        with connect(other["listen"]) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        eventually(lambda: descriptors(running.pid) <= before + 2)


@pytest.mark.slow
def test_reload_drains_a_changed_one(tmp_path: Path) -> None:
    web = accepted()
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as old:
        greeting(old)
        running.write({"backends": {"web": {**web, "command": ["echo", "the new one"]}}})
        running.signal(signal.SIGHUP)
        running.wait_for_line("reloaded")
        with connect(web["listen"]) as fresh:
            assert receive_all(fresh) == b"the new one\n"
        old.sendall(b"ping")
        assert old.recv(4) == b"ping"


@pytest.mark.slow
def test_many_in_a_row_leave_nothing(tmp_path: Path) -> None:
    web = accepted("true")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        for turn in range(200):
            with connect(web["listen"]) as sock:
                assert receive_all(sock) == b""
            if turn == 10:
                eventually(lambda: running.status("web")["connections"] == 0)
                before = descriptors(running.pid)
        eventually(lambda: running.status("web")["connections"] == 0)
        assert running.status("web")["total"] == 200
        eventually(lambda: descriptors(running.pid) <= before)


@pytest.fixture
def privilege_separation_directory() -> Iterator[None]:
    """sshd as root wants /run/sshd, which its package's service makes."""
    directory = Path("/run/sshd")
    if directory.exists() or os.geteuid() != 0:
        yield
        return
    directory.mkdir(mode=0o755)
    yield
    directory.rmdir()


@pytest.mark.slow
def test_ssh_runs_a_command(tmp_path: Path, privilege_separation_directory: None) -> None:
    """`sshd -i` behind the gateway, and a real client."""
    ssh, sshd, keygen = program("ssh"), program("sshd"), program("ssh-keygen")
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    authorized = tmp_path / "authorized_keys"
    authorized.write_bytes((tmp_path / "user.pub").read_bytes())
    (tmp_path / "sshd_config").write_text(
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {authorized}\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
    )
    web = accepted(sshd, "-i", "-e", "-f", tmp_path / "sshd_config")
    client = [
        ssh, "-F", "/dev/null", "-i", str(tmp_path / "user"), "-p", web["listen"].rpartition(":")[2],
        "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "BatchMode=yes",
        f"{getpass.getuser()}@127.0.0.1",
    ]  # fmt: skip
    with gateway(tmp_path, {"backends": {"ssh": web}}) as running:
        done = subprocess.run(
            [*client, "cat; echo $SSH_CONNECTION >&2; exit 7"],
            input="through",
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert (done.returncode, done.stdout) == (7, "through"), done.stderr + running.log
        assert "127.0.0.1 " in done.stderr
        running.wait_state("ssh", "stopped")
        running.wait_for_line("Accepted publickey")
        assert len(children(running.pid)) <= 2  # the worker and the nursery


@pytest.mark.slow
def test_a_burst_of_clients_is_served(tmp_path: Path) -> None:
    web = accepted(limits={"connections": 10})
    begun = time.monotonic()
    with gateway(tmp_path, {"backends": {"web": web}}) as running, ExitStack() as stack:
        waiting = [stack.enter_context(connect(web["listen"])) for _ in range(50)]
        assert len({_greet_and_leave(sock) for sock in waiting}) == 50
        eventually(lambda: running.status("web")["connections"] == 0)
    assert time.monotonic() - begun < 20


def _greet_and_leave(sock: socket.socket) -> int:
    pid = greeting(sock)
    sock.close()
    return pid
