"""Null-text inversion (unconditional embeddings per step) and stored prompt conditionings (spec/artefacts.md F.3)."""

from __future__ import annotations

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import bare
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding, Shape

ORDER = 15
_FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_LATENT_KEYS = frozenset({"x_T", "x_t", "latent", "latents"})


def recognise(file: TensorFile) -> Identity | None:
    """(T, 1, 77, d) in one tensor or a list of T, with or without the latent; (1, 77, d) is one conditioning."""
    if not 0 < len(file.tensors) <= 4096:
        return None
    root = bare(file)
    if root is not None:
        return _of_shape(root.shape)
    named = file.tensors.get("uncond") or file.tensors.get("uncond_embeddings")
    if named is not None and _steps(named.shape):
        return _null_text(named.shape[0], named.shape[-1], complete=any(key in _LATENT_KEYS for key in file.tensors))
    return _of_list(list(file.tensors.items()))


def _of_shape(shape: Shape) -> Identity | None:
    if _steps(shape):
        return _null_text(shape[0], shape[-1], complete=False)
    return _conditioning(shape[-1]) if _one(shape) else None


def _of_list(items: list[tuple[str, TensorRef]]) -> Identity | None:
    """A pickled list of one (1, 77, d) tensor per step."""
    if len(items) < 2 or not all(key.isdecimal() and _one(ref.shape) for key, ref in items):
        return None
    return _null_text(len(items), items[0][1].shape[-1], complete=False)


def _steps(shape: Shape) -> bool:
    return len(shape) == 4 and shape[1:3] == (1, 77) and shape[3] in _FAMILIES


def _one(shape: Shape) -> bool:
    return len(shape) in (2, 3) and shape[-2] == 77 and shape[-1] in _FAMILIES and shape[:-2] in ((), (1,), (2,))


def _null_text(steps: int, width: int, *, complete: bool) -> Identity:
    needs = (
        "it works only with the picture's inverted latent, the same prompt, scheduler (DDIM), steps and guidance scale"
    )
    note = Finding("needs-companions", "info", needs if complete else f"{needs}; the latent is not in this file")
    said = (f"{steps} unconditional embeddings of 77 x {width}",)
    return Identity("null_text", family=_FAMILIES[width], variant=f"{steps}-steps", findings=(note,), evidence=said)


def _conditioning(width: int) -> Identity:
    said = (f"77 x {width}: a whole prompt's hidden states",)
    return Identity("conditioning", family=_FAMILIES[width], variant="prompt", evidence=said)
