"""Naming tables: every family's rows cover its models exactly, and put each number where diffusers' own converters put it."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubtool import resources
from hubtool.layouts import tables, vocabulary
from hubtool.layouts.naming import Naming
from tests.support.namings import Case, canonical, cases, keys, outside, shapes

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
ALL = [pytest.param(case, id="/".join((case[0], case[1], case[3]))) for case in cases()]
FAMILIES = tables.family_ids()


# --- what every table promises ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_names_models_and_namings_that_exist(family: str) -> None:
    table = tables.family(family)
    known = {path.name.removesuffix(".json.gz") for path in (resources.schemas() / "vocabularies").iterdir()}
    for models in table.components.values():
        assert models
        assert set(models) <= known
    assert set(table.usual) <= set(tables.syntaxes())
    assert set(table.usual.values()) <= {"diffusers", *table.namings}
    for syntax, prefixes in table.prefixes.items():
        assert syntax in tables.syntaxes()
        assert set(prefixes) <= set(table.components)


@pytest.mark.parametrize("case", ALL)
def test_every_parameter_has_exactly_one_key_outside(case: Case) -> None:
    family, naming, component, size = case
    holders: dict[str, str] = {}
    taken: dict[str, tuple[str, ...]] = {}
    for place in vocabulary.places(family, naming, component, size).values():
        for key, parts in keys(place, size):
            assert taken.setdefault(key, parts) == parts, f"{key} holds {taken[key]} and {parts}"
            assert all(holders.setdefault(part, key) == key for part in parts)
    if not tables.family(family).namings[naming].partial:
        assert holders.keys() == canonical(size).keys()


@pytest.mark.parametrize("case", ALL)
def test_the_parts_of_a_fused_weight_differ_in_their_rows_only(case: Case) -> None:
    family, naming, component, size = case
    modules = vocabulary.model(size)
    for place in vocabulary.places(family, naming, component, size).values():
        first = {name: shape[1:] for name, shape in modules[place.parts[0]].items()}
        assert all({name: shape[1:] for name, shape in modules[part].items()} == first for part in place.parts)


# step-distilled Flux.3: diffusers reads it, and there is no model to build it from
UNPUBLISHED = {"ref_time_in.in_layer", "ref_time_in.out_layer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_names_a_module_of_some_model(family: str) -> None:
    """U-Nets apart: their tables are products of blocks and leaves, and not every block has every leaf."""
    for naming in tables.family(family).naming_tables:
        names = "\n".join(
            place.outside
            for size in vocabulary.models(family, naming.component)
            for place in vocabulary.places(family, naming.id, naming.component, size).values()
        )
        rows = [row for row in naming.rows if naming.component != "unet" and row.outside not in UNPUBLISHED]
        assert not [row.outside for row in rows if not _pattern(row.outside).search(names)]


def _pattern(template: str) -> re.Pattern[str]:
    """The names that an outside template stands for, a line each."""
    parts = re.split(r"(\{[a-z]+\}|\{\*\})", template)
    text = "".join({"{*}": ".+"}.get(part, "[0-9]+") if part.startswith("{") else re.escape(part) for part in parts)
    return re.compile(f"^{text}$", re.MULTILINE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_outside_can_be_read_without_a_vocabulary(family: str) -> None:
    """Two rows with one outside name are told apart by ``{last}`` or by the parameter they speak of; nothing else is in a file."""
    for naming in tables.family(family).naming_tables:
        assert not _ambiguous(naming)


def _ambiguous(naming: Naming) -> list[str]:
    rows = defaultdict(list)
    for row in naming.rows:
        rows[re.sub(r"\{[a-z]\}", "#", row.outside)].append(row)
    return [name for name, alike in rows.items() if len(alike) > 1 and not all(row.parameters for row in alike)]


# --- and what original model code has ----------------------------------------------------------------------------------------

NATIVE = (
    ("chroma", "bfl", "chroma-transformer", "native/chroma.json"),
    ("flux2", "bfl", "flux2-dev-transformer", "native/flux2_dev.json"),
    ("flux2", "bfl", "flux2-klein-4b-transformer", "native/flux2_klein4b.json"),
    ("flux2", "bfl", "flux2-klein-9b-transformer", "native/flux2_klein9b.json"),
    ("hunyuan-video", "original", "hunyuan-video-transformer", "native/hunyuan_video.json"),
    ("hunyuan-image", "original", "hunyuan-image-transformer", "native/hunyuan_image.json"),
    ("wan", "original", "wan21-14b-t2v-transformer", "native/wan21_t2v_14b.json"),
    ("wan", "original", "wan21-14b-i2v-transformer", "native/wan21_i2v_14b.json"),
    ("lumina2", "original", "lumina2-transformer", "native/lumina2.json"),
    ("krea2", "original", "krea2-transformer", "native/krea2.json"),
    ("ideogram4", "original", "ideogram4-transformer", "native/ideogram4.json"),
    ("anima", "original", "anima-transformer", "native/anima.json"),
)
UNREAD = re.compile(
    r"^(norm_final\.weight|pos_embedder\..*|llm_adapter\..*)$"
)  # unused, computed, a component of its own


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row[0]}/{row[2]}") for row in NATIVE])
def test_the_original_model_has_exactly_the_parameters_of_the_table(
    shared: Path, row: tuple[str, str, str, str]
) -> None:
    family, naming, size, name = row
    original = json.loads((shared / "keymaps" / name).read_text())["params"]
    want = {key: tuple(shape) for key, shape in original.items() if not UNREAD.match(key)}
    got = shapes((family, naming, "transformer", size))
    assert got.keys() == want.keys()
    assert {key: math.prod(got[key]) for key in got} == {key: math.prod(want[key]) for key in want}


# --- diffusers' own converters put every number where the tables put it --------------------------------------------------------


def _with_unread(*names: str) -> Callable[[State], State]:
    """Checkpoints carry buffers that the diffusers class does not have; the converter insists on them."""
    return lambda state: {**state, **dict.fromkeys(names, next(iter(state.values())))}


class _Kept(dict[str, Any]):
    """diffusers 0.42.1 empties the checkpoint before it looks there which Cosmos it holds: one that cannot be emptied."""

    def pop(self, key: str, *_: Any) -> Any:
        return self[key]


def _cosmos1(state: State) -> State:
    return _Kept({f"net.{key}": value for key, value in state.items()})


def _same(state: State) -> State:
    return state


Checkpoint = tuple[str, str, str, str, Callable[[State], State]]
CHECKPOINTS: tuple[Checkpoint, ...] = (
    ("flux1", "bfl", "flux1-transformer", "convert_flux_transformer_checkpoint_to_diffusers", _same),
    ("chroma", "bfl", "chroma-transformer", "convert_chroma_transformer_checkpoint_to_diffusers", _same),
    ("flux2", "bfl", "flux2-dev-transformer", "convert_flux2_transformer_checkpoint_to_diffusers", _same),
    ("flux2", "bfl", "flux2-klein-4b-transformer", "convert_flux2_transformer_checkpoint_to_diffusers", _same),
    ("flux2", "bfl", "flux2-klein-9b-transformer", "convert_flux2_transformer_checkpoint_to_diffusers", _same),
    ("flux3", "bfl", "flux3-transformer", "convert_flux3_transformer_checkpoint_to_diffusers", _same),
    ("sd3", "original", "sd3-medium-transformer", "convert_sd3_transformer_checkpoint_to_diffusers", _same),
    ("sd3", "original", "sd35-medium-transformer", "convert_sd3_transformer_checkpoint_to_diffusers", _same),
    ("sd3", "original", "sd35-large-transformer", "convert_sd3_transformer_checkpoint_to_diffusers", _same),
    ("hunyuan-video", "original", "hunyuan-video-transformer", "convert_hunyuan_video_transformer_to_diffusers", _same),
    ("wan", "original", "wan21-14b-t2v-transformer", "convert_wan_transformer_to_diffusers", _same),
    ("wan", "original", "wan21-14b-i2v-transformer", "convert_wan_transformer_to_diffusers", _same),
    ("wan", "original", "wan22-5b-ti2v-transformer", "convert_wan_transformer_to_diffusers", _same),
    ("wan", "original", "wan21-14b-vace-transformer", "convert_wan_transformer_to_diffusers", _same),
    ("lumina2", "original", "lumina2-transformer", "convert_lumina2_to_diffusers", _with_unread("norm_final.weight")),
    ("z-image", "original", "z-image-transformer", "convert_z_image_transformer_checkpoint_to_diffusers", _same),
    ("z-image", "original", "z-image-omni-transformer", "convert_z_image_transformer_checkpoint_to_diffusers", _same),
    ("krea2", "original", "krea2-transformer", "convert_krea2_transformer_checkpoint_to_diffusers", _same),
    ("qwen-image-2.1", "original", "qwen-image-21-transformer", "convert_qwen_image21_transformer_checkpoint_to_diffusers", _same),
    ("ltx-video", "original", "ltx-video-transformer", "convert_ltx_transformer_checkpoint_to_diffusers", _same),
    ("ltx-video", "original", "ltx-video-13b-transformer", "convert_ltx_transformer_checkpoint_to_diffusers", _same),
    ("ltx2", "original", "ltx2-transformer", "convert_ltx2_transformer_to_diffusers", _same),
    ("auraflow", "original", "auraflow-transformer", "convert_auraflow_transformer_checkpoint_to_diffusers", _same),
    ("mochi", "original", "mochi-transformer", "convert_mochi_transformer_checkpoint_to_diffusers", _same),
    ("cosmos", "original", "cosmos-predict2-2b-transformer", "convert_cosmos_transformer_checkpoint_to_diffusers", _same),
    ("cosmos", "original", "cosmos-predict2-14b-transformer", "convert_cosmos_transformer_checkpoint_to_diffusers", _same),
    ("cosmos", "cosmos1", "cosmos-predict1-7b-transformer", "convert_cosmos_transformer_checkpoint_to_diffusers", _cosmos1),
    ("anima", "original", "anima-transformer", "convert_cosmos_transformer_checkpoint_to_diffusers", _same),
    ("sana", "original", "sana-1.6b-transformer", "convert_sana_transformer_to_diffusers", _with_unread("pos_embed", "y_embedder.y_embedding")),
    ("sana", "original", "sana-0.6b-transformer", "convert_sana_transformer_to_diffusers", _with_unread("pos_embed", "y_embedder.y_embedding")),
    ("minimax-h3", "original", "minimax-h3-transformer", "convert_minimax_h3_transformer_checkpoint_to_diffusers", _same),
    ("cascade", "original", "cascade-prior", "convert_stable_cascade_unet_single_file_to_diffusers", _same),
    ("cascade", "stage-b", "cascade-decoder", "convert_stable_cascade_unet_single_file_to_diffusers", _same),
)  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row[0]}/{row[1]}/{row[2]}") for row in CHECKPOINTS])
def test_diffusers_converts_the_original_checkpoint_to_the_canonical_one(row: Checkpoint) -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    family, naming, size, converter, dressed = row
    whole = canonical(size)
    given = dressed(outside((family, naming, tables.family(family).namings[naming].component, size), whole))
    _assert_equal(getattr(utils, converter)(given, config={}), whole)


def _assert_equal(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    import torch

    assert got.keys() == want.keys()
    different = [key for key, value in want.items() if not torch.equal(got[key].flatten(), value.flatten())]
    assert not different


Adapter = tuple[str, str, str, str, str]  # family, naming, model, converter, prefix
ADAPTERS: tuple[Adapter, ...] = (
    ("anima", "original", "anima-transformer", "_convert_non_diffusers_anima_lora_to_diffusers", "diffusion_model."),
    ("ideogram4", "original", "ideogram4-transformer", "_convert_non_diffusers_ideogram4_lora_to_diffusers", "diffusion_model."),
    ("ace-step", "original", "ace-step-transformer", "_convert_non_diffusers_ace_step_lora_to_diffusers", "base_model.model."),
    ("krea2", "original", "krea2-transformer", "_convert_non_diffusers_krea2_lora_to_diffusers", "diffusion_model."),
    ("minimax-h3", "original", "minimax-h3-transformer", "_convert_non_diffusers_minimax_h3_lora_to_diffusers", ""),
    ("ltx2", "original", "ltx23-transformer", "_convert_non_diffusers_ltx2_lora_to_diffusers", "diffusion_model."),
)  # fmt: skip
# the modules that these converters know: inside the blocks, and no norms
ATTENTION = "attn|attn1|attn2|attention|self_attn|cross_attn|audio_attn1"
BLOCK = re.compile(rf"^(transformer_blocks|layers)\.\d+\.({ATTENTION}|ff|feed_forward)\.(to_|gate|up|down|net|w\d)")


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row[0]}/{row[2]}") for row in ADAPTERS])
def test_diffusers_converts_an_adapter_in_original_names_to_the_canonical_one(row: Adapter) -> None:
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    family, naming, size, converter, prefix = row
    whole = {key: value for key, value in canonical(size).items() if BLOCK.match(key) and key.endswith(".weight")}
    given = outside_adapter((family, naming, "transformer", size), whole)
    got = getattr(utils, converter)({prefix + key: value for key, value in given.items()})
    up = {key: value for key, value in got.items() if key.endswith(".lora_B.weight")}
    _assert_equal(
        up, {f"transformer.{key.removesuffix('.weight')}.lora_B.weight": value for key, value in whole.items()}
    )


def outside_adapter(case: Case, ups: Mapping[str, Any]) -> State:
    """Adapter factors of the modules whose weights ``ups`` holds: an up matrix is split and swapped as its weight would be."""
    import torch

    family, naming, component, size = case
    wanted = {key.removesuffix(".weight") for key in ups}
    names = {
        place.outside for path, place in vocabulary.places(family, naming, component, size).items() if path in wanted
    }
    whole = outside(case, canonical(size))
    return {
        f"{name}.lora_{side}.weight": whole[f"{name}.weight"] if side == "B" else torch.zeros(1, 1, dtype=torch.int64)
        for name in sorted(names)
        for side in "AB"
    }
