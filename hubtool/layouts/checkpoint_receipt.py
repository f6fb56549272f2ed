"""Receipts of origin for checkpoints, so that the way back gives the same bytes.

A folder made of a single file keeps that file's header in ``hubtool.origin.json``; a single file made of a folder keeps in its own header
the header of every weights file of the folder and the text of its configurations. Neither is trusted: what does not fit is ignored.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import FileError, HubtoolError
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.formats.documents import is_plain_name
from hubtool.layouts import receipt
from hubtool.layouts.checkpoint_source import slots_of_origin
from hubtool.layouts.checkpoint_tables import Pipeline
from hubtool.layouts.checkpoint_weights import join, reshaped
from hubtool.layouts.checkpoints import Checkpoint, Home, folder_slots, homes
from hubtool.tensors import header
from hubtool.tensors.dtypes import nbytes, numel
from hubtool.tensors.expr import Expr
from hubtool.tensors.reading import open_read, pread_exact
from hubtool.tensors.ref import TensorRef

ORIGIN, EXTRAS = "hubtool.origin.json", "hubtool.extras.safetensors"
_DOCUMENTS = frozenset({"model_index.json", "config.json", "scheduler_config.json"})
_LARGEST = 64 << 20
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Restored:
    """A file of the origin: its tensors in its order, and its exact header."""

    name: str
    tensors: Mapping[str, Expr]
    header: bytes
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FolderOrigin:
    """``headers``: weights file -> its header JSON; ``texts``: document -> its bytes. Names are ``component/file``."""

    headers: Mapping[str, bytes]
    texts: Mapping[str, bytes]


def origin_of(folder: Path) -> receipt.Receipt | None:
    """The receipt in a folder that was made of a single file; None when there is none that can be read."""
    try:
        text = _small(folder / ORIGIN).decode()
    except (FileError, OSError, ValueError):
        return None
    return receipt.load({receipt.KEY: text})


def extras_of(folder: Path) -> TensorFile | None:
    """The tensors of no component that a folder keeps beside them."""
    return open_file(folder / EXTRAS) if (folder / EXTRAS).is_file() else None


def _small(path: Path) -> bytes:
    """The content of a document. Raises ``FileError`` for what is no regular file or absurdly large."""
    fd = open_read(path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise FileError("not a document", path=path)
        return pread_exact(fd, status.st_size, 0, path)
    finally:
        os.close(fd)


def of_folder(file: TensorFile) -> str | None:
    """The receipt for a folder of safetensors files, as text; None when a part of it has no header to keep."""
    weights = [path for path in file.files if path.suffix != ".json"]
    parts = {_inside(path, file.path): open_file(path).header_bytes for path in weights}
    if not parts or any(raw is None or not _is_weights(name) for name, raw in parts.items()):
        return None
    texts = {name: _small(path) for path in file.files if _is_document(name := _inside(path, file.path))}
    document = {
        "version": _VERSION,
        "folder": {
            **{name: {"header": _packed(raw)} for name, raw in parts.items() if raw is not None},
            **{name: {"text": _packed(text)} for name, text in texts.items()},
        },
    }
    return json.dumps(document)


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def load_folder(metadata: Mapping[str, str]) -> FolderOrigin | None:
    """The folder that a single file was made of; None when its header says nothing that can be read."""
    try:
        entries = json.loads(metadata.get(receipt.KEY, ""))["folder"]
        found = {name: {what: _unpacked(text) for what, text in entry.items()} for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error, zlib.error):
        return None
    headers = {name: entry["header"] for name, entry in found.items() if "header" in entry and _is_weights(name)}
    texts = {name: entry["text"] for name, entry in found.items() if "text" in entry and _is_document(name)}
    return FolderOrigin(headers, texts) if len(headers) + len(texts) == len(found) else None


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()


def _unpacked(text: str) -> bytes:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), _LARGEST)
    if unpacker.unconsumed_tail:
        raise ValueError("too large")
    return data


def _is_weights(name: str) -> bool:
    """A name that may be written: ``component/something.safetensors``, nothing that leads elsewhere."""
    return name.count("/") == 1 and all(map(is_plain_name, name.split("/"))) and name.endswith(".safetensors")


def _is_document(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    known = last in _DOCUMENTS or (".safetensors.index" in last and last.endswith(".json"))
    return known and is_plain_name(last) and (not folder or is_plain_name(folder))


def restore_single(origin: receipt.Receipt, checkpoint: Checkpoint, pipeline: Pipeline) -> Restored | None:
    """The single file that a folder was made of. None when the folder holds other tensors by now."""
    before = _header(origin.raw)
    slots = slots_of_origin(pipeline, before.tensors) if before else None
    if before is None or slots is None:
        return None
    placed = homes(before.tensors, pipeline, slots)
    tensors = _again(before.tensors, placed, checkpoint)
    if tensors is None or not _all_used(placed, before.tensors, checkpoint):
        return None
    return Restored("", tensors, origin.raw, before.metadata)


def restore_folder(origin: FolderOrigin, checkpoint: Checkpoint, pipeline: Pipeline) -> list[Restored] | None:
    """The weights files of the folder that a single file was made of. None when the file holds other tensors by now."""
    found, held = [], 0
    for name, raw in origin.headers.items():
        before = _header(raw)
        if before is None:
            return None
        component = name.partition("/")[0]
        keys = {f"{component}/{key}": ref for key, ref in before.tensors.items()}
        tensors = _again(keys, homes(keys, pipeline, folder_slots(pipeline)), checkpoint)
        if tensors is None:
            return None
        held += len(tensors)
        own = {key.removeprefix(f"{component}/"): tensor for key, tensor in tensors.items()}
        found.append(Restored(name, own, raw, before.metadata))
    complete = held == sum(map(len, checkpoint.weights.values())) and not checkpoint.extras
    return found if complete else None


def _header(raw: bytes) -> header.Header | None:
    """A kept header, checked as strictly as a file's."""
    try:
        document: dict[str, Any] = json.loads(raw)
        sizes = (nbytes(t["dtype"], tuple(t["shape"])) for name, t in document.items() if name != header.METADATA)
        return header.parse(raw, sum(sizes), Path("origin"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileError):
        return None


def _again(
    before: Mapping[str, TensorRef], placed: Mapping[str, Home], checkpoint: Checkpoint
) -> dict[str, Expr] | None:
    """Every tensor of the origin made of what there is now; None where one is missing or of another kind."""
    tensors: dict[str, Expr] = {}
    for key, ref in before.items():
        tensor = _one(placed[key], checkpoint) if key in placed else checkpoint.extras.get(key)
        if tensor is None or tensor.dtype != ref.dtype or numel(tensor.shape) != numel(ref.shape):
            return None
        tensors[key] = reshaped(tensor, ref.shape)
    return tensors


def _one(home: Home, checkpoint: Checkpoint) -> Expr | None:
    weights = checkpoint.weights.get(home.component, {})
    parts = [weights[part] for part in home.spot.parts if part in weights]
    if len(parts) < len(home.spot.parts):
        return None
    try:
        return join(home.spot, parts)
    except HubtoolError:  # parts that became different cannot be the origin's one tensor
        return None


def _all_used(placed: Mapping[str, Home], before: Mapping[str, TensorRef], checkpoint: Checkpoint) -> bool:
    """Whether nothing was added since: tensors of components, and extras."""
    then = {(home.component, part) for home in placed.values() for part in home.spot.parts}
    now = {(name, key) for name, own in checkpoint.weights.items() for key in own}
    return then == now and checkpoint.extras.keys() <= before.keys()


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a source's metadata travels into a single file."""
    return receipt.carried_metadata(metadata, "format")


def metadata_of(origin: receipt.Receipt) -> Mapping[str, str]:
    """What the single file said about itself; nothing when its header cannot be read."""
    before = _header(origin.raw)
    return before.metadata if before else {}
