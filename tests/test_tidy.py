"""The structure is tested: style, types, layers, and that each part of the program has its tests."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

import gateway

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent

TESTED_ELSEWHERE = {
    "gateway/__main__": "cli",
    "gateway/admin": "admin",
    "gateway/client": "cli",
    "gateway/server": "gateway",
    "gateway/service": "gateway",
    "gateway/status": "admin",
    "gateway/plane/__main__": "worker",
    "gateway/plane/dial": "worker",
    "gateway/plane/flow": "datagram",
    "gateway/plane/gate": "worker",
    "gateway/plane/listener": "worker",
    "gateway/document": "config",
    "gateway/parsing": "config",
    "gateway/problems": "config",
    "gateway/settings": "config",
    "gateway/backend": "config",
    "gateway/clashes": "config",
    "backends/environment": "process",
    "backends/notifications": "probe",
    "backends/nursery": "spawner",
    "backends/pipe": "process",
    "backends/usage": "process",
}
"""Parts of a whole: module -> the test file that tests the whole."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports", "--no-cache"]],
    ids=lambda command: " ".join(command),
)
def test_tool(command: list[str]) -> None:
    done = subprocess.run([str(SCRIPTS / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_its_tests() -> None:
    for package in ("gateway", "gateway/plane", "backends"):
        for module in sorted((ROOT / package).glob("*.py")):
            if module.name == "__init__.py":
                continue
            name = TESTED_ELSEWHERE.get(f"{package}/{module.stem}", module.stem)
            assert (ROOT / "tests" / f"test_{name}.py").exists(), f"{package}/{module.name} has no tests/test_{name}.py"


def test_data_plane_is_small() -> None:
    """A worker imports no asyncio and nothing of the control plane, whatever import-linter thinks of the rules."""
    script = "import sys, gateway.plane.worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"asyncio", "threading", "aiohttp", "yaml", "gateway.config", "backends.base"} & set(loaded)


def test_the_data_plane_is_forbidden_all_of_the_control_plane() -> None:
    """The contract lists modules, so a new one must be added to it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["source_modules"] == ["gateway.plane"])
    modules = {
        f"{package}.{file.stem}" for package in ("gateway", "backends") for file in (ROOT / package).glob("[!_]*.py")
    }
    assert set(contract["forbidden_modules"]) == modules - {"backends.endpoint"}


def test_only_the_command_line_imports_the_server() -> None:
    """The parts of the gateway form a star around it: they are told what to do, and call back what they were given."""
    graph = grimp.build_graph("gateway", exclude_type_checking_imports=True, cache_dir=None)
    assert graph.find_modules_that_directly_import("gateway.server") == {"gateway.cli"}


def test_version_is_the_same_everywhere() -> None:

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == gateway.__version__
