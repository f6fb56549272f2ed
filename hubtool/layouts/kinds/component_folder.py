"""One component of a pipeline as a folder whose tensors no table knows (a tiny or home-made one): its ``config.json`` says what it is."""

from __future__ import annotations

from collections.abc import Mapping

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile

ORDER = 990  # after every table of tensors: a configuration is a claim, its tensors are facts
# Beginning or end of a class's name -> kind. First match counts; diffusers' ``_class_name``, transformers' ``architectures``.
_STARTS = (
    ("Autoencoder", "vae"), ("VQModel", "vae"), ("ConsistencyDecoderVAE", "vae"), ("T2IAdapter", "t2i_adapter"),
    ("CLIPVision", "image_encoder"), ("SiglipVision", "image_encoder"), ("CLIPText", "text_encoder"), ("T5", "text_encoder"),
    ("UMT5", "text_encoder"), ("Gemma", "text_encoder"), ("Qwen", "text_encoder"), ("Llama", "text_encoder"),
    ("Mistral", "text_encoder"), ("UNet", "checkpoint"), ("StableCascadeUNet", "checkpoint"), ("Kandinsky3UNet", "checkpoint"),
)  # fmt: skip
_PARTS = (("ControlNet", "controlnet"), ("Transformer", "checkpoint"))


def recognise(file: TensorFile) -> Identity | None:
    """Kind by the class that the folder's configuration names."""
    config = file.config.get("config.json")
    if file.format != "component-folder" or not isinstance(config, Mapping) or not file.tensors:
        return None
    name = _class(config)
    kind = next((kind for part, kind in _PARTS if part in name), None)
    kind = kind or next((kind for start, kind in _STARTS if name.startswith(start)), None)
    if kind is None:
        return None
    return Identity(
        kind=kind,
        variant=name,
        layout="diffusers",
        components={
            "transformer" if "Transformer" in name else "unet" if kind == "checkpoint" else kind: len(file.tensors)
        },
        evidence=(f"config.json names the class {name}; no tensor contradicts it",),
    )


def _class(config: Mapping[str, object]) -> str:
    name = config.get("_class_name")
    if isinstance(name, str):
        return name
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
