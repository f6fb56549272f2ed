"""The tiny pipelines are what they claim: offline, deterministic, and named like the published models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from hubtool.errors import UnknownFamily
from hubtool.pipelines.live import canonical_path, family_of
from tests.support import tiny

PUBLISHED = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}


@pytest.mark.parametrize("family", PUBLISHED)
def test_parameters_are_named_and_shaped_in_dimensions_like_the_published_model(family: str, shared: Path) -> None:
    published = json.loads(gzip.decompress((shared / "bases" / f"{PUBLISHED[family]}.json.gz").read_bytes()))[
        "diffusers"
    ]
    pipe = tiny.build(family)
    for component, shapes in published.items():
        mine = {_canonical(component, name): p.ndim for name, p in getattr(pipe, component).named_parameters()}
        assert mine == {name: len(shape) for name, shape in shapes.items() if not name.endswith("position_ids")}


def _canonical(component: str, name: str) -> str:
    return canonical_path(component, name)


@pytest.mark.parametrize("family", PUBLISHED)
def test_family_of_a_pipeline_is_read_from_its_structure(family: str) -> None:
    assert family_of(tiny.build(family)) == family


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    one, two, other = tiny.build("sd1"), tiny.build("sd1"), tiny.build("sd1", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(tiny.picture(one), tiny.picture(two))
    assert not torch.equal(tiny.picture(one), tiny.picture(other))


def test_any_text_becomes_tokens_and_text_again() -> None:
    tokenizer = tiny.build("sd1").tokenizer
    assert (
        tokenizer.decode(tokenizer("a naïve 猫!", add_special_tokens=False).input_ids).replace(" ", "") == "anaïve猫!"
    )


def test_a_pipeline_survives_a_folder(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = tiny.build("sdxl")
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(tiny.picture(pipe), tiny.picture(again), atol=1e-5)


def test_a_family_without_a_tiny_pipeline_is_refused() -> None:
    with pytest.raises(UnknownFamily, match="flux1"):
        tiny.build("flux1")
