"""Weights in several files under an index: ``model.safetensors.index.json`` with ``metadata.total_size`` and ``weight_map``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, UnsafeFile
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.formats.documents import is_plain_name, read_json
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

# What the index calls itself -> how its shards must end. A safetensors index must not lead to a pickle.
_SUFFIXES = ((".safetensors.index.", ".safetensors"), (".bin.index.", ".bin"))


def read(path: Path) -> TensorFile:
    """Open an index and all its shards as one file; tensors in order of the shards.

    Cross checks: every shard lies beside the index, exists and is of the promised kind; no tensor lies in two shards; the map names
    every tensor where it is, and nothing else. Raises ``UnsafeFile`` for a shard name that leads elsewhere, ``CorruptFile`` for the
    rest. A wrong ``total_size`` is a finding.
    """
    document = read_json(path, strict=True)
    where = _weight_map(document, path)
    names = list(dict.fromkeys(where.values()))
    for name in names:
        _check_name(name, path)
    shards = {name: _open_shard(path.parent / name, path) for name in names}
    tensors = _joined(shards, where, path)
    files = tuple(shard.path for shard in shards.values())
    return TensorFile(
        path,
        "sharded",
        sum(shard.size for shard in shards.values()),
        tensors,
        {key: value for shard in shards.values() for key, value in shard.metadata.items()},
        _findings(document, shards, tensors),
        config={path.name: document},
        files=(*files, path),
    )


def _weight_map(document: Any, path: Path) -> Mapping[str, str]:
    where = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(where, dict) or not where:
        raise CorruptFile("the index has no weight_map", path=path)
    if not all(isinstance(name, str) for name in where.values()):
        raise CorruptFile("the weight_map holds something that is not a file name", path=path)
    return where


def _check_name(name: str, path: Path) -> None:
    if not is_plain_name(name):
        raise UnsafeFile(f"the index names a shard outside its folder: {name[:80]!a}", path=path)
    for mark, suffix in _SUFFIXES:
        if mark in path.name and not name.lower().endswith(suffix):
            raise UnsafeFile(f"the index promises {suffix} files and names {name[:80]!a}", path=path)


def _open_shard(shard: Path, path: Path) -> TensorFile:
    if not os.path.exists(shard):
        raise CorruptFile(f"the shard {shard.name} is missing", path=path, hint="download it into the same folder")
    file = open_file(shard)
    if shard.name.lower().endswith(".safetensors") and file.format != "safetensors":
        raise UnsafeFile(f"the shard {shard.name} is a {file.format} file under a safetensors name", path=path)
    return file


def _joined(shards: Mapping[str, TensorFile], where: Mapping[str, str], path: Path) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for name, shard in shards.items():
        for key, ref in shard.tensors.items():
            if key in tensors:
                raise CorruptFile(f"the tensor {key[:80]!a} lies in two shards", path=path)
            if where.get(key) != name:
                raise CorruptFile(f"the index does not say that {key[:80]!a} lies in {name}", path=path)
            tensors[key] = ref
    for key in where:
        if key not in tensors:
            raise CorruptFile(f"the index names {key[:80]!a}, which is not in {where[key]}", path=path)
    return tensors


def _findings(
    document: Mapping[str, Any], shards: Mapping[str, TensorFile], tensors: Mapping[str, TensorRef]
) -> tuple[Finding, ...]:
    found = [
        replace(finding, message=f"{name}: {finding.message}")
        for name, shard in shards.items()
        for finding in shard.findings
    ]
    metadata = document.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(ref.nbytes for ref in tensors.values())
    if claimed is not None and claimed != total:
        found.append(
            Finding(
                "total-size", "warning", f"the index claims {ascii(claimed)[:40]} bytes of tensors; there are {total}"
            )
        )
    return tuple(found)
