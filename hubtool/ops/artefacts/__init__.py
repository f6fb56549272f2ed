"""Conversions of what is no LoRA: each artefact's own forms, and how one becomes another. One module per artefact.

Nothing here is imported before a file of that kind is converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubtool.adapters.identity import Identity
    from hubtool.formats.base import TensorFile
    from hubtool.layouts.emission import Loss
    from hubtool.ops.plan import Plan
    from hubtool.ops.target import Target
    from hubtool.tensors.expr import Expr

# kind -> module of this package with ``convert(file, identity, target) -> Plan``
KINDS = MappingProxyType(
    {
        "textual_inversion": "textual_inversion",
        "hypernetwork": "hypernetwork",
        "aesthetic_embedding": "bare",
        "null_text": "null_text",
        "conditioning": "bare",
        "custom_diffusion": "custom_diffusion",
    }
)


def plan(file: TensorFile, identity: Identity, target: Target) -> Plan | None:
    """What converting an artefact of one of ``KINDS`` writes; None for every other kind.

    Without a layout the artefact takes its usual form in the container asked for (safetensors unless told otherwise), and a torch file
    that became safetensors goes back to its very bytes. Raises ``UsageProblem`` and ``ConversionError`` where a form does not exist.
    """
    if identity.kind not in KINDS:
        return None
    from hubtool.ops.artefacts import _image

    made = _convert(file, identity, target)
    if target.dtype is not None:
        return made
    if made.format == "safetensors":
        if target.component is not None or "/" in (
            made.layout or ""
        ):  # a part, or an adapter: no way back to the whole
            return made
        return _image.remember(made, file, identity.layout or identity.variant, target.layout)
    return _image.restore(made, file, target.layout, lambda again, asked: _again(again, target, asked)) or made


def contents(file: TensorFile, identity: Identity) -> dict[str, Expr] | None:
    """The tensors of an artefact under names that no form changes, to compare two files of it; None for other kinds."""
    if identity.kind not in KINDS:
        return None
    found: dict[str, Expr] = _module(identity).contents(file)
    return found


def _module(identity: Identity) -> Any:
    return import_module(f"{__name__}.{KINDS[identity.kind]}")


def _convert(file: TensorFile, identity: Identity, target: Target) -> Plan:
    made: Plan = _module(identity).convert(file, identity, target)
    return replace(made, losses=(*made.losses, *_dropped(file)))


def _dropped(file: TensorFile) -> Iterator[Loss]:
    """Tensors outside the wrapper that holds the artefact: a trainer's state."""
    from hubtool.layouts.emission import Loss
    from hubtool.layouts.unwrap import unwrapped

    tensors, notes = unwrapped(file)
    if len(tensors) < len(file.tensors):
        count = len(file.tensors) - len(tensors)
        what = "1 tensor" if count == 1 else f"{count} tensors"
        yield Loss(f"{what} of the training state", "; ".join(note.message for note in notes))


def _again(file: TensorFile, target: Target, asked: str | None) -> Plan | None:
    """The conversion that made the safetensors file, for the file that is about to be restored."""
    from hubtool.layouts.identify import identify

    return plan(file, identify(file), replace(target, format="safetensors", layout=asked))
