"""The state of the static pickle machine, and what may be done to it: names, calls, storages, limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hubtool.errors import CorruptFile, UnsafeFile, UnsupportedFile
from hubtool.formats.pickle_globals import ALLOWED
from hubtool.formats.torch_objects import Inert, Name, NumpyArray, NumpyDtype, Storage

MAX_OPCODES = 2_000_000
MAX_BYTES = 32 << 20
MAX_DIGITS = 128
MAX_UNKNOWN = 1000
MAX_KEY = 1 << 60
_LOCATION = re.compile(r"[a-z]{2,16}(:\d{1,4})?")
_KEY = re.compile(r"\d{1,20}")


class Truncated(CorruptFile):
    """The stream ends inside an opcode or before STOP."""


@dataclass(slots=True)
class Machine:
    """State of one run. ``stack`` is the part above the last mark; ``marks`` holds the parts below."""

    data: bytes
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    inert: dict[str, Name] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    copied: int = 0
    protocol: bool = False

    def take(self, pos: int, count: int) -> bytes:
        """``count`` bytes at ``pos``; the claim is checked before anything is allocated."""
        if count < 0 or pos + count > len(self.data):
            raise Truncated(f"the pickle claims {count} bytes where {len(self.data) - pos} are left", offset=pos)
        return self.data[pos : pos + count]

    def line(self, pos: int, limit: int = MAX_BYTES) -> tuple[bytes, int]:
        """The text up to the next newline, and the position after it."""
        end = self.data.find(b"\n", pos, pos + limit + 1)
        if end < 0:
            kind = Truncated if len(self.data) - pos <= limit else CorruptFile
            raise kind("a line of the pickle has no end", offset=pos)
        return self.data[pos:end], end + 1

    def spend(self, count: int) -> None:
        """Account for bytes or items that a call copies: memo references must not multiply them."""
        self.copied += count
        if self.copied > 2 * len(self.data) + 4096:
            raise UnsafeFile("the pickle copies the same data again and again (a memory bomb)")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def name(self, module: str, name: str, pos: int) -> Name:
        """The token of a global. An unknown one is remembered and stands as a stub until the verdict."""
        token = ALLOWED.get((module, name))
        if token is None:
            if len(self.unknown) > MAX_UNKNOWN:
                raise UnsafeFile("the pickle names too many things")
            token = Name(module, name, inert=True)
            self.unknown.setdefault(f"{module}.{name}"[:200], pos)
        elif token.inert:
            self.inert[str(token)] = token
        return token

    def call(self, target: Any, args: Any) -> Any:
        """REDUCE and NEWOBJ."""
        if not isinstance(target, Name) or type(args) is not tuple:
            raise UnsafeFile("the pickle calls something that is not a name")
        if target.call is not None:
            return target.call(args, self.spend)
        if target.inert:
            return NumpyArray() if target.name == "ndarray" and target.module == "numpy" else Inert(target, args)
        raise UnsafeFile(f"the pickle calls {target}, which may only be mentioned")

    def set_items(self, target: Any, items: list[Any]) -> None:
        mapping = target.items if isinstance(target, Inert) else target
        if type(mapping) is not dict or len(items) % 2:
            raise UnsafeFile("the pickle sets items on something that is not a mapping")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                check_key(key)
            if key in mapping and len(self.duplicates) < 20:
                self.duplicates.append(str(key)[:200])
            mapping[key] = value

    def append(self, target: Any, items: list[Any]) -> None:
        values = target.values if isinstance(target, Inert) else target
        if type(values) is not list:
            raise UnsafeFile("the pickle appends to something that is not a list")
        values.extend(items)

    def build(self, target: Any, state: Any) -> None:
        """BUILD: attributes for inert objects, content for numpy arrays and dtypes; nothing else can be given a state."""
        if isinstance(target, Inert) and target.state is None:
            target.state = state
        elif isinstance(target, NumpyArray) and target.data is None:
            _fill(target, state)
        elif isinstance(target, NumpyDtype) and type(state) is tuple:
            target.big = state[1] == ">"
        elif type(target) is not dict or type(state) is not dict:
            raise UnsafeFile(f"the pickle sets the state of a {type(target).__name__}")

    def persistent(self, pid: Any) -> Storage:
        """``('storage', type, key, location, numel[, view])``: a storage that lies outside the pickle."""
        if type(pid) is not tuple or len(pid) not in {5, 6} or pid[0] != "storage":
            raise UnsafeFile(
                f"an unknown kind of persistent id {str(pid[0])[:40] if isinstance(pid, tuple) and pid else ''!r}"
            )
        _, kind, key, location, numel = pid[:5]
        if not (isinstance(kind, Name) and isinstance(kind.value, tuple)):
            raise CorruptFile("a storage has no known element type")
        if type(key) is not str or not _KEY.fullmatch(key):
            raise CorruptFile(f"{str(key)[:60]!r} is not a storage key")
        if location == "meta":
            raise UnsupportedFile("a storage lies on device 'meta': the file has no data for it")
        if type(location) is not str or not _LOCATION.fullmatch(location):
            raise CorruptFile(f"{str(location)[:60]!r} is not a device")
        if type(numel) is not int or not 0 <= numel < 1 << 48:
            raise CorruptFile(f"storage {key} has an impossible number of elements: {str(numel)[:40]}")
        return self.remember(_storage(kind, key, numel, pid[5] if len(pid) == 6 else None))

    def remember(self, storage: Storage) -> Storage:
        known = self.storages.setdefault(storage.key, storage)
        if (known.dtype, known.numel, known.untyped) != (storage.dtype, storage.numel, storage.untyped):
            raise CorruptFile(f"storage {storage.key} is used as {known.dtype} and as {storage.dtype}")
        return storage


def _storage(kind: Name, key: str, numel: int, view: Any) -> Storage:
    dtype, itemsize = kind.value
    untyped = kind.name == "UntypedStorage"
    if view is None:
        return Storage(dtype, itemsize, key, numel, untyped=untyped)
    _, start, size = view
    if type(start) is not int or type(size) is not int or start < 0 or size < 0 or start + size > numel:
        raise CorruptFile(f"a view leaves storage {key}")
    return Storage(dtype, itemsize, key, numel, start, size, untyped)


def _fill(array: NumpyArray, state: Any) -> None:
    """numpy's state: ``(version, shape, dtype, is_fortran, data)``."""
    if type(state) is not tuple or len(state) != 5 or not isinstance(state[2], NumpyDtype):
        raise CorruptFile("a numpy array has a state that is not its own")
    _, shape, dtype, fortran, data = state
    if type(shape) is not tuple or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise CorruptFile("a numpy array has an impossible shape")
    array.shape, array.dtype, array.fortran = shape, dtype, bool(fortran)
    array.data = data if isinstance(data, bytes) else None


def check_key(key: Any) -> None:
    """Mapping keys are scalars, names, or flat tuples of them: anything deeper could hang the hash function."""
    parts = key if type(key) is tuple and len(key) <= 16 else (key,)
    if not all(part is None or isinstance(part, str | int | float | bytes | Name) for part in parts):
        raise CorruptFile(f"a {type(key).__name__} is used as a key")
    # Python's hash of numbers is a remainder: numbers above it can be chosen to collide.
    if any(isinstance(part, int | float) and abs(part) >= MAX_KEY for part in parts):
        raise CorruptFile("a very large number is used as a key")
