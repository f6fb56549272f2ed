"""The tables against the libraries they describe, and the rules every table must keep."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubtool import resources
from hubtool.errors import TableError, UnknownFamily, UnknownLayout
from hubtool.layouts import index, tables
from hubtool.layouts.vocabulary import model, models, places, spellings, weight_shape
from tests.support.bases import UNETS, unet
from tests.tables import parsed

FAMILIES = tables.family_ids()
NAMINGS = [(family, naming) for family in FAMILIES for naming in tables.family(family).namings]


@pytest.mark.parametrize("family", sorted(UNETS))
def test_a_native_naming_is_the_one_diffusers_converts_from(family: str) -> None:
    """Oracle: diffusers' own single-file converter renames our native names to the canonical ones, shape by shape."""
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    naming = next(iter(tables.family(family).namings))
    names = {path: place.outside for path, place in places(family, naming, "unet").items()}
    modules = model(models(family, "unet")[0])
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


SIZES = [(f, n, size) for f, n in NAMINGS for size in models(f, tables.family(f).namings[n].component)]


@pytest.mark.parametrize(("family", "naming", "size"), SIZES)
def test_a_naming_spells_every_module_once(family: str, naming: str, size: str) -> None:
    component = tables.family(family).namings[naming].component
    known = {path: place for path, place in places(family, naming, component, size).items() if place.outside}
    owners = {place.outside: place.parts for place in known.values()}
    assert all(owners[place.outside] == place.parts for place in known.values())
    assert all(path in place.parts for path, place in known.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("joiner", [".", "_"])
def test_every_spelling_leads_back_to_its_module(family: str, joiner: str) -> None:
    for component in tables.family(family).components:
        for size in models(family, component):
            known = spellings(family, component, joiner, size)
            for naming in ["diffusers", *tables.family(family).namings]:
                for place in places(family, naming, component, size).values():
                    if not place.outside:
                        continue  # parameters of the model itself: no adapter has a module without a name
                    text = place.outside if joiner == "." else place.outside.replace(".", "_")
                    assert known[text].parts == place.parts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_usual_naming_exists(family: str) -> None:
    table = tables.family(family)
    for syntax, naming in table.usual.items():
        assert naming in ("diffusers", *table.namings)
        assert tables.layout(syntax + "/" + naming, family)


def test_the_index_is_that_of_the_tables() -> None:
    assert index.build() == dict(index._load()), "run `python -m tests.tables index`"


def test_the_parsed_tables_are_those_of_the_files() -> None:
    assert {name: tuple(row) for name, row in resources._parsed().items()} == parsed(), (
        "run `python -m tests.tables index`"
    )
    for path in resources.schemas().rglob("*.toml"):
        name = path.relative_to(resources.schemas()).as_posix()
        assert resources.table(name) == tomllib.loads(path.read_text("utf-8"))


@pytest.fixture
def own_schemas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables with the checksums of the real ones and a copy of one table."""
    for name in ("parsed.json.gz", "claims.toml"):
        shutil.copy(resources.schemas() / name, tmp_path)
    monkeypatch.setattr(resources, "schemas", lambda: tmp_path)
    resources._parsed.cache_clear()
    yield tmp_path
    resources._parsed.cache_clear()


def test_a_table_that_was_edited_is_read_as_it_stands(own_schemas: Path) -> None:
    path = own_schemas / "claims.toml"
    path.write_text(path.read_text("utf-8") + "\n[added]\nby = 'hand'\n", "utf-8")
    assert resources.table("claims.toml")["added"] == {"by": "hand"}


def test_tables_are_read_without_their_parsed_form(own_schemas: Path) -> None:
    known = resources.table("claims.toml")
    (own_schemas / "parsed.json.gz").unlink()
    resources._parsed.cache_clear()
    assert resources.table("claims.toml") == known


def test_a_broken_table_is_named(own_schemas: Path) -> None:
    (own_schemas / "claims.toml").write_text("= nothing", "utf-8")
    with pytest.raises(TableError, match=r"claims\.toml"):
        resources.table("claims.toml")


@pytest.mark.parametrize("walk", tables.syntaxes()["cloneofsimo"].walks, ids=lambda w: f"{w.component}-{len(w.paths)}")
def test_a_walk_names_real_modules_once(walk: tables.Walk) -> None:
    assert len(set(walk.paths)) == len(walk.paths)
    for family in walk.families:
        assert all(weight_shape(family, walk.component, path) for path in walk.paths)


def test_the_walks_are_those_measured_on_real_files(shared: Path) -> None:
    measured = json.loads((shared / "keymaps" / "cloneofsimo_index.json").read_text())
    walks = [list(walk.paths) for walk in tables.syntaxes()["cloneofsimo"].walks]
    for name, paths in measured.items():
        assert name == "note" or paths in walks, name


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("sd1", "sd2", "sdxl")])
def test_the_tables_agree_with_the_verified_rules(family: str, shared: Path) -> None:
    rules = json.loads((shared / "keymaps" / "rules" / f"{family}.json").read_text())
    naming = next(iter(tables.family(family).namings.values()))
    found = {place.outside: path for path, place in places(family, naming.id, "unet").items()}
    assert all(found[row["a"]] == row["b"] for row in rules["rules"] if row["b"] in found.values())
    pairs = [tuple(pair) for table in rules["block_tables"] for pair in table["blocks"]]
    assert all(
        any(found[o].startswith(canonical + ".") for o in found if o.startswith(outside + "."))
        for outside, canonical in pairs
    )


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
        tables.layout("peft/bfl", "sdxl")
