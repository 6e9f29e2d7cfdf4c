"""Driver `process`: what the contract suite does not ask of every driver."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends import environment
from backends import process as driver
from backends.base import Exit, Exited, PassedSocket, Setup, Shared, StartFailed
from backends.output import KEPT_LINES
from backends.probe import Connect, Notify, Readiness
from backends.process import Process, ProcessOptions
from backends.units import decode
from tests import mimic
from tests.conftest import program
from tests.drivers import line, services
from tests.running import PATIENCE

shared = pytest.fixture(services)

Make = Callable[..., Process]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")


@pytest.fixture
def make(tmp_path: Path, shared: Shared) -> Make:
    def make(command: object, readiness: Readiness | None = None, **options: Any) -> Process:
        parsed = msgspec.convert({"command": command, **options}, ProcessOptions, dec_hook=decode)
        return Process(parsed, Setup("mimic", tmp_path, {}, readiness or Connect(), shared))

    return make


async def said_by(backend: Process, *sockets: PassedSocket) -> list[str]:
    """Run it to its end; its output."""
    await backend.start(sockets)
    await asyncio.wait_for(backend.wait(), PATIENCE)
    return backend.output.fresh()


async def report_of(backend: Process) -> dict[str, str]:
    return dict(text.split("=", 1) for text in await said_by(backend))


REPORT = mimic.command("--report", "--exit-after", 0)


# What cannot be started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": "/nonexistent/nginx -g x"}, "/nonexistent/nginx: No such file or directory"),
        ({"command": "no-such-program"}, "no-such-program: no such program in PATH"),
        ({"command": "./script"}, "{}/script: Exec format error; a script begins with a line such as #!/bin/sh"),
        ({"command": "./no-interpreter"}, "{}/no-interpreter: the interpreter that it names does not exist"),
        ({"command": "./not-executable"}, "{}/not-executable: Permission denied"),
        ({"command": "/"}, "/: Permission denied"),
        ({"command": "true", "cwd": "none"}, "cwd {}/none: No such file or directory"),
        ({"command": "true", "cwd": "not-executable"}, "cwd {}/not-executable: Not a directory"),
        ({"command": "true", "user": "no-such-user"}, "user 'no-such-user': unknown"),
        ({"command": "true", "user": 54321}, "user 54321: unknown, so its group must be configured, too"),
        ({"command": "true", "group": "no-such-group"}, "group 'no-such-group': unknown"),
        ({"command": "true", "rlimits": {"nofile": [9, 5]}}, "rlimit nofile 9:5: Invalid argument"),
        ({"command": "true", "rlimits": {"nofile": 2**40}}, f"rlimit nofile {2**40}:{2**40}: Operation not permitted"),
    ],
)
async def test_what_cannot_be_started_says_why(
    make: Make, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for name, text, mode in (
        ("script", "echo no interpreter line", 0o755),
        ("no-interpreter", "#!/nonexistent/sh\n", 0o755),
        ("not-executable", "#!/bin/sh\n", 0o644),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    backend = make(**options)
    with pytest.raises(StartFailed) as caught:
        await backend.start()
    assert str(caught.value) == message.format(tmp_path)
    assert await backend.wait() == Exit()


@needs_root
async def test_without_the_right_it_cannot_be_started_as_somebody_else(make: Make, tmp_path: Path) -> None:
    script = f"""
import asyncio, os, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from backends.base import Setup, Shared, StartFailed
from backends.probe import Connect
from backends.process import Process, ProcessOptions
from backends.units import Command

async def main():
    shared = Shared()
    for options in ({{"user": "daemon"}}, {{"group": 1}}, {{"user": 0}}):
        setup = Setup("x", Path("/"), {{}}, Connect(), shared)
        backend = Process(ProcessOptions(command=Command(["true"]), **options), setup)
        try:
            await backend.start()
            print("started")
        except StartFailed as error:
            print(error)
    await shared.close()

asyncio.run(main())
"""
    without = [program("setpriv"), "--bounding-set", "-setuid,-setgid"]
    said = await said_by(make([*without, mimic.command()[0], "-c", script]))
    assert said == ["group 1: Operation not permitted", "group 1: Operation not permitted", "started"]


async def test_without_descriptors_the_start_fails_and_recovers(make: Make) -> None:
    backend = make("true")
    assert await said_by(backend) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            with pytest.raises(StartFailed, match="Too many open files"):
                await backend.start()
            with pytest.raises(StartFailed, match="Too many open files"):
                await backend.serve(theirs, {})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await said_by(backend) == []


# What it finds when it runs


async def test_it_has_no_descriptor_but_its_own(make: Make) -> None:
    with socket.socket() as leaked:
        leaked.set_inheritable(True)
        said = await said_by(make(mimic.command("--fd-report", "--exit-after", 0)))
    assert said == ["fds 0,1,2 None False None"]


async def test_many_sockets_keep_their_order(make: Make) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(40)]
        for sock in sockets:
            sock.setblocking(False)
        passed = [PassedSocket(f"s{number}", sock) for number, sock in enumerate(sockets)]
        said = await said_by(make(mimic.command("--fd-report", "--exit-after", 0)), *passed)
        names = ":".join(f"s{number}" for number in range(40))
        assert said == [f"fds {','.join(map(str, range(43)))} 40 True {names}"]
        assert all(os.get_blocking(sock.fileno()) for sock in sockets)


async def test_more_sockets_than_fit_are_refused(make: Make) -> None:
    with socket.socket() as sock, pytest.raises(StartFailed, match="300 sockets cannot be handed over; allowed: 249"):
        await make("true").start([PassedSocket("many", sock)] * 300)


async def test_it_begins_with_a_clean_slate_of_signals(make: Make) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        said = await said_by(make(["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    masks = {name: int(mask, 16) for name, mask in map(str.split, said)}
    # Signals 32 and 33 belong to the C library, which lets nobody touch them: they stay as they were for us.
    assert masks["SigBlk:"] == 0
    assert masks["SigIgn:"] & ~(3 << 31) == 0


async def test_it_leads_its_own_session_and_has_blocking_stdio(make: Make) -> None:
    report = await report_of(make(REPORT))
    assert report["session"] == "True"
    assert report["blocking"] == "True,True,True"


async def test_its_environment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "INVOCATION_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("INHERITED", "caf\udce9")  # not UTF-8
    said = await said_by(make("env", env={"PORT": 80, "TEXT": "a b=c"}))
    names = {text.partition("=")[0] for text in said}
    assert {"PORT=80", "TEXT=a b=c", "DORMANT_BACKEND=mimic", "INHERITED=caf\ufffd"} <= set(said)
    assert not names & {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "INVOCATION_ID"}


async def test_paths_are_relative_to_the_folder_of_the_configuration(make: Make, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "where").write_text("#!/bin/sh\npwd\n")
    (tmp_path / "bin" / "where").chmod(0o755)
    assert await said_by(make("bin/where")) == [str(tmp_path)]
    assert await said_by(make("./bin/where", cwd="bin")) == [str(tmp_path / "bin")]
    assert await said_by(make("bin/where", cwd="/")) == ["/"]


async def test_umask_and_limits(make: Make) -> None:
    report = await report_of(make(REPORT, umask="0027", rlimits={"nofile": [100, 200], "core": "unlimited"}))
    assert (report["umask"], report["nofile"], report["core"]) == ("0027", "100:200", "-1:-1")
    report = await report_of(make(REPORT, umask=0o77, rlimits={"nofile": 64, "core": "0", "data": "2GiB"}))
    assert (report["umask"], report["nofile"], report["core"]) == ("0077", "64:64", "0:0")


async def test_the_limit_of_open_files_is_the_one_that_the_gateway_had(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway raises its own, which many programs do not bear."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(driver, "NOFILE", 128)
    assert (await report_of(make(REPORT)))["nofile"] == f"128:{hard}"
    assert (await report_of(make(REPORT, rlimits={"nofile": 64})))["nofile"] == "64:64"


@pytest.mark.parametrize(("told", "limit"), [({}, 99), ({environment.NOFILE_VARIABLE: "77"}, 77)])
def test_that_limit_is_known_before_it_is_raised_and_after_a_replacement(told: dict[str, str], limit: int) -> None:
    script = "from backends.environment import *; print(NOFILE, [name for name in inherited() if 'NOFILE' in name])"
    said = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -Sn 99; exec "$0" -c "$1"', sys.executable, script],
        env=os.environ | told,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == f"{limit} []\n"


@needs_root
@pytest.mark.parametrize(
    ("options", "uid", "gid", "groups"),
    [
        ({"user": "nobody"}, "65534", "65534", "65534"),
        ({"user": "nobody", "group": "daemon"}, "65534", "1", "1 65534"),
        ({"group": 1}, "0", "1", "1" + "".join(f" {gid}" for gid in os.getgroups())),
        ({"user": 54321, "group": 54322}, "54321", "54322", "54322"),  # nobody's numbers
    ],
)
async def test_it_runs_as_its_user(make: Make, options: dict[str, Any], uid: str, gid: str, groups: str) -> None:
    assert pwd.getpwnam("nobody").pw_uid == 65534
    assert await said_by(make(["/bin/sh", "-c", "id -u; id -g; id -G"], cwd="/", **options)) == [uid, gid, groups]


@needs_root
async def test_the_environment_is_its_users(make: Make) -> None:
    said = await said_by(make("env", user="nobody", cwd="/", env={"USER": "somebody"}))
    assert {f"HOME={pwd.getpwnam('nobody').pw_dir}", "LOGNAME=nobody", "USER=somebody"} <= set(said)


# Its output


async def test_a_flood_of_output_is_taken_and_its_last_lines_are_kept(make: Make) -> None:
    said = await said_by(make("seq 200000"))
    assert said == [str(number) for number in range(200001 - KEPT_LINES, 200001)]


async def test_a_last_line_without_an_end_is_a_line(make: Make) -> None:
    assert await said_by(make("printf 'one\\ntwo'")) == ["one", "two"]


# notify


async def test_it_is_ready_when_it_says_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/of/the/gateway")
    backend = make(mimic.command("--status", "half way", "--notify-on-signal", "--say", "up"), Notify())
    for _ in range(2):
        await backend.start()
        await line(backend, "up")
        ready = asyncio.create_task(backend.ready())
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            while backend.trouble != "it has not said READY=1":
                await asyncio.sleep(0)
        assert not ready.done()
        assert backend._child is not None
        backend._child.signal(signal.SIGUSR1)
        assert await asyncio.wait_for(ready, PATIENCE) == {}
        await backend.stop(PATIENCE)


async def test_what_dies_before_it_says_so_is_not_ready(make: Make) -> None:
    backend = make(mimic.command("--say", "no", "--exit-after", 0, "--exit-code", 9), Notify())
    await backend.start()
    with pytest.raises(Exited, match="exit status 9") as caught:
        await asyncio.wait_for(backend.ready(), PATIENCE)
    assert caught.value.lines == ("no",)


async def test_nobody_else_can_say_so(make: Make) -> None:
    backend = make(mimic.command("--environment", "NOTIFY_SOCKET", "--say", "up", "--notify-on-signal"), Notify())
    await backend.start()
    address = (await line(backend, "NOTIFY_SOCKET=")).partition("=")[2]
    assert backend._run is not None
    assert backend._run.notifications is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as forger:
        forger.connect("\0" + address[1:])
        forger.send(b"READY=1")
        ready = asyncio.create_task(backend.ready())
        assert backend._child is not None
        backend._child.signal(signal.SIGUSR1)  # comes after the forged message
        await asyncio.wait_for(backend._run.notifications.ready.wait(), PATIENCE)
        await asyncio.wait_for(ready, PATIENCE)
        await backend.stop(PATIENCE)
        with pytest.raises(ConnectionRefusedError):
            forger.send(b"READY=1")


async def test_a_forged_message_alone_makes_nothing_ready(make: Make) -> None:
    backend = make(mimic.command("--environment", "NOTIFY_SOCKET", "--status", "genuine"), Notify())
    await backend.start()
    address = (await line(backend, "NOTIFY_SOCKET=")).partition("=")[2]
    assert backend._run is not None
    assert backend._run.notifications is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as forger:
        forger.connect("\0" + address[1:])
        forger.send(b"READY=1")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(backend.ready(), 0.05)
    await backend.stop(PATIENCE)


async def test_a_message_is_its_own_when_descent_and_user_are_right(make: Make) -> None:
    """Anybody can copy the mark by which descendants are known."""
    backend = make(mimic.command("--fork"), Notify())
    await backend.start()
    descendant = int((await line(backend, "child ")).split()[1])
    run, uid, other = backend._run, os.geteuid(), 54321
    assert run is not None and run.child is not None and run.child.pid is not None
    assert run._belongs(descendant, uid) and run._belongs(descendant, 0)
    assert not run._belongs(descendant, other)
    assert not run._belongs(os.getpid(), uid)
    assert run._belongs(run.child.pid, other)  # it gave up its rights
    await backend.stop(PATIENCE)


async def test_systemd_notify_of_a_shell_script_is_heard(make: Make) -> None:
    backend = make(["/bin/sh", "-c", f"{program('systemd-notify')} --ready; exec sleep 1000"], Notify())
    await backend.start()
    await asyncio.wait_for(backend.ready(), PATIENCE)
    await backend.stop(PATIENCE)


async def test_a_sender_that_is_gone_already_is_known_by_its_user(make: Make) -> None:
    send = (
        'import os,socket; s=socket.socket(1,2); s.connect("\\0"+os.environ["NOTIFY_SOCKET"][1:]); s.send(b"READY=1")'
    )
    script = f"{mimic.command()[0]} -I -S -c '{send}'; echo sent; exec sleep 1000"
    backend = make(["/bin/sh", "-c", script], Notify())
    await backend.start()
    await asyncio.wait_for(backend.ready(), PATIENCE)
    await backend.stop(PATIENCE)


# The rest


async def test_usage_counts_descendants(make: Make) -> None:
    alone = make(mimic.command("--say", "up"))
    await alone.start()
    await line(alone, "up")
    shell = make(["/bin/sh", "-c", " ".join(mimic.command("--say", "up")) + "; true"])
    await shell.start()
    await line(shell, "up")
    one, with_shell = await alone.usage(), await shell.usage()
    assert one.memory is not None
    assert with_shell.memory is not None
    assert with_shell.memory > 2 << 20
    assert one.cpu is not None
    assert 0 <= one.cpu < 5
    await alone.stop(PATIENCE)
    await shell.stop(PATIENCE)


async def test_a_kill_after_the_grace_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    for arguments, said in ((["--ignore-term"], ["stop_grace: it has not ended after 50ms; killed"]), ([], [])):
        caplog.clear()
        backend = make(mimic.command(*arguments, "--say", "up"))
        await backend.start()
        await line(backend, "up")
        await backend.stop(0.05 if arguments else PATIENCE)
        assert caplog.messages == said
        assert [record.__dict__["backend"] for record in caplog.records] == ["mimic"] * len(said)


async def test_the_next_life_begins_when_all_of_the_former_is_gone(make: Make) -> None:
    backend = make(mimic.command("--say", "up"))
    await backend.start()
    await line(backend, "up")
    former = backend._child
    assert former is not None and former.pid is not None
    nursery = former._nest._process.pid
    os.kill(nursery, signal.SIGSTOP)
    try:
        os.kill(former.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            while not former.dead:
                await asyncio.sleep(0)
        assert not former.gone
        starting = asyncio.create_task(backend.start())
        await asyncio.sleep(0.05)  # time for what must not happen while the nursery is stopped
        assert backend._child is former
    finally:
        os.kill(nursery, signal.SIGCONT)
    await asyncio.wait_for(starting, PATIENCE)
    assert former.gone and backend._child is not former
    await backend.stop(PATIENCE)


async def test_a_frozen_one_that_is_killed_is_gone(make: Make) -> None:
    backend = make(mimic.command("--say", "up"))
    await backend.start()
    await backend.freeze()
    assert backend._child is not None
    assert backend._child.pid is not None
    os.kill(backend._child.pid, signal.SIGKILL)
    assert await asyncio.wait_for(backend.wait(), PATIENCE) == Exit(signal=signal.SIGKILL)
    await backend.thaw()
    await backend.stop(PATIENCE)


async def test_an_instance_gets_its_environment_and_an_own_line_each(make: Make) -> None:
    backend = make(["/bin/sh", "-c", 'echo "$REMOTE_ADDR $REMOTE_PORT $LISTEN_FDS"; printf "for the log" >&2'])
    pairs = [socket.socketpair() for _ in range(5)]
    serving = [
        backend.serve(theirs, {"REMOTE_ADDR": "192.0.2.1", "REMOTE_PORT": str(port)})
        for port, (_, theirs) in enumerate(pairs)
    ]
    assert await asyncio.wait_for(asyncio.gather(*serving), PATIENCE) == [Exit(code=0)] * 5
    for port, (ours, theirs) in enumerate(pairs):
        theirs.close()
        assert ours.recv(100) == f"192.0.2.1 {port} \n".encode()
        assert ours.recv(100) == b""
        ours.close()
    assert backend.output.tail() == ["for the log"] * 5


async def test_an_instance_that_cannot_be_started_says_why(make: Make) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(StartFailed, match="/none: No such file"):
        await make("/none").serve(theirs, {})


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
async def test_a_cancelled_instance_leaves_nothing(make: Make, turns: int) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        serving = asyncio.create_task(make("sleep 1000").serve(theirs, {}))
        for _ in range(turns):
            await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        theirs.close()
        assert ours.recv(1) == b""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "missing required field `command`"),
        ({"command": ""}, "is not a command"),
        ({"command": "true", "comand": 1}, "unknown field `comand`"),
        ({"command": "true", "umask": "99"}, "'99' is not a file mode mask"),
        ({"command": "true", "umask": 4096}, "4096 is not a file mode mask"),
        ({"command": "true", "rlimits": {"files": 1}}, "'files' is not a resource limit; allowed: as, core"),
        ({"command": "true", "rlimits": {"nofile": "many"}}, "'many' is not a size"),
        ({"command": "true", "rlimits": {"nofile": [1]}}, r"nofile: \[1\] is not a limit"),
        ({"command": "true", "env": {"A=B": "c"}}, "is not the name of an environment variable"),
        ({"command": "true", "env": {"A": ["c"]}}, "Expected `int | str`"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(options, ProcessOptions, dec_hook=decode)
