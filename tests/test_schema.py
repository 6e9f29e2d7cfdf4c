"""`gateway.schema`: the schema for editors takes what `load` takes, and refuses what a schema can see is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import backends
from backends.probe import KINDS
from gateway.backend import KEYS
from gateway.parsing import fields
from gateway.schema import schema
from gateway.settings import GatewayOptions, Idle, Limits

EXAMPLES = sorted((Path(__file__).parent.parent / "config").glob("*.yaml"))
CASES = Path(__file__).with_name("config")

SEEN = ["unknown_keys", "unknown_driver", "wrong_values", "wrong_types", "missing", "names", "ready", "no_listener"]
"""Cases of `test_config` whose problems are problems for the schema, too."""


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return schema()


@pytest.fixture(scope="module")
def validator(whole: dict[str, Any]) -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.Draft202012Validator.check_schema(whole)
    return jsonschema.Draft202012Validator(whole)


def backend(**keys: Any) -> dict[str, Any]:
    return {"backends": {"web": {"command": "x", "listen": "unix:/a", "endpoint": "unix:/b", **keys}}}


def test_it_is_json_and_every_reference_leads_somewhere(whole: dict[str, Any]) -> None:
    text = json.dumps(whole)
    assert json.loads(text) == whole
    used = {part.split('"')[0] for part in text.split('"$ref": "#/$defs/')[1:]}
    assert used == set(whole["$defs"])


def test_it_has_every_key(whole: dict[str, Any]) -> None:
    common = whole["$defs"]["backend"]["properties"]
    assert set(common) == set(KEYS)
    assert set(whole["properties"]["gateway"]["properties"]) == set(fields(GatewayOptions))
    assert set(common["limits"]["properties"]) == set(fields(Limits))
    drivers = {rule["if"]["properties"]["driver"]["const"]: rule["then"] for rule in whole["$defs"]["backend"]["allOf"]}
    assert set(drivers) == set(backends.names())
    for name, own in drivers.items():
        assert set(own["properties"]) == set(fields(backends.load(name).Options))
    kinds = [form["properties"] for form in whole["$defs"]["readiness"]["anyOf"] if "properties" in form]
    assert [key for form in kinds for key in form] == list(KINDS)


def test_it_states_the_defaults(whole: dict[str, Any]) -> None:
    common = whole["$defs"]["backend"]["properties"]
    assert (common["idle"]["default"], common["start_timeout"]["default"], common["delivery"]["default"]) == (
        "5m",
        "1m",
        "relay",
    )
    assert common["driver"]["default"] == backends.DEFAULT
    idle = next(form for form in common["idle"]["anyOf"] if "properties" in form)
    assert set(idle["properties"]) == set(fields(Idle))
    assert {key: value.get("default") for key, value in idle["properties"].items()} == {
        "after": "5m",
        "min_uptime": "0s",
        "then": "stop",
        "stop_after": "never",
    }


def test_a_driver_whose_library_is_missing_takes_any_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.DRIVERS, "pod", "no_such_library:Pod")
    monkeypatch.setitem(backends.EXTRAS, "no_such_library", "podman")
    rules = schema()["$defs"]["backend"]["allOf"]
    assert {"if": {"required": ["driver"], "properties": {"driver": {"const": "pod"}}},
            "then": {"unevaluatedProperties": True}} in rules  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_takes_the_examples(path: Path, validator: Any) -> None:
    found = [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))]
    assert found == []


@pytest.mark.parametrize("case", SEEN)
def test_it_refuses_what_is_wrong(case: str, validator: Any) -> None:
    assert not validator.is_valid(yaml.safe_load((CASES / f"{case}.yaml").read_text()))


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"idle": "never"}, {"idle": 30}, {"idle": {"after": "1m", "then": "freeze", "stop_after": "1h"}},
        {"ready": "http"}, {"ready": {"http": "/a"}}, {"ready": {"exec": {"command": ["a"], "timeout": 1}}},
        {"ready": {"udp": {"send": "hex:00", "expect": "x"}}}, {"limits": {"flow_timeout": "1m", "flow_bytes": "64KiB"}},
        {"ready": {"delay": "2s"}}, {"listen": ["unix:/a", {"address": "unix:/b", "name": "b"}]},
        {"listen": {"a": "unix:/a", "b": {"address": "unix:/b", "backlog": 5}}}, {"limits": {"pending": "${PENDING}"}},
        {"env": {"A": 1, "B": "c"}}, {"umask": 18}, {"rlimits": {"nofile": [1, "unlimited"]}}, {"delivery": "${DELIVERY}"},
        {"driver": "process"},
    ],
)  # fmt: skip
def test_it_takes_every_form(keys: dict[str, Any], validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(backend(**keys))] == []


@pytest.mark.parametrize(
    "keys",
    [
        {"idel": "5m"}, {"idle": None}, {"idle": {"aftr": 1}}, {"idle": []}, {"ready": "exec"},
        {"ready": {"http": "/", "delay": 1}},
        {"ready": {"htp": "/"}}, {"listen": []}, {"listen": {}}, {"listen": 80}, {"limits": {"pending": 0}},
        {"ready": "udp"}, {"limits": 5}, {"delivery": "rely"}, {"driver": "external"}, {"driver": "proces"}, {"env": {"A": []}},
        {"endpoints": "unix:/a"}, {"start": "x"},
    ],
)  # fmt: skip
def test_it_refuses_what_is_not_a_form(keys: dict[str, Any], validator: Any) -> None:
    assert not validator.is_valid(backend(**keys))
