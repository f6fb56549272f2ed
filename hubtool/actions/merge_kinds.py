"""What kinds of files have a sum, and what to do with those that have none."""

from __future__ import annotations

from collections.abc import Sequence

from hubtool.errors import UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.identify import identify

_WHOLE = ("checkpoint", "diffusers_pipeline", "text_encoder")  # what an adapter can be collapsed into
# kind -> (what such a file does instead of changing weights, whether a pipeline can be written with it)
_BESIDE = {
    "textual_inversion": ("an embedding is a word of the prompt", True),
    "hypernetwork": ("a hypernetwork acts beside the weights", False),
    "aesthetic_embedding": ("an aesthetic embedding acts on the prompt", False),
    "custom_diffusion": ("a Custom Diffusion file replaces weights and brings a word", False),
    "null_text": ("null-text embeddings are of one picture", False),
}


def kind_of(files: Sequence[TensorFile]) -> str:
    """``adapter`` or ``checkpoint``; a file that is neither is refused where it is read. Raises ``UsageProblem`` for what has no sum."""
    found = [identify(file).kind for file in files]
    kinds = ["adapter" if kind == "lora" else "checkpoint" for kind in found]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    beside = next((i for i, kind in enumerate(found) if kind in _BESIDE), None)
    if beside is not None:
        raise _refused(files, found, beside)
    if other is None:
        return kinds[0]
    whole = any(kind in _WHOLE for kind in found)
    hint = "hubtool collapse puts adapters into a checkpoint" if whole else _unlike(files, found)
    raise UsageProblem(_told(files, found, other), path=files[other].path, hint=hint)


def _told(files: Sequence[TensorFile], found: Sequence[str], other: int) -> str:
    first, second = ((files[i].path.name, found[i]) for i in (0, other))
    return f"{first[0]} is of kind {first[1]}, {second[0]} of kind {second[1]}: they have no sum"


def _unlike(files: Sequence[TensorFile], found: Sequence[str]) -> str:
    if "unknown" in found:
        return f"hubtool explain {files[found.index('unknown')].path.name} shows why its kind could not be told"
    return "merge files of one kind; load the others beside"


def _refused(files: Sequence[TensorFile], found: Sequence[str], beside: int) -> UsageProblem:
    """The refusal of a file that acts otherwise than by weights."""
    why, written = _BESIDE[found[beside]]
    name = files[beside].path.name
    if any(kind in _WHOLE for kind in found):
        verb = f"pipeline export BASE {name} -o OUT/ writes" if written else f"generate BASE {name} takes"
        hint = f"{why}: hubtool {verb} both as one"
    elif "lora" in found:
        hint = f"{why}: merge the LoRAs alone, then hubtool generate BASE MERGED {name} takes both"
    else:
        hint = f"{why}: hubtool generate BASE {' '.join(file.path.name for file in files)} takes them together"
    other = next((i for i, kind in enumerate(found) if kind != found[0]), None)
    text = f"files of kind {found[0]} have no sum" if other is None else _told(files, found, other)
    return UsageProblem(text, path=files[beside].path, hint=hint)
