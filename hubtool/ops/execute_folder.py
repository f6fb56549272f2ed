"""Writes a ``FolderPlan``: a folder beside the target, synced and renamed when it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from hubtool.layouts.checkpoint_receipt import EXTRAS
from hubtool.ops import weights_file
from hubtool.ops.folder_plan import FolderPlan, WeightsFile
from hubtool.tensors.expr import Expr, size
from hubtool.tensors.writer import atomic_folder

Progress = Callable[[int], None]
Writer = Callable[..., int]
SHARD = 10_000_000_000  # bytes: what diffusers' save_pretrained puts into one file at most


def execute_folder(
    plan: FolderPlan,
    output: Path,
    *,
    progress: Progress | None = None,
    shard: int = SHARD,
    workers: int | None = None,
    device: str = "cpu",
    late: weights_file.Late | None = None,
) -> int:
    """Write the plan to the new folder ``output`` and return the bytes written.

    Weights of more than ``shard`` bytes are split under an index. Raises ``WouldOverwrite`` when ``output`` exists, ``FileError``.
    """
    write = partial(weights_file.write, progress=progress, workers=workers, device=device)
    with atomic_folder(output) as part:
        total = sum(_weights(plan, file, part, shard, write) for file in plan.files)
        if plan.extras:
            total += write(part / EXTRAS, plan.extras)
        for name, text in plan.documents.items():
            _place(part, name).write_bytes(text if late is None else late(text))
        for name, source in plan.copies.items():
            shutil.copyfile(source, _place(part, name))
    return total + sum(map(len, plan.documents.values()))


def _place(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _weights(plan: FolderPlan, file: WeightsFile, folder: Path, shard: int, write: Writer) -> int:
    tensors = {key: plan.tensors[name] for key, name in file.keys.items()}
    path = _place(folder, file.name)
    if file.header is not None and plan.header is not None:
        return write(path, tensors, header=file.header)
    pieces = list(_shards(tensors, shard))
    if len(pieces) == 1:
        return write(path, tensors, file.metadata)
    names = [f"{path.stem}-{i:05}-of-{len(pieces):05}.safetensors" for i in range(1, len(pieces) + 1)]
    _write_index(path, dict(zip(names, pieces, strict=True)))
    return sum(write(path.parent / name, piece, file.metadata) for name, piece in zip(names, pieces, strict=True))


def _shards(tensors: Mapping[str, Expr], limit: int) -> Iterator[dict[str, Expr]]:
    """Tensors in their order, up to ``limit`` bytes together; one that is larger stands alone."""
    piece: dict[str, Expr] = {}
    held = 0
    for key, tensor in tensors.items():
        if piece and held + size(tensor) > limit:
            yield piece
            piece, held = {}, 0
        piece[key] = tensor
        held += size(tensor)
    yield piece


def _write_index(path: Path, pieces: Mapping[str, Mapping[str, Expr]]) -> None:
    where = {key: name for name, piece in pieces.items() for key in piece}
    total = sum(size(tensor) for piece in pieces.values() for tensor in piece.values())
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    text = json.dumps(document, indent=2) + "\n"
    (path.parent / f"{path.name}.index.json").write_text(text, encoding="utf-8")
