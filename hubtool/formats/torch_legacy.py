"""Torch's stream format (torch < 1.6): five pickles, then every storage as a count and raw numbers. Layout: spec/artefacts C.2.

The numbers are little-endian whatever ``sys_info`` says: torch encodes them so on every machine (``StorageMethods``/``writeFileRaw``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileError, UnsupportedFile
from hubtool.formats import pickle_machine
from hubtool.formats.base import TensorFile
from hubtool.formats.pickle_machine import Parsed
from hubtool.formats.pickle_state import MAX_BYTES, Truncated
from hubtool.formats.source import Source
from hubtool.formats.torch_tree import Blob, Tree, pickle_findings
from hubtool.types import Finding

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_FIRST_WINDOW = 1 << 20


@dataclass(frozen=True, slots=True)
class _Head:
    """The pickles of the stream: the object, the order of the storages, and where the storages begin."""

    body: Parsed
    keys: tuple[str, ...]
    end: int


def read(path: Path, fd: int, size: int) -> TensorFile:
    """Open a legacy torch file; nothing is executed. A bare pickle gets its verdict, then is refused as not a torch file.

    Raises ``CorruptFile``, ``UnsafeFile`` or ``UnsupportedFile``.
    """
    source = Source.of(path, fd, size)
    try:
        head = _head(source)
        blobs, end = _storages(source, head)
        tree = Tree(path, size, lambda storage: blobs[storage.key])
        structure = tree.walk(head.body.value)
    except FileError as error:
        error.path = error.path or str(path)
        raise
    findings = [*pickle_findings(head.body), *tree.findings]
    if end < size:
        findings.append(Finding("trailing-bytes", "warning", f"{size - end} bytes follow the last storage"))
    if unused := sum(blobs[key].nbytes for key in blobs if key not in tree.blobs):
        findings.append(Finding("hidden-bytes", "warning", f"{unused} bytes of storages that no tensor uses"))
    return TensorFile(
        path, "torch-legacy", size, tree.tensors, tree.metadata, tuple(findings), structure, files=(path,)
    )


def _head(source: Source) -> _Head:
    """Parse the pickles from a first window, and from the largest one allowed when that is too short."""
    for limit in (_FIRST_WINDOW, MAX_BYTES):
        data = source.read(0, min(source.size, limit))
        more = limit < min(source.size, MAX_BYTES)
        try:
            return _pickles(data, more=more)
        except Truncated:
            if not more:
                raise
    raise CorruptFile("the pickles of the file do not end", offset=MAX_BYTES)


def _pickles(data: bytes, *, more: bool) -> _Head:
    magic = pickle_machine.run(data, more=more)
    if magic.value != MAGIC or type(magic.value) is not int:
        raise UnsupportedFile(
            "a bare pickle, not a file that torch.save wrote", hint="hubtool reads no pickles but torch's"
        )
    protocol = pickle_machine.run(data, magic.end, more=more)
    if protocol.value != PROTOCOL:
        raise CorruptFile("a legacy torch file of an unknown protocol", offset=magic.end)
    system = pickle_machine.run(data, protocol.end, more=more)
    if type(system.value) is not dict:
        raise CorruptFile("a legacy torch file does not describe its system", offset=protocol.end)
    body = pickle_machine.run(data, system.end, more=more)
    keys = pickle_machine.run(data, body.end, more=more)
    return _Head(body, _checked_keys(keys.value, body), keys.end)


def _checked_keys(keys: Any, body: Parsed) -> tuple[str, ...]:
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise CorruptFile("the list of storages is not a list of names")
    if sorted(set(keys)) != sorted(keys) or set(keys) != set(body.storages):
        raise CorruptFile("the list of storages does not match those that tensors use")
    return tuple(keys)


def _storages(source: Source, head: _Head) -> tuple[dict[str, Blob], int]:
    """Byte range of every storage, and where the last one ends. Counts must equal what the pickle says."""
    blobs, at = {}, head.end
    for key in head.keys:
        storage = head.body.storages[key]
        if at + 8 > source.size:
            raise CorruptFile("the file is truncated: storages are missing", offset=at, hint="download it again")
        numel = int.from_bytes(source.read(at, 8), "little", signed=True)
        if numel != storage.numel:
            raise CorruptFile(f"storage {key} says {numel} elements instead of {storage.numel}", offset=at)
        blobs[key] = Blob(at + 8, numel * storage.itemsize)
        at += 8 + blobs[key].nbytes
        if at > source.size:
            raise CorruptFile("the file is truncated inside a storage", offset=source.size, hint="download it again")
    return blobs, at
