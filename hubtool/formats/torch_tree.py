"""Pickled object -> names, ``TensorRef``s, string metadata and an inert structure. Every size and bound is checked here.

Policy: spec/security 5.2 and 3 (#9 amplification, #10 bounds, #12 nesting), spec/artefacts C.6 (views, ties).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, UnsafeFile, UnsupportedFile
from hubtool.formats.pickle_globals import array_tensor
from hubtool.formats.pickle_machine import Parsed
from hubtool.formats.torch_objects import NUMPY, Inert, Name, NumpyArray, NumpyDtype, Storage, Tensor
from hubtool.tensors.dtypes import BITS
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding, Shape

ROOT = "(root)"
MAX_DEPTH = 64
MAX_RANK = 32
MAX_NODES = 500_000
MAX_TEXT = 32 << 20
MIN_NAMELESS = 8


@dataclass(frozen=True, slots=True)
class Blob:
    """The bytes of a storage: a range of the file, or ``inline`` bytes (then ``start`` is 0)."""

    start: int
    nbytes: int
    inline: bytes | None = None


@dataclass(slots=True)
class Tree:
    """Walks one object. ``locate`` turns a storage into its bytes; ``size`` of the file bounds what views may add up to."""

    path: Path
    size: int
    locate: Callable[[Storage], Blob]
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    blobs: dict[str, Blob] = field(default_factory=dict)
    windows: dict[str, list[tuple[int, int, TensorRef]]] = field(default_factory=dict)
    active: set[int] = field(default_factory=set)
    nodes: int = 0
    text_size: int = 0
    logical: int = 0

    def walk(self, value: Any) -> Any:
        """The inert structure of ``value``; fills ``tensors``, ``metadata`` and ``findings``."""
        _refuse_nameless(value, self.path)
        structure = self.node(value, "", 0)
        self.findings += _window_findings(self.windows, self.blobs)
        if not self.tensors:
            self.findings.append(Finding("no-tensors", "warning", "the file holds no tensors"))
        odd = [name for name in self.tensors if not name.isprintable() or len(name) > 1024]
        if odd:
            self.findings.append(
                Finding("odd-name", "warning", f"{len(odd)} names hold control characters: {odd[0][:80]!a}")
            )
        return structure

    def node(self, value: Any, name: str, depth: int) -> Any:
        self.nodes += 1
        self.text_size += len(name)
        if depth > MAX_DEPTH or self.nodes > MAX_NODES or self.text_size > MAX_TEXT:
            raise UnsafeFile(
                "the object is nested too deeply, repeats itself without end, or holds too many values", path=self.path
            )
        visit = _VISITORS.get(type(value))
        if visit is None:
            raise CorruptFile(f"a {type(value).__name__} at {name!r} has no meaning in a torch file", path=self.path)
        return visit(self, value, name, depth)

    def mapping(self, value: dict[Any, Any], name: str, depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        with _Guard(self, value):
            for key, item in value.items():
                label = key if type(key) is str else _label(key)
                before = len(self.tensors)
                result[str(key) if isinstance(key, Name) else key] = self.node(item, _join(name, label), depth + 1)
                if type(key) not in _KEYS and len(self.tensors) > before:
                    raise UnsupportedFile(
                        f"a tensor under a key of type {type(key).__name__}: {label[:60]}", path=self.path
                    )
        return result

    def sequence(self, value: Iterable[Any], name: str, depth: int) -> list[Any]:
        with _Guard(self, value):
            return [self.node(item, _join(name, str(i)), depth + 1) for i, item in enumerate(value)]

    def fixed(self, value: tuple[Any, ...], name: str, depth: int) -> tuple[Any, ...]:
        return tuple(self.sequence(value, name, depth))

    def inert(self, value: Inert, name: str, depth: int) -> Any:
        with _Guard(self, value):
            return self.node(value.content(), name, depth + 1)

    def scalar(self, value: Any, name: str, _depth: int) -> Any:
        """A leaf for ``metadata``; numbers JSON has no word for become text."""
        if type(value) is str:
            self.text_size += len(value)
        plain = str(value) if type(value) is float and not math.isfinite(value) else value
        self.metadata[name or ROOT] = json.dumps(plain)
        return value

    def raw(self, value: bytes, _name: str, _depth: int) -> bytes:
        return value

    def text(self, value: Any, name: str, depth: int) -> Any:
        return self.scalar(str(value.code if isinstance(value, NumpyDtype) else value), name, depth)

    def array(self, value: NumpyArray, name: str, depth: int) -> Any:
        if value.data is None or value.dtype.code not in NUMPY:
            return None
        return self.tensor(array_tensor(value), name, depth)

    def storage(self, value: Storage, name: str, depth: int) -> TensorRef:
        count = value.numel if value.view is None else value.view
        return self.tensor(Tensor(value, value.dtype, 0, (count,), (1,)), name, depth)

    def tensor(self, value: Tensor, name: str, _depth: int) -> TensorRef:
        name = name or ROOT
        self.check_name(name)
        low, count = _extent(value, name, self.path)
        itemsize = BITS[value.dtype] // 8
        blob, base, room, key = self.bytes_of(value, name)
        if (low + count) * itemsize > room:
            raise CorruptFile(f"tensor {name!r} leaves its storage", path=self.path)
        self.logical += math.prod(value.shape) * itemsize
        if self.logical > 8 * self.size + (1 << 20):
            raise UnsafeFile("the tensors are far larger than the file (views that repeat bytes)", path=self.path)
        ref = self.reference(value, name, blob, base + low * itemsize, base + (low + count) * itemsize)
        self.tensors[name] = ref
        self.windows.setdefault(key, []).append((base + low * itemsize, base + (low + count) * itemsize, ref))
        return ref

    def reference(self, value: Tensor, name: str, blob: Blob, start: int, end: int) -> TensorRef:
        strides = None if _contiguous(value.shape, value.stride) else value.stride
        if blob.inline is None:
            return TensorRef(name, value.dtype, value.shape, self.path, blob.start + start, blob.start + end, strides)
        return TensorRef(name, value.dtype, value.shape, self.path, 0, end - start, strides, blob.inline[start:end])

    def bytes_of(self, value: Tensor, name: str) -> tuple[Blob, int, int, str]:
        """The blob, where the storage's own view begins in it, bytes available from there, and a key for ties."""
        source = value.source
        if isinstance(source, NumpyArray):
            blob = _array_blob(source)
            return self.blobs.setdefault(f"{name}/array", blob), 0, blob.nbytes, f"{name}/array"
        if source.key not in self.blobs:
            self.blobs[source.key] = self.locate(source)
        blob = self.blobs[source.key]
        room = blob.nbytes if source.view is None else source.view * source.itemsize
        return blob, source.start * source.itemsize, room, source.key

    def check_name(self, name: str) -> None:
        if name == "__metadata__":
            raise UnsupportedFile(
                "a tensor is called __metadata__, which means something else in safetensors", path=self.path
            )
        if name in self.tensors:
            raise UnsupportedFile(
                f"two tensors are called {name[:200]!r} once the nesting is flattened", path=self.path
            )
        if not name.isascii() and any(0xD800 <= ord(char) < 0xE000 for char in name):
            raise CorruptFile(f"a tensor name is not valid text: {name[:80]!a}", path=self.path)


_KEYS = (str, int, Name)


class _Guard:
    """Marks a container as being visited: meeting it again below itself is a cycle."""

    __slots__ = ("tree", "value")

    def __init__(self, tree: Tree, value: Any) -> None:
        self.tree, self.value = tree, id(value)

    def __enter__(self) -> None:
        if self.value in self.tree.active:
            raise UnsafeFile("an object contains itself", path=self.tree.path)
        self.tree.active.add(self.value)

    def __exit__(self, *_: object) -> None:
        self.tree.active.discard(self.value)


_VISITORS: Mapping[type, Callable[[Tree, Any, str, int], Any]] = {
    Tensor: Tree.tensor, dict: Tree.mapping, list: Tree.sequence, tuple: Tree.fixed, Inert: Tree.inert, bytes: Tree.raw,
    Storage: Tree.storage, NumpyArray: Tree.array, NumpyDtype: Tree.text, Name: Tree.text,
    **dict.fromkeys((str, int, float, bool, type(None)), Tree.scalar),
}  # fmt: skip


def _join(name: str, label: str) -> str:
    return f"{name}.{label}" if name else label


def _label(key: Any) -> str:
    plain = key[:80] if isinstance(key, bytes) else key
    return str(key) if isinstance(key, int | Name) else repr(plain)[:200]


def _refuse_nameless(value: Any, path: Path) -> None:
    """Refuse integer keys straight to tensors, and nameless tensors too small for any artefact that is stored without names.

    Positional LoRA lists, aesthetic embeddings and null-text stacks have no names, and hypernetworks have integer keys (to pairs,
    not tensors); there, shapes are the only evidence (spec/artefacts D, F, B.8).
    """
    if type(value) is dict and any(type(key) is int and isinstance(item, Tensor) for key, item in value.items()):
        raise UnsupportedFile("integer keys instead of names (optimizer state?): not a state dict", path=path)
    nameless = value if type(value) in {list, tuple} else [value]
    tensors = [item for item in nameless if isinstance(item, Tensor)]
    if tensors and len(tensors) == len(nameless) and all(_tiny(item.shape) for item in tensors):
        raise UnsupportedFile("tensors without names, of a few numbers each: nothing says what they are", path=path)


def _tiny(shape: Any) -> bool:
    return type(shape) is tuple and all(type(size) is int for size in shape) and math.prod(shape) < MIN_NAMELESS


def _extent(value: Tensor, name: str, path: Path) -> tuple[int, int]:
    """First element and number of elements of the window the view spans, after checking every number in it."""
    if value.dtype not in BITS:
        raise UnsupportedFile(f"tensor {name!r} is {value.dtype}, which safetensors cannot store", path=path)
    shape, stride, offset = value.shape, value.stride, value.offset
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > MAX_RANK:
        raise CorruptFile(f"tensor {name!r} has an impossible shape", path=path)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (offset, *shape, *stride)):
        raise CorruptFile(f"tensor {name!r} has impossible sizes or strides", path=path)
    if 0 in shape:
        return 0, 0
    return offset, 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _contiguous(shape: Shape, stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size == 0:
            return True
        if size != 1:
            if step != expected:
                return 0 in shape
            expected *= size
    return True


def _array_blob(array: NumpyArray) -> Blob:
    data = array.data or b""
    dtype, itemsize = NUMPY[array.dtype.code]
    if len(data) != math.prod(array.shape) * itemsize:
        raise CorruptFile("a numpy array has another size than its shape says")
    if array.dtype.big:
        data = swapped(data, itemsize // 2 if dtype.startswith("C") else itemsize)
    return Blob(0, len(data), data)


def swapped(data: bytes, width: int) -> bytes:
    """``data`` with the bytes of every ``width``-byte number reversed."""
    result = bytearray(len(data))
    for i in range(width):
        result[i::width] = data[width - 1 - i :: width]
    return bytes(result)


def _window_findings(windows: dict[str, list[tuple[int, int, TensorRef]]], blobs: dict[str, Blob]) -> Iterable[Finding]:
    hidden, tied, overlapping, strided = 0, [], [], 0
    for key, views in windows.items():
        strided += sum(not ref.contiguous for _, _, ref in views)
        at = covered = 0
        previous = None
        for start, end, ref in sorted(views, key=lambda view: view[:2]) if len(views) > 1 else views:
            if previous == (start, end):
                tied.append(ref.name)
            elif start < at and end > start:
                overlapping.append(ref.name)
            covered += max(0, end - max(at, start))
            at, previous = max(at, end), (start, end)
        hidden += blobs[key].nbytes - covered
    if hidden:
        yield Finding("hidden-bytes", "warning", f"{hidden} bytes of larger storages belong to no tensor")
    if tied:
        yield Finding(
            "tied-tensors", "info", f"{len(tied)} tensors share their bytes with another: {', '.join(tied[:3])[:200]}"
        )
    if overlapping:
        yield Finding(
            "overlapping-tensors", "warning", f"{len(overlapping)} tensors overlap others: {overlapping[0][:200]}"
        )
    if strided:
        yield Finding("non-contiguous", "info", f"{strided} tensors are not stored row by row")


def pickle_findings(parsed: Parsed) -> Iterable[Finding]:
    """What the pickle itself showed: classes read as data, keys given twice."""
    if parsed.inert:
        names = ", ".join(parsed.inert[:5])
        yield Finding("inert-global", "warning", f"objects of other programs, read as data and never created: {names}")
    if parsed.duplicates:
        yield Finding(
            "duplicate-key", "warning", f"keys given twice, the last one counts: {', '.join(parsed.duplicates[:3])!a}"
        )
