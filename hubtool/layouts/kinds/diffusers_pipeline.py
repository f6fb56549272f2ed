"""A diffusers folder with ``model_index.json``: family by its denoiser's tensors, else by the pipeline's class.

``formats.folder`` names its tensors ``component/key`` and its documents ``component/config.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._companions import plural
from hubtool.layouts.kinds._tables import Hit, checkpoints, first_hit
from hubtool.layouts.kinds.checkpoint import variants_of
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

ORDER = 10
_CROSS = {768: "sd1", 1024: "sd2"}
_DENOISERS = ("unet", "transformer", "prior", "decoder")
# Classes that come without weights (diffusers and transformers name them so throughout).
_WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "Extractor")
Parts = Mapping[str, Mapping[str, TensorRef]]


def recognise(file: TensorFile) -> Identity | None:
    """Class, components, family and completeness of a pipeline folder."""
    index = file.config.get("model_index.json")
    if not isinstance(index, Mapping):
        return None
    name = index.get("_class_name")
    named = name if isinstance(name, str) else ""
    parts = _parts(file)
    hit = _denoiser(parts)
    families, evidence = _families(file, named, hit, parts)
    single = families[0] if len(families) == 1 else None
    return Identity(
        kind="diffusers_pipeline",
        family=single,
        family_candidates=() if single else families,
        variant=named or None,
        layout="diffusers",
        components={component: len(tensors) for component, tensors in parts.items()},
        flags=_flags(hit, parts),
        findings=(*_missing(index, parts), *_incomplete(hit, parts)),
        evidence=evidence,
    )


def _parts(file: TensorFile) -> dict[str, dict[str, TensorRef]]:
    parts: dict[str, dict[str, TensorRef]] = {}
    for key, ref in file.tensors.items():
        component, slash, name = key.partition("/")
        if slash:
            parts.setdefault(component, {})[name] = ref
    return parts


def _denoiser(parts: Parts) -> tuple[str, Hit] | None:
    """The component that is a denoiser of the sentinel table, and the row it fits."""
    for component in _DENOISERS:
        hit = first_hit(parts[component], checkpoints().rows) if component in parts else None
        if hit is not None:
            return component, hit
    return None


def _families(
    file: TensorFile, name: str, found: tuple[str, Hit] | None, parts: Parts
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if found is not None and found[1].row.family:
        component, hit = found
        said = tuple(f"{component}/{sentence}" for sentence in hit.evidence(parts[component]))
        return (hit.row.family or "",), said
    families = next((families for start, families in checkpoints().pipelines if name.startswith(start)), ())
    width = _cross_attention(file.config)
    if width in _CROSS and _CROSS[width] in families:
        return (_CROSS[width],), (f"{name} with cross_attention_dim {width}",)
    if not families and found is not None:
        families = found[1].row.candidates
    return families, (f"pipeline class {name}",) if name else ()


def _cross_attention(config: Mapping[str, Any]) -> int:
    unet = config.get("unet/config.json")
    width = unet.get("cross_attention_dim") if isinstance(unet, Mapping) else None
    return width if isinstance(width, int) else 0


def _flags(found: tuple[str, Hit] | None, parts: Parts) -> tuple[str, ...]:
    """What the denoiser was made for: inpaint, instruct-pix2pix, depth ..."""
    if found is None:
        return ()
    return variants_of(parts[found[0]], found[1])


def _missing(index: Mapping[str, Any], parts: Parts) -> Iterator[Finding]:
    """Components that the index names with a class that has weights, and of which none were found."""
    for component, value in index.items():
        names = isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
        if names and component not in parts and not value[1].endswith(_WEIGHTLESS):
            text = f"model_index.json names {component}, its weights are not here"
            yield Finding("missing-component", "warning", text)


def _incomplete(found: tuple[str, Hit] | None, parts: Parts) -> Iterator[Finding]:
    """Components with fewer tensors than the family's have; a family told by names alone says nothing of sizes."""
    family = found[1].row.family if found else None
    if family is None or not any(size for _, shape in found[1].row.have for size in shape):  # type: ignore[index]
        return
    for component, full in checkpoints().counts.get(family, {}).items():
        held = len(parts.get(component, ()))
        if 0 < held < full:
            text = f"{component} has {held} of at least {plural(full, 'tensor')}"
            yield Finding("incomplete-component", "warning", text)
