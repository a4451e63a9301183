"""What is wrong with a recipe's value, in words: what was wanted comes from the recipe's own schema."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from causal_compress.recipe import Recipe

Key = tuple[str | int, ...]
ABSENT = object()
"""Stands for the value of a key that is not there, which None is not."""

# Numbers of YAML 1.2's core schema: what looks otherwise, such as 010, is text there even without quotes.
WHOLE = r"^[-+]?(?:0|[1-9][0-9_]*)$"
FLOAT = (
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


def sentence(kind: str, key: Key, value: Any) -> str:
    """One fault as a sentence.

    Args:
        kind: pydantic's error type.
        key: Where in the recipe.
        value: What stands there, or `ABSENT`.

    Returns:
        What is wanted, what was found, and a hint where one is at hand.
    """
    if kind == "extra_forbidden":
        return f"unknown key '{dotted(key)}'.{_did_you_mean_key(key)}"
    wanted = _schema_of(key)
    if value is ABSENT:
        return f"{dotted(key)} is missing; it must be {_describe(wanted)}{_meaning(wanted)}. Add it."
    return f"{dotted(key)} must be {_describe(wanted)}, got {show(value)}.{_hint(wanted, value)}"


def _meaning(schema: Mapping[str, Any]) -> str:
    return f" ({schema['description']})" if "description" in schema else ""


def _did_you_mean_key(key: Key) -> str:
    siblings = list(_properties(_schema_of(key[:-1])))
    if close := difflib.get_close_matches(str(key[-1]), siblings, n=1):
        return f" Did you mean '{dotted((*key[:-1], close[0]))}'?"
    elsewhere = [name for name in _all_keys(_schema()) if name.rpartition(".")[2] == str(key[-1])]
    if elsewhere:
        return f" Did you mean '{elsewhere[0]}'?"
    return f" Allowed here: {', '.join(siblings)}." if siblings else ""


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _all_keys(schema: Mapping[str, Any]) -> Iterator[str]:
    for name, part in _properties(schema).items():
        yield name
        yield from (f"{name}.{inner}" for inner in _all_keys(part))


def _members(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schema's alternatives, each with its reference followed."""
    if "$ref" in schema:
        return _members(_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return [member for part in schema["anyOf"] for member in _members(part)]
    return [schema]


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: part for member in _members(schema) for name, part in member.get("properties", {}).items()}


def _schema_of(key: Key) -> Mapping[str, Any]:
    schema: Mapping[str, Any] = _schema()
    for step in key:
        inside: Any = _properties(schema).get(str(step))
        for member in _members(schema):
            inside = inside or _item(member, step) or member.get("additionalProperties")
        schema = inside if isinstance(inside, dict) else {}
    return schema


def _item(schema: Mapping[str, Any], step: str | int) -> Any:
    """What an item of a list may be."""
    fixed = schema.get("prefixItems", ())
    return fixed[step] if isinstance(step, int) and step < len(fixed) else schema.get("items")


def _describe(schema: Mapping[str, Any]) -> str:
    if "pattern" in schema and "description" in schema:
        return str(schema["description"])
    return " or ".join(dict.fromkeys(_describe_member(member) for member in _members(schema)))


def _describe_member(schema: Mapping[str, Any]) -> str:
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices:
        return ("one of " if len(choices) > 1 else "") + ", ".join(repr(choice) for choice in choices)
    match schema.get("type"):
        case "number":
            return "a number" + _range(schema)
        case "integer":
            return "a whole number" + _range(schema)
        case "array":
            return _describe_list(schema)
        case "object":
            return "a mapping"
        case "boolean":
            return "true or false"
        case "string":
            return "text"
        case other:
            return str(other or "a plain value")


def _describe_list(schema: Mapping[str, Any]) -> str:
    if fixed := schema.get("prefixItems"):
        return f"a list of {len(fixed)} ({', '.join(map(_describe, fixed))})"
    some = "a non-empty list" if schema.get("minItems") else "a list"
    return f"{some} (each {_describe(schema.get('items', {}))})"


def _range(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    start = f"({above:g}" if above is not None else f"[{low:g}" if low is not None else "(-inf"
    end = f"{below:g})" if below is not None else f"{_exact(high)}]" if high is not None else ""
    if end:
        return f" in {start}, {end}"
    if above is not None:
        return f" > {above:g}"
    return f" >= {low:g}" if low is not None else ""


def _exact(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _hint(schema: Mapping[str, Any], value: Any) -> str:
    members = _members(schema)
    if isinstance(value, str):
        choices = [choice for member in members for choice in member.get("enum", [])]
        if close := difflib.get_close_matches(value, choices, n=1):
            return f" Did you mean '{close[0]}'?"
        numeric = any(member.get("type") in ("number", "integer") for member in members)
        return _number_hint(value) if numeric and _is_number(value) else ""
    is_share = any(1 in (member.get("maximum"), member.get("exclusiveMaximum")) for member in members)
    if is_share and isinstance(value, int | float) and 1 < value <= 100:
        share = value / 100
        return (
            f" For {value:g} % write {share:.2f}." if round(share, 2) == share else f" For {value:g} % write {share:g}."
        )
    return ""


def _number_hint(text: str) -> str:
    if re.match(WHOLE, text) or re.match(FLOAT, text):
        return " Remove the quotes."
    plain = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)
    return f" Write {plain}, without leading zeros." if re.match(WHOLE, plain) or re.match(FLOAT, plain) else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def dotted(key: Key) -> str:
    """The key as people write it: `section.key[0]`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in key).lstrip(".")


def show(value: Any) -> str:
    """A value as it would stand in YAML, shortened."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case dict() | list():
            return shorten(json.dumps(value))
        case _:
            return shorten(repr(value))


def shorten(text: str, limit: int = 80) -> str:
    """Printable text of at most `limit` characters."""
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= limit else text[: limit - 3] + "..."
