"""The plans of a collapse: the base's own container, names and order, with some tensors computed and all others copied as bytes."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.errors import FileError, Unsupported
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.layouts.checkpoint_receipt import EXTRAS, ORIGIN
from hubtool.layouts.receipt import carried_metadata
from hubtool.ops.collapse.base import Base
from hubtool.ops.folder_plan import FORMAT, FolderPlan, WeightsFile
from hubtool.ops.plan import Plan
from hubtool.ops.recipes.parents import DOCUMENTS
from hubtool.tensors import header as headers
from hubtool.tensors.expr import Expr, Read
from hubtool.tensors.ref import TensorRef

HEADER = "hubtool.base"  # the base's header, so that --undo gives its very bytes
FOLDERS = frozenset({FORMAT, "component-folder"})
_TORCH = frozenset({"torch-zip", "torch-legacy"})
_OWN = frozenset({*DOCUMENTS.values(), ORIGIN})  # what is said there is true of the base only
_LARGEST = 64 << 20
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".h5", ".onnx")

Changes = Mapping[str, Expr]  # stored key -> what it becomes


def plan(base: Base, changes: Changes, container: str | None, *, undone: bool = False) -> Plan:
    """What will be written. ``container``: ``safetensors`` or ``torch-zip`` where the output's name asks for it; a folder stays a folder.

    ``undone``: the base is the result of a collapse, and the output what it was before.
    """
    rounded = dict(_rounded(base, changes))
    if base.file.format in FOLDERS and container is None:
        return _folder(base, changes, rounded)
    tensors = {key: changes.get(key, Read(ref)) for key, ref in _in_order(base.tensors)}
    kind = container or ("torch-zip" if base.file.format in _TORCH else "safetensors")
    metadata, header = _metadata(base.file, tensors, kind, undone=undone)
    return Plan(
        source=base.file.path,
        format=kind,
        layout=base.source.form,
        tensors=tensors,
        metadata=metadata,
        header=header,
        tree=_tree(base.file, changes) if kind == "torch-zip" and base.file.structure is not None else None,
        rounded=rounded,
        notes=tuple(_notes(base, kind)),
    )


def _in_order(tensors: Mapping[str, TensorRef]) -> list[tuple[str, TensorRef]]:
    """In the order of the bytes where they lie in one file, so that neighbours are copied at once."""
    files = {ref.path for ref in tensors.values()}
    rows = list(tensors.items())
    return sorted(rows, key=lambda row: row[1].start) if len(files) == 1 else rows


def _rounded(base: Base, changes: Changes) -> Iterator[tuple[str, str]]:
    counts: dict[str, int] = {}
    for key in changes:
        counts[base.tensors[key].dtype] = counts.get(base.tensors[key].dtype, 0) + 1
    for dtype, count in counts.items():
        yield f"{count} {dtype} tensors", f"all changes summed in fp32, rounded once to {dtype}"


def _metadata(
    file: TensorFile, tensors: Mapping[str, Expr], kind: str, *, undone: bool
) -> tuple[dict[str, str], bytes | None]:
    """What the output says about itself, and the exact header where ``undone`` and known."""
    if kind == "torch-zip":
        return {}, None
    if undone:
        header = unpacked(file.metadata.get(HEADER, ""))
        if header is not None and _describes(header, tensors):
            return {}, header
    said = {} if file.format in _TORCH else carried_metadata(file.metadata, HEADER)
    kept = {} if undone or file.header_bytes is None else {HEADER: packed(file.header_bytes)}
    return {"format": "pt", **said, **kept}, None


def packed(header: bytes) -> str:
    """A header as text."""
    return base64.b64encode(zlib.compress(header, 6)).decode()


def unpacked(text: str) -> bytes | None:
    """The header in a text; None where there is none (it is a convenience, never trusted)."""
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), _LARGEST)
    except (ValueError, binascii.Error, zlib.error):
        return None
    return None if unpacker.unconsumed_tail or not data else data


def _describes(header: bytes, tensors: Mapping[str, Expr]) -> bool:
    from hubtool.tensors.expr import size

    try:
        found = headers.parse(header, sum(map(size, tensors.values())), Path("base")).tensors
    except FileError:
        return False
    return {name: (ref.dtype, ref.shape) for name, ref in found.items()} == {
        name: (expr.dtype, expr.shape) for name, expr in tensors.items()
    }


def _tree(file: TensorFile, changes: Changes) -> Any:
    """The pickled object with its tensors replaced. Names below wrappers end with the stored key."""
    by_place = {(ref.path, ref.start, ref.end, ref.shape): changes.get(key) for key, ref in _unwrapped(file)}

    def mapped(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return by_place.get((value.path, value.start, value.end, value.shape)) or Read(value)
        if isinstance(value, Mapping):
            return type(value)((key, mapped(item)) for key, item in value.items()) if isinstance(value, dict) else value
        return type(value)(map(mapped, value)) if isinstance(value, list | tuple) else value

    return mapped(file.structure)


def _unwrapped(file: TensorFile) -> Iterator[tuple[str, TensorRef]]:
    from hubtool.layouts.unwrap import unwrapped

    yield from unwrapped(file)[0].items()


def _notes(base: Base, kind: str) -> Iterator[str]:
    if base.file.format == "sharded":
        yield f"the base lies in {len(base.file.files) - 1} shards, the output is one file"
    if base.file.format in FOLDERS:
        yield "the base is a folder, the output one file with its names"
    if base.file.format in _TORCH and kind == "safetensors":
        left = len(base.file.tensors) - len(base.tensors)
        yield f"{left} tensors of the training state stay behind" if left else "the pickle's other values stay behind"
    yield from ema(base)


def ema(base: Base) -> Iterator[str]:
    """EMA copies of a training checkpoint are weights of their own; programs do not read them."""
    count = sum(key.startswith("model_ema.") for key in base.extras())
    if count:
        yield f"{count} EMA tensors keep the base's values"


def _folder(base: Base, changes: Changes, rounded: Mapping[str, str]) -> FolderPlan:
    """The same folder: files with a changed tensor are written anew, all others copied as they are."""
    root, tensors, files = base.file.path, {}, []
    for path, own in _by_file(base).items():
        if not any(key in changes for key in own):
            continue
        name = _inside(path, root)
        tensors.update({key: changes.get(key, Read(ref)) for key, ref in own.items()})
        prefix = f"{name.rpartition('/')[0]}/" if "/" in name else ""
        keys = {key.removeprefix(prefix): key for key in own}
        files.append(WeightsFile(_safe_name(name), keys, metadata=_of_file(path)))
    written = {_inside(path, root) for path, own in _by_file(base).items() if any(key in changes for key in own)}
    copies, notes = _copies(base, written)
    return FolderPlan(
        source=root,
        format=FORMAT,
        layout=base.source.form,
        tensors=tensors,
        rounded=rounded,
        notes=(*notes, *ema(base)),
        files=tuple(files),
        copies=copies,
    )


def _by_file(base: Base) -> dict[Path, dict[str, TensorRef]]:
    found: dict[Path, dict[str, TensorRef]] = {}
    for key, ref in _in_order(base.tensors):
        found.setdefault(ref.path, {})[key] = ref
    return found


def _inside(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _safe_name(name: str) -> str:
    """A pickled weights file is written as safetensors, under the name that loaders look for."""
    if not name.endswith(".bin"):
        return name
    folder, slash, last = name.removesuffix(".bin").rpartition("/")
    if "-of-" in last:
        raise Unsupported(f"{name} is a shard in pickle form", hint="hubtool convert the folder first")
    stem = last if not last.startswith("pytorch_model") else last.removeprefix("pytorch_")
    return f"{folder}{slash}{stem}.safetensors"


def _of_file(path: Path) -> Mapping[str, str]:
    file = open_file(path)
    said = carried_metadata(file.metadata) if file.format == "safetensors" else {}
    return MappingProxyType({"format": "pt", **said})


def _copies(base: Base, written: set[str]) -> tuple[dict[str, Path], list[str]]:
    """Files that are copied byte for byte, and notes about weights that are not: other variants hold the base's numbers."""
    root = base.file.path
    known = {_inside(path, root) for path in base.file.files if path.is_relative_to(root)}
    found: dict[str, Path] = {}
    left: list[str] = []
    for path in sorted(root.rglob("*")):
        name = _inside(path, root)
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.is_file() or name in written or name in _OWN:
            continue
        if name not in known and name != EXTRAS and (name.endswith(_WEIGHTS) or ".index." in name):
            left.append(name)
        else:
            found[name] = path
    notes = [f"left out, it holds the base's weights in another form: {name}" for name in left]
    return found, notes
