"""A diffusers folder with ``model_index.json``: family by its denoiser's tensors, else by the pipeline's class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._tables import checkpoints, first_hit
from hubtool.types import Finding

ORDER = 10
_CROSS = {768: "sd1", 1024: "sd2"}


def recognise(file: TensorFile) -> Identity | None:
    """Class, components and family of a pipeline folder."""
    index = file.config.get("model_index.json")
    if not isinstance(index, Mapping):
        return None
    name = index.get("_class_name")
    named = name if isinstance(name, str) else ""
    families, evidence = _families(file, named)
    single = families[0] if len(families) == 1 else None
    components = _components(file)
    return Identity(
        kind="diffusers_pipeline",
        family=single,
        family_candidates=() if single else families,
        variant=named or None,
        layout="diffusers",
        components=components,
        findings=tuple(_missing(index, components)),
        evidence=evidence,
    )


def _families(file: TensorFile, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    table = checkpoints()
    hit = first_hit(file.tensors, table.rows) if file.tensors else None
    if hit is not None and hit.row.family:
        return (hit.row.family,), hit.evidence(file.tensors)
    families = next((families for start, families in table.pipelines if name.startswith(start)), ())
    width = _cross_attention(file.config)
    if width in _CROSS and _CROSS[width] in families:
        return (_CROSS[width],), (f"{name} with cross_attention_dim {width}",)
    return families, (f"pipeline class {name}",) if name else ()


def _cross_attention(config: Mapping[str, Any]) -> int:
    unet = config.get("unet/config.json")
    width = unet.get("cross_attention_dim") if isinstance(unet, Mapping) else None
    return width if isinstance(width, int) else 0


def _components(file: TensorFile) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in file.tensors:
        name = key.replace("/", ".", 1).split(".", 1)[0]
        counts[name] = counts.get(name, 0) + 1
    return counts


def _missing(index: Mapping[str, Any], components: Mapping[str, int]) -> list[Finding]:
    """Components that the index names with a class, and of which no weights were found. Only denoisers and VAEs are checked."""
    named = [
        key for key in ("unet", "transformer", "vae") if isinstance(index.get(key), list) and index[key][:1] != [None]
    ]
    gone = [key for key in named if key not in components] if components else []
    return [
        Finding("missing-component", "warning", f"model_index.json names {key}, its weights are not here")
        for key in gone
    ]
