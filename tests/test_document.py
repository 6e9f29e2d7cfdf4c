"""`gateway.document`: YAML as plain values, and variables in them. What is refused is in `test_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import document
from gateway.document import Variable, parse, read
from gateway.problems import Place, Problems

ENVIRONMENT = {"SET": "set", "NUMBER": "5", "EMPTY": "", "YAML": "{a: [b, *c]}"}


def value(text: str) -> Any:
    problems = Problems()
    parsed = parse(text, Place("f"), ENVIRONMENT, problems)
    assert problems == []
    return parsed


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("no", "no"), ("on", "on"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("a#b", "a#b"),
        ("'5'", "5"), ("!!str 5", "5"), ("! 5", "5"), ("|-\n  a\n  b", "a\nb"), (">-\n  a\n  b", "a b"), ('"a\\tb"', "a\tb"),
        ("5", 5), ("-5", -5), ("+5", 5), ("0", 0), ("0x1F", 31), ("0o17", 15), ("017", 15), ("089", "089"), ("9" * 40, "9" * 40),
        ("1.5", 1.5), (".5", 0.5), ("1e3", 1000.0), (".", "."), ("-", [None]), ("1.2.3.4", "1.2.3.4"), (".inf", ".inf"),
        ("true", True), ("False", False), ("null", None), ("~", None), ("a:", {"a": None}), ("'true'", "true"),
        ("{}", {}), ("[]", []), ("[a, [b, {c: d}]]", ["a", ["b", {"c": "d"}]]), ("{'1': a}", {"1": "a"}),
        ("? a\n: b", {"a": "b"}), ("{a, b}", {"a": None, "b": None}), ("[&x a, *x]", ["a", "a"]),
    ],
)  # fmt: skip
def test_the_values_of_yaml(written: str, expected: Any) -> None:
    found = value(written)
    assert found == expected
    assert type(found) is type(expected)


def test_what_is_the_same_in_both_versions_of_yaml_is_read_as_pyyaml_reads_it() -> None:
    for path in sorted((Path(__file__).parent.parent / "config").glob("*.yaml")):
        text = path.read_text().replace("$", "S")
        assert value(text) == yaml.safe_load(text), path


def test_merge_keys_are_defaults() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {y: 3, <<: *a}\nc: {<<: [{y: 4}, *a], z: 5}\nd: {'<<': 6}\n"
    assert value(text) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 4, "z": 5},
        "d": {"<<": 6},
    }


def test_a_byte_order_mark_directives_and_the_end_of_the_document(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeff%YAML 1.2\n---\n# a comment\na: é\n...\n")
    assert value(read(path)) == {"a": "é"}


def test_equal_text_is_kept_once() -> None:
    first, second = value("[{some key: some text}, {some key: some text}]")
    assert first["some key"] is second["some key"]
    assert next(iter(first)) is next(iter(second))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${SET}", "set"), ("a-${SET}-${NUMBER}", "a-set-5"), ("${UNSET:-x}", "x"), ("${EMPTY:-x}", "x"), ("a${EMPTY}b", "ab"),
        ("${SET:-x}", "set"), ("${UNSET:-}", ""), ("$${SET}", "${SET}"), ("$$", "$"), ("$$$$", "$$"), ("$SET", "$SET"),
        ("$(date)", "$(date)"), ("${UNSET:-a: b}", "a: b"), ("5${EMPTY}", "5"), ("${NUMBER}", "5"), ("a$", "a$"),
        ("${YAML}", "{a: [b, *c]}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("quote", ['"', "'"])
def test_variables_are_expanded_in_values(written: str, expected: str, quote: str) -> None:
    assert value(f"a: {quote}{written}{quote}") == {"a": expected}


def test_variables_are_not_expanded_in_keys() -> None:
    assert value("'${SET}': a") == {"${SET}": "a"}


def test_only_a_variable_alone_may_stand_for_something_else() -> None:
    alone, beside, dollar = value('["${NUMBER}", "0${NUMBER}", "$$"]')
    assert isinstance(alone, Variable)
    assert alone.value == 5
    assert not isinstance(beside, Variable)
    assert not isinstance(dollar, Variable)


def test_it_works_without_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: &a [1, {b: c}]\nd: *a\n"
    monkeypatch.setattr(document, "_Loader", yaml.SafeLoader)
    assert value(text) == {"a": [1, {"b": "c"}], "d": [1, {"b": "c"}]}
    with pytest.raises(document.DocumentError, match=r"^line 1, column "):
        value("'a")
    with pytest.raises(document.DocumentError, match="is not allowed"):
        value("a: \x07")
