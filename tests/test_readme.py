"""Every command of the README is run, its configuration is loaded, its table of states is the real one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gateway.states import TRANSITIONS, Event, State
from tests.conftest import program
from tests.running import eventually, free_port

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STAYS = ("make run", "dormant run", "dormant activate")
"""Commands that go on until they are interrupted; a line on their stderr says that they listen."""
NOT_HERE = ("make test",)
"""This is what runs this test."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def readme(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The README with free ports, and the environment of its commands, in an empty folder with `dormant.yaml`."""
    port = free_port(200)
    text = README
    for number in range(8080, 8084):
        text = text.replace(str(number), str(port + 150 + number - 8080))
    document = next(block for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S) if "backends:" in block)
    (tmp_path / "dormant.yaml").write_text(document)
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(tmp_path),
        "PORT": str(port),
    }
    yield text, environment


@pytest.mark.slow
def test_every_command(readme: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    program("curl")
    text, environment = readme
    staying: list[subprocess.Popen[bytes]] = []
    try:
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S):
            for line in block.splitlines():
                if line.startswith("export "):
                    name, _, value = line.removeprefix("export ").partition("=")
                    environment[name] = value
                elif line.startswith(STAYS):
                    staying.append(_start(line, environment, tmp_path, len(staying)))
                elif line not in NOT_HERE:
                    done = subprocess.run(
                        line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
                    )
                    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    finally:
        for process in staying:
            os.killpg(process.pid, signal.SIGINT)
        codes = [process.wait(20) for process in staying]
    # make ends by the signal itself when its recipe has ended.
    assert set(codes) <= {0, -signal.SIGINT}


def _start(line: str, environment: dict[str, str], directory: Path, number: int) -> subprocess.Popen[bytes]:
    log = directory / f"log-{number}"
    if line.startswith("make"):
        # The checkout is what it needs; set-up has been done by whoever runs the tests.
        words = (
            [str(ROOT / "config" / "quickstart" / "run.sh")]
            if shutil.which("make") is None
            else [*shlex.split(line), "-C", str(ROOT)]
        )
        words += [f"PORT={environment['PORT']}"] if words[0] == "make" else []
    else:
        words = shlex.split(line)
    with log.open("wb") as stderr:
        process = subprocess.Popen(words, stderr=stderr, cwd=directory, env=environment, start_new_session=True)
    eventually(lambda: "asleep, listening" in log.read_text() or process.poll() is not None, line)
    assert process.poll() is None, f"{line}: {log.read_text()}"
    return process


def test_table_of_states_is_the_real_one() -> None:
    found = re.search(r"<!-- states -->\n(.*?)\n<!-- /states -->", README, re.S)
    assert found
    rows = ["| | " + " | ".join(event.value for event in Event) + " |", "|---" * (len(Event) + 1) + "|"]
    for state in State:
        cells = [TRANSITIONS[state, event].name if (state, event) in TRANSITIONS else "" for event in Event]
        rows.append(re.sub(" +", " ", f"| {state.name} | {' | '.join(cells)} |"))
    assert found[1].splitlines() == rows


def test_yaml_parses() -> None:
    assert [yaml.safe_load(block) for block in blocks("yaml")]


def test_files_that_are_named_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)", README) + re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
