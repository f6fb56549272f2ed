"""The tiny pipelines are what they claim: offline, deterministic, and named like the published models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.errors import UnknownFamily
from hubtool.layouts import tables, vocabulary
from hubtool.pipelines import live
from hubtool.pipelines.generating import check_whole
from hubtool.pipelines.live import canonical_path
from hubtool.pipelines.tiny import RECIPES, WHOLE, tokenizers
from tests.support import tiny

PUBLISHED = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
APART = ("vae", "safety_checker")
Names = dict[tuple[str, str], int]


@pytest.mark.parametrize("family", PUBLISHED)
def test_parameters_are_named_and_shaped_in_dimensions_like_the_published_model(family: str, shared: Path) -> None:
    published = json.loads(gzip.decompress((shared / "bases" / f"{PUBLISHED[family]}.json.gz").read_bytes()))[
        "diffusers"
    ]
    pipe = tiny.build(family)
    for component, shapes in published.items():
        mine = {canonical_path(component, name): p.ndim for name, p in getattr(pipe, component).named_parameters()}
        assert mine == {name: len(shape) for name, shape in shapes.items() if not name.endswith("position_ids")}


@pytest.mark.parametrize("family", [name for name in RECIPES if name != "kolors"])
def test_every_component_is_named_like_one_size_of_its_family(family: str) -> None:
    pipe = tiny.build(family)
    for component, model in live.modules(pipe).items():
        if component not in APART:
            known = tables.family(family).components
            called = component if component in known else live.told(component)[0]
            assert names(component, model) in sizes(family, called)


def names(component: str, model: Any) -> Names:
    """(canonical module, parameter) -> number of dimensions, of everything that the model would save."""
    cut = ((canonical_path(component, key), value.ndim) for key, value in model.state_dict().items())
    return {(key.rpartition(".")[0], key.rpartition(".")[2]): dimensions for key, dimensions in cut if not apart(key)}


def apart(key: str) -> bool:
    """What is a copy, computed, or no part of the language model that the tables list."""
    return key.endswith(("encoder.embed_tokens.weight", "position_ids", "lm_head.weight")) or ".visual." in key


def sizes(family: str, component: str) -> list[Names]:
    return [
        {(path, parameter): len(shape) for path, table in vocabulary.model(size).items() for parameter, shape in table.items()}
        for size in vocabulary.models(family, component)
    ]  # fmt: skip


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    one, two, other = tiny.build("sd1"), tiny.build("sd1"), tiny.build("sd1", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(tiny.picture(one), tiny.picture(two))
    assert not torch.equal(tiny.picture(one), tiny.picture(other))


@pytest.mark.parametrize("make", [tokenizers.tokenizer, tokenizers.gemma_tokenizer, tokenizers.qwen_tokenizer])
def test_any_text_becomes_tokens_and_text_again(make: Any, tmp_path: Path) -> None:
    made = make()
    ids = made("a naïve 猫!", add_special_tokens=False).input_ids
    assert made.decode(ids).replace(" ", "") == "anaïve猫!"
    made.save_pretrained(tmp_path)
    assert type(made).from_pretrained(tmp_path)("a naïve 猫!", add_special_tokens=False).input_ids == ids


def test_t5_reads_printable_ascii_and_ends_with_its_own_token() -> None:
    made = tokenizers.t5_tokenizer()
    text = "".join(map(chr, range(33, 127)))
    ids = made(text).input_ids
    assert made.unk_token_id not in ids
    assert (made.decode(ids[:-1]).strip(), ids[-1]) == (text, made.eos_token_id)


@pytest.mark.parametrize("family", WHOLE)
def test_a_whole_pipeline_is_a_few_megabytes_without_a_missing_part(family: str) -> None:
    pipe = tiny.build(family)
    check_whole(pipe)
    size = sum(p.numel() * p.element_size() for model in live.modules(pipe).values() for p in model.parameters())
    assert size < 26_000_000


def test_a_pipeline_survives_a_folder(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = tiny.build("sdxl")
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(tiny.picture(pipe), tiny.picture(again), atol=1e-5)


def test_a_family_without_a_tiny_pipeline_is_refused() -> None:
    with pytest.raises(UnknownFamily, match="flux9"):
        tiny.build("flux9")
