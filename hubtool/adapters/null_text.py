"""Null-text inversion: one unconditional embedding (77, width) per denoising step, and what else a file of it may hold.

Forms on disk (spec/artefacts.md F.3): one tensor (steps, 1, 77, width) (diffusers' community pipeline), a list of (1, 77, width)
(prompt-to-prompt notebooks), either of them in a dict beside the inverted latent ``x_T`` and facts such as the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hubtool.tensors.expr import Expr, Read, concat, reshape
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape

TOKENS = 77
FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
STEP_KEYS = ("uncond", "uncond_embeddings", "null_text", "null_embeddings")
LATENT_KEYS = ("x_T", "x_t", "latent", "latents")
_ROOT = "(root)"


@dataclass(frozen=True, slots=True)
class NullText:
    """``steps``: (T, 77, width). ``form``: how they lay in the file: ``stacked`` or ``list``; ``key``: their key, None at the root."""

    steps: Expr
    form: str
    key: str | None
    others: Mapping[str, TensorRef]

    @property
    def latent(self) -> str | None:
        """Key of the inverted latent."""
        return next((key for key in LATENT_KEYS if key in self.others), None)


def parse(tensors: Mapping[str, TensorRef]) -> NullText | None:
    """The embeddings among the tensors of a file; None where there are none, or where there is more than belongs to them."""
    if _ROOT in tensors:
        ref = tensors[_ROOT]
        return NullText(_steps(ref), "stacked", None, {}) if is_stack(ref.shape) and len(tensors) == 1 else None
    for key in STEP_KEYS:
        found = _under(key, tensors)
        if found is not None:
            return found
    return _listed(None, tensors, {}) if "1" in tensors else None


def _under(key: str, tensors: Mapping[str, TensorRef]) -> NullText | None:
    ref = tensors.get(key)
    if ref is not None:
        others = {name: other for name, other in tensors.items() if name != key}
        fits = is_stack(ref.shape) or (len(ref.shape) == 3 and ref.shape[0] > 1 and is_prompt(ref.shape[1:]))
        return NullText(_steps(ref), "stacked", key, others) if fits and _few(others) else None
    if f"{key}.0" not in tensors:
        return None
    inside = {name.removeprefix(f"{key}."): ref for name, ref in tensors.items() if name.startswith(f"{key}.")}
    others = {name: ref for name, ref in tensors.items() if not name.startswith(f"{key}.")}
    return _listed(key, inside, others) if _few(others) else None


def _few(others: Mapping[str, TensorRef]) -> bool:
    """A latent, perhaps the picture and the trajectory: not a model."""
    return len(others) <= 4 or all(name.startswith(LATENT_KEYS) for name in others)


def _listed(key: str | None, items: Mapping[str, TensorRef], others: Mapping[str, TensorRef]) -> NullText | None:
    """One tensor per step, named by its position."""
    alike = len({(ref.shape, ref.dtype) for ref in items.values()}) == 1
    if (
        not alike
        or list(items) != [str(i) for i in range(len(items))]
        or not is_prompt(next(iter(items.values())).shape)
    ):
        return None
    parts = tuple(reshape(Read(ref), (1, *ref.shape[-2:])) for ref in items.values())
    return NullText(concat(parts), "list", key, others)


def is_stack(shape: Shape) -> bool:
    """(T, 1, 77, width)."""
    return len(shape) == 4 and shape[1:3] == (1, TOKENS) and shape[3] in FAMILIES


def is_prompt(shape: Shape) -> bool:
    """(77, width), (1, 77, width), or a pair of them: the hidden states of one prompt."""
    return len(shape) in (2, 3) and shape[-2] == TOKENS and shape[-1] in FAMILIES and shape[:-2] in ((), (1,), (2,))


def _steps(ref: TensorRef) -> Expr:
    return reshape(Read(ref), (ref.shape[0], *ref.shape[-2:]))
