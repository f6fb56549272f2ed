"""What a live diffusers pipeline holds: its components, their modules by canonical path, the PEFT layers wrapped around them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hubtool.errors import LoadMismatch

_CLIP_PREFIX = "text_model."
_CLIP_PARTS = ("encoder.layers.", "embeddings.", "final_layer_norm")
# longest matching prefix of the pipeline's class name -> family; SD 1 and SD 2 share a class and are told apart below
_FAMILIES = {
    "StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "StableDiffusion": "sd1", "FluxKontext": "flux1", "Flux": "flux1",
    "Flux2": "flux2", "Chroma": "chroma", "QwenImage": "qwen-image", "ZImage": "z-image", "HunyuanVideo": "hunyuan-video",
    "HunyuanImage": "hunyuan-image", "Wan": "wan", "LTX": "ltx-video", "LTX2": "ltx2", "Lumina2": "lumina2", "HiDream": "hidream",
    "AuraFlow": "auraflow", "Sana": "sana", "PixArt": "pixart", "CogVideoX": "cogvideox", "Kolors": "kolors", "Mochi": "mochi",
}  # fmt: skip


def family_of(pipe: Any) -> str | None:
    """Family of ``pipe`` by its class; SD 2 is the Stable Diffusion whose UNet projects linearly. None for a class unknown here."""
    name = type(pipe).__name__
    prefixes = [prefix for prefix in _FAMILIES if name.startswith(prefix)]
    family = _FAMILIES[max(prefixes, key=len)] if prefixes else None
    if family == "sd1" and pipe.unet.config.get("use_linear_projection"):
        return "sd2"
    return family


def components(pipe: Any) -> dict[str, Any]:
    """The components that diffusers lets adapters change and that are present, by name."""
    names = getattr(pipe, "_lora_loadable_modules", ())
    found = {name: getattr(pipe, name, None) for name in names}
    return {name: model for name, model in found.items() if model is not None}


def encoders(pipe: Any) -> dict[str, tuple[Any, Any]]:
    """Text encoders with their tokenizers: ``{"text_encoder_2": (encoder, tokenizer)}``."""
    names = [f"text_encoder{suffix}" for suffix in ("", "_2", "_3")]
    pairs = {name: (getattr(pipe, name, None), getattr(pipe, _tokenizer_of(name), None)) for name in names}
    return {name: pair for name, pair in pairs.items() if None not in pair}


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every module that PEFT has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def adapter_layers(model: Any, name: str) -> dict[str, Any]:
    """The PEFT layers of ``model`` that hold low-rank factors of adapter ``name``, by path."""
    return {path: layer for path, layer in layers(model) if name in getattr(layer, "lora_A", ())}


def adapter_names(pipe: Any) -> set[str]:
    """Names of all adapters present in any component."""
    return {name for model in components(pipe).values() for name in getattr(model, "peft_config", None) or ()}


def merged(pipe: Any) -> set[str]:
    """Names of the adapters that are fused into the weights at this moment."""
    return {name for model in components(pipe).values() for _, layer in layers(model) for name in layer.merged_adapters}


def base(module: Any) -> Any:
    """The module itself, without PEFT's wrapper."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def live_path(model: Any, path: str) -> str | None:
    """The path under which ``model`` knows the canonical ``path``, or None.

    Canonical CLIP paths start with ``text_model.``; ``CLIPTextModel`` of transformers >= 5.6 dropped that level.
    """
    for candidate in (path, path.removeprefix(_CLIP_PREFIX)):
        if _has(model, candidate):
            return candidate
    return None


def canonical_path(component: str, path: str) -> str:
    """Inverse of ``live_path``: gives a flattened CLIP text encoder its ``text_model.`` back."""
    flat = component.startswith("text_encoder") and path.startswith(_CLIP_PARTS)
    return _CLIP_PREFIX + path if flat else path


def component(pipe: Any, name: str) -> Any:
    """The component ``name`` of ``pipe``. Raises ``LoadMismatch`` when it is absent or takes no adapters."""
    found = components(pipe)
    if name not in found:
        raise LoadMismatch(
            f"the adapter changes {name}, which this {type(pipe).__name__} does not have",
            hint=f"load a part of it: components={sorted(found)}",
        )
    return found[name]


@contextmanager
def aside() -> Iterator[None]:
    """Work of diffusers without side effects: no reports and progress bars of what is checked here anyway, no random numbers used."""
    import torch
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(_cuda()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _cuda() -> list[int]:
    import torch

    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def _has(model: Any, path: str) -> bool:
    """Whether ``path`` is a module of the model itself: the inside of PEFT's wrappers does not count."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    module = model
    for part in path.split("."):
        if isinstance(module, BaseTunerLayer) or part not in getattr(module, "_modules", ()):
            return False
        module = module._modules[part]
    return module is not None
