"""Hand-made ``TensorFile``s: names and shapes without bytes, pickled trees, and the key lists of the shared fixtures."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubtool.formats.base import TensorFile
from hubtool.tensors.ref import TensorRef

Shapes = Mapping[str, Any]


def tensor(name: str, *shape: int, dtype: str = "F32", inline: bytes | None = None) -> TensorRef:
    return TensorRef(name, dtype, shape, Path("made.safetensors"), 0, len(inline or b""), inline=inline)


def flat(
    shapes: Shapes, metadata: Mapping[str, str] | None = None, *, stem: str = "made", dtype: str = "F16"
) -> TensorFile:
    """A safetensors file of the given shapes."""
    refs = {name: tensor(name, *shape, dtype=dtype) for name, shape in shapes.items()}
    return TensorFile(Path(f"{stem}.safetensors"), "safetensors", 0, refs, dict(metadata or {}))


def pickled(tree: Any, *, stem: str = "made") -> TensorFile:
    """A torch file of a tree in which tuples of ints are shapes of tensors."""
    tensors: dict[str, TensorRef] = {}
    structure = _filled(tree, "", tensors)
    return TensorFile(Path(f"{stem}.pt"), "torch-zip", 0, tensors, structure=structure)


def _filled(value: Any, name: str, tensors: dict[str, TensorRef]) -> Any:
    if isinstance(value, TensorRef):
        tensors[name] = value
        return value
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        tensors[name or "(root)"] = tensor(name, *value)
        return tensors[name or "(root)"]
    if isinstance(value, Mapping):
        return {key: _filled(item, f"{name}.{key}" if name else str(key), tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, f"{name}.{i}" if name else str(i), tensors) for i, item in enumerate(value)]
    return value


def base_lists(folder: Path) -> list[tuple[str, str, str, Shapes]]:
    """(base, naming, component, {key: shape}) of ``fixtures/bases``."""
    found = []
    for path in sorted(folder.glob("*.json.gz")):
        document = json.loads(gzip.decompress(path.read_bytes()))
        for naming in ("original", "diffusers"):
            found += [(document["name"], naming, part, keys) for part, keys in document[naming].items()]
    return found


def signature(path: Path) -> TensorFile:
    """A key list of ``fixtures/real/signature``: nested dicts whose leaves are ``{"shape": [...]}``."""
    return pickled(_shapes(json.loads(path.read_text())), stem=path.stem)


def _shapes(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("shape"), list):
        return tuple(value["shape"])
    return {key: _shapes(item) for key, item in value.items()} if isinstance(value, dict) else value
