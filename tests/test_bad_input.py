"""What users, programs and clients get wrong: each is told clearly or closed, and everybody else goes on."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gateway.cli import main
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
from tests.test_gateway import backend, connect, greeting

RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: close by RST


def other(directory: Path) -> dict[str, Any]:
    """The backend that has nothing to do with it."""
    endpoint = f"unix:{directory}/other.backend"
    return {
        "command": command("--listen", endpoint),
        "listen": f"unix:{directory}/other.sock",
        "endpoint": endpoint,
        "idle": "1h",
    }


def goes_on(directory: Path) -> None:
    """It still serves."""
    with connect(f"unix:{directory}/other.sock") as sock:
        greeting(sock)


def beside(directory: Path, web: dict[str, Any]) -> dict[str, Any]:
    return {"backends": {"web": web, "other": other(directory)}}


@contextlib.contextmanager
def calm(running: Gateway, seconds: float = 0.5) -> Iterator[None]:
    """What happens meanwhile, and some time after it, costs the gateway next to no CPU."""
    planes = running.pid, running.worker
    used = sum(map(cpu, planes))
    yield
    end = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > end)
    assert sum(map(cpu, planes)) - used < 0.3 * seconds + 0.1


# Configuration


CAT = "command: cat, delivery: accept"


@pytest.mark.parametrize(
    ("text", "essentials"),
    [
        (
            "backends: {web: {driver: proces, command: cat, listen: 'unix:s', endpoint: 'unix:e'}}",
            ["backends.web.driver: unknown driver 'proces'", "did you mean 'process'?", "allowed: external, process"],
        ),
        (
            f"backends: {{web: {{{CAT}, listen: 'unix:s', limts: {{}}}}}}",
            ["backends.web.limts: unknown key", "did you mean 'limits'?", "allowed: ", "start_timeout", "umask"],
        ),
        (
            "backnds: {}",
            ["backnds: unknown key; did you mean 'backends'? allowed: backends, gateway, include"],
        ),
        (
            f"backends: {{web: {{{CAT}, listen: 'tpc://127.0.0.1:80'}}}}",
            ["backends.web.listen: 'tpc://127.0.0.1:80' is not an address; allowed: tcp://HOST:PORT", "did you mean 'tcp'?"],
        ),
        (
            f"backends: {{web: {{{CAT}, listen: 'tcp://[::1:80'}}}}",
            ["backends.web.listen: 'tcp://[::1:80': expected HOST:PORT"],
        ),
        (
            f"backends: {{web: {{{CAT}, listen: 'tcp://127.0.0.1:66000'}}}}",
            ["backends.web.listen: ", "'66000' is not a port; allowed: 0 to 65535"],
        ),
        (
            "include: ['sites.d/*.yaml']",
            ["include[0]: 'sites.d/*.yaml' matches no file"],
        ),
        (
            "include: dormant.yaml",
            ["include[0]: include loop: ", "dormant.yaml -> "],
        ),
        (
            f"backends: {{a: {{{CAT}, listen: 'tcp://127.0.0.1:80'}}, b: {{{CAT}, listen: 'tcp://127.0.0.1:80'}}}}",
            ["backends.b.listen: tcp://127.0.0.1:80 is already listened on", "backends.a.listen", "an address of its own"],
        ),
        (
            "backends: {web: {command: cat, listen: 'tcp://127.0.0.1:80', endpoint: 'tcp://localhost:80'}}",
            ["backends.web.endpoint: tcp://localhost:80 is its own listener tcp://127.0.0.1:80", "where the backend listens"],
        ),
        ("", ["is empty"]),
        ("backends: [", ["line ", "flow"]),
    ],
)  # fmt: skip
def test_a_configuration_that_is_wrong(tmp_path: Path, text: str, essentials: list[str]) -> None:
    file = tmp_path / "dormant.yaml"
    file.write_text(text)
    said = refused(file)
    assert all(essential in said for essential in essentials), said
    assert len(said.splitlines()) == 2


def refused(file: Path) -> str:
    """What `check` says against a file."""
    result = CliRunner().invoke(main, ["check", str(file)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: the configuration has errors\n{file.parent}/")
    return result.output


def test_two_files_that_include_each_other(tmp_path: Path) -> None:
    for name, included in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"include: {included}.yaml")
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    assert f"{c}: include[0]: include loop: {a} -> {b} -> {c} -> {a};" in refused(a)


BOMB = b"b: &b [x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 4)) for c in range(99, 115))


@pytest.mark.parametrize(
    ("content", "essential"),
    [
        (b"\x7fELF\0\0\0\0", "is a binary file"),
        (b"backends: {\xff\xfe: 1}", "byte 0xff is not UTF-8"),
        (b"# " + b"x" * (17 << 20), "is larger than 16 MiB"),
        (b"- " * 100_000, "nested more than 50 levels deep"),
        (BOMB, "more than 1000000 values"),
    ],
    ids=["binary", "latin", "huge", "deep", "bomb"],
)  # fmt: skip
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, essential: str) -> None:
    file = tmp_path / "dormant.yaml"
    file.write_bytes(content)
    begun = time.monotonic()
    said = refused(file)
    assert essential in said
    assert len(said) < 500
    assert time.monotonic() - begun < 5


def test_a_folder_and_a_device_are_no_configuration(tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path)
    assert "is not a regular file" in refused(Path("/dev/zero"))
    os.mkfifo(tmp_path / "fifo")
    assert "is not a regular file" in refused(tmp_path / "fifo")


# Sockets


def run_refused(running: Gateway, prefix: list[str] | None = None) -> str:
    """`dormant run` that must fail at once and leave nothing."""
    done = subprocess.run([*(prefix or []), *running.command], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(running.admin).exists()
    return next(line for line in done.stderr.splitlines() if line.startswith("Error: "))


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        config = {"backends": {"other": other(tmp_path), "web": {**backend(tmp_path), "listen": address}}}
        said = run_refused(Gateway(tmp_path, config))
    assert said == f"Error: {address}: the address is in use, by another program or by another listener here"
    assert not (tmp_path / "other.sock").exists()


def test_a_unix_socket_in_use_and_a_file_in_its_place(tmp_path: Path) -> None:
    running = Gateway(tmp_path, {"backends": {"web": {**backend(tmp_path), "listen": f"unix:{tmp_path}/s"}}})
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(f"{tmp_path}/s")
        taken.listen()
        assert run_refused(running) == (
            f"Error: unix:{tmp_path}/s: the address is in use by another program, or the file is no socket"
        )
    (tmp_path / "s").unlink()
    (tmp_path / "s").write_text("precious")
    assert "in use" in run_refused(running)
    assert (tmp_path / "s").read_text() == "precious"


def test_a_privileged_port_without_the_right(tmp_path: Path) -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1:
        pytest.skip("this system lets everybody listen on every port")
    # Root without the one right: an ordinary user might not be able to read this checkout.
    prefix = [program("setpriv"), "--bounding-set=-net_bind_service"] if os.geteuid() == 0 else []
    config = {"backends": {"web": {**backend(tmp_path), "listen": "tcp://127.0.0.1:1"}}}
    said = run_refused(Gateway(tmp_path, config), prefix)
    assert said.startswith("Error: tcp://127.0.0.1:1: no right to listen on a port below 1024; ")
    assert "CAP_NET_BIND_SERVICE" in said


@pytest.mark.parametrize(
    ("address", "essential"),
    [
        ("unix:/no/such/folder/s", "there is no such directory"),
        ("tcp://192.0.2.1:20000", "this machine has no such address"),
        ("tcp://no-such-host.invalid:20000", "no-such-host.invalid"),
        ("unix:s?owner=nobody-here", "there is no user 'nobody-here'"),
        ("fd://web", "no such socket was passed in; there are: none"),
    ],
)
def test_an_address_that_cannot_be_listened_on(tmp_path: Path, address: str, essential: str) -> None:
    said = run_refused(Gateway(tmp_path, {"backends": {"web": {**backend(tmp_path), "listen": address}}}))
    assert essential in said


# Programs


@pytest.mark.parametrize(
    ("words", "essential"),
    [
        (["/no/such/program"], "/no/such/program: No such file or directory"),
        (["no-such-program"], "no-such-program: no such program in PATH"),
        (["/etc/passwd"], "/etc/passwd: Permission denied"),
        (["./script"], "the interpreter that it names does not exist"),
        (command("--say", "bad flag", "--exit-after", 0, "--exit-code", 2), "it ended (exit status 2)"),
        (command("--exit-after", 0), "it ended (exit status 0)"),
        (command("--never-ready"), "start_timeout: not ready after 300ms"),
        (command("--never-ready", "--ignore-term"), "start_timeout: not ready after 300ms"),
    ],
    ids=[
        "missing",
        "not in PATH",
        "not executable",
        "no interpreter",
        "exits 2",
        "exits 0",
        "never listens",
        "ignores TERM",
    ],
)
@pytest.mark.slow
def test_a_program_that_does_not_serve(tmp_path: Path, words: list[str], essential: str) -> None:
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    web = backend(tmp_path, start_timeout="300ms", stop_grace="100ms", command=words)
    with gateway(tmp_path, beside(tmp_path, web)) as running:
        goes_on(tmp_path)
        before = len(children(running.pid)), descriptors(running.pid), descriptors(running.worker)
        with connect(web["listen"]) as sock:
            assert receive_all(sock) == b""
        line = running.wait_for_line("start failed: ")
        assert "web: error: start failed: " in line
        assert essential in line
        assert "next try in" in running.log
        with calm(running):
            goes_on(tmp_path)
            with connect(web["listen"]) as sock:  # it is left alone for a while; the client waits
                assert running.status("web")["retry_in"] is not None
        eventually(
            lambda: (len(children(running.pid)), descriptors(running.pid), descriptors(running.worker)) <= before
        )


@pytest.mark.slow
def test_a_program_that_ignores_term_is_killed_when_it_sleeps(tmp_path: Path) -> None:
    web = backend(tmp_path, "--ignore-term", "--fork", idle="50ms", stop_grace="200ms")
    with gateway(tmp_path, beside(tmp_path, web)) as running:
        goes_on(tmp_path)
        family = len(children(running.pid))
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
        running.wait_state("web", "stopping")
        goes_on(tmp_path)
        running.wait_state("web", "stopped")
        assert not Path(f"/proc/{pid}").exists()
        assert len(children(running.pid)) == family


# Clients


def test_clients_that_connect_and_leave(tmp_path: Path) -> None:
    """They cause one start; nobody is left waiting; it sleeps again."""
    web = backend(tmp_path, "--after", 0.2, "--started", tmp_path / "starts")
    with gateway(tmp_path, beside(tmp_path, web)) as running:
        before = descriptors(running.worker)
        for turn in range(200):
            with connect(web["listen"]) as sock:
                if turn % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        running.wait_state("web", "ready")
        goes_on(tmp_path)
        row = running.wait_state("web", "stopped")
        assert (row["connections"], row["waiting"]) == (0, 0)
        assert len((tmp_path / "starts").read_text().split()) == 1
        with connect(f"unix:{tmp_path}/other.sock"):  # its own connection is the only one
            eventually(lambda: descriptors(running.worker) <= before + 2)


def test_clients_that_send_nothing(tmp_path: Path) -> None:
    """Before and after the start. They hold a place until limits.idle_timeout, and nothing else."""
    web = backend(tmp_path, "--after", 0.2, limits={"idle_timeout": "500ms"})
    with gateway(tmp_path, beside(tmp_path, web)) as running, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(web["listen"])) for _ in range(20)]
        goes_on(tmp_path)
        for sock in silent:
            greeting(sock)
        with calm(running, 0.3):
            goes_on(tmp_path)
        assert [receive_all(sock) for sock in silent] == [b""] * 20
        running.wait_for_line("limits.idle_timeout")
        running.wait_state("web", "stopped")


FLOOD = """
import socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
client, _ = listening.accept()
client.sendall(b"hello 1\\n")
try:
    while True:
        client.sendall(bytes(1 << 16))
except OSError:
    pass
"""


@pytest.mark.slow
def test_a_client_that_never_reads(tmp_path: Path) -> None:
    """It is not read for either: the backend waits, the gateway keeps no bytes and is at rest."""
    web = backend(tmp_path, idle="1h")
    web["command"] = [sys.executable, "-I", "-S", "-c", FLOOD, f"{tmp_path}/backend.sock"]
    web["ready"] = {"exec": ["test", "-S", f"{tmp_path}/backend.sock"]}
    with gateway(tmp_path, beside(tmp_path, web)) as running, connect(web["listen"]) as sock:
        goes_on(tmp_path)
        before = memory(running.worker)
        greeting(sock)
        sent = -1

        def settled() -> bool:
            nonlocal sent
            last, sent = sent, running.status("web")["sent"]
            return last == sent > 1 << 16

        eventually(settled)
        with calm(running):
            for _ in range(10):
                goes_on(tmp_path)
        assert memory(running.worker) - before < 8 << 20
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


class Crowd:
    """Very many clients of one port at once, none of which says a word."""

    def __init__(self, address: str, count: int) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self.poll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.heard: dict[int, bytes] = {}
        for _ in range(count):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.connect_ex((host, int(port)))
            self.sockets[sock.fileno()] = sock
            self.heard[sock.fileno()] = b""

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.poll.close()
        for sock in self.sockets.values():
            sock.close()

    def listen(self, timeout: float = 30) -> list[bytes]:
        """Wait until each has heard a line, or the end."""
        waiting = set(self.sockets)
        for fd in waiting:
            self.poll.register(fd, select.EPOLLIN)
        deadline = time.monotonic() + timeout
        while waiting:
            ready = self.poll.poll(max(0, deadline - time.monotonic()))
            assert ready, f"{len(waiting)} of {len(self.sockets)} heard nothing"
            for fd, _ in ready:
                data = self.sockets[fd].recv(100)
                self.heard[fd] += data
                if not data or data.endswith(b"\n"):
                    waiting.discard(fd)
                    self.poll.unregister(fd)
        return list(self.heard.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_five_thousand_clients_at_once_on_a_sleeping_backend(tmp_path: Path, family: str) -> None:
    """One start, five thousand answers."""
    web = backend(tmp_path, "--after", 1, "--started", tmp_path / "starts", idle="1h")
    if family == "tcp":
        web["endpoint"] = f"tcp://127.0.0.1:{free_port()}"
        web["command"] = command("--listen", web["endpoint"], "--after", 1, "--started", tmp_path / "starts")
    with gateway(tmp_path, beside(tmp_path, web)) as running:
        goes_on(tmp_path)
        before = descriptors(running.worker)
        with Crowd(web["listen"], 5000) as crowd:
            goes_on(tmp_path)
            answers = crowd.listen()
            assert len(set(answers)) == 1
            assert answers[0].startswith(b"hello ")
            goes_on(tmp_path)
            row = running.status("web")
            assert (row["connections"], row["waiting"], row["refused"]) == (5000, 0, 0)
        eventually(lambda: running.status("web")["connections"] == 0)
        assert len((tmp_path / "starts").read_text().split()) == 1
        eventually(lambda: descriptors(running.worker) <= before)


@pytest.mark.slow
def test_five_thousand_clients_at_once_on_a_backend_that_fails(tmp_path: Path) -> None:
    web = backend(tmp_path, "--never-ready", start_timeout="1s", limits={"pending": 3000})
    with gateway(tmp_path, beside(tmp_path, web)) as running:
        goes_on(tmp_path)
        before = descriptors(running.worker)
        with Crowd(web["listen"], 5000) as crowd:
            eventually(lambda: running.status("web")["waiting"] == 3000)
            goes_on(tmp_path)
            with contextlib.suppress(ConnectionResetError):
                assert set(crowd.listen()) == {b""}
        running.wait_for_line("limits.pending: cut ")
        running.wait_for_line("start_timeout")
        assert running.status("web")["refused"] >= 2000
        eventually(lambda: descriptors(running.worker) <= before)
        assert len([line for line in running.log.splitlines() if "limits.pending" in line]) < 10
        goes_on(tmp_path)


# Descriptors


@contextlib.contextmanager
def descriptors_left(pid: int, count: int) -> Iterator[None]:
    """A process can open no more than so many files meanwhile."""
    prlimit = program("prlimit")
    highest = max(map(int, os.listdir(f"/proc/{pid}/fd")))
    subprocess.run([prlimit, f"--pid={pid}", f"--nofile={highest + 1 + count}:"], check=True)
    try:
        yield
    finally:
        subprocess.run([prlimit, f"--pid={pid}", "--nofile=20000:"], check=True)


@pytest.mark.slow
def test_a_worker_without_descriptors(tmp_path: Path) -> None:
    """Who is connected goes on; who comes waits in the backlog and is served once there is room."""
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, beside(tmp_path, web)) as running, contextlib.ExitStack() as stack:
        warm = stack.enter_context(connect(f"unix:{tmp_path}/other.sock"))
        greeting(warm)
        first = stack.enter_context(connect(web["listen"]))
        greeting(first)
        before = descriptors(running.worker)
        waiting = []
        with descriptors_left(running.worker, 3), calm(running):
            waiting = [stack.enter_context(connect(web["listen"])) for _ in range(20)]
            running.wait_for_line("accepting is paused: Too many open files")
            for sock in (warm, first):
                sock.sendall(b"ping")
                assert sock.recv(4) == b"ping"
        assert len({greeting(sock) for sock in waiting}) == 1
        goes_on(tmp_path)
        for sock in waiting:
            sock.close()
        eventually(lambda: descriptors(running.worker) <= before)


@pytest.mark.slow
def test_a_control_plane_without_descriptors(tmp_path: Path) -> None:
    """Nothing can be started, which is told; who is awake is served; later it starts after all."""
    web = backend(tmp_path)
    with gateway(tmp_path, beside(tmp_path, web)) as running:
        goes_on(tmp_path)
        worker, before = running.worker, descriptors(running.pid)
        with descriptors_left(running.pid, 0):
            with connect(web["listen"]) as sock:
                assert receive_all(sock) == b""
            assert "Too many open files" in running.wait_for_line("start failed")
            goes_on(tmp_path)
            used = cpu(running.pid)
            goes_on(tmp_path)
            end = time.monotonic() + 0.5
            eventually(lambda: time.monotonic() > end)
            assert cpu(running.pid) - used < 0.2
        with connect(web["listen"]) as sock:
            greeting(sock)
        assert running.worker == worker
        running.wait_state("web", "stopped")
        eventually(lambda: descriptors(running.pid) <= before)


@pytest.mark.slow
def test_a_worker_that_dies_without_descriptors_in_the_control_plane(tmp_path: Path) -> None:
    """Its successor cannot be started then; it is once there is room again."""
    with gateway(tmp_path, {"backends": {"other": other(tmp_path)}}) as running:
        goes_on(tmp_path)
        worker = running.worker
        with descriptors_left(running.pid, -2):
            os.kill(worker, signal.SIGKILL)
            running.wait_for_line("cannot be started")
        goes_on(tmp_path)
        assert running.worker != worker
