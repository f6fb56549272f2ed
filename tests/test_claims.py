"""What metadata says is kept beside what the tensors say; a contradiction is a finding, never a decision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hubtool.formats import open_file
from hubtool.layouts.claims import number, read_claims
from hubtool.layouts.identify import identify
from tests.support.tensor_files import flat, pickled

TI = {"emb_params": (2, 768)}
TOKEN = {"<cat>": (1, 768)}


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_base_model_version": "sd_v2_768_v"}, "sd2"),
        ({"ss_base_model_version": "flux1"}, "flux1"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-refiner"}, "sdxl-refiner"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux1"),
        ({"ss_v2": "True"}, "sd2"),
        ({"ot_config": json.dumps({"base_model_name": "stabilityai/stable-diffusion-xl-base-1.0"})}, "sdxl"),
        ({"ss_base_model_version": "something new"}, None),
    ],
)
def test_the_claimed_family_is_read_from_every_dialect(metadata: dict[str, str], family: str | None) -> None:
    assert read_claims(flat(TI, metadata)).family == family


def test_a_claim_that_contradicts_the_tensors_is_a_warning_and_loses() -> None:
    found = identify(flat(TI, {"ss_base_model_version": "sdxl_base_v1-0"}))
    assert found.family == "sd1"
    assert found.claims["family"] == "sdxl"
    assert [(finding.code, finding.severity) for finding in found.findings] == [("claim-contradicts", "warning")]


def test_a_claim_among_the_candidates_settles_the_family_and_says_so() -> None:
    assert identify(flat(TOKEN, dtype="F32")).family is None
    found = identify(flat(TOKEN, {"modelspec.architecture": "stable-diffusion-v1/textual-inversion"}, dtype="F32"))
    assert (found.family, found.findings) == ("sd1", ())
    assert "the metadata says sd1" in found.evidence[-1]


def test_a_sibling_model_is_no_contradiction() -> None:
    keys = {
        "double_blocks.0.img_attn.qkv.weight": (9, 3),
        "vector_in.in_layer.weight": (3, 3),
        "img_in.weight": (3, 64),
    }
    assert identify(flat(keys, {"ss_base_model_version": "chroma"})).findings == ()


def test_metadata_of_an_adapter_without_an_adapter_is_a_warning() -> None:
    found = identify(flat({"w": (2, 2)}, {"ss_network_module": "networks.lora", "ss_network_dim": "128"}))
    assert "claim-contradicts" in {finding.code for finding in found.findings}


def test_claims_are_named_values_and_numbers_are_numbers() -> None:
    metadata = {
        "modelspec.title": "Cats", "ss_output_name": "cats_v1", "ss_network_dim": "16", "ss_network_alpha": "8.0",
        "ss_sd_model_name": "model.safetensors", "sshs_model_hash": "ab" * 32, "ss_network_args": '{"conv_dim": "4"}',
        "ss_clip_skip": "None",
    }  # fmt: skip
    values = read_claims(flat(TI, metadata)).values
    assert values == {
        "title": "Cats", "network_dim": 16, "network_alpha": 8, "base_model": "model.safetensors",
        "sshs_model_hash": "ab" * 32, "network_args": {"conv_dim": "4"},
    }  # fmt: skip


def test_fields_of_a_pickle_are_claims_too() -> None:
    tree = {
        "string_to_param": {"*": (3, 768)},
        "name": "cat",
        "step": 99,
        "sd_checkpoint": "4bdfc29c",
        "sd_checkpoint_name": "base",
    }
    found = identify(pickled(tree))
    assert (found.base_model, found.claims["steps"], found.claims["base_model_autov1"]) == ("base", 99, "4bdfc29c")


def test_a_peft_config_names_the_base_model() -> None:
    config = {
        "adapter_config.json": {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "black-forest-labs/FLUX.1-dev"}
    }
    claims = read_claims(replace(flat({"x": (1,)}), config=config))
    assert (claims.family, claims.values["base_model"], claims.values["network_dim"]) == (
        "flux1",
        "black-forest-labs/FLUX.1-dev",
        8,
    )


def test_trigger_words_are_the_phrase_and_the_tags_of_every_image() -> None:
    metadata = {
        "modelspec.trigger_phrase": "sks cat, fur",
        "ss_tag_frequency": json.dumps({"10_cat": {"fur": 12, "tabby": 12, "outdoors": 5}}),
        "ss_dataset_dirs": json.dumps({"10_cat": {"n_repeats": 10, "img_count": 12}}),
    }
    assert read_claims(flat(TI, metadata)).trigger_words == ("sks cat", "fur", "tabby")


@pytest.mark.parametrize("text", ['{"a": {', "NaN", "[" * 100_000, '"' + "x" * 10])
def test_broken_json_is_a_finding_and_nothing_else(text: str) -> None:
    claims = read_claims(flat(TI, {"ss_tag_frequency": text, "ss_dataset_dirs": "{}"}))
    assert [finding.code for finding in claims.findings] == ["metadata-bad-json"]
    assert claims.trigger_words == ()


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_tag_frequency": "[1, 2]", "ss_dataset_dirs": "3"},
        {"ss_tag_frequency": '{"a": {"x": "many"}}', "ss_dataset_dirs": '{"a": {"img_count": null}}'},
        {"ot_config": "[]", "lora_adapter_metadata": "0"},
    ],
)
def test_json_of_another_shape_than_expected_is_harmless(metadata: dict[str, str]) -> None:
    assert read_claims(flat(TI, metadata)).trigger_words == ()


@pytest.mark.parametrize("text", ["nan", "inf", "9" * 5000, "1e999", "Dynamic", ""])
def test_absurd_numbers_are_no_numbers(text: str) -> None:
    assert number(text) is None


def test_a_real_flux_adapter_that_claims_sd1_stays_flux(shared: Path) -> None:
    found = identify(open_file(shared / "real/lora/leighwoods__flux_ai-toolkit_lora.safetensors"))
    assert (found.family, found.claims["family"]) == ("flux1", "sd1")
    assert found.claims["sshs_model_hash"].startswith("e3b0c442")
    assert "claim-contradicts" in {finding.code for finding in found.findings}
