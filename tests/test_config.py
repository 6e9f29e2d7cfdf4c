"""`gateway.config`: what is taken, what is refused and in which words, and how much it costs.

Each pair of files `config/NAME.yaml` and `config/NAME.expected` is a case of what is refused: a new case is two new files.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import pytest

import backends
from backends.base import Backend, Capability, Exit, Status
from backends.endpoint import Tcp, Udp, Unix, Unixgram, Vsock
from backends.external import Action
from backends.probe import Connect, Delay, Exec, Http, Log, Notify, Query
from backends.units import Command, Duration, Size
from gateway.backend import KEYS, Entry
from gateway.config import (
    BackendConfig,
    Config,
    ConfigError,
    Delivery,
    GatewayOptions,
    Idle,
    Limits,
    Listener,
    Then,
    build,
    default_admin,
    default_state_directory,
    load,
)
from gateway.document import DEEPEST, LARGEST_FILE
from gateway.parsing import fields

CASES = Path(__file__).with_name("config")
EXAMPLES = Path(__file__).parent.parent / "config"
ENVIRONMENT = {
    "SET": "set",
    "WORD": "word",
    "NUMBER": "5",
    "EMPTY": "",
    "LINES": "tcp://127.0.0.1:80\n    delivery: pass\n    idle: *a",
}
QUICKSTART = {"DORMANT_SOCKET": "/tmp/x.sock", "PORT": "1", "SITE_PORT": "2", "TIME_PORT": "3", "BACKEND_PORT": "4"}


def read(text: str, directory: Path, environment: Mapping[str, str] = ENVIRONMENT) -> Config:
    path = directory / "dormant.yaml"
    path.write_text(text)
    return load(path, environment)


def one(text: str, directory: Path, environment: Mapping[str, str] = ENVIRONMENT) -> BackendConfig:
    """A backend of these keys, relayed to unless they say otherwise."""
    lines = text.splitlines() if text.startswith("command:") else ["command: x", *text.splitlines()]
    if "listen:" not in text:
        lines.append("listen: tcp://127.0.0.1:80")
    if "endpoint" not in text and "delivery:" not in text:
        lines.append("endpoint: tcp://127.0.0.1:81")
    return read("backends:\n  web:\n    " + "\n    ".join(lines), directory, environment).backends["web"]


def problems(path: Path, environment: Mapping[str, str] = ENVIRONMENT) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, environment)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# What is refused


@pytest.mark.parametrize("case", sorted(path.stem for path in CASES.glob("*.yaml")))
def test_the_problems_of_a_file(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CASES)
    found = [line.replace(str(CASES), "DIRECTORY") for line in problems(Path(f"{case}.yaml"))]
    assert found == (CASES / f"{case}.expected").read_text().splitlines()


def test_every_case_has_its_file() -> None:
    assert {path.stem for path in CASES.glob("*.expected")} == {path.stem for path in CASES.glob("*.yaml")}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x7fELF\0\0\0", "is a binary file; allowed: YAML in UTF-8"),
        (b"backends:\n  caf\xe9: 1\n", "line 2: byte 0xe9 is not UTF-8"),
        ("backends: {}".encode("utf-16"), "is a binary file"),
        (b"a: " + b"x" * LARGEST_FILE, "is larger than 16 MiB"),
        (b"[" * 100_000, "nest"),
        (b"- " * 100_000, f"nested more than {DEEPEST} levels deep"),
        (b"{" * 100_000, "nest"),
        (b"? " * 100_000, f"nested more than {DEEPEST} levels deep"),
        pytest.param(b"- \n" * 1_000_001, "more than 1000000 values", marks=pytest.mark.slow),
    ],
    ids=["binary", "latin", "utf-16", "huge", "brackets", "dashes", "braces", "keys", "many"],
)
def test_what_is_no_configuration_is_one_clear_line(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "dormant.yaml"
    path.write_bytes(data)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: ")
    assert said in problem


def test_a_path_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    assert problems(tmp_path) == [f"{tmp_path}: is a directory; allowed: a YAML file"]
    assert problems(tmp_path / "missing") == [f"{tmp_path}/missing: does not exist"]
    assert problems(tmp_path / "fifo") == [f"{tmp_path}/fifo: is not a regular file; allowed: a YAML file"]
    assert problems(tmp_path / "loop") == [f"{tmp_path}/loop: cannot be read: Too many levels of symbolic links"]
    assert problems(Path("/dev/zero")) == ["/dev/zero: is not a regular file; allowed: a YAML file"]


def test_a_file_without_the_right_to_read_it_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "dormant.yaml"
    path.write_text("backends: {}")
    path.chmod(0)
    with as_nobody():
        assert problems(path) == [f"{path}: cannot be read: Permission denied"]


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_all_problems_of_all_files_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: [b.yaml]\nbackends: {x: {listn: 1}}\n")
    (tmp_path / "b.yaml").write_text("backends: {y: {listn: 1}\n")
    found = problems(tmp_path / "a.yaml")
    assert any(line.startswith(f"{tmp_path}/b.yaml: line ") for line in found)
    assert any(
        line.startswith(f"{tmp_path}/a.yaml: backends.x.listn: unknown key; did you mean 'listen'?") for line in found
    )
    assert any(line.startswith(f"{tmp_path}/a.yaml: backends.x.command: missing") for line in found)


def test_no_value_makes_a_message_long_or_two_lines(tmp_path: Path) -> None:
    long = "x" * 100_000
    path = tmp_path / "dormant.yaml"
    path.write_text(
        f"backends:\n  {long}: {{}}\n  web:\n    listen: {long}\n    command: '{long} \"'\n    idle: {long}\n    {long}: 1\n"
        f'    delivery: "a\\n{long}"\n    ready: {{log: "({long}"}}\n    limits: {{connections: "${{{long}}}"}}\n'
    )
    for line in problems(path, {}):
        assert "\n" not in line
        assert len(line) < 1500


@pytest.mark.slow
def test_damaged_files_are_refused_or_taken_but_nothing_else_happens(tmp_path: Path) -> None:
    chance = random.Random(1)
    source = b"".join((EXAMPLES / f"{name}.yaml").read_bytes() for name in ("reference",))
    path = tmp_path / "dormant.yaml"
    for _ in range(400):
        data = bytearray(source)
        for _ in range(chance.randint(1, 6)):
            start = chance.randrange(len(data))
            piece = chance.choice(
                [b"", b"{", b"[", b"\n", b"  ", b":", b"- ", b"*a ", b"&a ", b"!!x ", b"${", b"'", b"\xff"]
            )
            data[start : start + chance.randint(0, 9)] = piece
        path.write_bytes(data)
        with contextlib.suppress(ConfigError):
            load(path, {})


# What is taken


def test_the_least_that_a_file_needs(tmp_path: Path) -> None:
    config = read(
        "backends:\n  web: {command: nginx, listen: 'tcp://*:80', endpoint: 'tcp://127.0.0.1:81'}", tmp_path, {}
    )
    assert config.files == (tmp_path / "dormant.yaml",)
    assert config.gateway == GatewayOptions(admin=default_admin({}), state_directory=default_state_directory({}))
    web = config.backends["web"]
    assert web.driver == "process"
    assert web.listeners == (Listener("listen", Tcp("*", 80), 4096, False),)
    assert (web.delivery, web.endpoints) == (Delivery.RELAY, {"": Tcp("127.0.0.1", 81)})
    assert (web.ready, web.idle, web.limits) == (Connect(), Idle(), Limits())
    assert (web.start_timeout, web.stop_grace) == (60, 10)
    assert (web.directory, web.origin) == (tmp_path, f"{tmp_path}/dormant.yaml: backends.web")
    assert (web.idle.after, web.idle.min_uptime, web.idle.then, web.idle.stop_after) == (300, 0, Then.STOP, None)
    assert msgspec.structs.astuple(web.limits) == (10000, 10000, 5, None, 30, 16, 1 << 20)


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("tcp://127.0.0.1:1", [("listen", 1, 4096)]),
        ("[tcp://127.0.0.1:1, tcp://127.0.0.1:2]", [("listen", 1, 4096), ("listen-2", 2, 4096)]),
        ("{a: tcp://127.0.0.1:1, b: tcp://127.0.0.1:2}", [("a", 1, 4096), ("b", 2, 4096)]),
        ("{address: tcp://127.0.0.1:1, backlog: 5}", [("listen", 1, 5)]),
        ("{address: tcp://127.0.0.1:1, name: x}", [("x", 1, 4096)]),
        ("{a: {address: tcp://127.0.0.1:1, backlog: 5}}", [("a", 1, 5)]),
        ("[tcp://127.0.0.1:1, {address: tcp://127.0.0.1:2, name: x}, tcp://127.0.0.1:3]",
         [("listen", 1, 4096), ("x", 2, 4096), ("listen-3", 3, 4096)]),
    ],
)  # fmt: skip
def test_the_forms_of_listen(listen: str, expected: list[tuple[str, int, int]], tmp_path: Path) -> None:
    listeners = one(f"listen: {listen}", tmp_path).listeners
    assert [(item.name, item.endpoint.port, item.backlog) for item in listeners] == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("idle", "expected"),
    [
        ("30s", Idle(after=Duration(30))),
        ("30", Idle(after=Duration(30))),
        ("never", Idle(after=None)),
        ("{}", Idle()),
        ("{after: never}", Idle(after=None)),
        ("{min_uptime: 1m}", Idle(min_uptime=Duration(60))),
        ("{after: 1m, then: freeze, stop_after: 1h}", Idle(Duration(60), Duration(0), Then.FREEZE, Duration(3600))),
    ],
)
def test_the_forms_of_idle(idle: str, expected: Idle, tmp_path: Path) -> None:
    assert one(f"idle: {idle}", tmp_path).idle == expected


@pytest.mark.parametrize(
    ("ready", "expected"),
    [
        ("connect", Connect()),
        ("{connect: }", Connect()),
        ("{connect: {}}", Connect()),
        ("http", Http()),
        ("{http: /health}", Http("/health")),
        ("{http: {path: /health, status: 204}}", Http("/health", 204)),
        ("notify", Notify()),
        ("{exec: 'pg_isready -q'}", Exec(Command(("pg_isready", "-q")))),
        ("{exec: [a, 1]}", Exec(Command(("a", "1")))),
        ("{exec: {command: a, timeout: 1s}}", Exec(Command(("a",)), Duration(1))),
        ("{log: ready to accept}", Log("ready to accept")),
        ("{delay: 2s}", Delay(Duration(2))),
    ],
)
def test_the_forms_of_ready(ready: str, expected: Any, tmp_path: Path) -> None:
    assert one(f"ready: {ready}", tmp_path).ready == expected


def test_endpoints_of_single_listeners(tmp_path: Path) -> None:
    web = one("listen: {a: unix:a, b: tcp://*:1}\nendpoint: unix:./c\nendpoints: {a: 'vsock://guest:5'}", tmp_path)
    assert web.endpoints == {"": Unix(str(tmp_path / "c")), "a": Vsock("guest", 5)}


@pytest.mark.parametrize("delivery", [Delivery.PASS, Delivery.ACCEPT])
def test_other_deliveries_have_no_endpoint(delivery: Delivery, tmp_path: Path) -> None:
    web = one(f"delivery: {delivery.value}\nlisten: [unix:a, 'tcp://127.0.0.1:80']", tmp_path)
    assert (web.delivery, web.endpoints, web.ready) == (delivery, {}, Connect())


def test_datagrams_can_be_handed_over(tmp_path: Path) -> None:
    web = one("delivery: pass\nlisten: [udp://127.0.0.1:53, unixgram:a, tcp://127.0.0.1:53]", tmp_path)
    assert web.listeners[0].endpoint == Udp("127.0.0.1", 53)


@pytest.mark.parametrize("ready", ["{udp: ping}", "{exec: x}", "notify", "{log: x}", "{delay: 1s}"])
def test_datagrams_can_be_relayed(ready: str, tmp_path: Path) -> None:
    web = one(f"listen: [udp://127.0.0.1:53, unixgram:a]\nendpoint: unixgram:b\nready: {ready}", tmp_path)
    assert web.endpoints == {"": Unixgram(str(tmp_path / "b"))}
    assert web.ready in (Query("ping"), Exec(Command(["x"])), Notify(), Log("x"), Delay(Duration(1)))
    assert (web.limits.flow_timeout, web.limits.flow_datagrams, web.limits.flow_bytes) == (30, 16, 1 << 20)


@pytest.mark.parametrize("ready", ["connect", "http", "{udp: ping}"])
def test_streams_and_datagrams_have_an_endpoint_each(ready: str, tmp_path: Path) -> None:
    web = one(
        "listen: {dns: 'udp://127.0.0.1:53', web: 'tcp://127.0.0.1:53', given: 'fd://dns'}\n"
        f"endpoint: tcp://127.0.0.1:54\nendpoints: {{dns: 'udp://127.0.0.1:54'}}\nready: {ready}",
        tmp_path,
    )
    assert web.endpoints == {"": Tcp("127.0.0.1", 54), "dns": Udp("127.0.0.1", 54)}


def test_an_external_backend(tmp_path: Path) -> None:
    text = (
        "driver: external, start: {command: a b, timeout: 2m}, stop: [c, d], listen: 'tcp://*:1', endpoint: 'tcp://h:1'"
    )
    options: Any = read(f"backends: {{web: {{{text}}}}}", tmp_path).backends["web"].options
    assert options.start == Action(Command(("a", "b")), Duration(120))
    assert (options.stop, options.status) == (["c", "d"], None)


def test_paths_are_relative_to_the_file_that_they_stand_in(tmp_path: Path) -> None:
    sub = tmp_path / "sites.d" / "deep"
    sub.mkdir(parents=True)
    (sub / "a.yaml").write_text("backends: {a: {command: x, delivery: pass, listen: 'unix:a.sock'}}")
    config = read("gateway: {admin: ./admin.sock, state_directory: state}\ninclude: ['sites.d/**/*.yaml']\n", tmp_path)
    backend = config.backends["a"]
    assert (config.gateway.admin, config.gateway.state_directory) == (f"{tmp_path}/admin.sock", f"{tmp_path}/state")
    assert backend.listeners[0].endpoint == Unix(str(sub / "a.sock"))
    assert backend.directory == sub
    assert backend.origin == f"{sub}/a.yaml: backends.a"
    assert config.files == (tmp_path / "dormant.yaml", sub / "a.yaml")


def test_a_relative_path_of_the_file_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read("backends: {a: {command: x, delivery: pass, listen: 'unix:a.sock'}}", tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load(Path("dormant.yaml"), {})
    assert config.backends["a"].listeners[0].endpoint == Unix(str(tmp_path / "a.sock"))
    assert config.backends["a"].origin == "dormant.yaml: backends.a"
    assert config.files == (tmp_path / "dormant.yaml",)


# Scalars and variables (more in test_document)


def test_a_mask_can_be_written_as_everybody_writes_it(tmp_path: Path) -> None:
    options: Any = one("umask: 022", tmp_path).options
    assert options.umask == 0o022


def test_a_variable_can_stand_for_a_number(tmp_path: Path) -> None:
    web = one(
        'limits: {connections: "${NUMBER}", pending: "${UNSET:-7}"}\nlisten: {address: unix:@a, reuse_port: "${YES}"}',
        tmp_path,
        {"NUMBER": "5", "YES": "true"},
    )
    assert (web.limits.connections, web.limits.pending, web.listeners[0].reuse_port) == (5, 7, True)


def test_quoted_numbers_are_not_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found '5'; allowed: a whole number"):
        one('limits: {connections: "5"}', tmp_path)


def test_what_a_variable_holds_stays_text(tmp_path: Path) -> None:
    options: Any = one('command: [echo, "${A}"]\nenv: {A: "${B}"}', tmp_path, {"A": "] x: [", "B": "${A}"}).options
    assert options.command == ("echo", "] x: [")
    assert options.env == {"A": "${A}"}


# Documents made in memory


def test_a_document_made_in_memory_is_checked_and_not_expanded(tmp_path: Path) -> None:
    document = {"backends": {"a": {"command": ["echo", "${HOME}", "$$"], "listen": "unix:a", "delivery": "pass"}}}
    config = build(document, tmp_path, "command line")
    options: Any = config.backends["a"].options
    assert options.command == ("echo", "${HOME}", "$$")
    assert (config.backends["a"].origin, config.files) == ("command line: backends.a", ())
    with pytest.raises(ConfigError) as caught:
        build({"backends": {"a": {**document["backends"]["a"], "idel": "5m"}}}, tmp_path, "command line")
    assert caught.value.problems[0].startswith("command line: backends.a.idel: unknown key; did you mean 'idle'?")


# Comparing, for a reload


def test_backends_that_say_the_same_are_equal(tmp_path: Path) -> None:
    keys = {"ready": "{exec: a b}", "idle": "5m", "env": "{A: b}", "listen": "unix:/a"}

    def written(directory: Path = tmp_path, **changes: str) -> BackendConfig:
        return one("\n".join(f"{key}: {value}" for key, value in {**keys, **changes}.items()), directory)

    first, same = written(), written(limits="{}")
    assert first == same
    assert hash(first) == hash(same)
    assert first == msgspec.structs.replace(same, origin="elsewhere")
    assert first != "web"
    for change in (
        {"idle": "6m"},
        {"env": "{A: c}"},
        {"listen": "unix:/b"},
        {"limits": "{pending: 5}"},
        {"stop_grace": "1s"},
    ):
        assert first != written(**change)
    (tmp_path / "other").mkdir()
    assert first != written(tmp_path / "other"), "relative paths mean something else there"


def test_equal_parts_are_kept_once(tmp_path: Path) -> None:
    keys = "command: x, delivery: pass, idle: 7m, limits: {pending: 9}, ready: {http: /a}"
    a, b = read(
        f"backends:\n  a: {{{keys}, listen: unix:/a}}\n  b: {{{keys}, listen: unix:/b}}", tmp_path
    ).backends.values()
    assert a.idle is b.idle
    assert a.limits is b.limits
    assert a.ready is b.ready
    assert a.directory is b.directory


# Drivers


class Mount(msgspec.Struct, frozen=True):
    source: str
    target: str = "/"


class SampleOptions(msgspec.Struct, frozen=True, kw_only=True):
    image: str
    memory: Size = Size(0)
    mode: Literal["fast", "slow"] = "fast"
    mounts: tuple[Mount, ...] = ()
    labels: dict[str, Mount] = {}
    rooms: list[Duration | None] = []


class Sample(Backend):
    """A driver from outside, which can do nothing."""

    Options: ClassVar[type[msgspec.Struct]] = SampleOptions
    capabilities = Capability.NONE

    async def start(self, sockets: Any = ()) -> None: ...
    async def wait(self) -> Exit:
        return Exit()

    async def stop(self, grace: float) -> None: ...
    async def status(self) -> Status:
        return Status.STOPPED


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.DRIVERS, "sample", f"{__name__}:Sample")


@pytest.mark.usefixtures("sample")
def test_the_options_of_a_driver_are_its_own_type(tmp_path: Path) -> None:
    text = "driver: sample\nimage: a\nmemory: 1MiB\nmounts: [/a, {source: /b, target: /c}]\nlabels: {x: /d}\nrooms: [never, 1s]"
    config = read(
        "backends:\n  a:\n    " + "\n    ".join([*text.splitlines(), "listen: unix:/a", "endpoint: unix:/b"]), tmp_path
    )
    assert config.backends["a"].options == SampleOptions(
        image="a",
        memory=Size(1 << 20),
        mounts=(Mount("/a"), Mount("/b", "/c")),
        labels={"x": Mount("/d")},
        rooms=[None, Duration(1)],
    )


@pytest.mark.usefixtures("sample")
def test_problems_inside_the_options_of_a_driver_are_located(tmp_path: Path) -> None:
    text = "driver: sample, listen: unix:/a, delivery: pass, idle: {then: freeze}, memory: much, mode: slwo, "
    text += "mounts: [5, {source: a, tagret: b}], labels: {x: {}}, rooms: [1s, soon]"
    path = tmp_path / "dormant.yaml"
    path.write_text(f"backends: {{a: {{{text}}}}}")
    assert [line.removeprefix(f"{path}: backends.a.") for line in problems(path)] == [
        "memory: found 'much'; allowed: a size such as 4096, 64KiB or 2GiB",
        "mode: found 'slwo'; did you mean 'slow'? allowed: fast, slow",
        "mounts[0]: found 5; allowed: text, or a mapping with the keys source, target",
        "mounts[1].tagret: unknown key; did you mean 'target'? allowed: source, target",
        "labels.x.source: missing; allowed: text",
        "rooms[1]: found 'soon'; allowed: a duration such as 500ms, 30s, 5m or 1h, never",
        "image: missing; allowed: text",
        "delivery: driver sample cannot do delivery pass; allowed: another delivery (drivers that can do pass: process)",
        "idle.then: this driver cannot freeze; allowed: stop (drivers that can: process)",
    ]


def test_a_driver_whose_library_is_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.DRIVERS, "pod", "no_such_library:Pod")
    monkeypatch.setitem(backends.EXTRAS, "no_such_library", "podman")
    path = tmp_path / "dormant.yaml"
    path.write_text("backends: {a: {driver: pod, image: x, listen: unix:/a, endpoint: unix:/b}}")
    assert problems(path) == [
        f"{path}: backends.a.driver: driver 'pod' needs no_such_library: pip install 'dormant[podman]'"
    ]


@pytest.mark.parametrize("name", backends.names())
def test_no_driver_has_a_key_that_every_backend_has(name: str) -> None:
    assert not set(fields(backends.load(name).Options)) & set(KEYS)


# Defaults that depend on where it runs


def test_the_defaults_of_paths() -> None:
    assert default_state_directory({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}) == "/var/lib/a"
    if os.geteuid() == 0:
        assert default_admin({"XDG_RUNTIME_DIR": "/run/user/5"}) == "/run/dormant/admin.sock"
        assert default_state_directory({"HOME": "/root"}) == "/var/lib/dormant"
        os.seteuid(65534)
    try:
        assert default_admin({"XDG_RUNTIME_DIR": "/run/user/5"}) == "/run/user/5/dormant/admin.sock"
        assert default_admin({}) == f"/run/user/{os.geteuid()}/dormant/admin.sock"
        assert default_state_directory({"XDG_STATE_HOME": "/s", "HOME": "/h"}) == "/s/dormant"
        assert default_state_directory({"HOME": "/h"}) == "/h/.local/state/dormant"
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def test_the_environment_that_is_given_decides(tmp_path: Path) -> None:
    config = read("backends: {a: {command: x, delivery: pass, listen: 'unix:@a'}}", tmp_path, {"STATE_DIRECTORY": "/s"})
    assert config.gateway.state_directory == "/s"


# The examples


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_the_examples_are_right(example: str) -> None:
    assert load(EXAMPLES / example, QUICKSTART).backends


def test_the_reference_states_the_defaults_that_are_used() -> None:
    stated = load(EXAMPLES / "reference.yaml", {})
    needed = {
        "web": {
            "command": ["/usr/sbin/nginx", "-g", "daemon off;"],
            "listen": "tcp://127.0.0.1:8080",
            "endpoint": "tcp://127.0.0.1:8081",
        },
        "elsewhere": {"driver": "external", "listen": "tcp://127.0.0.1:8090", "endpoint": "tcp://127.0.0.1:8091"},
    }
    used = build({"backends": needed}, EXAMPLES, "defaults")
    assert stated.backends == used.backends
    assert stated.gateway == msgspec.structs.replace(
        used.gateway, admin=default_admin({}), state_directory=default_state_directory({})
    )
    text = (EXAMPLES / "reference.yaml").read_text()
    if os.geteuid() == 0:
        assert f"# admin: {default_admin({})} " in text
        assert f"# state_directory: {default_state_directory({})} " in text


def test_the_reference_has_every_key() -> None:
    text = (EXAMPLES / "reference.yaml").read_text()
    structs = [GatewayOptions, Idle, Limits, Entry, *(backends.load(name).Options for name in backends.names())]
    keys = {"backends", "include", "gateway", *KEYS, *(key for kind in structs for key in fields(kind))}
    assert {key for key in keys if not re.search(rf"^\s*(# |- )?{key}:", text, re.MULTILINE)} == set()


# What it costs


def many(count: int) -> str:
    return "backends:\n" + "".join(
        f"  site-{number}:\n"
        f"    command: [/usr/bin/site, --config, /srv/{number}/site.conf]\n"
        f"    listen: tcp://127.0.{number >> 8}.{number & 255}:80\n"
        f"    endpoint: unix:/run/sites/{number}.sock\n"
        f"    idle: 30s\n"
        f"    limits: {{connections: 50}}\n"
        f"    ready: {{http: /health}}\n"
        f"    env: {{SITE: site-{number}}}\n"
        for number in range(count)
    )


@pytest.mark.slow
def test_ten_thousand_backends_load_in_a_moment(tmp_path: Path) -> None:
    start = time.process_time()
    config = read(many(10_000), tmp_path)
    took = time.process_time() - start
    assert len(config.backends) == 10_000
    assert took < 3, f"{took:.2f} s; it takes 1 s on a slow machine"


@pytest.mark.slow
def test_a_backend_is_small(tmp_path: Path) -> None:
    read(many(1), tmp_path)
    gc.collect()
    tracemalloc.start()
    try:
        config = read(many(1000), tmp_path)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / len(config.backends) < 2500  # bytes
