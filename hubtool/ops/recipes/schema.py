"""Checks a document against a JSON Schema of our own, with the words that our schemas use (draft 2020-12): no package needed.

``schemas/recipe.schema.json`` is what counts, not this code: a word that is not known here is refused, never ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

from hubtool import resources
from hubtool.errors import TableError

Schema = Mapping[str, Any]
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_SILENT = frozenset({"$schema", "$id", "$defs", "title", "description"})


@cache
def schema(name: str) -> Schema:
    """A schema of the folder schemas/, checked for words that ``problems`` does not know. Raises ``TableError``."""
    path = resources.schemas() / f"{name}.schema.json"
    document: Schema = json.loads(path.read_text(encoding="utf-8"))
    unknown = set(_words(document)) - _CHECKS.keys() - _SILENT - {"$ref", "additionalProperties"}
    if unknown:
        raise TableError(f"{path.name} uses {', '.join(sorted(unknown))}", path=path)
    return document


def problems(value: Any, root: Schema) -> Iterator[str]:
    """What is wrong with ``value``, one sentence each, beginning with where: ``inputs[0].strength: ...``."""
    yield from _problems(value, root, root, "")


def _words(node: Schema) -> Iterator[str]:
    """Every keyword of a schema and of those inside it."""
    for word, value in node.items():
        yield word
        if word in ("properties", "$defs"):
            for inner in value.values():
                yield from _words(inner)
        elif word == "anyOf":
            for inner in value:
                yield from _words(inner)
        elif isinstance(value, Mapping):
            yield from _words(value)


def _problems(value: Any, node: Schema, root: Schema, where: str) -> Iterator[str]:
    if "$ref" in node:
        yield from _problems(value, root["$defs"][node["$ref"].rpartition("/")[2]], root, where)
    for word, wanted in node.items():
        if word in _CHECKS and (complaint := _CHECKS[word](value, wanted)):
            yield f"{where or 'the document'}: {complaint}"
    yield from _inside(value, node, root, where)
    if "anyOf" in node and not any(_fits(value, choice, root) for choice in node["anyOf"]):
        yield f"{where or 'the document'}: {_choices(node['anyOf'])}"


def _fits(value: Any, node: Schema, root: Schema) -> bool:
    return next(_problems(value, node, root, ""), None) is None


def _choices(choices: list[Schema]) -> str:
    wanted = [name for choice in choices for name in choice.get("required", ())]
    return f"one of {', '.join(wanted)} is needed" if wanted else "this value has no allowed form"


def _inside(value: Any, node: Schema, root: Schema, where: str) -> Iterator[str]:
    """Problems of members and items."""
    if isinstance(value, dict):
        known, rest = node.get("properties", {}), node.get("additionalProperties", True)
        for name, item in value.items():
            place = f"{where}.{name}" if where else str(name)
            if name in known:
                yield from _problems(item, known[name], root, place)
            elif rest is False:
                yield f"{place}: not a word of this schema (known: {', '.join(known)})"
            elif isinstance(rest, Mapping):
                yield from _problems(item, rest, root, place)
    elif isinstance(value, list) and "items" in node:
        for at, item in enumerate(value):
            yield from _problems(item, node["items"], root, f"{where}[{at}]")


def _type(value: Any, wanted: str | list[str]) -> str | None:
    names = [wanted] if isinstance(wanted, str) else wanted
    return None if any(_is(value, name) for name in names) else f"{_told(value)} is no {' or '.join(names)}"


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False  # JSON has no word for it, YAML has
    return isinstance(value, _TYPES[name]) or (name == "integer" and isinstance(value, float) and value.is_integer())


def _told(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _required(value: Any, names: list[str]) -> str | None:
    missing = [name for name in names if name not in value] if isinstance(value, dict) else []
    return f"{', '.join(missing)} is missing" if missing else None


def _number(value: Any, limit: float, *, over: bool) -> str | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    wrong = value > limit if over else value < limit
    return f"{_told(value)} is {'over' if over else 'under'} {limit}" if wrong else None


def _length(value: Any, limit: int, *, kind: type[str] | type[list[Any]], over: bool) -> str | None:
    if not isinstance(value, kind):
        return None
    count = len(value)
    wrong = count > limit if over else count < limit
    what = "characters" if kind is str else "items"
    return f"{count} {what} are {'more' if over else 'fewer'} than {limit}" if wrong else None


def _pattern(value: Any, wanted: str) -> str | None:
    return (
        f"{_told(value)} does not match {wanted}" if isinstance(value, str) and not re.search(wanted, value) else None
    )


def _const(value: Any, wanted: Any) -> str | None:
    return None if value == wanted and type(value) is type(wanted) else f"{_told(value)} is not {wanted!r}"


def _enum(value: Any, wanted: list[Any]) -> str | None:
    return None if value in wanted else f"{_told(value)} is none of {', '.join(map(str, wanted))}"


_CHECKS: Mapping[str, Callable[[Any, Any], str | None]] = {
    "type": _type,
    "const": _const,
    "enum": _enum,
    "required": _required,
    "pattern": _pattern,
    "minimum": partial(_number, over=False),
    "maximum": partial(_number, over=True),
    "minLength": partial(_length, kind=str, over=False),
    "maxLength": partial(_length, kind=str, over=True),
    "minItems": partial(_length, kind=list, over=False),
    "maxItems": partial(_length, kind=list, over=True),
    "items": lambda value, wanted: None,  # looked into by _inside
    "properties": lambda value, wanted: None,
    "anyOf": lambda value, wanted: None,
}
