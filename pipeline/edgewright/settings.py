"""Strict reading of TOML tables into frozen dataclasses.

Unknown keys are errors with a suggestion; a value of the wrong type names the key, the type
expected and the value found. Recipes and target profiles are both read with it.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from edgewright.errors import BadInput

T = typing.TypeVar("T")
LISTED = 20  # known words in a message
SEEDS = (0, 2**32 - 1)  # what every generator of random numbers takes
NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def load_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file; BadInput where it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"{what} not found: {path}", expected="a TOML file", hint="check the path"
        ) from None
    except IsADirectoryError:
        raise BadInput(f"{what} {path}", expected="a TOML file", found="a folder") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(
            f"{what} {path} is not valid TOML", found=str(error), hint="mend that line"
        ) from None


def suggestion(word: str, known: typing.Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest of the known words, or a list of the first of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return "known: " + ", ".join(known[:LISTED]) + more


def check_limits(
    values: object, limits: typing.Mapping[str, tuple[float, float]], where: str
) -> None:
    """BadInput for the first of some numbers of a table that is outside its limits."""
    for key, (low, high) in limits.items():
        if not low <= (value := getattr(values, key)) <= high:
            raise BadInput(f"{where}.{key}", expected=f"{low} to {high}", found=str(value))


def parse(cls: type[T], raw: Any, where: str) -> T:
    """Read a table into the dataclass `cls`: every key checked, defaults from the dataclass."""
    if not isinstance(raw, dict):
        raise BadInput(f"{where}", expected="a table", found=repr(raw))
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in fields:
            raise BadInput(f"unknown key '{key}' in {where}", hint=suggestion(key, fields))
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = convert(hints[name], raw[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BadInput(f"missing key '{name}' in {where}", expected=describe(hints[name]))
    return cls(**values)


def convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, or BadInput. Whole numbers pass as floats; nothing else is coerced."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if [a for a in args if a is not type(None)] == list(args[:1]):
            return convert(args[0], value, where)  # its own message says more than ours
        for option in args:
            if option is type(None):
                continue
            try:
                return convert(option, value, where)
            except BadInput:
                pass
        raise BadInput(where, expected=describe(kind), found=repr(value))
    if origin is typing.Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        expected = "one of " + ", ".join(repr(a) for a in args)
        hint = (
            suggestion(value, [a for a in args if isinstance(a, str)])
            if isinstance(value, str)
            else ""
        )
        raise BadInput(where, expected=expected, found=repr(value), hint=hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise BadInput(where, expected="a list", found=repr(value))
        return tuple(convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise BadInput(where, expected="a table", found=repr(value))
        return {k: convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return parse(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise BadInput(where, expected=describe(kind), found=repr(value))
    if kind is float and not math.isfinite(value):
        raise BadInput(where, expected="a finite number", found=repr(value))
    return value


def describe(kind: Any) -> str:
    """The type in words, for messages."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args if a is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple:
        return "a list"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a table"
    return NAMES.get(kind, str(kind))
