"""The inert values a torch pickle is made of: names, storages, tensors and stubs. Nothing here can run anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Names of torch's typed storages -> (safetensors dtype or, where safetensors has none, torch's own name; bytes per element).
STORAGES = {
    "DoubleStorage": ("F64", 8), "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1), "ComplexFloatStorage": ("C64", 8),
    "ComplexDoubleStorage": ("complex128", 16), "UntypedStorage": ("U8", 1),
}  # fmt: skip
DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "int64": "I64", "long": "I64", "int32": "I32", "int": "I32", "int16": "I16", "short": "I16",
    "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "cfloat": "C64", "complex128": "complex128", "cdouble": "complex128",
    "complex32": "complex32", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
# numpy type code -> (safetensors dtype, bytes per element)
NUMPY = {
    "f8": ("F64", 8), "f4": ("F32", 4), "f2": ("F16", 2), "i8": ("I64", 8), "i4": ("I32", 4), "i2": ("I16", 2),
    "i1": ("I8", 1), "u8": ("U64", 8), "u4": ("U32", 4), "u2": ("U16", 2), "u1": ("U8", 1), "b1": ("BOOL", 1),
    "c8": ("C64", 8), "c16": ("complex128", 16),
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A global that a pickle names. Never resolved: ``call`` is a function of ours, or ``None`` where it may only be mentioned."""

    module: str
    name: str
    call: Callable[[tuple[Any, ...], Callable[[int], None]], Any] | None = None
    value: Any = None
    inert: bool = False

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Storage:
    """A persistent id: ``numel`` elements under ``key``; ``start`` and ``view`` (elements) for views of very old files."""

    dtype: str
    itemsize: int
    key: str
    numel: int
    start: int = 0
    view: int | None = None
    untyped: bool = False


@dataclass(slots=True)
class NumpyDtype:
    """``numpy.dtype``: a type code such as ``f4``; big-endian or not."""

    code: str
    big: bool = False


@dataclass(slots=True)
class NumpyArray:
    """``numpy.ndarray``: filled by BUILD. ``data`` is the row-major (or column-major) bytes."""

    shape: tuple[int, ...] = ()
    dtype: NumpyDtype = field(default_factory=lambda: NumpyDtype("u1"))
    fortran: bool = False
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view: ``offset`` and ``stride`` count elements of ``dtype`` in ``source``."""

    source: Storage | NumpyArray
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(slots=True)
class Inert:
    """An object of a class that is not instantiated: what the pickle said about it, as data."""

    name: Name
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)

    def content(self) -> Any:
        """The part worth showing: mapping state, items, list values, or the arguments of the constructor."""
        state = self.state[-1] if isinstance(self.state, tuple) and self.state else self.state
        if self.name.name == "ParameterDict" and isinstance(state, dict):
            return _parameters(state)
        if self.items or self.values:
            return self.items or self.values
        return state if isinstance(state, dict) else list(self.args)


def _parameters(state: dict[Any, Any]) -> dict[Any, Any]:
    """Items of a pickled ``torch.nn.ParameterDict``: its ``_parameters``, and tensors that newer torch keeps as attributes."""
    inner = state.get("_parameters")
    plain = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {**inner, **plain} if isinstance(inner, dict) else plain
