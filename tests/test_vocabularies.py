"""The vocabularies against the libraries they describe, and the folding that makes them small."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubtool import resources
from hubtool.layouts.vocabulary import expand, model
from tests.support.folding import fold
from tests.support.models import MODELS, modules
from tests.tables import is_current, packed, path

# What diffusers can load adapters into: loader -> {component: a model of it}.
LOADERS = {
    "StableDiffusionLoraLoaderMixin": {"unet": "sd1-unet", "text_encoder": "clip-l"},
    "StableDiffusionXLLoraLoaderMixin": {"unet": "sdxl-unet", "text_encoder": "clip-l", "text_encoder_2": "clip-g"},
    "SD3LoraLoaderMixin": {
        "transformer": "sd3-medium-transformer",
        "text_encoder": "clip-l-projected",
        "text_encoder_2": "clip-g",
    },
    "AuraFlowLoraLoaderMixin": {"transformer": "auraflow-transformer"},
    "FluxLoraLoaderMixin": {"transformer": "flux1-transformer", "text_encoder": "clip-l"},
    "AmusedLoraLoaderMixin": {"transformer": "amused-512-transformer", "text_encoder": "clip-l-projected"},
    "CogVideoXLoraLoaderMixin": {"transformer": "cogvideox-5b-transformer"},
    "Mochi1LoraLoaderMixin": {"transformer": "mochi-transformer"},
    "LTXVideoLoraLoaderMixin": {"transformer": "ltx-video-transformer"},
    "LTX2LoraLoaderMixin": {"transformer": "ltx2-transformer", "connectors": "ltx2-connectors"},
    "SanaLoraLoaderMixin": {"transformer": "sana-1.6b-transformer"},
    "HeliosLoraLoaderMixin": {"transformer": "helios-transformer"},
    "HunyuanVideoLoraLoaderMixin": {"transformer": "hunyuan-video-transformer"},
    "Lumina2LoraLoaderMixin": {"transformer": "lumina2-transformer"},
    "KandinskyLoraLoaderMixin": {"transformer": "kandinsky5-lite-video-transformer"},
    "WanLoraLoaderMixin": {
        "transformer": "wan21-14b-t2v-transformer",
        "transformer_2": "wan21-14b-t2v-transformer",
    },
    "SkyReelsV2LoraLoaderMixin": {"transformer": "skyreels-v2-14b-transformer"},
    "CogView4LoraLoaderMixin": {"transformer": "cogview4-transformer"},
    "HiDreamImageLoraLoaderMixin": {"transformer": "hidream-transformer"},
    "QwenImageLoraLoaderMixin": {"transformer": "qwen-image-transformer"},
    "Krea2LoraLoaderMixin": {"transformer": "krea2-transformer"},
    "ZImageLoraLoaderMixin": {"transformer": "z-image-transformer"},
    "AnimaLoraLoaderMixin": {"transformer": "anima-transformer", "text_conditioner": "anima-text-conditioner"},
    "Flux2LoraLoaderMixin": {"transformer": "flux2-dev-transformer"},
    "Flux3LoraLoaderMixin": {"transformer": "flux3-transformer"},
    "BriaFibo2LoraLoaderMixin": {"transformer": "bria-fibo2-transformer"},
    "Ideogram4LoraLoaderMixin": {"transformer": "ideogram4-transformer"},
    "ErnieImageLoraLoaderMixin": {"transformer": "ernie-image-transformer"},
    "CosmosLoraLoaderMixin": {"transformer": "cosmos-predict25-2b-transformer"},
    "AceStepLoraLoaderMixin": {"transformer": "ace-step-transformer"},
    "MiniMaxH3LoraLoaderMixin": {
        "transformer": "minimax-h3-transformer",
        "transformer_ref": "minimax-h3-transformer",
    },
    "RFD4ProteinaLoraLoaderMixin": {"transformer": "rfd4-proteina-transformer"},
}

Flat = dict[str, dict[str, list[int]]]

segments = st.sampled_from(["a", "to_q", "2-1", "0", "1", "2", "3", "03", "4"])
shapes = st.lists(st.integers(0, 2), max_size=1)
parameters = st.dictionaries(st.sampled_from(["weight", "bias"]), shapes, min_size=1)
trees = st.recursive(
    st.tuples(parameters, st.just({})),
    lambda inner: st.tuples(st.none() | parameters, st.dictionaries(segments, inner, max_size=5)),
    max_leaves=20,
)


def _modules(tree: Any, path: str = "") -> Flat:
    """The modules of a drawn tree: each before what is in it."""
    own, children = tree
    found: Flat = {} if own is None else {path: own}
    for segment, child in children.items():
        found |= _modules(child, f"{path}.{segment}" if path else segment)
    return found


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_vocabulary_is_what_the_installed_library_builds(name: str) -> None:
    live = {module: {key: tuple(shape) for key, shape in own.items()} for module, own in modules(name).items()}
    assert dict(model(name)) == live
    assert is_current(name)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_unfolding_gives_a_models_modules_back_in_order(name: str) -> None:
    folded = json.loads(gzip.decompress(path(name).read_bytes()))
    assert list(expand(folded).items()) == _with_tuples(modules(name))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_two_modules_of_a_model_flatten_to_one_name(name: str) -> None:
    flat = [module.replace(".", "_") for module in model(name)]
    assert len(set(flat)) == len(flat)


def test_every_vocabulary_file_has_a_recipe() -> None:
    files = {file.name.removesuffix(".json.gz") for file in (resources.schemas() / "vocabularies").iterdir()}
    assert files == set(MODELS)


def test_every_adapter_loader_of_diffusers_has_its_models() -> None:
    from diffusers.loaders import lora_pipeline

    live = {
        name: set(cls._lora_loadable_modules)
        for name, cls in vars(lora_pipeline).items()
        if name.endswith("LoraLoaderMixin") and "_lora_loadable_modules" in vars(cls)
    }
    assert {name: set(components) for name, components in LOADERS.items()} == live
    assert {one for components in LOADERS.values() for one in components.values()} <= set(MODELS)


@given(trees.map(_modules))
def test_unfolding_undoes_folding(flat: Flat) -> None:
    assert list(expand(fold(flat)).items()) == _with_tuples(flat)


@given(st.integers(2, 12), parameters)
def test_equal_neighbours_fold_into_one_line(count: int, own: dict[str, list[int]]) -> None:
    blocks = {f"blocks.{index}.to_q": own for index in range(count)}
    assert list(fold(blocks)) == [f"blocks.{{0..{count - 1}}}.to_q"]


def test_blocks_that_differ_stay_apart() -> None:
    blocks = {f"blocks.{index}.to_q": {"weight": [index // 2]} for index in range(4)}
    assert list(fold(blocks)) == ["blocks.{0..1}.to_q", "blocks.{2..3}.to_q"]


def test_a_file_has_no_time_and_no_name_in_it() -> None:
    first = packed(b"{}\n")
    assert gzip.decompress(first) == b"{}\n"
    assert (first[3], first[4:8], first[9]) == (0, b"\0\0\0\0", 255)
    assert all(one == two for one, two in pairwise(packed(b"{}\n") for _ in range(3)))


def _with_tuples(flat: Any) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    return [(path, {name: tuple(shape) for name, shape in own.items()}) for path, own in flat.items()]
