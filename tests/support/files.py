"""Raw builders of test files. Independent of hubtool's writers on purpose: they are oracles."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

RawTensor = tuple[str, Sequence[int], bytes]


def safetensors_bytes(
    tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None, *, align: int = 8
) -> bytes:
    """A safetensors file: ``tensors`` maps names to (dtype, shape, bytes) laid in mapping order; header padded to ``align``."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % align)
    return framed(text, b"".join(data for _, _, data in tensors.values()))


def framed(header: bytes, body: bytes = b"") -> bytes:
    """Any bytes as the header of a safetensors file: for malformed files."""
    return len(header).to_bytes(8, "little") + header + body


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file (folders are made) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(tensors, metadata))
    return path


def write_json(path: Path, document: object) -> Path:
    """Write a JSON document (folders are made) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def floats(*shape: int, start: float = 0.0, step: float = 0.25) -> RawTensor:
    """An F32 tensor counting from ``start`` in steps that every float dtype represents."""
    count = math.prod(shape)
    return "F32", shape, struct.pack(f"<{count}f", *(start + step * i for i in range(count)))


def scalar(value: float, dtype: str = "F32") -> RawTensor:
    """A 0-d tensor, as alphas are stored."""
    return dtype, (), struct.pack({"F32": "<f", "F16": "<e", "F64": "<d", "I64": "<q"}[dtype], value)


def zeros(dtype: str, *shape: int) -> RawTensor:
    """A tensor of zero bytes; ``dtype`` is a safetensors name."""
    bits = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "U8": 8, "I8": 8, "BOOL": 8}[dtype]
    return dtype, shape, bytes(math.prod(shape) * bits // 8)
