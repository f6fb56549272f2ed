"""The JSON of an A1111 embedding picture -> tensors. ``{"TORCHTENSOR": nested lists}`` stands for a float tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile
from hubtool.formats.base import TensorFile
from hubtool.tensors.dtypes import numel
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding, Shape

_TENSOR = "TORCHTENSOR"
_MOST_NUMBERS = 1 << 22
_DEEPEST = 8


def payload_file(path: Path, size: int, payload: Any, findings: tuple[Finding, ...]) -> TensorFile:
    """The tensors (F32, ``inline``), scalars and structure of a payload. Raises ``CorruptFile`` for anything else."""
    if not isinstance(payload, Mapping) or not isinstance(payload.get("string_to_param"), Mapping):
        raise CorruptFile("the picture's embedding data has no string_to_param", path=path)
    structure = _convert(path, payload, "", 0)
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    _collect(structure, "", tensors, metadata)
    return TensorFile(path, "png", size, tensors, metadata, findings, structure, files=(path,))


def _convert(path: Path, value: Any, name: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise CorruptFile("the picture's embedding data is nested too deeply", path=path)
    if isinstance(value, Mapping):
        if _TENSOR in value:
            return _tensor(path, name, value[_TENSOR])
        return {key: _convert(path, item, f"{name}.{key}" if name else key, depth + 1) for key, item in value.items()}
    return value


def _tensor(path: Path, name: str, nested: Any) -> TensorRef | int:
    """``string_to_token`` keeps its id as a 0-d tensor; floats become F32 (JSON's doubles hold them exactly)."""
    if isinstance(nested, int):
        return nested
    shape = _shape(nested)
    if numel(shape) > _MOST_NUMBERS:
        raise CorruptFile(f"an embedding of shape {list(shape)}", path=path)
    try:
        data = struct.pack(f"<{numel(shape)}f", *_flat(nested, shape))
    except (struct.error, TypeError, ValueError, OverflowError) as error:
        raise CorruptFile(f"the picture's embedding {name!r} is no table of numbers", path=path) from error
    return TensorRef(name, "F32", shape, path, 0, len(data), inline=data)


def _shape(nested: Any) -> Shape:
    sizes: list[int] = []
    while isinstance(nested, list) and len(sizes) < 4:
        sizes.append(len(nested))
        nested = nested[0] if nested else None
    return tuple(sizes)


def _flat(nested: Any, shape: Shape) -> list[Any]:
    """Row-major values; raises ``ValueError`` where a row has another length than the first."""
    if not shape:
        return [nested]
    if not isinstance(nested, list) or len(nested) != shape[0]:
        raise ValueError("ragged rows")
    return [value for row in nested for value in _flat(row, shape[1:])]


def _collect(value: Any, name: str, tensors: dict[str, TensorRef], metadata: dict[str, str]) -> None:
    if isinstance(value, TensorRef):
        tensors[name] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, f"{name}.{key}" if name else key, tensors, metadata)
    else:
        metadata[name] = json.dumps(value)
