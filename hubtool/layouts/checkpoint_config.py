"""The JSON documents of a diffusers folder: facts of the family, and what the weights themselves say (widths, depths, optional parts).

A value of a table is a fact, or says where to look: ``{dim, axis}``, ``{each, axis}``, ``{count}``, ``{counts, over, none}``, ``{has}``; see the
head of ``schemas/pipelines/sd1.toml``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from hubtool.errors import ConversionError
from hubtool.layouts.checkpoint_tables import Component, Pipeline
from hubtool.tensors.expr import Expr

_WRITTEN_AS = "0.35.0"  # the oldest diffusers these documents are written for
_INDEX = "{i}"
_NOTHING = object()
Weights = Mapping[str, Expr]


def component_config(component: Component, weights: Weights) -> dict[str, Any]:
    """``config.json`` of a component; empty where no table says what it is: another class, or a variant without the usual parts."""
    other = any(key.startswith(component.unlike) for key in weights) if component.unlike else False
    if not component.config or other or not _complete(component.config, weights):
        return {}
    head = {"_class_name": component.cls, "_diffusers_version": _WRITTEN_AS} if component.library == "diffusers" else {}
    return {**head, **_resolved(component.config, weights)}


def scheduler_config(pipeline: Pipeline, denoiser: Weights) -> dict[str, Any]:
    """``scheduler_config.json``: the family's usual scheduler."""
    head = {"_class_name": pipeline.scheduler, "_diffusers_version": _WRITTEN_AS}
    return {**head, **_resolved(pipeline.scheduler_config, denoiser)}


def model_index(pipeline: Pipeline, present: Mapping[str, Weights]) -> dict[str, Any]:
    """``model_index.json``: components that are there with their class, the others as ``[null, null]``."""
    entries: dict[str, list[str | None]] = {
        name: [part.library, part.cls] if name in present else [None, None]
        for name, part in pipeline.components.items()
    }
    entries |= {name: _other(name, value, present) for name, value in pipeline.others.items()}
    entries["scheduler"] = ["diffusers", pipeline.scheduler]
    head = {"_class_name": pipeline.cls, "_diffusers_version": _WRITTEN_AS}
    return {**head, **pipeline.facts, **dict(sorted(entries.items()))}


def _other(name: str, value: tuple[str, ...], present: Mapping[str, Weights]) -> list[str | None]:
    """A tokenizer belongs to its encoder: without the one the pipeline goes without the other."""
    encoder = name.replace("tokenizer", "text_encoder")
    return [*value] if value and (encoder == name or encoder in present) else [None, None]


def dump(document: Mapping[str, Any]) -> bytes:
    """The document as diffusers writes it: two spaces, a line break at the end."""
    return (json.dumps(document, indent=2) + "\n").encode()


def _resolved(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    found = ((name, _value(value, weights)) for name, value in config.items())
    return {name: value for name, value in found if value is not _NOTHING}


def _complete(config: Mapping[str, Any], weights: Weights) -> bool:
    """Whether every tensor is there that a width is read from."""
    rules = [value for value in config.values() if isinstance(value, Mapping) and "dim" in value]
    return all(rule["dim"] in weights or rule.get("optional", False) for rule in rules)


def _value(value: Any, weights: Weights) -> Any:
    if not isinstance(value, Mapping):
        return value
    return next(rule(value, weights) for word, rule in _RULES.items() if word in value)


def _dim(rule: Mapping[str, Any], weights: Weights) -> Any:
    if rule.get("optional") and rule["dim"] not in weights:
        return _NOTHING
    size = _size(rule["dim"], rule["axis"], weights) // rule.get("by", 1)
    if "over" in rule:
        size //= _size(rule["over"], 0, weights)
    return math.isqrt(size) if rule.get("root") else size


def _size(key: str, axis: int, weights: Weights) -> int:
    tensor = weights.get(key)
    if tensor is None or axis >= len(tensor.shape):
        raise ConversionError(f"a configuration needs a width of {key}, which is missing or has fewer dimensions")
    return tensor.shape[axis]


def _each(rule: Mapping[str, Any], weights: Weights) -> list[Any]:
    """A value for every index of ``{i}``: a size, a fixed value, or the index itself."""
    keys = [
        (i, rule["each"].replace(_INDEX, str(i)))
        for i in range(_count(rule["each"].partition("." + _INDEX)[0], weights))
    ]
    there = [(i, key) for i, key in keys if key in weights]
    if "axis" in rule:
        return [_size(key, rule["axis"], weights) for _, key in there]
    return [rule.get("value", i) for i, _ in there]


def _counts(rule: Mapping[str, Any], weights: Weights) -> list[int]:
    levels = range(_count(rule["over"], weights))
    return [_count(rule["counts"].replace(_INDEX, str(i)), weights) or rule["none"] for i in levels]


def _count(head: str, weights: Weights) -> int:
    """Highest index that follows ``head``, plus one."""
    return max(_indices(head + ".", weights), default=-1) + 1


def _indices(start: str, weights: Weights) -> Iterator[int]:
    for key in weights:
        if key.startswith(start):
            text = key[len(start) :].partition(".")[0]
            if text.isdecimal():
                yield int(text)


def _has(rule: Mapping[str, Any], weights: Weights) -> Any:
    if rule["has"] in weights:
        return rule.get("then", True)
    return rule.get("else", _NOTHING if "then" in rule else False)


_RULES = {
    "dim": _dim,
    "each": _each,
    "counts": _counts,
    "count": lambda rule, weights: _count(rule["count"], weights),
    "has": _has,
}
