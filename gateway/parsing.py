"""Plain values to types, checked: every problem is found and says where it is, what was found and what is allowed.

msgspec converts as well, but stops at the first error. So structs, lists and mappings are walked here, and msgspec
converts what they hold, with the units of `backends.units`. Counterpart: `gateway.schema` walks the same types for the
JSON Schema. Nothing here knows a key of the configuration.

Beside what msgspec takes, three short forms are understood: a struct may be given as the value of its first field, if the
others have defaults; `never` stands for a duration that may be nothing; and text that came from one variable alone may
stand for a number.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Meta, Struct

from backends import units
from gateway.document import Variable
from gateway.problems import FAILED, Place, Problems, listed, nearest, show

S = TypeVar("S", bound=Struct)
Converter = Callable[[Any, Place, Problems], Any]

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true, false"}
NEVER = "never"


class Field(NamedTuple):
    """A field of a struct, as the walkers of its types see it."""

    name: str
    type: Any
    required: bool
    default: Any
    convert: Converter


@cache
def fields(kind: type[Struct]) -> dict[str, Field]:
    """The fields of a struct by the key that stands for them, in order."""
    result = {}
    for info in msgspec.structs.fields(kind):
        required = info.default is NODEFAULT and info.default_factory is NODEFAULT
        value = info.default if info.default_factory is NODEFAULT else info.default_factory()
        result[info.encode_name] = Field(info.name, info.type, required, value, converter(info.type))
    return result


def has_short_form(kind: type[Struct]) -> bool:
    """Whether the value of its first field may stand for the whole struct."""
    return bool(kind.__struct_fields__) and not any(field.required for field in list(fields(kind).values())[1:])


def without_none(kind: Any) -> Any:
    """`T` of `T | None`, else None."""
    if get_origin(kind) not in (Union, types.UnionType):
        return None
    rest = [member for member in get_args(kind) if member is not types.NoneType]
    return rest[0] if len(rest) == 1 else None


def convert(kind: Any, value: Any, place: Place, problems: Problems) -> Any:
    """The value as this type; FAILED when it is not one, and then the problems say why."""
    return converter(kind)(value, place, problems)


def convert_struct(kind: type[S], value: Any, place: Place, problems: Problems, beside: Collection[str] = ()) -> S:
    """A mapping as this struct, or FAILED. Keys `beside` are allowed, too, as far as the messages go."""
    known = fields(kind)
    if not isinstance(value, dict):
        problems.wrong(place, value, f"a mapping with the keys {', '.join(known)}")
        return FAILED
    result, failed = {}, False
    for key, item in value.items():
        field = known.get(key)
        if field is None:
            problems.unknown(place / key, "unknown key", [*known, *beside])
            failed = True
            continue
        converted = field.convert(item, place / key, problems)
        failed = failed or converted is FAILED
        result[field.name] = converted
    for key, field in known.items():
        if field.required and key not in value:
            problems.add(place / key, f"missing; allowed: {words(field.type)}")
            failed = True
    return FAILED if failed else _make(kind, result, place, problems)


def _make(kind: type[S], values: dict[str, Any], place: Place, problems: Problems) -> S:
    try:
        return kind(**values)
    except ValueError as error:  # of its __post_init__
        problems.add(place, str(error))
        return FAILED


@cache
def converter(kind: Any) -> Converter:
    """The function that makes values of this type."""
    inner = without_none(kind)
    if inner is not None:
        return partial(_optional, _saying(kind, inner), inner is units.Duration)
    if isinstance(kind, type) and issubclass(kind, Struct):
        if not has_short_form(kind):
            return partial(convert_struct, kind)
        first = next(iter(fields(kind).values()))
        return partial(_short_or_whole, kind, first.name, _saying(kind, first.type))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        structs = [member for member in arguments if isinstance(member, type) and issubclass(member, Struct)]
        return partial(_one_of, converter(structs[0]), kind) if len(structs) == 1 else partial(_leaf, kind, kind)
    if origin is list:
        return partial(_items, converter(arguments[0]), list)
    if origin is tuple and arguments[1:] == (...,):
        return partial(_items, converter(arguments[0]), tuple)
    if origin is dict and arguments[0] is str:
        return partial(_mapping, converter(arguments[1]))
    return partial(_leaf, kind, kind)


def _saying(said: Any, kind: Any) -> Converter:
    """The converter for a type; what is allowed is said of another type that this is a form of."""
    inner = without_none(kind)
    if inner is not None:
        return partial(_optional, _saying(said, inner), inner is units.Duration)
    found = converter(kind)
    return partial(_leaf, kind, said) if isinstance(found, partial) and found.func is _leaf else found


def _optional(inner: Converter, duration: bool, value: Any, place: Place, problems: Problems) -> Any:
    return None if value is None or (duration and value == NEVER) else inner(value, place, problems)


def _short_or_whole(
    kind: type[Struct], name: str, first: Converter, value: Any, place: Place, problems: Problems
) -> Any:
    if isinstance(value, dict):
        return convert_struct(kind, value, place, problems)
    if value is None:  # an empty key is an oversight; `never` is what stands for nothing
        problems.wrong(place, value, "a value, or no such key")
        return FAILED
    converted = first(value, place, problems)
    return FAILED if converted is FAILED else _make(kind, {name: converted}, place, problems)


def _one_of(struct: Converter, kind: Any, value: Any, place: Place, problems: Problems) -> Any:
    return struct(value, place, problems) if isinstance(value, dict) else _leaf(kind, kind, value, place, problems)


def _items(inner: Converter, make: Callable[[list[Any]], Any], value: Any, place: Place, problems: Problems) -> Any:
    if not isinstance(value, list):
        problems.wrong(place, value, "a list")
        return FAILED
    result = [inner(item, place / index, problems) for index, item in enumerate(value)]
    return FAILED if any(item is FAILED for item in result) else make(result)


def _mapping(inner: Converter, value: Any, place: Place, problems: Problems) -> Any:
    if not isinstance(value, dict):
        problems.wrong(place, value, "a mapping")
        return FAILED
    result = {key: inner(item, place / key, problems) for key, item in value.items()}
    return FAILED if any(item is FAILED for item in result.values()) else result


def _leaf(kind: Any, said: Any, value: Any, place: Place, problems: Problems) -> Any:
    if value is FAILED or (isinstance(value, list) and any(item is FAILED for item in value)):
        return FAILED
    try:
        return msgspec.convert(value, kind, dec_hook=units.decode)
    except msgspec.ValidationError as error:
        if isinstance(value, Variable) and not isinstance(value.value, str):
            return _leaf(kind, said, value.value, place, problems)
        problems.add(place, _explain(kind, said, value, error))
        return FAILED


def _explain(kind: Any, said: Any, value: Any, error: msgspec.ValidationError) -> str:
    choices = _choices(kind)
    if choices:
        near = nearest(value, choices) if isinstance(value, str) else ";"
        return f"found {show(value)}{near} {listed(choices)}"
    why = str(error.__cause__ or "")  # of a type that parses itself
    if why and not (kind in units.UNITS and why.endswith(kind.expected)):
        return why
    hint = " (write it in quotes)" if said in (str, str | None) and isinstance(value, (bool, int, float)) else ""
    return f"found {show(value)}; allowed: {words(said)}{hint}"


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    return []


def words(kind: Any) -> str:
    """What a value of this type may be, in words."""
    inner = without_none(kind)
    if inner is not None:
        return f"{words(inner)}, {NEVER}" if inner is units.Duration else f"{words(inner)}, or nothing"
    if get_origin(kind) is Annotated:
        base, *notes = get_args(kind)
        bounds = [note for note in notes if isinstance(note, Meta)]
        return words(base) + "".join(_bounds(meta) for meta in bounds)
    if kind in units.UNITS:
        return str(kind.expected)
    if isinstance(kind, type) and issubclass(kind, Struct):
        short = f"{words(next(iter(fields(kind).values())).type)}, or " if has_short_form(kind) else ""
        return f"{short}a mapping with the keys {', '.join(fields(kind))}"
    if choices := _choices(kind):
        return ", ".join(choices)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("nothing" if member is types.NoneType else words(member) for member in get_args(kind))
    containers = {list: "a list", tuple: "a list", dict: "a mapping"}
    return containers.get(get_origin(kind) or kind) or _NAMES.get(kind) or str(getattr(kind, "__name__", kind))


def _bounds(meta: Meta) -> str:
    limits = {"from": meta.ge, "above": meta.gt, "up to": meta.le, "below": meta.lt, "matching": meta.pattern}
    said = " ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
    return f" {said}" if said else ""
