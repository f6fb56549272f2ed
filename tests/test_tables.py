"""The tables against the libraries they describe, and the rules every table must keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hubtool.errors import UnknownFamily, UnknownLayout
from hubtool.layouts import tables
from hubtool.layouts.vocabulary import spellings, vocabulary, written
from tests.support.bases import UNETS, unet

FAMILIES = tables.family_ids()
NAMINGS = [(family, naming) for family in FAMILIES for naming in tables.family(family).namings]


@pytest.mark.parametrize("family", sorted(UNETS))
def test_a_vocabulary_is_that_of_the_installed_diffusers(family: str) -> None:
    live = {name: tuple(tensor.shape) for name, tensor in unet(family).state_dict().items()}
    ours = {f"{m}.{p}": tuple(s) for m, ps in vocabulary(family).modules["unet"].items() for p, s in ps.items()}
    assert ours == live


@pytest.mark.parametrize("family", sorted(UNETS))
def test_a_native_naming_is_the_one_diffusers_converts_from(family: str) -> None:
    """Oracle: diffusers' own single-file converter renames our native names to the canonical ones, shape by shape."""
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    naming = next(iter(tables.family(family).namings))
    names = written(family, naming, "unet")
    modules = vocabulary(family).modules["unet"]
    with torch.device("meta"):
        native = {
            f"model.diffusion_model.{names[m]}.{p}": torch.empty(shape)
            for m, ps in modules.items()
            for p, shape in ps.items()
        }
    config = {**unet(family).config}
    got = convert_ldm_unet_checkpoint(native, config)
    assert {k: tuple(v.shape) for k, v in got.items()} == {
        f"{m}.{p}": tuple(shape) for m, ps in modules.items() for p, shape in ps.items()
    }


@pytest.mark.parametrize(("family", "naming"), NAMINGS)
def test_a_naming_spells_every_module_differently(family: str, naming: str) -> None:
    component = tables.family(family).namings[naming].component
    names = written(family, naming, component)
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("joiner", [".", "_"])
def test_every_spelling_leads_back_to_its_module(family: str, joiner: str) -> None:
    for component in vocabulary(family).modules:
        known = spellings(family, component, joiner)
        for naming in ["diffusers", *tables.family(family).namings]:
            for path, text in written(family, naming, component).items():
                assert known[text if joiner == "." else text.replace(".", "_")][1] == path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_usual_naming_exists(family: str) -> None:
    table = tables.family(family)
    for syntax, naming in table.usual.items():
        assert naming in ("diffusers", *table.namings)
        assert tables.syntaxes()[syntax].allows(naming)


@pytest.mark.parametrize("walk", tables.syntaxes()["cloneofsimo"].walks, ids=lambda w: f"{w.component}-{len(w.paths)}")
def test_a_walk_names_real_modules_once(walk: tables.Walk) -> None:
    assert len(set(walk.paths)) == len(walk.paths)
    for family in walk.families:
        assert all(vocabulary(family).weight_shape(walk.component, path) for path in walk.paths)


def test_the_walks_are_those_measured_on_real_files(shared: Path) -> None:
    measured = json.loads((shared / "keymaps" / "cloneofsimo_index.json").read_text())
    walks = [list(walk.paths) for walk in tables.syntaxes()["cloneofsimo"].walks]
    for name, paths in measured.items():
        assert name == "note" or paths in walks, name


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("sd1", "sd2", "sdxl")])
def test_the_tables_agree_with_the_verified_rules(family: str, shared: Path) -> None:
    rules = json.loads((shared / "keymaps" / "rules" / f"{family}.json").read_text())
    naming = next(iter(tables.family(family).namings.values()))
    assert {(r["a"], r["b"]) for r in rules["rules"]} == set(naming.rows.items())
    pairs = {tuple(pair) for table in rules["block_tables"] for pair in table["blocks"]}
    assert pairs == {(outside, canonical) for outside, canonical, _ in naming.blocks}


def test_short_names_stand_for_the_usual_form() -> None:
    assert str(tables.layout("kohya", "sdxl")) == "kohya/sgm"
    assert str(tables.layout("kohya", "sd1")) == "kohya/diffusers"
    assert str(tables.layout("diffusers", "sdxl")) == "peft/diffusers"
    assert str(tables.layout("peft", "sd1")) == "peft-model/diffusers"
    assert str(tables.layout("peft/diffusers", "sd1")) == "peft/diffusers"
    assert str(tables.layout("comfy", "sd1")) == "comfy/ldm"
    assert str(tables.layout("kohya/native", "sd1")) == "kohya/ldm"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownLayout) as unknown:
        tables.layout("koya", "sd1")
    assert "kohya" in (unknown.value.hint or "")
    with pytest.raises(UnknownFamily):
        tables.family("sd9")
    with pytest.raises(UnknownLayout):
        tables.layout("peft/sgm", "sdxl")
