"""What a live diffusers pipeline holds: its components, their modules by canonical path, the PEFT layers wrapped around them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CLIP_PREFIX = "text_model."
# levels above the decoder layers of a language model, which the classes of transformers wrap more or less deeply
_LANGUAGE_LEVELS = ("model.language_model.", "language_model.", "model.")
_LANGUAGE_PARTS = ("layers.", "embed_tokens", "norm")
# what pipelines call components that the tables call otherwise: Stable Cascade's stages are families of their own transformer
_ALIASES = {"transformer": ("prior", "prior_prior", "decoder"), "text_encoder": ("prior_text_encoder",)}
_CLIP_PARTS = ("encoder.layers.", "embeddings.", "final_layer_norm")


def modules(pipe: Any) -> dict[str, Any]:
    """Every component that has weights and is present, by name; first those that the pipeline's own loader serves."""
    from torch import nn

    found = {name: getattr(pipe, name, None) for name in (*_served(pipe), *pipe.components)}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def components(pipe: Any) -> dict[str, Any]:
    """The components that can hold an adapter as PEFT layers, by name: with diffusers' loader, or text encoders that the pipeline serves."""
    served = _served(pipe)
    return {name: one for name, one in modules(pipe).items() if _loads(one, name in served)}


def _loads(model: Any, served: bool) -> bool:
    return hasattr(model, "load_lora_adapter") or (served and hasattr(model, "load_adapter"))


def _served(pipe: Any) -> tuple[str, ...]:
    return tuple(getattr(pipe, "_lora_loadable_modules", ()))


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

    Canonical CLIP paths start with ``text_model.``; ``CLIPTextModel`` of transformers >= 5.6 dropped that level. Those of language
    models start below whatever wraps them.
    """
    wrapped = [level + path for level in _LANGUAGE_LEVELS] if path.startswith(_LANGUAGE_PARTS) else []
    for candidate in (path, path.removeprefix(_CLIP_PREFIX), *wrapped):
        if _has(model, candidate):
            return candidate
    return None


def canonical_path(component: str, path: str) -> str:
    """Inverse of ``live_path``: gives a flattened CLIP text encoder its ``text_model.`` back, takes a language model's wrapping away."""
    if not component.startswith("text_encoder"):
        return path
    if path.startswith(_CLIP_PARTS):
        return _CLIP_PREFIX + path
    bare = next((path.removeprefix(level) for level in _LANGUAGE_LEVELS if path.startswith(level)), path)
    return bare if bare.startswith(_LANGUAGE_PARTS) else path


def alias(pipe: Any, component: str) -> str:
    """What ``pipe`` calls ``component``."""
    found = modules(pipe)
    return next((name for name in (component, *_ALIASES.get(component, ())) if name in found), component)


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


def told(component: str) -> tuple[str, ...]:
    """Inverse of ``alias``: what the tables may call a pipeline's component."""
    return tuple(name for name, others in _ALIASES.items() if component in others)
