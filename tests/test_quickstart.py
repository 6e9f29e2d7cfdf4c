"""What `make run` starts: three services that wake and sleep."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.running import eventually, free_port, receive_all

RUN = Path(__file__).parent.parent / "config" / "quickstart" / "run.sh"


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    port = free_port(110)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PORT": str(port), "XDG_RUNTIME_DIR": str(tmp_path)}
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        running = subprocess.Popen([str(RUN)], env=environment, stderr=stderr, start_new_session=True)
    try:
        eventually(lambda: "asleep, listening" in log.read_text(), "quickstart listens")
        for site in (port, port + 1):
            with urllib.request.urlopen(f"http://127.0.0.1:{site}/", timeout=20) as answer:
                assert b"Good morning" in answer.read()
        with socket.create_connection(("127.0.0.1", port + 2), timeout=20) as sock:
            assert receive_all(sock).startswith(b"hello 127.0.0.1")
    finally:
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
    assert "unexpected" not in log.read_text()
