"""Writes the pickle of a torch zip: protocol 2, only globals that ``torch.load(weights_only=True)`` accepts.

Source of the facts: ``torch/_weights_only_unpickler.py`` and ``torch/_utils.py`` (arguments of the rebuild functions).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hubtool.errors import ConversionError
from hubtool.formats.pickle_state import MAX_KEY
from hubtool.formats.torch_objects import STORAGES
from hubtool.tensors.dtypes import TORCH_NAME, numel
from hubtool.tensors.expr import Expr, Read, size
from hubtool.types import Shape

MAX_DEPTH = 64
_BATCH = 1000
_PACKED = frozenset({"F4"})  # torch packs two numbers into one element: its shapes are not those of safetensors
_TYPED = {dtype: name for name, (dtype, _) in STORAGES.items() if dtype in TORCH_NAME and name != "UntypedStorage"}


@dataclass(slots=True)
class Emitter:
    """Builds the pickle in ``out``; ``storages[i]`` is the expression whose bytes become record ``data/i``, ``names[i]`` the key it lies under."""

    out: bytearray = field(default_factory=lambda: bytearray(b"\x80\x02"))
    storages: list[Expr] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _key: str = "a tensor"
    _memo: dict[tuple[str, str], int] = field(default_factory=dict)
    _ties: dict[Any, int] = field(default_factory=dict)

    def value(self, value: Any, depth: int = 0) -> None:
        """Emit a dict, list, tuple, str, int, float, bool, ``None`` or tensor expression. Raises ``ConversionError`` for others."""
        if isinstance(value, Expr):
            self.tensor(value)
            return
        emit = next((emit for kind, emit in _KINDS if isinstance(value, kind)), None)
        if emit is None or depth > MAX_DEPTH:
            raise ConversionError(
                f"a {type(value).__name__} has no place in a torch file" if emit is None else "nested too deeply"
            )
        emit(self, value, depth)

    def mapping(self, value: dict[Any, Any], depth: int) -> None:
        if isinstance(value, OrderedDict):
            self.name("collections", "OrderedDict")
            self.out += b")R"
        else:
            self.out += b"}"
        items = list(value.items())
        for start in range(0, len(items), _BATCH):
            self.out += b"("
            for key, item in items[start : start + _BATCH]:
                if not isinstance(key, str | int) or (isinstance(key, int) and abs(key) >= MAX_KEY):
                    raise ConversionError(
                        f"{str(key)[:40]!a} of type {type(key).__name__} cannot be a key in a torch file"
                    )
                self.value(key, depth + 1)
                self._key = str(key)
                self.value(item, depth + 1)
            self.out += b"u"

    def sequence(self, value: list[Any], depth: int) -> None:
        self.out += b"]"
        for start in range(0, len(value), _BATCH):
            self.out += b"("
            for item in value[start : start + _BATCH]:
                self.value(item, depth + 1)
            self.out += b"e"

    def fixed(self, value: Sequence[Any], depth: int) -> None:
        self.out += b"("
        for item in value:
            self.value(item, depth + 1)
        self.out += b"t"

    def text(self, value: str, _depth: int = 0) -> None:
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConversionError(f"{value[:80]!a} is not valid text") from error
        self.out += b"X" + len(data).to_bytes(4, "little") + data

    def boolean(self, value: bool, _depth: int = 0) -> None:
        self.out += b"\x88" if value else b"\x89"

    def integer(self, value: int, _depth: int = 0) -> None:
        if 0 <= value < 256:
            self.out += b"K" + value.to_bytes(1, "little")
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + value.to_bytes(4, "little", signed=True)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(data) > 64:
                raise ConversionError("an integer is too large for a torch file")
            self.out += b"\x8a" + len(data).to_bytes(1, "little") + data

    def floating(self, value: float, _depth: int = 0) -> None:
        self.out += b"G" + struct.pack(">d", value)

    def none(self, _value: None, _depth: int = 0) -> None:
        self.out += b"N"

    def name(self, module: str, name: str) -> None:
        """A global, spelled once and then fetched from the memo."""
        slot = self._memo.get((module, name))
        if slot is not None:
            self.out += b"h" + bytes([slot])
            return
        slot = self._memo[module, name] = len(self._memo)
        self.out += f"c{module}\n{name}\nq".encode() + bytes([slot])

    def tensor(self, expr: Expr) -> None:
        """``_rebuild_tensor_v2`` for dtypes that have a typed storage, ``_rebuild_tensor_v3`` for the newer ones."""
        typed = _TYPED.get(expr.dtype)
        if expr.dtype not in TORCH_NAME or expr.dtype in _PACKED:
            raise ConversionError(f"torch has no dtype for {expr.dtype}")
        self.name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"("
        self.storage(expr, typed)
        self.integer(0)
        self.fixed(expr.shape, 0)
        self.fixed(_strides(expr.shape), 0)
        self.out += b"\x89"
        self.name("collections", "OrderedDict")
        self.out += b")R"
        if typed is None:
            self.name("torch", TORCH_NAME[expr.dtype])
        self.out += b"tR"

    def storage(self, expr: Expr, typed: str | None) -> None:
        """The persistent id ``('storage', type, key, 'cpu', numel)``; an untyped storage counts bytes."""
        self.out += b"("
        self.text("storage")
        self.name("torch", typed) if typed else self.name("torch.storage", "UntypedStorage")
        self.text(str(self._slot(expr)))
        self.text("cpu")
        self.integer(numel(expr.shape) if typed else size(expr))
        self.out += b"tQ"

    def _slot(self, expr: Expr) -> int:
        """Tensors that are the same bytes of the same file stay tied: they share one record."""
        key: Any = id(expr)
        if isinstance(expr, Read) and expr.ref.inline is None:
            key = (expr.ref.path, expr.ref.start, expr.ref.end, expr.ref.strides, expr.dtype, expr.shape)
        if key not in self._ties:
            self._ties[key] = len(self.storages)
            self.storages.append(expr)
            self.names.append(self._key)
        return self._ties[key]


_KINDS: tuple[tuple[type, Callable[[Emitter, Any, int], None]], ...] = (
    (dict, Emitter.mapping), (list, Emitter.sequence), (tuple, Emitter.fixed), (str, Emitter.text), (bool, Emitter.boolean),
    (int, Emitter.integer), (float, Emitter.floating), (type(None), Emitter.none),
)  # fmt: skip


def _strides(shape: Shape) -> Shape:
    strides, step = [], 1
    for dimension in reversed(shape):
        strides.append(step)
        step *= max(dimension, 1)
    return tuple(reversed(strides))
