"""The units in config/systemd: systemd understands them, and the gateway does what they promise systemd."""

from __future__ import annotations

import configparser
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from backends.units import Duration
from gateway.backend import is_name
from gateway.config import default_admin, default_state_directory
from tests.conftest import program
from tests.mimic import command
from tests.running import PATIENCE
from tests.test_gateway import connect, greeting

UNITS = Path(__file__).parent.parent / "config" / "systemd"
DORMANT = str(Path(sys.executable).with_name("dormant"))

AS_SYSTEMD_DOES = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Puts the descriptor it is given at 3 and becomes the program."""


def unit(name: str) -> configparser.SectionProxy:
    """The settings of the unit's own kind."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # systemd minds the case
    parser.read_string((UNITS / name).read_text())
    assert set(parser.sections()) == {"Unit", name.rpartition(".")[2].capitalize(), "Install"}
    return parser[name.rpartition(".")[2].capitalize()]


@pytest.mark.slow
@pytest.mark.parametrize("manager", ["--system", "--user"])
def test_systemd_finds_nothing_wrong(tmp_path: Path, manager: str) -> None:
    """As system and as user units, unchanged but for where `dormant` is installed."""
    analyze = program("systemd-analyze")
    for file in UNITS.iterdir():
        (tmp_path / file.name).write_text(file.read_text().replace("ExecStart=dormant ", f"ExecStart={DORMANT} "))
    files = [str(tmp_path / file.name) for file in UNITS.iterdir()]
    done = subprocess.run(
        [analyze, manager, "verify", *files], capture_output=True, text=True, timeout=30,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_socket_and_service_belong_together() -> None:
    """The socket unit starts the service of the same name, and a listener can name its socket."""
    assert {file.name for file in UNITS.iterdir()} == {"dormant.service", "dormant.socket"}
    door, service = unit("dormant.socket"), unit("dormant.service")
    assert is_name(door["FileDescriptorName"])
    assert "Accept" not in door
    assert service["Type"] == "notify"
    assert shlex.split(service["ExecReload"]) == ["kill", "-HUP", "$MAINPID"]
    # Where the admin socket and the holds are, for the system as for a user.
    assert Path(default_admin({"XDG_RUNTIME_DIR": "/run/user/1"})).parent.name == service["RuntimeDirectory"]
    assert Path(default_state_directory({"HOME": "/home/somebody"})).name == service["StateDirectory"]
    # The service manager must not lose patience before `gateway.drain` and the stop of the backends are over.
    assert Duration.parse(int(service["TimeoutStopSec"])) > 60


def test_the_gateway_keeps_what_the_units_promise(tmp_path: Path) -> None:
    """READY, the watchdog, reload and stop, with a socket and directories as systemd would give them."""
    door, service = unit("dormant.socket"), unit("dormant.service")
    endpoint = f"unix:{tmp_path}/backend.sock"
    file = tmp_path / "dormant" / "dormant.yaml"
    file.parent.mkdir()
    listener = f"fd://{door['FileDescriptorName']}"
    web = {"command": command("--listen", endpoint), "listen": listener, "endpoint": endpoint}
    file.write_text(json.dumps({"gateway": {"admin": f"{tmp_path}/admin.sock"}, "backends": {"web": web}}))
    words = [word.replace("%E", str(tmp_path)) for word in shlex.split(service["ExecStart"])]
    assert words[0] == "dormant"
    environment = os.environ | {
        "NOTIFY_SOCKET": f"{tmp_path}/notify",
        "WATCHDOG_USEC": str(round(Duration.parse(int(service["WatchdogSec"])) * 1_000_000)),
        "LISTEN_FDNAMES": door["FileDescriptorName"],
    }
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.create_server(("127.0.0.1", 0), backlog=int(door["Backlog"])) as listening,
        (tmp_path / "log").open("wb") as log,
    ):
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(PATIENCE)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", AS_SYSTEMD_DOES, str(listening.fileno()), DORMANT, *words[1:]],
            env=environment, stderr=log, pass_fds=[listening.fileno()],
        )  # fmt: skip
        try:
            told = [manager.recv(100).decode() for _ in range(3)]
            assert told == ["READY=1", "WATCHDOG=1", "STATUS=1 asleep, 0 awake"]
            with connect(f"tcp://127.0.0.1:{listening.getsockname()[1]}") as sock:
                greeting(sock)
                assert manager.recv(100) == b"STATUS=0 asleep, 1 awake"
                process.send_signal(signal.SIGHUP)
                assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
                told = [manager.recv(100).decode() for _ in range(2)]
                assert sorted(told) == ["READY=1", "STATUS=0 asleep, 1 awake"]
                sock.sendall(b"ping")
                assert sock.recv(4) == b"ping"
            process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(PATIENCE) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert "belongs to no listener" not in text
