"""Plans the single file that a pipeline folder, another single file or one component becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hubtool.errors import UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts import checkpoint_receipt as receipts
from hubtool.layouts import checkpoints as layouts
from hubtool.layouts import receipt
from hubtool.layouts.checkpoint_source import Source
from hubtool.layouts.checkpoint_tables import DIFFUSERS, Form, Slot
from hubtool.layouts.checkpoints import Checkpoint
from hubtool.layouts.emission import Loss
from hubtool.layouts.unwrap import unwrap
from hubtool.ops.folder_plan import FORMAT
from hubtool.ops.plan import Plan


def plan(file: TensorFile, source: Source, checkpoint: Checkpoint, form: Form) -> Plan:
    """The single file of ``form``; the origin's very bytes where a folder keeps a receipt of it and still holds the same tensors."""
    restored = _restored(file, source, checkpoint, form)
    if restored is not None:
        return restored
    made = layouts.write(checkpoint, source.pipeline, form if source.component is None else _alone(form, source))
    return Plan(
        source=file.path,
        format="safetensors",
        layout=form.id,
        tensors=made.tensors,
        metadata=_metadata(file),
        losses=(*made.losses, *left_behind(file, source, checkpoint)),
        notes=tuple(_notes(file, source, checkpoint, form)),
    )


def component(file: TensorFile, source: Source, checkpoint: Checkpoint) -> Plan:
    """One component under diffusers' names in a file of its own. Raises ``UsageProblem`` for several: they are a folder."""
    if len(checkpoint.weights) > 1:
        raise UsageProblem(
            f"{len(checkpoint.weights)} components under diffusers' names are a folder",
            hint="name a folder, or one of them with --component",
        )
    (weights,) = checkpoint.weights.values()
    return Plan(
        source=file.path,
        format="safetensors",
        layout=DIFFUSERS,
        tensors={**weights, **checkpoint.extras},
        metadata=_metadata(file),
        losses=tuple(left_behind(file, source, checkpoint)),
    )


def _alone(form: Form, source: Source) -> Form:
    """One component in a file of its own has no prefix."""
    wanted = source.component or ""
    own = next((slot.naming for slot in form.slots if slot.component == wanted), source.pipeline.naming(wanted))
    return Form(form.id, (Slot("", wanted, own),))


def _restored(file: TensorFile, source: Source, checkpoint: Checkpoint, form: Form) -> Plan | None:
    origin = receipts.origin_of(file.path) if file.format == FORMAT else None
    if origin is None or origin.layout != form.id:
        return None
    restored = receipts.restore_single(origin, checkpoint, source.pipeline)
    if restored is None:
        return None
    return Plan(
        source=file.path,
        format="safetensors",
        layout=form.id,
        tensors=restored.tensors,
        metadata=restored.metadata,
        header=restored.header if origin.format == "safetensors" else None,
        notes=("restored from the receipt of origin",),
    )


def _metadata(file: TensorFile) -> dict[str, str]:
    """What the source (or the single file that a folder was made of) said about itself, and the receipt for the way back."""
    origin = receipts.origin_of(file.path) if file.format == FORMAT else None
    said: Mapping[str, str] = file.metadata if origin is None else receipts.metadata_of(origin)
    return {"format": "pt", **receipts.carried(said), **_receipt_of(file)}


def _receipt_of(file: TensorFile) -> dict[str, str]:
    if file.format != FORMAT:
        return {receipt.KEY: file.metadata[receipt.KEY]} if receipt.KEY in file.metadata else {}
    text = receipts.of_folder(file)
    return {receipt.KEY: text} if text else {}


def left_behind(file: TensorFile, source: Source, checkpoint: Checkpoint) -> Iterator[Loss]:
    """What is part of no form: a trainer's state beside the weights, a folder's components that the family does not have."""
    yield from layouts.stray_losses(checkpoint)
    dropped = len(file.tensors) - len(source.tensors)
    if dropped:
        _, findings = unwrap(file)
        noun = "tensor" if dropped == 1 else "tensors"
        yield Loss(f"{dropped} {noun} of the training state", "; ".join(finding.message for finding in findings))


def _notes(file: TensorFile, source: Source, checkpoint: Checkpoint, form: Form) -> Iterator[str]:
    if file.format != FORMAT or source.component is not None:
        return
    yield "tokenizers stay behind: programs that read single files bring their own"
    absent = [slot.component for slot in form.slots if slot.component not in checkpoint.weights]
    if absent:
        yield f"the folder has no weights of {', '.join(absent)}"
    spare = [name for name in checkpoint.weights if source.pipeline.components[name].unused]
    if "text_encoder" in spare and form.id != DIFFUSERS and not checkpoint.extras and _fused(source, form):
        yield "the last layer and the projection of the text encoder are not in the folder; programs that read the file do not use them"


def _fused(source: Source, form: Form) -> bool:
    return source.pipeline.family == "sd2" and any(slot.naming == "openclip" for slot in form.slots)
