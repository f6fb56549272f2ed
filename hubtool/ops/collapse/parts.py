"""The adapters of a collapse: every kind of file that is a change of weights, read as one, and refused by name where it is none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, ConversionError, RecognitionError, Unsupported
from hubtool.formats.base import TensorFile
from hubtool.layouts.claims import related
from hubtool.layouts.identify import identify
from hubtool.layouts.parse import recognise
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.collapse.base import Base
from hubtool.ops.strengths import Strengths
from hubtool.types import Finding

_REASONS: Mapping[str, str] = MappingProxyType({
    "textual_inversion": "a textual inversion adds tokens and changes no weight: load it beside the checkpoint",
    "aesthetic_embedding": "an aesthetic embedding steers the prompt and changes no weight",
    "null_text": "null-text embeddings belong to one picture and change no weight",
    "checkpoint": "it is a checkpoint: two of them are merged, or their difference extracted",
    "diffusers_pipeline": "it is a whole pipeline: two of them are merged, or their difference extracted",
    "controlnet": "a ControlNet runs beside the denoiser and changes none of its weights",
    "t2i_adapter": "a T2I adapter runs beside the denoiser and changes none of its weights",
    "ip_adapter": "an IP adapter adds attention of its own and changes no weight",
    "vae": "it is a VAE: put it into the checkpoint by convert",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter and how strongly it counts. ``name`` is how messages call it; ``notes``: what of the file stays out of the base."""

    name: str
    file: TensorFile
    adapter: Adapter
    strengths: Strengths
    notes: tuple[str, ...] = ()


def read(file: TensorFile, base: Base, strengths: Strengths, family: str | None = None) -> Part:
    """The change of weights that ``file`` is. Raises ``ConversionError`` for another family, and by name what is no change of weights."""
    adapter = _adapter(file, base, family)
    errors = [finding.message for finding in adapter.findings if finding.severity == "error"]
    if errors:
        raise ConversionError(f"the adapter cannot be read safely: {errors[0]}", path=file.path)
    _check_alphas(adapter, file)
    return Part(
        _name(file), file, adapter, strengths.resolved(adapter.family or base.family), tuple(_left_out(adapter))
    )


def _left_out(adapter: Adapter) -> Iterator[str]:
    if adapter.embeddings:
        tokens = ", ".join(one.token or "a token without a name" for one in adapter.embeddings[:4])
        yield f"{len(adapter.embeddings)} token embeddings ({tokens}) are no change of weights: load them beside the checkpoint"
    if adapter.extras:
        yield f"{len(adapter.extras)} tensors of the adapter belong to no module, first {next(iter(adapter.extras))}"
    yield from (one.message for one in adapter.findings if one.severity == "warning")


def _name(file: TensorFile) -> str:
    return file.path.name if file.path.is_dir() else file.path.stem


def _adapter(file: TensorFile, base: Base, family: str | None) -> Adapter:
    parsed = recognise(file, family)
    if parsed is None or not parsed.adapter.patches:
        return _artefact(file, base)
    adapter = parsed.adapter
    if adapter.family is None and base.family in parsed.candidates:
        parsed = recognise(file, base.family)
        adapter = adapter if parsed is None else parsed.adapter
    _check_family(file, adapter, base)
    return adapter


def _check_family(file: TensorFile, adapter: Adapter, base: Base) -> None:
    own, other = adapter.family, base.family
    if own is not None and not (related(own, other) or related(other, own)):
        hint = "--family NAME reads both as one family where a file was misjudged"
        raise ConversionError(f"the adapter is for {own}, the base is {other}", path=file.path, hint=hint)


def _check_alphas(adapter: Adapter, file: TensorFile) -> None:
    for key, patch in adapter.patches.items():
        if not math.isfinite(patch.scale):
            raise BadValues(f"{'.'.join(key)}: alpha is {patch.alpha_value}", path=file.path)


def _artefact(file: TensorFile, base: Base) -> Adapter:
    """Hypernetworks without an activation, and Custom Diffusion, are changes of weights too."""
    identity = identify(file)
    if identity.kind == "hypernetwork":
        return _hypernetwork(file, base)
    if identity.kind == "custom_diffusion":
        return _custom_diffusion(file)
    if any(finding.code == "broken-keys" for finding in identity.findings):
        hint = f"mend them first: hubtool convert {file.path} --repair"
        raise RecognitionError("the keys of this adapter were broken by hand", path=file.path, hint=hint)
    text = _REASONS.get(identity.kind, f"this file ({identity.kind}) is no change of weights that hubtool knows")
    hint = f"hubtool explain {file.path}"
    raise RecognitionError(f"{file.path.name} cannot be collapsed: {text}", path=file.path, hint=hint)


def _hypernetwork(file: TensorFile, base: Base) -> Adapter:
    from hubtool.ops.artefacts import hypernetwork

    found = hypernetwork.read(file)
    why = found.nonlinear()
    if why is not None:
        text = f"the hypernetwork {file.path.name} cannot be collapsed: {why}"
        raise Unsupported(text, path=file.path, hint="it works beside a checkpoint only")
    folded = hypernetwork.folded(found, dict(base.weights()), base.family)
    if not folded.patches:
        widths = ", ".join(str(width) for width in sorted({width for width, _ in found.networks}))
        raise ConversionError(f"no projection of the base reads the hypernetwork's widths ({widths})", path=file.path)
    return replace(folded, metadata=file.metadata)


def _custom_diffusion(file: TensorFile) -> Adapter:
    from hubtool.adapters.custom_diffusion import parse

    found = parse(unwrapped(file)[0])
    if found is None:
        raise RecognitionError("these tensors are no Custom Diffusion", path=file.path)
    patches, biases = found.patches()
    left = [*biases, *dict.fromkeys(name.partition(".")[0] for name in found.text_encoders)]
    text = f"not collapsed: replaced {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}"
    findings = (Finding("not-collapsed", "warning", text),) if left else ()
    return Adapter(found.family, patches, found.tokens, metadata=file.metadata, findings=findings)
