"""A checker for the part of JSON Schema 2020-12 that our schemas use, with Python alone.

A device has no `jsonschema`. What a schema says beyond this part is an error of ours and no
pass: `known` lists every keyword. Stricter than the standard in one place: 1.0 is no integer
(RFC 8785 spells it 1, so it is none of ours).
"""

import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
KNOWN = frozenset(
    ("$schema", "$defs", "$ref", "title", "description", "type", "const", "enum", "pattern")
    + ("minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "minItems")
    + ("maxItems", "items", "required", "properties", "additionalProperties", "propertyNames")
    + ("minProperties", "maxProperties")
)


def fault(value: Any, schema: Schema, where: str) -> str:
    """The first thing that is wrong with the value, called `where`; empty where nothing is."""
    return next(faults(value, schema, schema, where), "")


def faults(value: Any, schema: Schema, root: Schema, where: str) -> Iterator[str]:
    """What is wrong, part by part: 'place: reason'."""
    if unknown := sorted(set(schema) - KNOWN):
        raise NotImplementedError(f"schema keyword {unknown[0]}")
    if "$ref" in schema:
        yield from faults(value, target(root, schema["$ref"]), root, where)
    if reason := own_fault(value, schema):
        yield f"{where}: {reason}"
        return  # what follows may take the type for granted
    if isinstance(value, list) and "items" in schema:
        for k, item in enumerate(value):
            yield from faults(item, schema["items"], root, f"{where}.{k}")
    if isinstance(value, dict):
        yield from object_faults(value, schema, root, where)


def object_faults(value: dict[str, Any], schema: Schema, root: Schema, where: str) -> Iterator[str]:
    """What is wrong with the keys of an object and what they hold."""
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{where}: lacks {key!r}"
    known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key, item in value.items():
        place = f"{where}.{shown(key)}"
        if "propertyNames" in schema:
            yield from faults(key, schema["propertyNames"], root, place)
        if key in known:
            yield from faults(item, known[key], root, place)
        elif more is False:
            yield f"{where}: unknown key {shown(key)!r}"
        elif isinstance(more, dict):
            yield from faults(item, more, root, place)


def target(root: Schema, reference: str) -> Schema:
    """What `#/$defs/NAME` names; other references are not used."""
    name = reference.removeprefix("#/$defs/")
    found: Schema = root["$defs"][name]
    return found


def own_fault(value: Any, schema: Schema) -> str:
    """What this schema itself says against a value, its parts aside."""
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(is_a(value, name) for name in names):
            return f"expected {' or '.join(names)}, found {shown(value)}"
    if "const" in schema and not same(value, schema["const"]):
        return f"expected {schema['const']!r}, found {shown(value)}"
    if "enum" in schema and not any(same(value, item) for item in schema["enum"]):
        return f"expected one of {schema['enum']}, found {shown(value)}"
    if isinstance(value, str):
        if "pattern" in schema and not re.search(ended(schema["pattern"]), value):
            return f"{shown(value)!r} is not of the form {schema['pattern']}"
        return bounds(len(value), schema, "minLength", "maxLength", "characters")
    if isinstance(value, list):
        return bounds(len(value), schema, "minItems", "maxItems", "entries")
    if isinstance(value, dict):
        return bounds(len(value), schema, "minProperties", "maxProperties", "keys")
    if is_a(value, "number"):
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            return f"expected more than {schema['exclusiveMinimum']}, found {value}"
        return bounds(value, schema, "minimum", "maximum", "")
    return ""


def ended(pattern: str) -> str:
    """A JSON Schema's pattern for Python, where "$" matches before a newline at the end, too."""
    return pattern[:-1] + r"\Z" if pattern.endswith("$") else pattern


def bounds(size: float, schema: Schema, least: str, most: str, unit: str) -> str:
    """A size outside of its range."""
    if least in schema and size < schema[least]:
        return f"expected at least {schema[least]} {unit}".rstrip() + f", found {size}"
    if most in schema and size > schema[most]:
        return f"expected at most {schema[most]} {unit}".rstrip() + f", found {size}"
    return ""


def is_a(value: Any, name: str) -> bool:
    """Whether a value has a JSON type; Python holds booleans for numbers, JSON does not."""
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name])


def same(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and value == wanted


def shown(value: Any) -> str:
    """A value in a message: one line, cut."""
    return ascii(value)[:80].strip("'")
