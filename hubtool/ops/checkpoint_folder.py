"""Plans the diffusers folder that a single file becomes: weights by component, configurations, and what has to be added."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hubtool.formats.base import TensorFile
from hubtool.formats.documents import read_json
from hubtool.layouts import checkpoint_config as configs
from hubtool.layouts import checkpoint_receipt as receipts
from hubtool.layouts import receipt
from hubtool.layouts.checkpoint_receipt import ORIGIN
from hubtool.layouts.checkpoint_source import Source
from hubtool.layouts.checkpoint_tables import DENOISERS, DIFFUSERS
from hubtool.layouts.checkpoints import Checkpoint
from hubtool.layouts.tables import family
from hubtool.ops.checkpoint_single import left_behind
from hubtool.ops.folder_plan import FORMAT, FolderPlan, WeightsFile
from hubtool.tensors.expr import Expr

_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler/scheduler_config.json"


def plan(file: TensorFile, source: Source, checkpoint: Checkpoint, base: Path | None) -> FolderPlan:
    """The folder; the origin's very bytes where a single file keeps a receipt of one and still holds the same tensors.

    ``base``: a folder of the base model whose configurations and tokenizers are taken over.
    """
    restored = _restored(file, source, checkpoint)
    if restored is not None:
        return restored
    base = base or (file.path if file.format == FORMAT else None)
    return FolderPlan(
        source=file.path,
        format=FORMAT,
        layout=DIFFUSERS,
        tensors=dict(_tensors(source, checkpoint)),
        losses=tuple(left_behind(file, source, checkpoint)),
        notes=tuple(_notes(source, checkpoint, base)),
        files=tuple(_files(source, checkpoint)),
        documents={name: text for name, text in _documents(file, source, checkpoint, base) if text},
        extras=checkpoint.extras,
        copies=dict(_copies(source, checkpoint, base)),
    )


def _folder(source: Source, name: str) -> str:
    """Where a component lies: a component by itself is the folder."""
    return "" if source.component is not None else f"{name}/"


def _tensors(source: Source, checkpoint: Checkpoint) -> Iterator[tuple[str, Expr]]:
    for name, own in checkpoint.weights.items():
        for key, tensor in own.items():
            yield _folder(source, name) + key, tensor


def _files(source: Source, checkpoint: Checkpoint) -> Iterator[WeightsFile]:
    for name, own in checkpoint.weights.items():
        folder = _folder(source, name)
        stem = source.pipeline.components[name].stem
        yield WeightsFile(f"{folder}{stem}.safetensors", {key: folder + key for key in own})


def _documents(
    file: TensorFile, source: Source, checkpoint: Checkpoint, base: Path | None
) -> Iterator[tuple[str, bytes]]:
    for name in checkpoint.weights:
        kept = _read(base, f"{name}/{_CONFIG}")
        made = kept if kept is not None else _component(source, name, checkpoint)
        yield _folder(source, name) + _CONFIG, configs.dump(made) if made else b""
    if source.component is None:
        yield _INDEX, configs.dump(_index(source, checkpoint, base))
        kept = _read(base, _SCHEDULER)
        yield _SCHEDULER, configs.dump(kept if kept is not None else _scheduler(source, checkpoint))
        yield ORIGIN, _origin(file, source)


def _component(source: Source, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    made = configs.component_config(source.pipeline.components[name], checkpoint.weights[name])
    return {**made, **source.pipeline.adjusted(source.flags, name)} if made else {}


def _scheduler(source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    denoiser = next((own for name, own in checkpoint.weights.items() if name in DENOISERS), {})
    made = configs.scheduler_config(source.pipeline, denoiser)
    return {**made, **source.pipeline.adjusted(source.flags, "scheduler")}


def _index(source: Source, checkpoint: Checkpoint, base: Path | None) -> dict[str, Any]:
    made = configs.model_index(source.pipeline, checkpoint.weights)
    made = {**made, "_class_name": source.pipeline.class_for(source.variants)}
    kept = _read(base, _INDEX)
    if not isinstance(kept, dict):
        return made
    absent = source.pipeline.components.keys() - checkpoint.weights.keys()
    return {**kept, **{name: [None, None] for name in absent if name in kept}}


def _read(base: Path | None, name: str) -> dict[str, Any] | None:
    """A document of the base folder; None when there is no base, or no such document in it."""
    if base is None or not (base / name).is_file():
        return None
    document = read_json(base / name)
    return document if isinstance(document, dict) else None


def _origin(file: TensorFile, source: Source) -> bytes:
    """The receipt that makes the way back exact; nothing for a folder, which is no origin."""
    if file.format == FORMAT:
        carried = receipts.origin_of(file.path)
        return (carried.dump() + "\n").encode() if carried else b""
    return (receipt.of_file(file, source.form).dump() + "\n").encode()


def _copies(source: Source, checkpoint: Checkpoint, base: Path | None) -> Iterator[tuple[str, Path]]:
    """Files of the base folder that hold no weights: tokenizers of the encoders that are there."""
    if base is None or source.component is not None:
        return
    for name in _tokenizers(source, checkpoint):
        folder = base / name
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file():
                yield f"{name}/{path.name}", path


def _tokenizers(source: Source, checkpoint: Checkpoint) -> list[str]:
    index = configs.model_index(source.pipeline, checkpoint.weights)
    return [name for name in source.pipeline.others if isinstance(index[name], list) and index[name][1]]


def _notes(source: Source, checkpoint: Checkpoint, base: Path | None) -> Iterator[str]:
    model = family(source.pipeline.family).base_model
    bare = [name for name in checkpoint.weights if not _component(source, name, checkpoint)]
    unknown = [name for name in bare if _read(base, f"{name}/{_CONFIG}") is None]
    if unknown:
        yield f"add config.json of {', '.join(unknown)} from {model} (or name a folder with --config-from)"
    if source.component is not None:
        return
    missing = [name for name in _tokenizers(source, checkpoint) if base is None or not (base / name).is_dir()]
    if missing:
        yield f"add {', '.join(missing)} from {model}: a single file does not hold them (or name a folder with --config-from)"
    parts = source.pipeline.components
    absent = [name for name, part in parts.items() if name not in checkpoint.weights and not part.optional]
    if absent:
        yield f"the file has no {', '.join(absent)}: load them from {model} and hand them to from_pretrained"
    if checkpoint.extras:
        yield f"{len(checkpoint.extras)} tensors belong to no component (first {next(iter(checkpoint.extras))}); they are kept in {receipts.EXTRAS}"
    for flag in sorted(source.pipeline.flags.keys() - source.flags) if _read(base, _SCHEDULER) is None else ():
        if "unsure" in source.pipeline.flags[flag]:
            yield source.pipeline.flags[flag]["unsure"]


def _restored(file: TensorFile, source: Source, checkpoint: Checkpoint) -> FolderPlan | None:
    origin = receipts.load_folder(file.metadata) if source.component is None else None
    found = receipts.restore_folder(origin, checkpoint, source.pipeline) if origin else None
    if origin is None or found is None:
        return None
    names = {one.name: one.name.partition("/")[0] for one in found}
    files = (
        WeightsFile(one.name, {key: f"{names[one.name]}/{key}" for key in one.tensors}, one.header, one.metadata)
        for one in found
    )
    return FolderPlan(
        source=file.path,
        format=FORMAT,
        layout=DIFFUSERS,
        tensors={f"{names[one.name]}/{key}": tensor for one in found for key, tensor in one.tensors.items()},
        header=b"",
        notes=("restored from the receipt of origin, without the tokenizers of that folder",),
        files=tuple(files),
        documents=origin.texts,
    )
