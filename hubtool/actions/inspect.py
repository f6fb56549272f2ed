"""Say what a file is: container, identity, values and hashes in one report. Needs no library, no torch; executes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubtool.adapters.identity import Identity
from hubtool.errors import CorruptFile
from hubtool.formats.base import EMPTY, TensorFile
from hubtool.tensors.dtypes import BITS, numel
from hubtool.types import Finding

# Kinds whose every number is used as it is: one that is not finite makes the whole artifact useless.
_CHECKED = frozenset(
    {"lora", "textual_inversion", "hypernetwork", "aesthetic_embedding", "custom_diffusion", "null_text"}
)
_NOT_FINITE = "the training diverged or the file was damaged; only an earlier copy helps"
_HASHES = ("sha256", "payload_sha256", "content_id")


@dataclass(frozen=True, slots=True)
class Report:
    """What ``inspect`` found. ``findings`` are those of the container, of the identity and of the values, each once."""

    file: TensorFile
    identity: Identity
    hashes: Mapping[str, str | None] = field(default_factory=lambda: EMPTY)
    findings: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that ``inspect --json`` prints; its form is ``schemas/inspect.schema.json``."""
        return {
            **self._file_json(),
            **self._identity_json(),
            "findings": [finding.to_json() for finding in self.findings],
        }

    def _file_json(self) -> dict[str, Any]:
        refs = self.file.tensors.values()
        return {
            "path": str(self.file.path),
            "size": self.file.size,
            "format": self.file.format,
            "tensors": len(refs),
            "parameters": sum(numel(ref.shape) for ref in refs),
            "dtypes": sorted({ref.dtype for ref in refs}),
            "metadata": dict(self.file.metadata),
            "hashes": {**dict.fromkeys(_HASHES), **self.hashes},
        }

    def _identity_json(self) -> dict[str, Any]:
        found = self.identity
        return {
            "kind": found.kind,
            "kind_candidates": list(found.kind_candidates),
            "variant": found.variant,
            "algorithm": found.algorithm,
            "flags": list(found.flags),
            "family": found.family,
            "family_candidates": list(found.family_candidates),
            "base_model": found.base_model,
            "layout": found.layout,
            "components": dict(found.components),
            "ranks": sorted(set(found.ranks)),
            "alphas": sorted(set(found.alphas)),
            "trigger_words": list(found.trigger_words),
            "embeddings": [embedding.to_json() for embedding in found.embeddings],
            "claims": dict(found.claims),
            "evidence": list(found.evidence),
        }


def inspect(path: str | Path, *, hashes: bool = True, values: bool = True) -> Report:
    """Say what the file or folder at ``path`` is.

    ``hashes=False`` leaves the hashes out, ``values=False`` the look at every number of an adapter; with both, only headers are
    read. Raises FileMissing, FileError, UnsupportedFile, UnsafeFile, and CorruptFile also for an adapter with NaN or infinity.
    """
    from hubtool.formats import open_file
    from hubtool.layouts.identify import identify

    file = open_file(path)
    identity = identify(file)
    found = (*file.findings, *identity.findings, *(_check_values(file) if values and identity.kind in _CHECKED else ()))
    return Report(file, identity, _hashes(file) if hashes else EMPTY, tuple(dict.fromkeys(found)))


def _check_values(file: TensorFile) -> Iterator[Finding]:
    from hubtool.tensors.values import scan_values

    near = []
    for ref in file.tensors.values():
        values = scan_values(ref)
        if values.nonfinite_at is not None:
            at = None if ref.inline or not ref.contiguous else ref.start + values.nonfinite_at * BITS[ref.dtype] // 8
            raise CorruptFile(f"NaN or infinity in {ref.name}", path=file.path, offset=at, hint=_NOT_FINITE)
        if values.near_overflow:
            near.append(ref.name)
    if near:
        rest = len(near) - 1
        more = f" and {rest} more tensor{'s' if rest > 1 else ''}" if rest else ""
        yield Finding("near-overflow", "warning", f"values close to the limit of fp16 in {near[0]}{more}")


def _hashes(file: TensorFile) -> Mapping[str, str | None]:
    from hubtool.layouts.content import content_id

    return {**_bytes_hashes(file), "content_id": content_id(file)}


def _bytes_hashes(file: TensorFile) -> dict[str, str]:
    """The hashes of a file; of a folder or of shards the one hash of their tree, as the library has it."""
    from hubtool.actions.trees import tree_sha256
    from hubtool.tensors.hashing import hash_file

    if file.path.is_dir():
        return {"tree_sha256": tree_sha256(file, os.fsencode(file.path))}
    if file.path.name.endswith(".index.json"):
        return {"tree_sha256": tree_sha256(file, os.fsencode(file.path.parent))}
    return hash_file(file.path)
