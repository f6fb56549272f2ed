"""Null-text inversion (unconditional embeddings per step), and inputs of one picture: prompt conditionings, CLIP image embeddings.

Facts: spec/artefacts.md F.3 and F.4.
"""

from __future__ import annotations

from hubtool.adapters.identity import Identity
from hubtool.adapters.null_text import FAMILIES, NullText, is_prompt, parse
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import bare
from hubtool.layouts.kinds._companions import CODE, beside, plural, present
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

ORDER = 15
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_PROMPT_KEYS = ("prompt_embeds", "conditioning", "prompt_embedding")
_IMAGE_KEYS = (
    "image_embeds",
    "image_embedding",
    "clip_image_embedding",
    "clip_image_embeds",
    "ip_adapter_image_embeds",
)
_IMAGE_WIDTHS = {768: "CLIP ViT-L", 1024: "OpenCLIP ViT-H", 1280: "OpenCLIP ViT-bigG or the hidden states of ViT-H"}


def recognise(file: TensorFile) -> Identity | None:
    """(T, 1, 77, d) in one tensor or a list of T, with or without the latent; (1, 77, d) is one conditioning."""
    if not 0 < len(file.tensors) <= 4096:
        return None
    root = bare(file)
    if root is not None and is_prompt(root.shape):
        return _conditioning(root, "raw")
    if len(file.tensors) == 1 and (named := _named(file)) is not None:
        return named
    found = parse(file.tensors)
    return None if found is None else _null_text(file, found)


def _null_text(file: TensorFile, found: NullText) -> Identity:
    steps, _, width = found.steps.shape
    return Identity(
        "null_text",
        family=FAMILIES[width],
        variant=f"{steps}-steps",
        layout=found.form,
        findings=tuple(_companions(file, found, steps)),
        evidence=(f"{plural(steps, 'unconditional embedding')} of 77 x {width}",),
    )


def _companions(file: TensorFile, found: NullText, steps: int) -> list[Finding]:
    """What the inversion means nothing without. The community pipeline names its file ``PICTURE.pt``."""
    needs = f"it works only with the picture's inverted latent, the same prompt, scheduler (DDIM), {plural(steps, 'step')} and guidance"
    note = needs if found.latent else f"{needs}; the latent x_T is not in this file"
    names = (file.path.stem, *(file.path.stem + suffix for suffix in _PICTURES))
    pictures = beside(file, (name for name in names if name.lower().endswith(_PICTURES)))
    held = [present(pictures, "the picture that was inverted")] if pictures else []
    return [Finding(CODE, "info", note), *held]


def _named(file: TensorFile) -> Identity | None:
    key, ref = next(iter(file.tensors.items()))
    if key in _PROMPT_KEYS and is_prompt(ref.shape):
        return _conditioning(ref, "prompt_embeds")
    return _image(ref) if key in _IMAGE_KEYS and ref.shape and ref.shape[-1] in _IMAGE_WIDTHS else None


def _conditioning(ref: TensorRef, layout: str) -> Identity:
    width = ref.shape[-1]
    said = (f"77 x {width}: a whole prompt's hidden states",)
    return Identity("conditioning", family=FAMILIES[width], variant="prompt", layout=layout, evidence=said)


def _image(ref: TensorRef) -> Identity:
    """CLIP inversion, image variation, unCLIP, IP-Adapter: an image embedding in place of the prompt's."""
    width = ref.shape[-1]
    needs = "a model tuned for image embeddings is needed: image variation or unCLIP, or an IP-Adapter with its encoder"
    return Identity(
        "conditioning",
        variant="clip-image",
        layout="image_embeds",
        findings=(Finding(CODE, "info", needs),),
        evidence=(f"an image embedding {width} wide: {_IMAGE_WIDTHS[width]}",),
    )
