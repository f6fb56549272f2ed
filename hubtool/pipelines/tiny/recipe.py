"""What a tiny pipeline is made of: a pipeline class and how to make each of its parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

Part = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """``pipeline``: a class of diffusers. ``parts``: name -> maker, in the order in which random weights are drawn.

    ``whole``: it makes pictures; the others hold what adapters change, and None for every other part.
    """

    pipeline: str
    parts: Mapping[str, Part]
    whole: bool = False

    def build(self) -> Any:
        """The pipeline; parts that the recipe does not name are None where the class asks for them."""
        import diffusers

        made = {name: make() for name, make in self.parts.items()}
        cls = getattr(diffusers, self.pipeline)
        if issubclass(cls, diffusers.ModularPipeline):
            pipe = cls()
            pipe.update_components(**made)
            return pipe
        pipe = cls(**{**_required(cls), **made})
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _required(cls: Any) -> dict[str, None]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {one.name: None for one in parameters if one.default is one.empty and one.name != "self"}


def part(name: str, /, **config: Any) -> Part:
    """A model of diffusers with this configuration: ``FluxTransformer2DModel``, or ``pipelines.ltx2:LTX2TextConnectors``."""
    return partial(_model, name, config)


def value(constant: Any) -> Part:
    """A part that is no model: a flag of the pipeline, or None."""
    return lambda: constant


def _model(name: str, config: Mapping[str, Any]) -> Any:
    module, _, cls = name.rpartition(":")
    return getattr(import_module(f"diffusers.{module}" if module else "diffusers"), cls)(**config).eval()
