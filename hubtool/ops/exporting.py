"""A checkpoint with changed tensors as a whole pipeline: a diffusers folder, or a single file. One rounding, whatever dtype is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.errors import ConversionError
from hubtool.formats.documents import read_json
from hubtool.layouts import checkpoints as layouts
from hubtool.layouts.checkpoint_receipt import ORIGIN
from hubtool.layouts.checkpoint_tables import DIFFUSERS
from hubtool.layouts.receipt import KEY as RECEIPT
from hubtool.ops import checkpoints
from hubtool.ops.collapse import Base, output
from hubtool.ops.folder_plan import FORMAT, FolderPlan, WeightsFile
from hubtool.ops.plan import Plan
from hubtool.ops.strip.casting import Caster
from hubtool.ops.target import Target
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.expr import Compute, Concat, Expr, Read

Edit = Callable[[Mapping[str, Any]], dict[str, Any]]
Changes = Mapping[str, Expr]  # stored key -> what it becomes
_INDEX, _SHARD = "model_index.json", re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
_WORDS = MappingProxyType({"F32": "float32", "F16": "float16", "BF16": "bfloat16"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """``single``: one file instead of a folder; ``dtype``: F32, F16, BF16, None for the base's; ``whole``: write every weights file anew.

    ``config_from``: a folder that gives configurations and tokenizers to the pipeline of a single file. ``edits``: component -> what
    becomes of its configuration; ``copies``: files that take the place of the base's.
    """

    single: bool = False
    dtype: str | None = None
    whole: bool = False
    config_from: Path | None = None
    edits: Mapping[str, Edit] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)


def plan(base: Base, changes: Changes, wanted: Wanted) -> Plan:
    """What will be written. Raises ``ConversionError`` for a folder that diffusers could not open."""
    everything = dict(_cast(base, changes, wanted))
    folder = base.file.format in output.FOLDERS
    if wanted.single:
        made = output.plan(base, everything, "safetensors") if not folder else _renamed(base, everything, wanted)
        return replace(made, header=None, rounded=_rounded(base, everything))
    laid = output.plan(base, everything, None) if folder else _renamed(base, everything, wanted)
    assert isinstance(laid, FolderPlan)
    made_folder = _edited(_regrouped(laid) if wanted.whole or wanted.dtype else laid, wanted)
    made_folder = replace(made_folder, rounded=_rounded(base, everything))
    _check_complete(made_folder)
    return made_folder


def appended(base: Base, changes: Changes, key: str, vectors: Sequence[Expr]) -> Expr:
    """The stored table ``key`` with further rows; the vectors take its dtype."""
    table = changes.get(key, Read(base.tensors[key]))
    return Concat((table, *(one if one.dtype == table.dtype else e.Cast(one, table.dtype) for one in vectors)), 0)


def _cast(base: Base, changes: Changes, wanted: Wanted) -> Iterator[tuple[str, Expr]]:
    """The changes, and whatever else has to be written anew."""
    caster = None if wanted.dtype is None else Caster(wanted.dtype, saturate=False)
    for key, ref in base.tensors.items():
        tensor = changes.get(key, Read(ref))
        if caster is not None:
            tensor = _in(tensor, key, caster)
        if key in changes or wanted.whole or caster is not None:
            yield key, tensor


def _rounded(base: Base, everything: Changes) -> dict[str, str]:
    """Why numbers are not the base's bit for bit, by dtype; rows that are only appended, and a wider dtype, round nothing."""
    counts: dict[str, int] = {}
    for key, tensor in everything.items():
        wider = isinstance(tensor, Compute) and isinstance(tensor.function, Caster) and tensor.dtype == "F32"
        if isinstance(tensor, Compute) and not (wider and base.tensors[key].dtype in ("F16", "BF16")):
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    return {f"{count} tensors": f"all changes summed in fp32, rounded once to {name}" for name, count in counts.items()}


def _in(tensor: Expr, key: str, caster: Caster) -> Expr:
    """``tensor`` in the dtype. What is computed is rounded to it directly, not to the base's dtype first."""
    if isinstance(tensor, Concat):
        return replace(tensor, parts=tuple(_in(part, key, caster) for part in tensor.parts))
    if isinstance(tensor, Compute) and tensor.dtype in FLOATS:
        return replace(tensor, dtype=caster.dtype)
    return caster.cast(key, tensor)


def _renamed(base: Base, everything: Changes, wanted: Wanted) -> Plan:
    """A single file as a folder, a folder as the family's single file."""
    source = base.source
    tensors: dict[str, Expr] = {key: everything.get(key, Read(ref)) for key, ref in base.tensors.items()}
    found = layouts.read(tensors, source.pipeline, source.slots)
    if base.file.format == FORMAT:
        found = replace(found, extras={}, strays=found.extras)
    bare = replace(base.file, metadata={key: text for key, text in base.file.metadata.items() if key != RECEIPT})
    target = Target(format="safetensors" if wanted.single else None)
    layout = "single-file" if wanted.single else DIFFUSERS
    return checkpoints.written(bare, source, found, layout, target, config_from=wanted.config_from)


def _regrouped(plan: FolderPlan) -> FolderPlan:
    """Shards of one component as one file, which is cut anew where it is too large."""
    files: dict[str, WeightsFile] = {}
    for one in plan.files:
        name = _SHARD.sub("", one.name)
        before = files.get(name)
        files[name] = replace(one, name=name, keys={**(before.keys if before else {}), **one.keys})
    copies = {name: path for name, path in plan.copies.items() if not name.endswith(".safetensors.index.json")}
    return replace(plan, files=tuple(files.values()), copies=copies)


def _edited(plan: FolderPlan, wanted: Wanted) -> FolderPlan:
    """Tokenizers and configurations that say what is true of the output."""
    replaced = {name.partition("/")[0] for name in wanted.copies}
    copies = {name: path for name, path in plan.copies.items() if name.partition("/")[0] not in replaced}
    documents = {name: text for name, text in plan.documents.items() if name != ORIGIN}
    parts = {one.name.partition("/")[0] for one in plan.files if "/" in one.name}
    for part in sorted(parts):
        name = f"{part}/config.json"
        before = _document(plan, name)
        if before is None:
            continue
        after = wanted.edits[part](before) if part in wanted.edits else dict(before)
        after = _said(after, wanted.dtype)
        if after != before:
            copies.pop(name, None)
            documents[name] = (json.dumps(after, indent=2) + "\n").encode()
    return replace(plan, copies={**copies, **wanted.copies}, documents=documents)


def _said(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """transformers' configurations name the dtype of the weights."""
    word = _WORDS.get(dtype or "")
    return {key: word if word and key in ("dtype", "torch_dtype") else value for key, value in config.items()}


def _document(plan: FolderPlan, name: str) -> dict[str, Any] | None:
    if name in plan.documents:
        found = json.loads(plan.documents[name])
    else:
        found = read_json(plan.copies[name]) if name in plan.copies else None
    return found if isinstance(found, dict) else None


def _check_complete(plan: FolderPlan) -> None:
    """Raise ``ConversionError`` unless every component that the index names is there."""
    index = _document(plan, _INDEX) or {}
    there = {name.partition("/")[0] for name in (*plan.documents, *plan.copies, *(one.name for one in plan.files))}
    named = [name for name, home in index.items() if isinstance(home, list) and len(home) == 2 and all(home)]
    missing = [name for name in named if name not in there]
    if missing or not named:
        text = f"the folder would have no {', '.join(missing) or _INDEX}, and diffusers could not open it"
        hint = "--config-from FOLDER: a diffusers folder of the same family gives configurations and tokenizers"
        raise ConversionError(text, path=plan.source, hint=hint)
