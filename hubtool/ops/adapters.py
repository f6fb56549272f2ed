"""Plans the conversion of an adapter to another layout, with its receipt of origin and every loss by name."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from hubtool.adapters.ir import Adapter
from hubtool.errors import ConversionError, UnknownFamily, UnknownLayout, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts import receipt as receipts
from hubtool.layouts import tables
from hubtool.layouts.emission import Emission, Loss
from hubtool.layouts.emit import emit
from hubtool.layouts.parse import Parsed
from hubtool.ops.containers import config_losses, container
from hubtool.ops.plan import Plan, Promoted
from hubtool.tensors.expr import Read

if TYPE_CHECKING:
    from hubtool.ops.target import Target


def keeps_layout(parsed: Parsed, target: Target) -> bool:
    """Whether no other layout was asked for than the one the file has."""
    if target.layout is None:
        return True
    families = (target.family,) if target.family else parsed.candidates or (None,)
    return any(_full_name(target.layout, family) == str(parsed.layout) for family in families)


def _full_name(layout: str, family: str | None) -> str | None:
    try:
        return str(tables.layout(layout, family))
    except UnknownLayout:
        return None


def plan(file: TensorFile, parsed: Parsed, target: Target) -> Plan:
    """What converting the adapter to ``target.layout`` (or its own) will write. Raises ``ConversionError``, ``UnknownFamily``, ``UsageProblem``."""
    adapter = selected(parsed.adapter, target.component)
    _refuse_errors(adapter)
    promoted = _promoted(adapter, target)
    emission = spelled(promoted.adapter, target.layout or str(parsed.layout), parsed, target.family)
    if target.component is None and not promoted.promotions and _spells_alike(file, emission, parsed):
        return container(file, target.format, parsed)
    kind = container_of(emission, target.format)
    source = receipts.of_file(file, str(parsed.layout), (target.family,) if target.family else parsed.candidates)
    if kind == "safetensors" and (source.layout, source.format) == (str(emission.layout), "safetensors"):
        restored = receipts.restore(source, promoted.adapter, emission)
        if restored is not None:
            return restored_plan(file, emission, restored)
    return _new(file, promoted, emission, kind, source)


def _promoted(adapter: Adapter, target: Target) -> Promoted:
    """The adapter with its modules rewritten as ``target.algorithm``; as it is where none was asked for."""
    if target.algorithm is None:
        return Promoted(adapter)
    from hubtool.ops.promotion import promote

    return promote(adapter, target.algorithm, target.family)


def _spells_alike(file: TensorFile, emission: Emission, parsed: Parsed) -> bool:
    """Whether the layout has the file's very keys: two namings may call a file's modules alike."""
    if emission.losses or emission.layout.syntax != parsed.layout.syntax:
        return False
    return set(emission.tensors) == set(file.tensors) and all(
        isinstance(expr, Read) and expr.ref == file.tensors[key] for key, expr in emission.tensors.items()
    )


def _new(file: TensorFile, promoted: Promoted, emission: Emission, kind: str, source: receipts.Receipt) -> Plan:
    adapter = promoted.adapter
    metadata = receipts.carried_metadata(adapter.metadata) | emission.metadata | {receipts.KEY: source.dump()}
    losses = (*promoted.refused, *emission.losses, *_metadata_losses(adapter, kind))
    if emission.config and kind != "peft-folder":
        losses += tuple(config_losses(emission.patches, {}))
    return Plan(
        source=file.path,
        format=kind,
        layout=str(emission.layout),
        tensors=emission.tensors,
        metadata=metadata if kind != "torch-zip" else {},
        tree=list(emission.tensors.values()) if emission.container == "torch-list" else None,
        config=emission.config if kind == "peft-folder" else None,
        losses=losses,
        notes=tuple(emission.notes),
        rounded=emission.rounded,
        promotions=promoted.promotions,
    )


def _metadata_losses(adapter: Adapter, container: str) -> tuple[Loss, ...]:
    if container != "torch-zip":
        return ()
    kept = receipts.carried_metadata(adapter.metadata, "format")
    return tuple(Loss(f"metadata {key}", "a torch file has no place for metadata") for key in kept)


def restored_plan(file: TensorFile, emission: Emission, restored: receipts.Restored) -> Plan:
    """The plan that writes the origin again."""
    return Plan(
        source=file.path,
        format="safetensors",
        layout=str(emission.layout),
        tensors=restored.tensors,
        metadata=restored.metadata,
        header=restored.raw,
        notes=("restored from the receipt of origin",),
    )


def selected(adapter: Adapter, component: str | None) -> Adapter:
    """The adapter with one component only. Raises ``UsageProblem`` naming those it has."""
    if component is None:
        return adapter
    patches = {key: patch for key, patch in adapter.patches.items() if key[0] == component}
    if not patches:
        raise UsageProblem(
            f"the adapter has no component {component!r}", hint=f"it has {', '.join(adapter.components())}"
        )
    return replace(adapter, patches=MappingProxyType(patches), embeddings=(), extras=MappingProxyType({}))


def _refuse_errors(adapter: Adapter) -> None:
    errors = [finding.message for finding in adapter.findings if finding.severity == "error"]
    if errors:
        raise ConversionError(f"the adapter cannot be converted safely: {errors[0]}")


def spelled(adapter: Adapter, layout: str, parsed: Parsed, asked: str | None) -> Emission:
    """Emit for the one family, or for several candidates when all of them spell every key alike."""
    if adapter.family or asked or layout.endswith("/raw"):
        return emit(adapter, layout, family=asked)
    if not parsed.candidates:
        raise UnknownFamily(
            "no known family has these modules, so they cannot be renamed",
            hint=f"its own layout is {parsed.layout}; hubtool explain shows what was tried",
        )
    emissions = [emit(adapter, layout, family=name) for name in _with_layout(parsed.candidates, layout)]
    if any(list(other.tensors) != list(emissions[0].tensors) for other in emissions[1:]):
        names = ", ".join(parsed.candidates)
        raise UnknownFamily(
            f"this adapter fits {names}, which {layout} spells differently", hint="name one with --family"
        )
    return emissions[0]


def _with_layout(families: tuple[str, ...], layout: str) -> list[str]:
    """The families that have the layout's naming. Raises ``UnknownLayout`` when none has."""
    fit = [name for name in families if _full_name(layout, name)]
    if not fit:
        tables.layout(layout, families[0])  # raises the reason
    return fit


def container_of(emission: Emission, asked: str | None) -> str:
    """``safetensors``, ``torch-zip`` or ``peft-folder``: what the layout demands, else what was asked."""
    if emission.container == "torch-list":
        if asked == "safetensors":
            raise UsageProblem(
                "a positional list is a torch file", hint="name the output .pt, or use layout cloneofsimo"
            )
        return "torch-zip"
    return asked or emission.container
