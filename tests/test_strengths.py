"""Strengths: numbers by component, path and block, and the lists of block weights people pass around."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubtool.errors import UnknownFamily, UsageProblem
from hubtool.layouts import vocabulary
from hubtool.ops.strengths import Strengths, block_families, blocks_of, matches, parse, presets

DOWN = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
UP = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def test_one_number_counts_for_all() -> None:
    assert parse(["0.8"]).of("unet", DOWN) == parse(strength=0.8).of("text_encoder", "x") == 0.8
    assert parse().of("unet", DOWN) == 1.0


def test_a_component_has_its_own_number() -> None:
    found = parse(["0.8,unet=0.5,text_encoder=0"])
    assert [found.of(name, "x") for name in ("unet", "text_encoder", "text_encoder_2")] == [0.5, 0.0, 0.8]


def test_the_last_pattern_that_fits_wins_over_the_component() -> None:
    found = parse(["unet=0.5", "unet:down_blocks.*=0.3", "unet:down_blocks.1=0.2"])
    assert found.of("unet", DOWN) == 0.2
    assert found.of("unet", "down_blocks.0.resnets.0.conv1") == 0.3
    assert found.of("unet", UP) == 0.5
    assert found.of("text_encoder", DOWN) == 1.0


def test_a_pattern_without_a_component_means_every_component() -> None:
    assert matches("*.attn1.*", "unet", UP)
    assert matches("*:up_blocks.1", "transformer", UP)
    assert not matches("up_blocks.1", "unet", "up_blocks.10.x")


def test_negative_and_scientific_numbers_are_read() -> None:
    assert parse(["-1.5e-1"]).default == -0.15


@pytest.mark.parametrize("text", ["much", "unet=", "unet=nan", "inf", "unet:x"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageProblem, match="no strength"):
        parse([text])


def test_a_block_id_means_its_modules() -> None:
    found = parse(["IN04=0.25"]).resolved("sd1")
    assert found.of("unet", DOWN) == 0.25
    assert found.of("unet", UP) == 1.0


def test_block_weights_multiply_the_strength() -> None:
    found = parse(["0.5"], "0,0,0,0,0,0,0,0,2,1,1,1,1,1,1,1,1").resolved("sd1")
    assert found.of("unet", "up_blocks.1.attentions.0.proj_in") == 1.0
    assert found.of("unet", "up_blocks.2.attentions.0.proj_in") == 0.5
    assert found.of("unet", DOWN) == 0.0
    assert found.of("text_encoder", "text_model.x") == 0.0


def test_blocks_that_a_short_list_leaves_out_count_nothing() -> None:
    found = parse(blocks=",".join("1" * 17)).resolved("sd1")
    assert found.of("unet", "down_blocks.0.downsamplers.0.conv") == 0.0
    assert found.of("unet", DOWN) == 1.0


def test_a_list_without_base_leaves_the_text_encoder_alone() -> None:
    assert parse(blocks="GRAD_A").resolved("sd1").of("text_encoder", "text_model.x") == 1.0


def test_a_preset_is_a_list_with_a_name() -> None:
    assert parse(blocks="OUTD").resolved("sd1") == parse(blocks="1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0").resolved("sd1")


@pytest.mark.parametrize("name", presets())
def test_every_preset_fits_a_list_of_sd1(name: str) -> None:
    assert set(parse(blocks=name).resolved("sd1").factors)


@pytest.mark.parametrize(("family", "counts"), [("sd1", [17, 25, 26]), ("sdxl", [12, 19, 20]), ("flux1", [57, 58])])
def test_the_lists_people_know_are_known(family: str, counts: list[int]) -> None:
    assert sorted(blocks_of(family).lists) == counts


@pytest.mark.parametrize("family", block_families())
def test_blocks_share_no_module_and_name_only_real_ones(family: str) -> None:
    blocks = blocks_of(family)
    component = next(iter(blocks.paths.values()))[0].partition(":")[0]
    paths = vocabulary.model(vocabulary.models(family, component)[0])
    hits = {
        path: [b for b, own in blocks.paths.items() if any(matches(p, component, path) for p in own)] for path in paths
    }
    assert max(map(len, hits.values())) == 1
    assert {block for own in hits.values() for block in own} == set(blocks.paths)


def test_a_list_of_another_length_names_the_lengths() -> None:
    with pytest.raises(UsageProblem, match="3 block weights") as error:
        parse(blocks="1,0,1").resolved("sdxl")
    assert error.value.hint == "its lists have 12, 19, 20 numbers"
    with pytest.raises(UsageProblem, match="12 block weights for sd1") as error:
        parse(blocks=",".join("1" * 12)).resolved("sd1")
    assert (error.value.hint or "").startswith("its lists have 17, 25, 26 numbers; 12 are those of sdxl")


def test_unknown_blocks_and_families_are_refused() -> None:
    with pytest.raises(UsageProblem, match="no block IN99"):
        parse(["IN99=1"]).resolved("sd1")
    with pytest.raises(UnknownFamily, match="no names"):
        parse(blocks="ALL").resolved("wan")


def test_misspelt_parts_are_found() -> None:
    modules = [("unet", DOWN)]
    assert parse(["text_encodr=0", "unet:dwn*=1", "unet=1"]).unmatched(modules) == ["text_encodr", "unet:dwn*"]


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_parsing_what_was_written_gives_the_number_back(default: float, unet: float) -> None:
    assert parse([f"{default!r},unet={unet!r}"]) == Strengths(default, {"unet": unet})
