"""Recognises what a conversion of a checkpoint starts from: its family, and which keys hold which component under which naming."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hubtool.errors import ConversionError, UnknownFamily
from hubtool.formats.base import TensorFile
from hubtool.layouts import tables
from hubtool.layouts.checkpoint_tables import (
    DENOISERS,
    DIFFUSERS,
    NATIVE,
    Component,
    Form,
    Pipeline,
    Slot,
    families,
    pipeline,
)  # fmt: skip
from hubtool.layouts.checkpoints import folder_slots, homes, single_slots
from hubtool.layouts.kinds import checkpoint as kind
from hubtool.layouts.kinds import vae
from hubtool.layouts.kinds._tables import Hit, checkpoints, components, first_hit
from hubtool.layouts.unwrap import unwrap
from hubtool.tensors.ref import TensorRef

Tensors = Mapping[str, TensorRef]
_OPEN = "open-"  # before the name of a model whose keys are OpenCLIP's


@dataclass(frozen=True, slots=True)
class Source:
    """``form``: the id of its single-file form, or ``diffusers``. ``flags`` and ``variants``: what its kind tells beside the family.

    ``component``: the one component that the source is (a VAE or a text encoder by itself); None for a pipeline or its denoiser.
    """

    pipeline: Pipeline
    slots: tuple[Slot, ...]
    tensors: Tensors
    form: str
    flags: frozenset[str] = frozenset()
    variants: frozenset[str] = frozenset()
    component: str | None = None


def recognise(file: TensorFile, family: str | None = None, *, any_family: bool = False) -> Source | None:
    """The source of a conversion, or None when the file is no checkpoint, pipeline folder, VAE or text encoder of a known pipeline.

    ``family``: what the user says; ``any_family``: a VAE or encoder of several families may be read as the first's (only its configuration
    differs). Raises ``UnknownFamily`` where the file fits several, ``ConversionError`` for a family without a table.
    """
    if file.format == "diffusers-folder":
        return _folder(file, family)
    view, _ = unwrap(file)
    identity = kind.recognise(view)
    if identity is None:
        return _vae(view, family, any_family) or _text_encoder(view, family, any_family)
    hit = first_hit(view.tensors, checkpoints().rows)
    if hit is None:
        return None
    return _single(view.tensors, hit, family, frozenset(identity.flags), _variants(view.tensors, hit))


def _single(tensors: Tensors, hit: Hit, family: str | None, flags: frozenset[str], variants: frozenset[str]) -> Source:
    naming = DIFFUSERS if hit.row.layout == DIFFUSERS else NATIVE
    names = [family] if family else _candidates(hit)
    fitting = [table for table in map(pipeline, names) if table is not None and hit.row.component in table.components]
    if not fitting:
        raise _no_table(names)
    slots = [single_slots(table, hit.prefix, hit.row.component, naming) for table in fitting]
    best = _most(fitting, [len(homes(tensors, table, own)) for table, own in zip(fitting, slots, strict=True)])
    chosen = fitting[best]
    form = DIFFUSERS if naming == DIFFUSERS else _form(chosen, hit.prefix, hit.row.component, tensors).id
    alone = None if chosen.cls else hit.row.component
    return Source(chosen, slots[best], tensors, form, flags, variants, alone)


def _folder(file: TensorFile, family: str | None) -> Source:
    denoiser = next((name for name in DENOISERS if any(key.startswith(name + "/") for key in file.tensors)), None)
    bare = {
        key.removeprefix(f"{denoiser}/"): ref for key, ref in file.tensors.items() if key.startswith(f"{denoiser}/")
    }
    hit = first_hit(bare, checkpoints().rows)
    names = [family] if family else _candidates(hit) if hit else _of_class(file)
    fitting = [table for table in map(pipeline, names) if table is not None]
    if not fitting:
        raise _no_table(names)
    there = {key.partition("/")[0] for key in file.tensors}
    narrow = _by_projection(fitting, bare)
    chosen = narrow[_most(narrow, [-len(there ^ set(table.components)) for table in narrow])]
    return Source(chosen, folder_slots(chosen), file.tensors, DIFFUSERS, _folder_flags(file))


def _by_projection(fitting: list[Pipeline], denoiser: Tensors) -> list[Pipeline]:
    """SD1 projects by 1x1 convolutions, SD2 by matrices: that tells U-Nets of no published width apart."""
    ref = denoiser.get("mid_block.attentions.0.proj_in.weight")
    wanted = {4: "sd1", 2: "sd2"}.get(len(ref.shape)) if ref is not None else None
    return [table for table in fitting if table.family == wanted] or fitting


def _folder_flags(file: TensorFile) -> frozenset[str]:
    config = file.config.get("scheduler/scheduler_config.json")
    predicts = config.get("prediction_type") if isinstance(config, Mapping) else None
    return frozenset({"v-prediction"} if predicts == "v_prediction" else ())


def _of_class(file: TensorFile) -> list[str]:
    index = file.config.get("model_index.json")
    name = index.get("_class_name") if isinstance(index, Mapping) else None
    starts = checkpoints().pipelines
    return [*next((found for start, found in starts if isinstance(name, str) and name.startswith(start)), ())]


def _vae(file: TensorFile, family: str | None, any_family: bool) -> Source | None:
    hit = first_hit(file.tensors, components("vae"))
    if hit is None or hit.row.layout is None:
        return None
    names = [family] if family else _vae_families(file, hit)
    fitting = [table for table in map(pipeline, names) if table is not None and "vae" in table.components]
    if not fitting:
        raise _no_table(names)
    if len(fitting) > 1 and not any_family:
        raise _ambiguous(fitting)
    chosen = fitting[0]
    naming = DIFFUSERS if hit.row.layout == DIFFUSERS else chosen.naming("vae")
    form = DIFFUSERS if naming == DIFFUSERS else chosen.forms[0].id
    return Source(chosen, (Slot(hit.prefix, "vae", naming),), file.tensors, form, component="vae")


def _text_encoder(file: TensorFile, family: str | None, any_family: bool) -> Source | None:
    """An encoder by itself: of a family that has its model, or of several that configure it alike."""
    hit = first_hit(file.tensors, components("text_encoder"))
    if hit is None or hit.row.variant is None:
        return None
    model = hit.row.variant.removeprefix(_OPEN)
    tables_ = [table for table in map(pipeline, [family] if family else _candidates(hit)) if table is not None]
    found = [(table, name) for table in tables_ for name in [_encoder_of(table, model)] if name]
    if not found:
        return None
    chosen, name = found[0]
    unlike = [
        table for table, other in found if not _configured_alike(chosen.components[name], table.components[other])
    ]
    if unlike and not any_family:
        raise _ambiguous([table for table, _ in found])
    native = hit.row.variant.startswith(_OPEN)
    slot = Slot(hit.prefix.removesuffix("text_model."), name, "openclip" if native else DIFFUSERS)
    return Source(chosen, (slot,), file.tensors, chosen.forms[0].id if native else DIFFUSERS, component=name)


def _encoder_of(table: Pipeline, model: str) -> str | None:
    """The component of a pipeline that is the model (``clip-l`` stands for ``clip-l-projected`` too)."""
    known = tables.family(table.family).components
    return next((name for name in table.components if any(one.startswith(model) for one in known.get(name, ()))), None)


def _configured_alike(one: Component, other: Component) -> bool:
    return (one.cls, one.unused, dict(one.config)) == (other.cls, other.unused, dict(other.config))


def _vae_families(file: TensorFile, hit: Hit) -> list[str]:
    """Families of the shapes, narrowed by the scaling factor of a configuration beside the weights."""
    identity = vae.recognise(file)
    narrowed = [identity.family] if identity and identity.family else [*identity.family_candidates] if identity else []
    return narrowed or _candidates(hit)


def slots_of_origin(table: Pipeline, tensors: Tensors) -> tuple[Slot, ...] | None:
    """The slots of a single file of which only the header is known; None when its denoiser is not recognised."""
    hit = first_hit(tensors, checkpoints().rows)
    if hit is None:
        return None
    naming = DIFFUSERS if hit.row.layout == DIFFUSERS else NATIVE
    return single_slots(table, hit.prefix, hit.row.component, naming)


def _candidates(hit: Hit) -> list[str]:
    return [hit.row.family] if hit.row.family else [*hit.row.candidates]


def _form(table: Pipeline, prefix: str, component: str, tensors: Iterable[str]) -> Form:
    """The form whose prefixes explain most keys among those that keep the denoiser where it is."""
    keys = list(tensors)
    same = [form for form in table.forms if any((s.prefix, s.component) == (prefix, component) for s in form.slots)]
    return max(same or table.forms, key=lambda form: _explained(form, keys))


def _explained(form: Form, keys: Iterable[str]) -> int:
    starts = tuple(slot.prefix for slot in form.slots)
    return sum(key.startswith(starts) for key in keys)


def _most(tables: list[Pipeline], scores: list[int]) -> int:
    """Index of the one best; several are ambiguous."""
    top = max(scores)
    if scores.count(top) > 1:
        raise _ambiguous([table for table, score in zip(tables, scores, strict=True) if score == top])
    return scores.index(top)


def _variants(tensors: Tensors, hit: Hit) -> frozenset[str]:
    return frozenset(kind.variants_of(tensors, hit))


def _ambiguous(tables: list[Pipeline]) -> UnknownFamily:
    names = ", ".join(table.family for table in tables)
    return UnknownFamily(f"this file fits {names}, whose folders differ", hint="name one with --family")


def _no_table(names: Iterable[str]) -> ConversionError:
    asked = " or ".join(names) or "an unknown family"
    return ConversionError(
        f"hubtool does not know how a whole checkpoint of {asked} is laid out", hint=f"it knows {', '.join(families())}"
    )
