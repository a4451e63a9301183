"""Recipe files: YAML -> Recipe with every fault located, and Recipe -> YAML for the run folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from causal_compress.errors import RecipeError
from causal_compress.recipe import Recipe
from causal_compress.recipe_faults import ABSENT, FLOAT, WHOLE, Key, dotted, sentence, shorten, show

_MAX_FAULTS_SHOWN = 20
_FIRST_OVERRIDE = 1_000_000  # faults are told in order: the file's by line, then those of overrides
_DEEPEST = 50  # mappings and lists within each other; a recipe needs four
_CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}

# YAML 1.2's core schema. PyYAML follows 1.1, where `1e-3` is text, `no` is false and `2024-01-01` is a date.
_PLAIN_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", WHOLE, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2's plain scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way of saying it


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes what either version of YAML would not read as the same text."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Control characters stand quoted: PyYAML writes some of them plainly and reads them as spaces."""
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _name, _pattern, _first in _PLAIN_SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


@dataclass
class _Draft:
    """What has been read so far: plain values, where each key stands, and the faults met (sort key, sentence)."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, tuple[int, str]] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def place(self, key: Key) -> tuple[int, str]:
        """Where `key`, or the nearest section around it that was written down, stands."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, (0, "recipe"))

    def fault(self, place: tuple[int, str], sentence: str) -> None:
        order, where = place
        self.faults.append((order, f"{where}: {sentence}"))


@dataclass(frozen=True)
class _Origin:
    """Turns a line of a YAML text into a place: FILE:LINE for a file, the text itself for an override."""

    name: str
    order: int
    numbered: bool

    def at(self, line: int) -> tuple[int, str]:
        return self.order + line, f"{self.name}:{line + 1}" if self.numbered else self.name


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: YAML file, UTF-8; None starts from the defaults.
        overrides: Texts `section.key=value` with YAML values, applied in order; the last one wins.

    Returns:
        The validated recipe, with defaults filled in.

    Raises:
        RecipeError: all faults at once, each as `FILE:LINE: section.key ...` or `--set TEXT: ...`.
    """
    draft = _Draft()
    if path is not None:
        _read_file(path, draft)
    for number, override in enumerate(overrides, start=1):
        _apply_override(override, number, draft)
    recipe = _validate(draft)
    if recipe is None or draft.faults:
        raise _error(draft.faults, path)
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML text with every default spelt out; `load_recipe` reads it back as an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def recipe_sha256(recipe: Recipe) -> str:
    """Hash of the recipe's meaning: comments, key order and spelt-out defaults make no difference."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_file(path: Path, draft: _Draft) -> None:
    origin = _Origin(str(path), order=0, numbered=True)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} can't be read",
            found=error.strerror or str(error),
            remedy="check the path; `causal-compress recipes list` names the recipes that come with the package.",
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the recipe {path} is not UTF-8 text",
            found=f"byte 0x{error.object[error.start]:02x} at offset {error.start}",
            remedy="save the file as UTF-8.",
        ) from error
    values = _read_yaml(text, origin, (), draft)
    if values is None:
        return
    if not isinstance(values, dict):
        draft.fault(origin.at(0), f"a recipe must be a mapping of sections, got {show(values)}.")
        return
    draft.values = values


def _apply_override(override: str, number: int, draft: _Draft) -> None:
    origin = _Origin(f"--set {shorten(override)}", order=_FIRST_OVERRIDE + 1_000 * number, numbered=False)
    name, equals, text = override.partition("=")
    *sections, last = key = tuple(name.strip().split("."))
    if not equals or not all(key):
        draft.fault(origin.at(0), "wanted section.key=value, such as distill.epochs=10.")
        return
    inside = draft.values
    for depth, section in enumerate(sections, start=1):
        if inside.get(section) is None:
            inside[section] = {}
            draft.places[key[:depth]] = origin.at(0)
        if not isinstance(inside[section], dict):
            draft.fault(origin.at(0), f"'{'.'.join(key[:depth])}' is not a section, it can't hold '{last}'.")
            return
        inside = inside[section]
    for stale in [place for place in draft.places if place[: len(key)] == key]:
        del draft.places[stale]
    draft.places[key] = origin.at(0)
    before = len(draft.faults)
    value = _read_yaml(text, origin, key, draft)
    if len(draft.faults) == before:
        inside[last] = value


def _read_yaml(text: str, origin: _Origin, key: Key, draft: _Draft) -> Any:
    """Plain values of a YAML text; notes each key's place and each fault in `draft`."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            line = event.start_mark.line if event.start_mark else 0
            if isinstance(event, yaml.AliasEvent):
                draft.fault(origin.at(line), f"the alias '*{event.anchor}' is not allowed; write it out.")
                return None
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:  # reading the nodes recurses, and other libraries raise Python's own limit
                draft.fault(origin.at(line), "nested too deeply.")
                return None
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _plain(node, origin, key, draft)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = " Indent with spaces, not tabs." if "\\t" in problem else ""
        draft.fault(origin.at(mark.line if mark else 0), f"not valid YAML: {problem}.{hint}")
    return None


def _plain(node: yaml.Node, origin: _Origin, key: Key, draft: _Draft) -> Any:
    place = origin.at(node.start_mark.line)
    draft.places.setdefault(key, place)
    if node.tag not in _CORE_TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        draft.fault(
            place,
            f"{dotted(key) or 'the recipe'} has the YAML tag '{tag}'; tags are not allowed. Write a plain value.",
        )
        return None
    if isinstance(node, yaml.MappingNode):
        return dict(_entries(node, origin, key, draft))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, origin, (*key, index), draft) for index, item in enumerate(node.value)]
    if not _is_text(node.value):
        told = f"{dotted(key)} must be UTF-8 text, got {show(node.value)}."
        draft.fault(place, f"{told} Rename the file or folder that it names.")
        return None
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, yaml.YAMLError):  # an explicit tag that its text doesn't fit, such as `!!int abc`
        draft.fault(place, f"{dotted(key)} can't be read as {node.tag.rpartition(':')[2]}: {shorten(node.value)}")
        return None


def _is_text(text: str) -> bool:
    """Whether a text is free of lone surrogates: bytes of a path that are not UTF-8, which no JSON can hold."""
    try:
        text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")  # pairs are how JSON writes what is beyond U+FFFF
    except UnicodeDecodeError:
        return False
    return True


def _entries(node: yaml.MappingNode, origin: _Origin, key: Key, draft: _Draft) -> Iterator[tuple[str, Any]]:
    seen: dict[str, int] = {}
    for name_node, value_node in node.value:
        line = name_node.start_mark.line
        if not isinstance(name_node, yaml.ScalarNode) or not _is_text(name_node.value):
            draft.fault(origin.at(line), "a key must be plain text.")
            continue
        name = str(name_node.value)
        if name in seen:
            where = f", first on line {seen[name] + 1}" if origin.numbered else ""
            draft.fault(origin.at(line), f"the key '{dotted((*key, name))}' is there twice{where}. Remove one.")
            continue
        seen[name] = line
        draft.places[(*key, name)] = origin.at(line)
        before = len(draft.faults)
        value = _plain(value_node, origin, (*key, name), draft)
        if len(draft.faults) == before or isinstance(value, dict):
            yield name, value


def _validate(draft: _Draft) -> Recipe | None:
    try:
        # JSON mode is strict about kinds (true is no number, "3" is no number) but lets mappings become sections.
        return Recipe.model_validate_json(json.dumps(draft.values), strict=True)
    except ValidationError as error:
        told: set[Key] = set()
        for detail in error.errors(include_url=False):
            key = _written_part(detail["loc"], draft.values)
            if detail["type"] == "missing" and isinstance(detail["loc"][-1], str):  # else it is a list's item
                key = (*key, detail["loc"][-1])
            if key not in told:
                told.add(key)
                draft.fault(draft.place(key), sentence(detail["type"], key, _at(draft.values, key)))
    return None


def _written_part(location: Key, values: Any) -> Key:
    """The part of pydantic's location that the user wrote; the rest names members of a union."""
    for depth, step in enumerate(location):
        if isinstance(values, dict) and step in values:
            values = values[str(step)]
        elif isinstance(values, list) and isinstance(step, int) and step < len(values):
            values = values[step]
        else:
            return location[:depth]
    return location


def _at(values: Any, key: Key) -> Any:
    """What stands at a key; `ABSENT` where nothing does."""
    for step in key:
        values = values.get(step, ABSENT) if isinstance(values, dict) else values[step]
    return values


def _error(faults: Sequence[tuple[int, str]], path: Path | None) -> RecipeError:
    lines = [sentence for _, sentence in sorted(faults, key=lambda fault: fault[0])]
    hidden = len(lines) - _MAX_FAULTS_SHOWN
    shown = lines[:_MAX_FAULTS_SHOWN] + ([f"and {hidden} more"] if hidden > 0 else [])
    what = shown[0] if len(lines) == 1 else f"{len(lines)} faults in the recipe:\n  " + "\n  ".join(shown)
    in_file = any(order < _FIRST_OVERRIDE for order, _ in faults)
    check = f"`causal-compress recipes check {path}`" if path and in_file else "the command"
    return RecipeError(what, remedy=f"correct what is named above, then run {check} again.")
