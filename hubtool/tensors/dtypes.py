"""One table of dtypes: safetensors name, bits, torch name. Everything else derives from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import MappingProxyType

from hubtool.types import Shape

# safetensors name -> (bits per element, attribute of torch)
_TABLE = {
    "F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8"),
    "U64": (64, "uint64"), "U32": (32, "uint32"), "U16": (16, "uint16"), "U8": (8, "uint8"), "BOOL": (8, "bool"),
    "C64": (64, "complex64"), "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"), "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F4": (4, "float4_e2m1fn_x2"), "F6_E2M3": (6, ""), "F6_E3M2": (6, ""),
}  # fmt: skip
BITS = MappingProxyType({name: row[0] for name, row in _TABLE.items()})
TORCH_NAME = MappingProxyType({name: row[1] for name, row in _TABLE.items() if row[1]})
FROM_TORCH = MappingProxyType({row[1]: name for name, row in _TABLE.items() if row[1]})
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


def numel(shape: Iterable[int]) -> int:
    """Number of elements of ``shape`` (1 for a scalar)."""
    return math.prod(shape)


def nbytes(dtype: str, shape: Shape) -> int:
    """Bytes a contiguous tensor takes. ``dtype`` is a safetensors name."""
    return numel(shape) * BITS[dtype] // 8
