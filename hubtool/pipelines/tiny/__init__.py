"""Tiny pipelines for every family, built offline from configs: real module names and depths, random weights, a few megabytes at most.

They serve the tests and ``make demo``. Block structure and depth are those of the published models; only widths shrink. Those whose recipe
is ``whole`` (``WHOLE``) make pictures; the others hold what adapters change, and every other part is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from hubtool.errors import UnknownFamily
from hubtool.pipelines.tiny import images, unets, videos
from hubtool.pipelines.tiny.recipe import Recipe

RECIPES: Mapping[str, Recipe] = MappingProxyType({**unets.RECIPES, **images.RECIPES, **videos.RECIPES})
WHOLE = tuple(family for family, recipe in RECIPES.items() if recipe.whole)


def build(family: str, *, seed: int = 0) -> Any:
    """Return a tiny pipeline of ``family``; the same seed gives the same bits. Nothing is read from disk or network.

    Whole ones: 64 x 64 pixels by default or when asked, prompts of single bytes (up to 77 where CLIP reads them). ``RECIPES`` lists the
    families, ``WHOLE`` those that make pictures.
    Raises ``UnknownFamily`` for a family without a tiny pipeline.
    """
    if family not in RECIPES:
        raise UnknownFamily(f"no tiny pipeline for family {family!r}", hint=f"choose one of {', '.join(RECIPES)}")
    with _seeded(seed):
        return RECIPES[family].build()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
