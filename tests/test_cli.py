"""The command `dormant`, as it is typed: what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import backends
from gateway import __version__
from gateway.cli import main
from gateway.status import BackendStatus, GatewayStatus
from tests.mimic import command
from tests.running import PATIENCE, Gateway, eventually, free_port, gateway, receive_all
from tests.test_gateway import backend, connect, greeting, try_connect

DORMANT = [sys.executable, "-m", "gateway.cli"]
ROOT = Path(__file__).parent.parent


def dormant(*words: object, code: int = 0, **environment: str) -> str:
    """What the command says: on stdout when it succeeds, on stderr when it is to fail with this status."""
    done = CliRunner().invoke(main, list(map(str, words)), env=environment)
    return judged(words, code, done.exit_code, done.stdout, done.stderr)


def typed(*words: object, code: int = 0, cwd: Path = ROOT, **environment: str) -> str:
    """The same in a process of its own."""
    done = subprocess.run(
        [*DORMANT, *map(str, words)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=30
    )
    return judged(words, code, done.returncode, done.stdout, done.stderr)


def judged(words: object, code: int, found: int, said: str, complained: str) -> str:
    assert found == code, f"{words}: {found}\n{said}{complained}"
    assert "Traceback" not in complained
    assert (complained == "") == (code == 0)
    return complained if code else said


def at(running: Gateway, *words: object, code: int = 0) -> str:
    """What it says at this gateway."""
    return dormant(*words, "--socket", running.admin, code=code)


# Without a gateway


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_tells_every_option(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"] if name else ["--help"])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"Usage: main {name}".rstrip())
    if not name:
        assert all(f"\n  {word} " in shown.output for word in main.commands)
        return
    for parameter in main.commands[name].params:
        assert all(option in shown.output for option in parameter.opts if option.startswith("-"))
    assert CliRunner().invoke(main, [name, "-h"]).output == shown.output


def test_version() -> None:
    assert typed("--version") == f"dormant, version {__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["statsu"], "No such command 'statsu'"),
        (["status", "--jsn"], "No such option"),
        (["hold", "web", "--for", "soon"], "'soon' is not a duration such as 500ms"),
        (["hold"], "Missing argument 'NAME'"),
        (["activate", "-l", "127.0.0.1:1"], "Missing argument 'COMMAND...'"),
        (["activate", "--", "cat"], "Missing option '-l'"),
        (["run", "--log", "xml", "x.yaml"], "'xml' is not one of"),
    ],
)
def test_wrong_usage_is_status_2(words: list[str], said: str) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    "words",
    [["status"], ["status", "--json"], ["status", "--watch"], ["reload"], ["logs", "web"], ["logs", "-f", "web"]]
    + [[verb, "web"] for verb in ("start", "stop", "hold", "release")],
    ids=" ".join,
)
def test_no_gateway_is_one_clear_line(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "nobody.sock"
    result = CliRunner().invoke(main, [*words, "--socket", str(path)])
    assert result.exit_code == 1
    assert result.output == (
        f"Error: no gateway answers at {path} (No such file or directory); is it running? --socket names another one\n"
    )


def test_a_socket_that_a_dead_gateway_left(tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    assert "(Connection refused); is it running?" in dormant("status", code=1, DORMANT_SOCKET=str(path))


def test_something_else_at_the_socket(tmp_path: Path) -> None:
    """Not a gateway: it speaks another protocol."""
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        asking = subprocess.Popen([*DORMANT, "status", "--socket", str(path)], stderr=subprocess.PIPE, text=True)
        with sock.accept()[0] as asked:
            asked.sendall(b"220 mail.example.com\r\n")
            _, said = asking.communicate(timeout=PATIENCE)
    assert asking.returncode == 1
    assert said.startswith("Error: no gateway answers")


def test_check(tmp_path: Path) -> None:
    file = tmp_path / "dormant.yaml"
    file.write_text("backends: {web: {command: cat, delivery: accept, listen: 'tcp://127.0.0.1:1'}}")
    assert typed("check", file) == f"{file}: 1 backend, no errors\n"
    assert typed("check", cwd=tmp_path) == "dormant.yaml: 1 backend, no errors\n"
    assert dormant("check", DORMANT_CONFIG=str(file)) == f"{file}: 1 backend, no errors\n"


def test_check_tells_all_errors_and_run_the_same(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("backends: {web: {comand: cat, listen: 'tpc://127.0.0.1:1', idle: soon}, other: {}}")
    said = dormant("check", file, code=1)
    assert said.startswith("Error: the configuration has errors\n")
    for line in ("backends.web.comand: ", "backends.web.listen: ", "backends.web.idle: ", "backends.other.listen: "):
        assert f"\n{file}: {line}" in said
    assert dormant("run", file, code=1) == said


def test_no_configuration(tmp_path: Path) -> None:
    if not Path("/etc/dormant/dormant.yaml").exists():
        assert "no configuration: name a FILE" in typed("run", cwd=tmp_path, code=2)
    assert "missing.yaml: does not exist" in typed("check", "missing.yaml", cwd=tmp_path, code=1)


def test_schema_knows_every_key_of_the_examples() -> None:
    schema = json.loads(dormant("schema"))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    common = schema["$defs"]["backend"]
    own = {rule["if"]["properties"]["driver"]["const"]: rule["then"]["properties"] for rule in common["allOf"]}
    assert set(own) == set(backends.names())
    for file in (ROOT / "config").glob("*.yaml"):
        document = yaml.safe_load(file.read_text())
        assert set(document) <= set(schema["properties"])
        assert set(document.get("gateway", {})) <= set(schema["properties"]["gateway"]["properties"])
        for name, given in document["backends"].items():
            known = set(common["properties"]) | set(own[given.get("driver", backends.DEFAULT)])
            assert set(given) <= known, f"{file.name}: {name}"
    for reference in re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema)):
        assert reference in schema["$defs"]


# At a gateway


def test_status_as_json(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web, "other": backend(tmp_path)}}) as running:
        asleep = json.loads(at(running, "status", "--json"))
        assert set(asleep) == set(GatewayStatus.__struct_fields__)
        assert (asleep["version"], asleep["pid"], asleep["workers"]) == (__version__, running.pid, [running.worker])
        assert (asleep["asleep"], asleep["awake"]) == (2, 0)
        assert [row["name"] for row in asleep["backends"]] == ["web", "other"]
        row = asleep["backends"][0]
        assert set(row) == set(BackendStatus.__struct_fields__)
        assert (row["driver"], row["delivery"], row["state"], row["wakes"]) == ("process", "relay", "stopped", 0)
        assert row["listeners"] == {"listen": web["listen"]}
        assert row["endpoints"] == {}
        assert row["memory"] is row["sleeps_in"] is row["held_for"] is row["retry_in"] is None
        with connect(web["listen"]) as sock:
            greeting(sock)
            (row,) = json.loads(at(running, "status", "--json", "web"))["backends"]
            assert (row["state"], row["connections"], row["wakes"], row["total"]) == ("ready", 1, 1, 1)
            assert row["last_wake"] == "{}:{}".format(*sock.getsockname())
            assert row["endpoints"] == {"": web["endpoint"]}
            assert row["start_took"] > 0
            assert row["ready_took"] > 0
            assert row["memory"] > 1 << 20
            assert row["sleeps_in"] is None
        eventually(lambda: 3500 < (running.status("web")["sleeps_in"] or 0) <= 3600)


@pytest.mark.slow
def test_status_is_watched_as_json(tmp_path: Path) -> None:
    """One document in one line, at once and for each change of what was asked for."""
    web, other = backend(tmp_path), backend(tmp_path)
    with gateway(tmp_path, {"backends": {"web": web, "other": other}}) as running:
        command = [*DORMANT, "status", "--json", "--watch", "web", "--socket", running.admin]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None and watching.stderr is not None
            lines = (json.loads(line)["backends"] for line in watching.stdout)
            assert [row["state"] for row in next(lines)] == ["stopped"]
            for listen in (other["listen"], web["listen"]):
                with connect(listen) as sock:
                    greeting(sock)
            states = [next(lines)[0]["state"]]
            while states[-1] != "stopped":
                states.append(next(lines)[0]["state"])
            assert states == sorted(states, key=["starting", "ready", "stopping", "stopped"].index)
            running.stop()
            assert "no gateway answers" in watching.stderr.read()
            assert watching.wait(PATIENCE) == 1


def test_status_as_a_table(tmp_path: Path) -> None:
    web, other = backend(tmp_path, idle="1h"), backend(tmp_path, delivery="accept")
    del other["endpoint"]
    with gateway(tmp_path, {"backends": {"web": web, "other": other}}) as running:
        with connect(web["listen"]) as sock:
            greeting(sock)
            heading, first, second, summary, *rest = at(running, "status").splitlines()
        assert heading.split()[:3] == ["NAME", "DRIVER", "STATE"]
        assert first.split()[:3] == ["web", "process", "ready"]
        assert web["listen"] in first
        assert second.split()[:3] == ["other", "process/accept", "stopped"]
        assert summary.startswith("1 asleep, 1 awake; up ")
        assert rest == []
        assert "web" not in at(running, "status", "other")
        assert "there is no backend 'nope'" in at(running, "status", "nope", code=1)


@contextlib.contextmanager
def terminal(*words: object) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """Run it on a terminal of its own; gives the process and a function that reads what appears until a text is there."""
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "40"}
    process = subprocess.Popen(
        [*DORMANT, *map(str, words)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def read_until(text: str) -> str:
        nonlocal seen
        while text.encode() not in seen:
            assert select.select([ours], [], [], PATIENCE)[0], f"{text!r} did not appear: {seen.decode()}"
            seen += os.read(ours, 65536)
        before, _, seen = seen.partition(text.encode())
        return before.decode()

    try:
        yield process, read_until
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


@pytest.mark.slow
def test_status_is_watched_on_a_terminal(tmp_path: Path) -> None:
    web = backend(tmp_path)
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        with terminal("status", "--watch", "--socket", running.admin) as (watching, read_until):
            read_until("stopped")
            with connect(web["listen"]) as sock:
                greeting(sock)
                read_until("ready")
            read_until("1 asleep, 0 awake")
            watching.send_signal(signal.SIGINT)
            assert watching.wait(PATIENCE) == 130
        with terminal("status", "-w", "--socket", running.admin) as (watching, read_until):
            read_until("stopped")
            running.stop()
            read_until("no gateway answers")
            assert watching.wait(PATIENCE) == 1


def test_start_and_stop(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        assert at(running, "start", "web") == "web: ready\n"
        assert running.status("web")["last_wake"] == "dormant start"
        assert at(running, "start", "web") == "web: ready\n"
        with connect(web["listen"]) as sock:
            pid = greeting(sock)
            assert at(running, "stop", "web") == "web: stopped\n"
            assert not Path(f"/proc/{pid}").exists()
            assert receive_all(sock) == b""
        assert at(running, "stop", "web") == "web: stopped\n"
        with connect(web["listen"]) as sock:
            assert greeting(sock) != pid


def test_start_that_fails_says_why(tmp_path: Path) -> None:
    web = backend(tmp_path, "--say", "no licence found", "--exit-after", 0, "--exit-code", 3, "--never-ready")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        said = at(running, "start", "web", code=1)
        assert said.startswith("Error: it ended (exit status 3)")
        assert "no licence found" in said
        assert "retry in" in at(running, "status")
        assert "no licence found" in at(running, "start", "web", code=1)  # it is left alone for a second


@pytest.mark.parametrize("name", ["nope", "no/such", "../reload", "a?b", "web "])
def test_a_backend_that_there_is_not(tmp_path: Path, name: str) -> None:
    with gateway(tmp_path, {"backends": {"web": backend(tmp_path)}}) as running:
        assert at(running, "start", name, code=1) == f"Error: there is no backend {name!r}\n"


def test_commands_for_a_life_say_that_instances_have_none(tmp_path: Path) -> None:
    echo = {"command": "cat", "delivery": "accept", "listen": f"unix:{tmp_path}/echo.sock"}
    with gateway(tmp_path, {"backends": {"echo": echo}}) as running:
        for verb in ("start", "stop", "hold", "release"):
            assert "with delivery accept there is nothing to start, stop or hold" in at(running, verb, "echo", code=1)


def test_hold_and_release(tmp_path: Path) -> None:
    web = backend(tmp_path, idle="50ms")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        assert at(running, "hold", "web", "--for", "1h30m") == "web: held\n"
        row = running.wait_state("web", "ready")
        assert 5300 < row["held_for"] <= 5400
        assert 5300 < row["sleeps_in"] <= 5400
        assert "held 1h" in at(running, "status")
        assert at(running, "hold", "web") == "web: held\n"
        assert running.status("web")["held_for"] == -1
        assert at(running, "release", "web") == "web: released\n"
        running.wait_state("web", "stopped")
        at(running, "hold", "web", "--for", "100ms")
        running.wait_for_line("asleep:", 2)


def test_holds_survive_a_restart(tmp_path: Path) -> None:
    config = {"backends": {name: backend(tmp_path, idle="50ms") for name in ("ever", "hour", "short", "free")}}
    for name, given in config["backends"].items():
        given["endpoint"] = f"unix:{tmp_path}/{name}.sock"
        given["command"] = command("--listen", given["endpoint"])
    with gateway(tmp_path, config) as running:
        at(running, "hold", "ever")
        at(running, "hold", "hour", "--for", "1h")
        at(running, "hold", "short", "--for", "1ms")
        at(running, "hold", "free")
        at(running, "release", "free")
        running.wait_for_line("asleep:", 2)
    running.log_file.unlink()
    with gateway(tmp_path, config) as running:
        assert running.wait_state("ever", "ready")["held_for"] == -1
        assert 3500 < running.wait_state("hour", "ready")["held_for"] <= 3600
        for name in ("short", "free"):
            assert running.status(name)["wakes"] == 0
        at(running, "release", "ever")
        at(running, "release", "hour")
        eventually(lambda: all(running.status(name)["state"] == "stopped" for name in ("ever", "hour")))
    running.log_file.unlink()
    with gateway(tmp_path, config) as running:
        assert json.loads(at(running, "status", "--json"))["awake"] == 0


def test_a_broken_file_of_holds_is_told_and_ignored(tmp_path: Path) -> None:
    web = backend(tmp_path)
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        at(running, "hold", "web")
    (file,) = (tmp_path / "state").iterdir()
    file.write_bytes(b"{\xff")
    running.log_file.unlink()
    with gateway(tmp_path, {"backends": {"web": web}}) as running, connect(web["listen"]) as sock:
        greeting(sock)
        running.wait_for_line("holds are not restored")


def test_logs(tmp_path: Path) -> None:
    web = backend(tmp_path, "--say", "first", "--say-error", "second", idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        assert at(running, "logs", "web") == ""
        at(running, "start", "web")
        assert at(running, "logs", "web") == "first\nsecond\n"
        assert "there is no backend 'nope'" in at(running, "logs", "nope", code=1)


@pytest.mark.slow
def test_logs_are_followed(tmp_path: Path) -> None:
    web = backend(tmp_path, "--say", "a line", idle="1h")
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        at(running, "start", "web")
        following = subprocess.Popen(
            [*DORMANT, "logs", "-f", "web", "--socket", running.admin], stdout=subprocess.PIPE, text=True
        )
        with following:
            assert following.stdout is not None
            assert following.stdout.readline() == "a line\n"
            at(running, "stop", "web")
            at(running, "start", "web")
            assert following.stdout.readline() == "a line\n"
            following.send_signal(signal.SIGINT)
            assert following.wait(PATIENCE) == 130


def test_reload(tmp_path: Path) -> None:
    web = backend(tmp_path)
    with gateway(tmp_path, {"backends": {"web": web}}) as running:
        other = {**backend(tmp_path), "listen": f"unix:{tmp_path}/other.sock"}
        running.write({"backends": {"web": {**web, "idle": "1h"}, "other": other}})
        assert at(running, "reload") == "reloaded: 1 added, 1 changed, 0 removed, 2 backends in all\n"
        running.write({"backends": {"web": {**web, "idel": "1h"}, "fresh": {**other, "driver": "proces"}}})
        said = at(running, "reload", code=1)
        assert "backends.web.idel: unknown key; did you mean 'idle'?" in said
        assert "backends.fresh.driver: unknown driver 'proces'; did you mean 'process'?" in said
        assert [row["name"] for row in running.ask("GET", "/v1/status")["backends"]] == ["web", "other"]


def test_the_socket_is_named_by_the_environment_too(tmp_path: Path) -> None:
    with gateway(tmp_path, {"backends": {"web": backend(tmp_path)}}) as running:
        assert "web" in typed("status", DORMANT_SOCKET=running.admin)
        assert "web" in typed("status", "--socket", "admin.sock", cwd=tmp_path, DORMANT_SOCKET="/nowhere")


# The gateway itself


def test_interrupt_ends_run(tmp_path: Path) -> None:
    with gateway(tmp_path, {"backends": {"web": backend(tmp_path)}}) as running:
        running.signal(signal.SIGINT)
        assert running.process is not None
        assert running.process.wait(PATIENCE) == 0
        running.wait_for_line("stopped")


def test_log_as_json(tmp_path: Path) -> None:
    web = backend(tmp_path, "--say", 'quote " and \\ and ü')
    with gateway(tmp_path, {"backends": {"web": web}}, "--log", "json") as running, connect(web["listen"]) as sock:
        greeting(sock)
    lines = [json.loads(line) for line in running.log.splitlines()]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        assert line["level"] == "info"
        assert set(line) <= {"time", "level", "message", "backend", "output"}
    about_web = [line for line in lines if line.get("backend") == "web"]
    assert {"message": 'quote " and \\ and ü', "output": True}.items() <= about_web[0].items()
    assert about_web[1]["message"].startswith("awake: woken by 127.0.0.1:")
    assert about_web[-1]["message"].startswith("asleep: ")
    assert "backend" not in lines[0]


def test_log_as_text(tmp_path: Path) -> None:
    web = backend(tmp_path, "--say", "good morning")
    with gateway(tmp_path, {"backends": {"web": web}}, "--log", "text") as running, connect(web["listen"]) as sock:
        greeting(sock)
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} ", line) for line in running.log.splitlines())
    assert re.search(r"^[\d:.]+ web \| good morning$", running.log, re.M)
    assert re.search(r"^[\d:.]+ web: awake: woken by ", running.log, re.M)
    assert re.search(r"^[\d:.]+ 1 backend asleep, listening; pid \d+$", running.log, re.M)


def test_log_is_json_by_itself_when_there_is_no_terminal(tmp_path: Path) -> None:
    config = {"gateway": {"log": "auto"}, "backends": {"web": backend(tmp_path)}}
    with gateway(tmp_path, config) as running:
        running.stop()
    assert all(json.loads(line) for line in running.log.splitlines())


def test_log_is_text_on_a_terminal(tmp_path: Path) -> None:
    running = Gateway(tmp_path, {"gateway": {"log": "auto"}, "backends": {"web": backend(tmp_path)}})
    with terminal("run", running.file) as (process, read_until):
        assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} 1 backend ", read_until("asleep, listening"))
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0


def test_log_level(tmp_path: Path) -> None:
    web = backend(tmp_path, command="/no/such/program")
    running = Gateway(tmp_path, {"backends": {"web": web}}, "--log-level", "error")
    running.process = running.launch()
    with contextlib.ExitStack() as stack:
        stack.callback(running.stop)
        with eventually(lambda: try_connect(web["listen"])) as sock:
            assert receive_all(sock) == b""
        running.wait_for_line("start failed")
    assert len(running.log.splitlines()) == 1


# A service in one line


@contextlib.contextmanager
def activated(directory: Path, *words: object) -> Iterator[Gateway]:
    """`dormant activate` with these words; Ctrl-C must end it with status 0."""
    running = Gateway(directory, {})
    line = [*DORMANT, "activate", "--admin", running.admin, "--log", "text", *map(str, words)]
    with contextlib.ExitStack() as stack:
        running.start(line, cwd=directory)
        assert running.process is not None
        stack.callback(running.process.wait)
        stack.callback(running.process.kill)
        yield running
        running.signal(signal.SIGINT)
        assert running.process.wait(PATIENCE) == 0, running.log


def test_activate_with_relay(tmp_path: Path) -> None:
    port, endpoint = free_port(), f"unix:{tmp_path}/backend.sock"
    words = ["--to", endpoint, "--idle", "100ms", "--name", "one", "--", *command("--listen", endpoint)]
    with activated(tmp_path, "-l", f"127.0.0.1:{port}", *words) as running:
        assert running.status("one")["delivery"] == "relay"
        with connect(f"tcp://127.0.0.1:{port}") as sock:
            greeting(sock)
        running.wait_state("one", "stopped")
        assert at(running, "start", "one") == "one: ready\n"


def test_activate_with_pass_is_the_default(tmp_path: Path) -> None:
    port = free_port()
    words = ["-l", f"127.0.0.1:{port}", "-l", f"tcp://[::1]:{port}", "-l", f"{tmp_path}/s", "-l", "unix:./relative"]
    with activated(tmp_path, *words, "--idle", "200ms", "--", *command("--inherit", "--fd-report")) as running:
        assert running.status("activate")["delivery"] == "pass"
        assert list(running.status("activate")["listeners"].values())[2:] == [
            f"unix:{tmp_path}/s",
            f"unix:{tmp_path}/relative",
        ]
        for address in (
            f"tcp://127.0.0.1:{port}",
            f"tcp://::1:{port}",
            f"unix:{tmp_path}/s",
            f"unix:{tmp_path}/relative",
        ):
            with connect(address) as sock:
                greeting(sock)
        running.wait_for_line("fds 0,1,2,3,4,5,6 4 True listen:listen-2:listen-3:listen-4")
        running.wait_state("activate", "stopped")
    assert not (tmp_path / "s").exists()


def test_activate_with_accept(tmp_path: Path) -> None:
    port = free_port()
    with activated(tmp_path, "-l", f"[::1]:{port}", "--delivery", "accept", "--", "cat") as running:
        with connect(f"tcp://::1:{port}") as sock:
            sock.sendall(b"ping")
            assert sock.recv(4) == b"ping"
        running.wait_for_line("exit status 0")


def test_activate_that_notifies(tmp_path: Path) -> None:
    port = free_port()
    words = ["--ready", "notify", "--", *command("--inherit", "--notify-on-signal", "--started", tmp_path / "pid")]
    with activated(tmp_path, "-l", f"localhost:{port}", *words) as running, connect(f"tcp://127.0.0.1:{port}") as sock:
        greeting(sock)
        assert running.status("activate")["state"] == "starting"
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
        running.wait_state("activate", "ready")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-l", "127.0.0.1", "cat"], "backends.activate.listen[0]: 'tcp://127.0.0.1': expected HOST:PORT"),
        (["-l", "80a", "cat"], "expected HOST:PORT"),
        (["-l", "127.0.0.1:1", "--delivery", "relay", "cat"], "backends.activate.endpoint: missing"),
        (["-l", "127.0.0.1:1", "--delivery", "pass", "--to", "127.0.0.1:2", "cat"], "nothing is dialled"),
        (["-l", "127.0.0.1:1", "--ready", "maybe", "cat"], "backends.activate.ready: found 'maybe'"),
        (["-l", "127.0.0.1:1", "--name", "a/b", "cat"], "found the name 'a/b'"),
    ],
)
def test_activate_says_what_is_wrong(words: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["activate", *words])
    assert result.exit_code == 1
    assert said in result.output


def test_activate_on_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = typed("activate", "--admin", tmp_path / "a", "-l", f"127.0.0.1:{port}", "cat", code=1)
    assert (
        f"Error: tcp://127.0.0.1:{port}: the address is in use, by another program or by another listener here" in said
    )
    assert not (tmp_path / "a").exists()
