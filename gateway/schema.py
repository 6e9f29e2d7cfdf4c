"""The JSON Schema of a configuration file, for editors: what `dormant schema` prints.

Made from the types that `gateway.parsing` converts to, field by field, and from the options of every driver that is
installed. A schema cannot say what must hold between keys: that is only in `gateway.backend` and `gateway.clashes`.

Source: https://json-schema.org/draft/2020-12/json-schema-core
"""

from __future__ import annotations

import enum
import inspect
import types
from typing import Any, Union, get_args, get_origin

import msgspec
from msgspec import Struct

import backends
from backends import units
from backends.endpoint import FORMS
from backends.probe import KINDS
from backends.units import Duration
from gateway.backend import DEFAULT_IDLE, NAME_PATTERN, START_TIMEOUT, STOP_GRACE, Entry
from gateway.parsing import NEVER, fields, has_short_form, without_none
from gateway.settings import Delivery, GatewayOptions, Idle, Limits

Schema = dict[str, Any]

_ADDRESS: Schema = {"type": "string", "description": FORMS}
_VARIABLE: Schema = {"type": "string", "pattern": r"^\$\{[^}]*\}$"}
_NAMES: Schema = {"pattern": NAME_PATTERN}


def schema() -> Schema:
    """The schema of a whole file, as JSON values. Imports every driver; one whose library is missing takes any keys."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Dormant",
        "type": "object",
        "properties": {
            "gateway": _struct(GatewayOptions),
            "include": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "backends": {
                "type": "object",
                "propertyNames": _NAMES,
                "additionalProperties": {"$ref": "#/$defs/backend"},
            },
        },
        "additionalProperties": False,
        "$defs": {
            "address": _ADDRESS,
            "variable": _VARIABLE,
            "listener": {"anyOf": [{"$ref": "#/$defs/address"}, _entry()]},
            "readiness": _readiness(),
            "backend": _backend(),
        },
    }


def _backend() -> Schema:
    names = backends.names()
    options = [_driver(name) for name in names]
    return {
        "type": "object",
        "required": ["listen"],
        "properties": {
            "driver": {**_or_variable({"enum": names}), "default": backends.DEFAULT},
            "listen": _listen(),
            "delivery": {**_of(Delivery), "default": Delivery.RELAY.value},
            "endpoint": {"$ref": "#/$defs/address"},
            "endpoints": {"type": "object", "additionalProperties": {"$ref": "#/$defs/address"}},
            "ready": {"$ref": "#/$defs/readiness"},
            "idle": {**_of(Idle), "default": str(DEFAULT_IDLE.after)},
            "limits": _struct(Limits),
            "start_timeout": {**_of(Duration), "default": str(START_TIMEOUT)},
            "stop_grace": {**_of(Duration), "default": str(STOP_GRACE)},
        },
        "allOf": options,
        "unevaluatedProperties": False,
    }


def _driver(name: str) -> Schema:
    try:
        own = _struct(backends.load(name).Options)
        del own["additionalProperties"]  # the common keys are allowed, too
    except backends.DriverMissing:
        own = {"unevaluatedProperties": True}
    # `properties` is also true of a backend without the key: that one has the default driver.
    required = [] if name == backends.DEFAULT else ["driver"]
    return {"if": {"required": required, "properties": {"driver": {"const": name}}}, "then": own}


def _entry() -> Schema:
    entry = _struct(Entry)
    entry["properties"] |= {"address": {"$ref": "#/$defs/address"}, "name": {"type": "string", **_NAMES}}
    return entry


def _listen() -> Schema:
    one = {"$ref": "#/$defs/listener"}
    by_name = {
        "type": "object",
        "propertyNames": {**_NAMES, "not": {"const": "address"}},
        "additionalProperties": one,
        "minProperties": 1,
    }
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}, by_name]}


def _readiness() -> Schema:
    bare = [name for name, kind in KINDS.items() if not any(field.required for field in fields(kind).values())]
    with_value = [
        {"type": "object", "properties": {name: _of(kind)}, "required": [name], "additionalProperties": False}
        for name, kind in KINDS.items()
    ]
    return {"anyOf": [_or_variable({"enum": bare}), *with_value], "default": "connect"}


def _of(kind: Any) -> Schema:
    """The schema of one type, with the short forms that `gateway.parsing` takes."""
    inner = without_none(kind)
    if inner is not None:
        return {"anyOf": [_of(inner), {"type": "null"}]}
    if isinstance(kind, type) and issubclass(kind, Struct):
        whole = _struct(kind)
        if not has_short_form(kind):
            return whole
        first = next(iter(fields(kind).values())).type
        return {"anyOf": [_of(without_none(first) or first), whole]}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(member) for member in arguments]}
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return {"type": "array", "items": _of(arguments[0])}
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _of(arguments[1])}
    return _leaf(kind)


def _leaf(kind: Any) -> Schema:
    (found,), components = msgspec.json.schema_components((kind,), schema_hook=units.schema, ref_template="{name}")
    found = dict(components[found["$ref"]] if "$ref" in found else found)
    found.pop("title", None)
    takes_text = found.get("type") == "string" or "string" in found.get("type", ())
    return found if takes_text else _or_variable(found)


def _or_variable(found: Schema) -> Schema:
    return {"anyOf": [found, {"$ref": "#/$defs/variable"}]}


def _struct(kind: type[Struct]) -> Schema:
    properties = {}
    for key, field in fields(kind).items():
        properties[key] = _of(field.type)
        if not field.required:
            properties[key] |= _default(field.default, without_none(field.type) is Duration)
    result: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required := [key for key, field in fields(kind).items() if field.required]:
        result["required"] = required
    if kind.__doc__:
        result["description"] = inspect.cleandoc(kind.__doc__).splitlines()[0]
    return result


def _default(value: Any, may_be_never: bool) -> Schema:
    if value is None:
        return {"default": NEVER} if may_be_never else {}
    if isinstance(value, enum.Enum):
        return {"default": value.value}
    if isinstance(value, units.UNITS):
        return {"default": str(value)}
    return {"default": value} if isinstance(value, (str, bool, int, float)) else {}
