"""The seven axes on which every adapter file is one point (spec/layouts.md 0), each read off the keys, with a key as evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hubtool.adapters.ir import Patch
from hubtool.formats.base import TensorFile
from hubtool.layouts import vocabulary
from hubtool.layouts.hosts_facts import algorithm
from hubtool.layouts.parse import Parsed
from hubtool.layouts.tables import Syntax

_CARRIERS = {
    "tensor": "an alpha tensor beside each module",
    "metadata": "lora_adapter_metadata in the header",
    "config": "adapter_config.json",
    "none": "nothing: the scale is 1",
}
_JOINERS = {"_": "_ (flat: dots became underscores)", ".": ". (dotted)"}


@dataclass(frozen=True, slots=True)
class Value:
    """One value that an axis has in a file: how many keys (or modules) show it, and one of them."""

    value: str
    count: int
    example: str

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "count": self.count, "example": self.example}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis, its commonest value first."""

    name: str
    values: tuple[Value, ...]

    def to_json(self) -> dict[str, Any]:
        return {"axis": self.name, "values": [value.to_json() for value in self.values]}


@dataclass(frozen=True, slots=True)
class _Cut:
    """A key in three parts."""

    key: str
    component: str
    path: str
    prefix: str
    stem: str
    suffix: str


def axes(file: TensorFile, parsed: Parsed) -> tuple[Axis, ...]:
    """The seven axes of a parsed adapter."""
    cuts = [_cut(row, key, parsed.syntax) for row, key in parsed.keys.items()]
    positional = parsed.syntax.positional
    joiner = "none: positions, not names" if positional else _JOINERS.get(parsed.syntax.joiner, parsed.syntax.joiner)
    flat = next((cut.key for cut in cuts if parsed.syntax.joiner in cut.stem), "")
    return (
        Axis("container", (Value(file.format, len(file.tensors), file.path.name),)),
        Axis("prefix", _counted((cut.prefix or "(none)", cut.key) for cut in cuts)),
        Axis(
            "vocabulary", _counted((_naming(cut, parsed), f"{cut.stem} = {cut.component}.{cut.path}") for cut in cuts)
        ),
        Axis("joiner", (Value(joiner, len(cuts), flat),)),
        Axis("suffix", _counted((cut.suffix, cut.key) for cut in cuts)),
        Axis(
            "algorithm", _counted((_algorithm(patch), ".".join(key)) for key, patch in parsed.adapter.patches.items())
        ),
        Axis("scale", _scales(parsed)),
    )


def _counted(pairs: Iterable[tuple[str, str]]) -> tuple[Value, ...]:
    """(value, example) pairs by value, the commonest first, each with its first example."""
    count: Counter[str] = Counter()
    first: dict[str, str] = {}
    for value, example in pairs:
        count[value] += 1
        first.setdefault(value, example)
    return tuple(Value(value, n, first[value]) for value, n in count.most_common())


def _cut(row: tuple[str, str, str], key: str, syntax: Syntax) -> _Cut:
    component, path, role = row
    if syntax.positional:
        head, _, suffix = key.rpartition(":")
        return _Cut(
            key, component, path, head.partition(":")[0], head or key, suffix if head else "(up and down in turn)"
        )
    prefix = _longest((text for text in _prefixes(syntax, component) if key.startswith(text)), "")
    suffix = _longest((text for text in _suffixes(syntax, component, role) if key.endswith("." + text)), "")
    stem = key[len(prefix) : len(key) - len(suffix) - 1] if suffix else key[len(prefix) :]
    return _Cut(key, component, path, prefix, stem, suffix or "(the end of the key)")


def _longest(texts: Iterable[str], default: str) -> str:
    return max(texts, key=len, default=default)


def _prefixes(syntax: Syntax, component: str) -> tuple[str, ...]:
    return syntax.prefixes.get(component, syntax.prefixes.get("*", ()))


def _suffixes(syntax: Syntax, component: str, role: str) -> Iterator[str]:
    for text in syntax.roles_of(component).get(role, ()):
        yield text
        yield from (f"{tail}.{text}" for _, tail in syntax.tails)


def _naming(cut: _Cut, parsed: Parsed) -> str:
    """Whose names these are. A name that several namings share counts as diffusers'."""
    if parsed.syntax.positional:
        return "position in a walk over the 2022 module tree"
    family = parsed.adapter.family or next(iter(parsed.candidates), None)
    if family is None:
        return "in no family's vocabulary"
    stem = cut.stem if cut.stem in _names(family, cut.component, parsed.syntax.joiner) else f"{cut.stem}{cut.suffix}"
    naming = _names(family, cut.component, parsed.syntax.joiner).get(stem)
    return naming or _tailed(cut, parsed, family)


def _tailed(cut: _Cut, parsed: Parsed, family: str) -> str:
    """Where the suffix swallowed the end of the name (processor.to_q_lora), the canonical path is what can be looked up."""
    known = cut.path in vocabulary.modules(family, cut.component)
    return f"diffusers ({family})" if known and parsed.syntax.tails else f"not in {family}'s vocabulary"


@cache
def _names(family: str, component: str, joiner: str) -> Mapping[str, str]:
    """spelled module -> ``sgm (sdxl)``, over every size of the component."""
    return {
        spelled: f"{place.naming} ({family})"
        for size in vocabulary.models(family, component)
        for spelled, place in vocabulary.spellings(family, component, joiner, size).items()
    }


def _algorithm(patch: Patch) -> str:
    name = algorithm(patch)
    if patch.dora_scale is None:
        return name
    axis = getattr(patch, "dora_axis", None)
    return f"{name} + DoRA" + (f", a magnitude per {axis}put" if axis else "")


def _scales(parsed: Parsed) -> tuple[Value, ...]:
    """Who carries the scales: the tensors of the modules that have one, what the syntax has for the others."""
    ranked = {key: patch for key, patch in parsed.adapter.patches.items() if patch.rank}
    tensors = {row[:2]: key for row, key in parsed.keys.items() if row[2] == "alpha"}
    return _counted(_carrier(".".join(key), patch, tensors.get(key), parsed.syntax) for key, patch in ranked.items())


def _carrier(name: str, patch: Patch, tensor: str | None, syntax: Syntax) -> tuple[str, str]:
    told = f"scale {patch.scale:g}"
    if tensor is not None:
        return f"{_CARRIERS['tensor']}: {told}", tensor
    if patch.alpha_value is None:
        return "nothing: alpha = rank, the scale is 1", name
    return f"{_CARRIERS[syntax.alpha]}: {told}", name
