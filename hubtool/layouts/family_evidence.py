"""What decides a file's family: why others were ruled out, or which module would tell where the file cannot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.ir import ModuleKey, Patch
from hubtool.layouts import index, tables, vocabulary
from hubtool.layouts.parse import Parsed
from hubtool.tensors.dtypes import numel
from hubtool.types import Shape

_NEAR = 0.5  # of the modules a family must know by name to be worth a word
_MOST_NEAR = 3
_MOST_TELLING = 2


@dataclass(frozen=True, slots=True)
class Evidence:
    """``why``: sentences for what was concluded. ``against``: family -> why it is not that. ``telling``: modules that would decide."""

    why: tuple[str, ...]
    against: dict[str, str]
    telling: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"why": list(self.why), "against": dict(self.against), "would_tell": list(self.telling)}


def evidence(parsed: Parsed) -> Evidence:
    """Why the file has the family, or the candidates, that it has."""
    against = {name: reason for name in _near(parsed) for reason in [_against(name, parsed)] if reason}
    telling = tuple(_telling(parsed.candidates)) if len(parsed.candidates) > 1 else ()
    return Evidence(parsed.evidence, against, telling)


def _near(parsed: Parsed) -> list[str]:
    """Families that know most of the names too, the nearest first."""
    stems = [path for _, path in parsed.adapter.patches]
    listed = index.shortlist(stems) if stems else []
    enough = [name for name, count in listed if count >= _NEAR * len(stems) and name not in parsed.candidates]
    return enough[:_MOST_NEAR]


def _against(name: str, parsed: Parsed) -> str | None:
    """The first thing in the file that this family contradicts; None where nothing does."""
    missing: list[str] = []
    for key, patch in parsed.adapter.patches.items():
        shapes = vocabulary.weight_shapes(name, *key) if key[0] in tables.family(name).components else ()
        if not shapes:
            missing.append(".".join(key))
        elif _differs(patch, shapes):
            return f"{'.'.join(key)} is {_called(patch.weight_shape)} here and {' or '.join(map(_called, shapes))} in {name}"
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{name} has no {missing[0]}{more}"
    return None


def _differs(patch: Patch, shapes: tuple[Shape, ...]) -> bool:
    mine = patch.weight_shape
    if mine is None:
        return False
    return all((mine[0], numel(mine[1:])) != (shape[0], numel(shape[1:])) for shape in shapes)


def _called(shape: Shape | None) -> str:
    return "unknown" if shape is None else " x ".join(map(str, shape))


def _telling(candidates: tuple[str, ...]) -> Iterator[str]:
    """Modules that differ between the candidates, first those that all have with another shape, then those that one of them lacks."""
    sentences = itertools.chain(_other_shapes(candidates), _other_modules(candidates))
    yield from itertools.islice(sentences, _MOST_TELLING)


def _other_shapes(candidates: tuple[str, ...]) -> Iterator[str]:
    for key in _modules(candidates[0]):
        shapes = {
            name: vocabulary.weight_shapes(name, *key)
            for name in candidates
            if key[0] in tables.family(name).components
        }
        if len(shapes) == len(candidates) and all(shapes.values()) and len(set(shapes.values())) == len(candidates):
            told = ", ".join(f"{' or '.join(map(_called, each))} in {name}" for name, each in shapes.items())
            yield f"{'.'.join(key)}: {told}"
            return


def _other_modules(candidates: tuple[str, ...]) -> Iterator[str]:
    for name in candidates:
        for key in _modules(name):
            lacking = [other for other in candidates if other != name and not _has(other, key)]
            if lacking:
                yield f"{'.'.join(key)}: only {name} has it, not {' or '.join(lacking)}"
                break


def _modules(name: str) -> Iterator[ModuleKey]:
    """Modules with a weight matrix, the denoiser's first."""
    for component in sorted(tables.family(name).components, key=lambda one: one.startswith("text_encoder")):
        for path, parameters in vocabulary.modules(name, component).items():
            if len(parameters.get("weight", ())) > 1:
                yield component, path


def _has(name: str, key: ModuleKey) -> bool:
    return key[0] in tables.family(name).components and key[1] in vocabulary.modules(name, key[0])
