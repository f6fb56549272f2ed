"""Recipes: what was asked of an operation, small enough to travel in the output's header and exact enough to repeat it to the byte.

A recipe names its inputs by path, by REF of the library, by SHA-256, or holds the recipe that makes them. The recipe that is stamped into
an output knows inputs by file name and SHA-256 only: a path of somebody's machine is nobody's business, and would make equal results differ.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from hubtool.errors import CorruptFile, HubtoolError, NotFound
from hubtool.ops.folder_plan import FolderPlan
from hubtool.ops.plan import Plan
from hubtool.ops.recipes import text as texts
from hubtool.ops.recipes.parents import DOCUMENTS, PARENTS, Parent, merged
from hubtool.ops.recipes.schema import problems, schema

__all__ = ["DOCUMENT", "KEY", "PARENTS", "Input", "Output", "Parent", "Recipe", "dump", "load", "of_metadata", "stamp"]

KEY = "hubtool.recipe"  # metadata entry of a single file
DOCUMENT = DOCUMENTS[KEY]  # file of a folder
VERSION = 1
P = TypeVar("P", bound=Plan)
_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Input:
    """One input. ``strength`` counts for all of it; ``strengths`` and ``blocks`` are texts of ``--strength`` and ``--blocks``."""

    path: str | None = None
    ref: str | None = None
    sha256: str | None = None
    name: str | None = None
    recipe: Recipe | None = None
    role: str | None = None
    strength: float | None = None
    strengths: tuple[str, ...] = ()
    blocks: str | None = None
    family: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {name: getattr(self, name) for name in _WORDS if getattr(self, name) not in (None, ())}
        if self.strength is not None:
            document["strength"] = float(self.strength)  # 1 and 1.0 are one recipe
        if self.strengths:
            document["strengths"] = list(self.strengths)
        return document if self.recipe is None else {**document, "recipe": self.recipe.to_json()}

    def __str__(self) -> str:
        said = self.path or self.ref or self.name or (self.sha256 or "")[:12]
        return said or f"the {self.recipe.operation if self.recipe else 'input'}"


_WORDS = ("path", "ref", "sha256", "name", "role", "strength", "strengths", "blocks", "family")


@dataclass(frozen=True, slots=True)
class Output:
    """What to write. ``sha256``: what the result was, for ``recipe check``."""

    layout: str | None = None
    format: str | None = None
    dtype: str | None = None
    sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        names = ("layout", "format", "dtype", "sha256")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Recipe:
    """``operation``: collapse, merge, extract ...; ``method`` and ``parameters`` are the operation's own; ``seed`` makes chance repeatable."""

    operation: str
    inputs: tuple[Input, ...]
    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    output: Output = Output()
    seed: int | None = None
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"version": self.version, "operation": self.operation}
        document["inputs"] = [one.to_json() for one in self.inputs]
        options = {
            "method": self.method,
            "parameters": dict(self.parameters),
            "output": self.output.to_json(),
            "seed": self.seed,
        }
        return document | {name: value for name, value in options.items() if value not in (None, {})}

    def steps(self) -> Iterator[Recipe]:
        """This recipe and those inside it, inner ones first."""
        for one in self.inputs:
            if one.recipe is not None:
                yield from one.recipe.steps()
        yield self

    def by_role(self, role: str) -> list[Input]:
        return [one for one in self.inputs if one.role == role]


def dump(recipe: Recipe, *, indent: int | None = None) -> str:
    """The one text of a recipe: JSON with sorted keys, so that equal recipes are equal bytes."""
    separators = (",", ":") if indent is None else None
    return json.dumps(
        recipe.to_json(), sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators
    )


def load(text: str) -> Recipe:
    """A recipe from JSON or YAML. Raises ``CorruptFile`` naming the first thing that schemas/recipe.schema.json does not allow."""
    return from_json(texts.parse(text))


def from_json(document: Any) -> Recipe:
    """As ``load``, for a document that has been parsed already."""
    wrong = next(problems(document, schema("recipe")), None)
    if wrong is not None:
        raise CorruptFile(f"no recipe: {wrong}", hint="schemas/recipe.schema.json says what a recipe may hold")
    return _recipe(document)


def _recipe(document: Mapping[str, Any]) -> Recipe:
    return Recipe(
        operation=document["operation"],
        inputs=tuple(map(_input, document["inputs"])),
        method=document.get("method"),
        parameters=MappingProxyType(dict(document.get("parameters", {}))),
        output=Output(**document.get("output", {})),
        seed=None if document.get("seed") is None else int(document["seed"]),
    )


def _input(document: Mapping[str, Any]) -> Input:
    known = {name: document[name] for name in _WORDS if name in document}
    nested = document.get("recipe")
    strength = document.get("strength")
    return Input(
        **{
            **known,
            "strengths": tuple(document.get("strengths", ())),
            "strength": None if strength is None else float(strength),
            "recipe": None if nested is None else _recipe(nested),
        }
    )


def of_metadata(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe in a file's metadata; None when there is none that can be read (metadata is a claim, never trusted)."""
    try:
        return load(metadata[KEY]) if KEY in metadata else None
    except HubtoolError:
        return None


def read(path: Path) -> Recipe:
    """The recipe in a recipe file (JSON or YAML), a tensor file's metadata, or a folder. Raises ``NotFound`` where there is none."""
    document = path / DOCUMENT if path.is_dir() else path
    if document.suffix.lower() in (".json", ".yaml", ".yml"):
        return load(_text(document, path))
    from hubtool.formats import open_file

    file = open_file(path)
    if KEY not in file.metadata:
        raise NotFound(
            "the file keeps no recipe", path=path, hint="name a recipe (.json, .yaml), or a file that hubtool made"
        )
    return load(file.metadata[KEY])


def _text(document: Path, asked: Path) -> str:
    from hubtool.tensors.reading import open_read, pread_exact

    if not document.is_file():
        raise NotFound("there is no recipe here", path=asked)
    fd = open_read(document)
    try:
        raw = pread_exact(fd, min(os.fstat(fd).st_size, texts.MAX_BYTES + 1), 0, document)
    finally:
        os.close(fd)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptFile("a recipe is UTF-8 text", path=document) from None


def anonymous(recipe: Recipe, parents: Sequence[Parent]) -> Recipe:
    """The recipe as it is stamped: ``parents`` in the order of the inputs give their names and hashes, paths and REFs are dropped."""
    known = [_known(one, parent) for one, parent in zip(recipe.inputs, parents, strict=True)]
    return replace(recipe, inputs=tuple(known), output=replace(recipe.output, sha256=None))


def _known(one: Input, parent: Parent) -> Input:
    if one.recipe is not None:
        made = of_metadata(parent.metadata) or one.recipe
        return replace(one, path=None, ref=None, sha256=None, name=None, recipe=made)
    return replace(one, path=None, ref=None, sha256=parent.sha256 or one.sha256, name=parent.name)


def stamp(plan: P, recipe: Recipe, parents: Sequence[Parent]) -> P:
    """The plan with the recipe and what its inputs (``parents``, in their order) said about themselves.

    A single file keeps both in its metadata, a folder in documents; a torch file has no place for them, and a note says so. What the
    plan's own metadata says is kept, but for licence, trigger words and origins, which are merged (see ``recipes.parents``).
    """
    known = dump(anonymous(recipe, parents))
    if plan.format == "torch-zip":
        return replace(plan, notes=(*plan.notes, "a torch file has no place for the recipe"))
    said = {**merged(plan.metadata, parents), KEY: known}
    if isinstance(plan, FolderPlan):
        papers = {DOCUMENT: _pretty(known), **_papers(said)}
        return replace(plan, metadata=said, documents={**plan.documents, **papers})
    return replace(plan, metadata=said, header=None)


def _papers(said: Mapping[str, str]) -> dict[str, bytes]:
    return {DOCUMENTS[PARENTS]: _pretty(said[PARENTS])} if PARENTS in said else {}


def _pretty(text: str) -> bytes:
    return (json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
