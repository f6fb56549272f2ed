"""The models behind ``schemas/vocabularies``: how the library that owns each one builds it at its published size.

Everything is built on the meta device: names and shapes, no weights, no network. Configurations are written out in the
``models_*`` modules; an argument left out is the class's own default.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from tests.support import models_images, models_texts, models_unets, models_vaes, models_videos
from tests.support.model import Model

MODELS: Mapping[str, Model] = {
    **models_unets.MODELS,
    **models_images.MODELS,
    **models_videos.MODELS,
    **models_texts.MODELS,
    **models_vaes.MODELS,
}


def build(model: Model) -> Any:
    """The module on the meta device."""
    import torch

    library, _, name = model.builder.partition(":")
    cls = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        if library.startswith("transformers"):
            return cls(cls.config_class(**model.config))
        return cls(**model.config)


@cache
def modules(name: str) -> dict[str, dict[str, list[int]]]:
    """Module path -> {parameter: shape} of a model, in its own order; what it would save, tied tensors once."""
    model = MODELS[name]
    found: dict[str, dict[str, list[int]]] = {}
    for key, shape in _saved(build(model)):
        path, _, parameter = (model.prefix + key).rpartition(".")
        found.setdefault(path, {})[parameter] = shape
    return found


def _saved(module: Any) -> Iterator[tuple[str, list[int]]]:
    seen: set[int] = set()
    for key, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield key, list(tensor.shape)
