"""A plan whose output is a diffusers folder: weights by component, configurations, and what no component holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubtool.ops.plan import Plan
from hubtool.tensors.evaluate import is_bytes
from hubtool.tensors.expr import Expr, size

FORMAT = "diffusers-folder"


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A safetensors file of the folder. ``keys``: key in the file -> key in the plan's ``tensors``; ``header``: the origin's, to reuse."""

    name: str
    keys: Mapping[str, str]
    header: bytes | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


@dataclass(frozen=True, slots=True)
class FolderPlan(Plan):
    """What will be written into a new folder. ``tensors`` are called ``component/key`` (``key`` in a folder of one component).

    ``documents``: file -> bytes; ``extras``: tensors of no component, kept in a file of their own and never cast; ``copies``: file ->
    file of a base model (tokenizers). ``header`` is not None when every file is its origin byte for byte.
    """

    files: tuple[WeightsFile, ...] = ()
    documents: Mapping[str, bytes] = field(default_factory=dict)
    extras: Mapping[str, Expr] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)

    @property
    def bytes_out(self) -> int:
        tensors = (*self.tensors.values(), *self.extras.values())
        return sum(map(size, tensors)) + sum(map(len, self.documents.values()))

    @property
    def needs_torch(self) -> bool:
        return not all(map(is_bytes, (*self.tensors.values(), *self.extras.values())))

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json`` and ``--dry-run``, with the names of the files."""
        names = [file.name for file in self.files] + [*self.documents] + [*self.copies]
        return {**Plan.to_json(self), "files": sorted(names), "extras": len(self.extras)}
