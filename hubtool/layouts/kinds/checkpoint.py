"""Whole checkpoints and bare denoisers (U-Net, transformer) by the sentinel table ``schemas/checkpoints.toml``.

Beside family and variant: which components are there and whether they are complete, EMA copies, quantisation marks, and the
evidence for v-prediction (spec/artefacts.md G).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import adapter_key
from hubtool.layouts.kinds._tables import CheckpointTable, Hit, Row, checkpoints, first_hit, fits
from hubtool.layouts.kinds._values import deviation, floats
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

ORDER = 38  # before adapters: a file with full weights and a few adapter keys is a checkpoint
_EMA_KEYS = 100  # diffusers' rule: more of them mean a real EMA copy
# ComfyUI's heuristic for SD2: the last block's norm bias spreads wider in v-prediction models.
_V_PRED_KEY, _V_PRED_SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
_POSITION_IDS = ("embeddings.position_ids",)
_NF4 = ".quant_state.bitsandbytes__nf4"
Tensors = Mapping[str, TensorRef]


def recognise(file: TensorFile) -> Identity | None:
    """A checkpoint when a sentinel fits and adapter keys are not the majority."""
    if len(file.tensors) < 2:
        return None
    table = checkpoints()
    hit = first_hit(file.tensors, table.rows)
    if hit is None:
        return None
    foreign = [key for key in file.tensors if adapter_key(key)]
    if 2 * len(foreign) >= len(file.tensors):
        return None
    identity = _identity(file, table, hit)
    return replace(identity, findings=(*identity.findings, _mixed(foreign))) if foreign else identity


def _identity(file: TensorFile, table: CheckpointTable, hit: Hit) -> Identity:
    variants = _variant_rows(file.tensors, hit)
    components = _count_components(file.tensors, table, hit)
    ema = components.pop("ema", 0)
    flags = (*_flags(file.tensors, table), *(("ema",) if ema > _EMA_KEYS else ()), *_quantised(file.tensors))
    spread = _v_prediction(file.tensors, hit)
    complete = not _fewer_tensors(flags) and not any(row.resized for row in variants)
    return Identity(
        kind="checkpoint",
        family=hit.row.family,
        family_candidates=hit.row.candidates,
        variant="+".join(_names(variants)) or None,
        layout=hit.row.layout,
        components=components,
        flags=(*flags, *(("v-prediction",) if spread and "v-prediction" not in flags else ())),
        findings=(*(_incomplete(table, hit, components) if complete else ()), *_odd_positions(file.tensors)),
        evidence=(*hit.evidence(file.tensors), *((spread,) if spread else ())),
    )


def variants_of(tensors: Tensors, hit: Hit) -> tuple[str, ...]:
    """Names of the variants that a checkpoint is (inpaint, dev, t2v-14b ...)."""
    return _names(_variant_rows(tensors, hit))


def _variant_rows(tensors: Tensors, hit: Hit) -> list[Row]:
    return [row for row in checkpoints().variants if _fits_variant(tensors, row, hit)]


def _names(rows: list[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.variant for row in rows if row.variant))


def _mixed(foreign: list[str]) -> Finding:
    """A merge that went wrong, or two files in one."""
    return Finding(
        "mixed-checkpoint",
        "warning",
        f"{len(foreign)} adapter tensors lie among the checkpoint's, first {foreign[0][:80]!a}",
    )


def _fits_variant(tensors: Tensors, row: Row, hit: Hit) -> bool:
    return (not row.families or hit.row.family in row.families) and fits(tensors, row, hit.prefix)


def _count_components(tensors: Tensors, table: CheckpointTable, hit: Hit) -> dict[str, int]:
    """Number of tensors by component; scheduler buffers and other strays are not counted."""
    rules = [
        (prefix, name) for prefix, name, families in table.components if not families or hit.row.family in families
    ]
    counts: dict[str, int] = {}
    for key in tensors:
        name = next((name for prefix, name in rules if key.startswith(prefix)), None)
        if name is None and key.startswith(hit.prefix):
            name = hit.row.component
        if name is not None:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _flags(tensors: Tensors, table: CheckpointTable) -> tuple[str, ...]:
    return tuple(name for name, keys in table.flags if any(key in tensors for key in keys))


def _quantised(tensors: Tensors) -> tuple[str, ...]:
    dtypes = {ref.dtype for ref in tensors.values() if len(ref.shape) > 1}
    marks = [
        mark
        for mark, held in (("fp8", any(dtype.startswith("F8") for dtype in dtypes)), ("int8", "I8" in dtypes))
        if held
    ]
    if "U8" in dtypes and any(key.endswith(_NF4) for key in tensors):
        marks.append("nf4")
    return tuple(marks)


def _fewer_tensors(flags: tuple[str, ...]) -> bool:
    """Packed formats have other tensor counts than the plain model."""
    return "nf4" in flags


def _incomplete(table: CheckpointTable, hit: Hit, components: Mapping[str, int]) -> tuple[Finding, ...]:
    """Components that are there, but with fewer tensors than the model has."""
    expected = table.counts.get(hit.row.family or "", {})
    short = [(name, found, expected[name]) for name, found in components.items() if found < expected.get(name, 0)]
    return tuple(
        Finding("incomplete-component", "warning", f"{name} has {found} of at least {full} tensors")
        for name, found, full in short
    )


def _v_prediction(tensors: Tensors, hit: Hit) -> str | None:
    """Evidence that an SD2 checkpoint predicts v; absence of evidence proves nothing."""
    ref = tensors.get(hit.prefix + _V_PRED_KEY) if hit.row.family == "sd2" else None
    values = floats(ref) if ref is not None else None
    spread = deviation(values) if values else 0.0
    return f"{_V_PRED_KEY} has standard deviation {spread:.3f}: v-prediction" if spread > _V_PRED_SPREAD else None


def _odd_positions(tensors: Tensors) -> tuple[Finding, ...]:
    """Merging tools that average everything also average ``position_ids``."""
    for key, ref in tensors.items():
        if key.endswith(_POSITION_IDS) and ref.dtype in ("F16", "F32", "BF16", "F64"):
            values = floats(ref)
            if values and any(value != round(value) for value in values):
                return (Finding("broken-position-ids", "warning", f"{key} holds fractions: a merge damaged it"),)
    return ()
