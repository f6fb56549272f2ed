"""Plans conversions of whole checkpoints: single file <-> diffusers folder, one single-file form into another, one component by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubtool.errors import ConversionError, UnknownLayout, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts import checkpoint_receipt as receipts
from hubtool.layouts import checkpoints as layouts
from hubtool.layouts.checkpoint_source import Source, recognise
from hubtool.layouts.checkpoint_tables import DIFFUSERS, Form, Pipeline
from hubtool.layouts.checkpoints import Checkpoint
from hubtool.ops import checkpoint_folder, checkpoint_single
from hubtool.ops.folder_plan import FORMAT
from hubtool.ops.plan import Plan
from hubtool.tensors.expr import Expr, Read

if TYPE_CHECKING:
    from hubtool.ops.target import Target

_ORIGIN = "origin"


def plan(file: TensorFile, target: Target, *, config_from: Path | None = None) -> Plan | None:
    """What converting a checkpoint, pipeline folder or VAE to ``target.layout`` will write; None when the file or the request is another's.

    ``config_from``: a diffusers folder of the base model, whose configurations and tokenizers are taken over. Raises ``UnknownLayout``
    for a form that the family does not have, and what recognising and cutting raise.
    """
    asked = target.layout or _implied(file, target)
    single = asked != DIFFUSERS or target.format is not None
    source = recognise(file, target.family, any_family=single) if asked else None
    if source is None or asked is None:
        return None
    if target.format == "torch-zip":
        raise UsageProblem(
            "whole checkpoints are written as safetensors", hint="name the output .safetensors, or a folder"
        )
    checkpoint = _selected(_checkpoint(file, source), target.component)
    source = replace(source, component=target.component or source.component)
    if not checkpoint.weights:
        raise ConversionError("no tensor of this file belongs to a known component", path=file.path)
    wanted = _back_to(file) if asked == _ORIGIN else asked
    return written(file, source, checkpoint, wanted, target, config_from=config_from)


def written(
    file: TensorFile,
    source: Source,
    checkpoint: Checkpoint,
    layout: str,
    target: Target,
    *,
    config_from: Path | None = None,
) -> Plan:
    """The plan that writes ``checkpoint``, whatever its tensors are by now, in a layout; ``source`` and ``file`` are where it came from."""
    if layout != DIFFUSERS:
        return checkpoint_single.plan(file, source, checkpoint, _form(source.pipeline, layout, checkpoint))
    if target.format is not None:
        return checkpoint_single.component(file, source, checkpoint)
    return checkpoint_folder.plan(file, source, checkpoint, config_from)


def _implied(file: TensorFile, target: Target) -> str | None:
    """Without a layout, a pipeline folder becomes the family's single file where a file is asked for, else a folder again."""
    if target.component is not None:
        return DIFFUSERS
    if file.format != FORMAT:
        return None
    return "single-file" if target.format else DIFFUSERS


def _back_to(file: TensorFile) -> str:
    """The layout that the receipt remembers."""
    if receipts.load_folder(file.metadata) is not None:
        return DIFFUSERS
    origin = receipts.origin_of(file.path) if file.format == FORMAT else None
    if origin is None:
        raise UsageProblem("this file keeps no receipt of an origin", path=file.path, hint="name a layout")
    return origin.layout


def _checkpoint(file: TensorFile, source: Source) -> Checkpoint:
    tensors: dict[str, Expr] = {key: Read(ref) for key, ref in source.tensors.items()}
    found = layouts.read(tensors, source.pipeline, source.slots)
    if file.format != FORMAT:
        return found
    kept = receipts.extras_of(file.path)
    extras = {key: Read(ref) for key, ref in kept.tensors.items()} if kept else {}
    return replace(found, extras=extras, strays=found.extras)


def _selected(checkpoint: Checkpoint, component: str | None) -> Checkpoint:
    """Only the component that was asked for; what belongs to no component stays behind."""
    if component is None:
        return checkpoint
    if component not in checkpoint.weights:
        raise UsageProblem(
            f"the checkpoint has no component {component!r}", hint=f"it has {', '.join(checkpoint.weights)}"
        )
    return Checkpoint(checkpoint.family, {component: checkpoint.weights[component]}, {})


def _form(pipeline: Pipeline, name: str, checkpoint: Checkpoint) -> Form:
    form = pipeline.form(name)
    if form is None:
        known = ", ".join((DIFFUSERS, *(form.id for form in pipeline.forms)))
        raise UnknownLayout(f"a checkpoint of {pipeline.family} has no layout {name!r}", hint=f"it has {known}")
    if name != form.id and not checkpoint.weights.keys() <= form.components():
        return max(pipeline.forms, key=lambda other: len(checkpoint.weights.keys() & other.components()))
    return form
