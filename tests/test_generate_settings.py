"""Settings of adapters: asked by name, as loading by hand with them does it, kept in the picture and read from it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hubtool.actions import generate as actions
from hubtool.actions.generate import Options, generate, pipeline
from hubtool.actions.generate_inputs import ready
from hubtool.actions.generate_settings import settled
from hubtool.actions.load import load, unload
from hubtool.cli.main import cli
from hubtool.errors import BadValues, CorruptFile, FileMissing, NotFound, UsageProblem
from hubtool.pipelines import grids, opening, pictures
from hubtool.pipelines.generating import Request
from tests.support import kinds

REQUEST = Request("a cat", seeds=(1,), steps=2, guidance=3.0, width=64, height=64)
WORDS = ["-p", "a cat", "--steps", 2, "--size", "64x64", "--guidance", 3, "--device", "cpu", "--seed", 1]


@pytest.fixture(autouse=True)
def own_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBTOOL_LIBRARY", str(tmp_path / "none.sqlite3"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "sd"
    kinds.wide().save_pretrained(folder)
    return folder


@pytest.fixture
def pipe() -> Any:
    return kinds.wide()


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return kinds.saved(tmp_path / "style.pt", torch.nn.functional.one_hot(torch.tensor([644]), kinds.WIDTH) * 20.0)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """A projection that lies elsewhere, under a name of its own."""
    (tmp_path / "clip").mkdir()
    values = {"text_projection.weight": torch.eye(kinds.WIDTH).flip(0)}
    return kinds.saved(tmp_path / "clip" / "projection.pt", values)


def run(*words: Any) -> Any:
    return CliRunner().invoke(cli, ["generate", *map(str, words)])


def pixels(path: Path) -> Any:
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def by_hand(pipe: Any, path: Path, settings: dict[str, Any], negative: str | None = None) -> Any:
    report = load(pipe, path, settings=settings)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt": negative}
    image = pipe("a cat", generator=torch.Generator().manual_seed(1), **options).images[0]
    unload(pipe, report.name)
    return numpy.asarray(image).astype(int)


def old_recipe(path: Path) -> None:
    """The picture as a version without settings wrote it."""
    image = Image.open(path)
    document = json.loads(image.text["hubtool.recipe"])
    for part in (document["base"], *document["adapters"]):
        del part["settings"]
    texts = PngInfo()
    texts.add_itxt(pictures.KEYWORD, json.dumps(document))
    image.save(path, pnginfo=texts)


def test_settings_on_the_command_line_make_the_picture_that_loading_with_them_makes(
    base: Path, style: Path, matrix: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(base)
    asked = ["--set", f"style.projection={matrix}", "--set", "style.pt.steps=2", "--set", f"{style}.rate=1e-3"]
    done = run(base, style, *WORDS, *asked, "--set", "style.slerp=on", "-o", tmp_path / "out.png")
    assert done.exit_code == 0, done.output
    assert "steps 2, rate 0.001, slerp on, projection projection.pt" in done.output
    known = {"projection": matrix, "steps": 2, "rate": 1e-3, "slerp": True}
    assert (pixels(tmp_path / "out.png") == by_hand(pipe, style, known)).all()
    assert (pixels(tmp_path / "out.png") != by_hand(pipe, style, {"projection": matrix})).any()


def test_the_recipe_keeps_settings_and_gives_the_picture_again(
    base: Path, style: Path, matrix: Path, tmp_path: Path
) -> None:
    options = Options(device="cpu", settings={style: {"steps": 2, "rate": 2e-3, "projection": matrix}})
    done = generate(base, [style], REQUEST, tmp_path / "out.png", options)
    text = Image.open(tmp_path / "out.png").text["hubtool.recipe"]
    own = json.loads(text)["adapters"][0]["settings"]
    assert own["projection"].keys() == {"name", "sha256"}
    assert own == {"steps": 2, "rate": 2e-3, "slerp": False, "projection": {**own["projection"], "name": matrix.name}}
    assert str(tmp_path) not in text
    assert pictures.read(tmp_path / "out.png") == done.outputs[0][1]
    again = ["--from", tmp_path / "out.png", "--search", base.parent, "--device", "cpu"]
    lost = run(*again, "-o", tmp_path / "lost.png")
    assert lost.exit_code == 1
    assert "projection.pt" in lost.output
    found = run(*again, "--search", matrix.parent, "-o", tmp_path / "again.png")
    assert found.exit_code == 0, found.output
    assert (pixels(tmp_path / "again.png") == pixels(tmp_path / "out.png")).all()
    other = run(*again, "--search", matrix.parent, "--set", "style.steps=9", "-o", tmp_path / "other.png")
    assert other.exit_code == 0, other.output
    changed = pictures.read(tmp_path / "other.png").adapters[0].settings
    assert changed == {**own, "steps": 9}


def test_a_projection_beside_the_file_is_kept_in_the_recipe_and_one_that_came_later_is_not_taken(
    pipe: Any, style: Path, matrix: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "text_projection.pt"
    assert ready(pipe, [style]).parts[0].settings["projection"] is None
    matrix.rename(beside)
    found = ready(pipe, [style])
    assert found.parts[0].settings["projection"]["name"] == beside.name
    assert found.all[0].settings["projection"] == beside
    none = ready(pipe, [style], settings={"style": {"projection": None}})
    assert none.all[0].settings["projection"] is None
    with pytest.raises(Exception, match="has no text_projection"):
        load(pipe, style, settings=none.all[0].settings)


def test_a_pipeline_is_opened_with_settings(base: Path, style: Path, matrix: Path) -> None:
    pipe = pipeline(base, [style], device="cpu", settings={"style": {"steps": 2, "projection": str(matrix)}})
    again = pipeline(base, [style], device="cpu", settings={"style": {"steps": 2, "projection": matrix}})
    other = pipeline(base, [style], device="cpu", settings={"style": {"steps": 9, "projection": matrix}})
    first, second, third = (
        one.encode_prompt("a cat", torch.device("cpu"), 1, False)[0] for one in (pipe, again, other)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("style.stepz=3", "steps, rate, slerp, projection"),
        ("nobody.steps=3", "style.pt"),
        ("style.steps=many", "a whole number"),
        ("style.steps=2.5", "a whole number"),
        ("style.rate=nan", "a number"),
        ("style.slerp=perhaps", "on or off"),
        ("style.projection=nowhere.pt", "nowhere.pt"),
        ("style=3", "--set style.steps=10"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_before_anything_is_loaded(
    base: Path, style: Path, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "load", None)
    monkeypatch.setattr(opening, "opened", None)
    done = run(base, style, *WORDS, "--set", text, "-o", tmp_path / "out.png")
    assert done.exit_code in (1, 2), done.output
    assert isinstance(done.exception, SystemExit)
    assert said in done.output
    assert not (tmp_path / "out.png").exists()


def test_a_kind_without_settings_says_so(pipe: Any, tmp_path: Path) -> None:
    net = kinds.hypernetwork(tmp_path / "net.pt", (64,))
    with pytest.raises(UsageProblem, match="hypernetwork has no setting steps") as caught:
        ready(pipe, [net], settings={"net": {"steps": 3}})
    assert caught.value.hint == "there can be set: nothing"


@pytest.mark.parametrize("value", [True, 2.5, None, [3]])
def test_values_of_another_type_are_refused_in_python(style: Path, value: Any) -> None:
    with pytest.raises(BadValues, match="steps"):
        settled("aesthetic_embedding", style, {"steps": value})


def test_a_projection_is_a_file(style: Path) -> None:
    with pytest.raises(BadValues, match="a file"):
        settled("aesthetic_embedding", style, {"projection": 3})
    with pytest.raises((FileMissing, NotFound)):
        settled("aesthetic_embedding", style, {"projection": "nowhere.pt"})


@given(steps=st.integers(), rate=st.floats(allow_nan=False, allow_infinity=False), slerp=st.booleans())
def test_what_is_written_as_text_is_read_as_its_value(steps: int, rate: float, slerp: bool) -> None:
    words = {"steps": str(steps), "rate": repr(rate), "slerp": "on" if slerp else "off"}
    found = settled("aesthetic_embedding", Path("style.pt"), words)
    assert found == {"steps": steps, "rate": rate, "slerp": slerp, "projection": None}


def test_a_pair_that_is_off_brings_no_negative_half(pipe: Any, tmp_path: Path) -> None:
    path = kinds.pair(tmp_path)
    done = generate(pipe, [path], REQUEST, tmp_path / "one.png", Options(settings={"art": {"pair": False}}))
    assert [one.name for one in done.recipe.adapters] == ["art.pt"]
    assert (pixels(tmp_path / "one.png") == by_hand(pipe, path, {"pair": False})).all()


@pytest.mark.parametrize("old", [False, True])
def test_from_does_not_add_a_negative_half_that_came_later(base: Path, old: bool, tmp_path: Path) -> None:
    """The pixels tell nothing where the prompt has no token of the half: the recipe of the new picture tells."""
    art = kinds.half(tmp_path / "art.pt", 2, 1)
    request = Request("art", negative="fog", seeds=(1,), steps=2, guidance=3.0, width=64, height=64)
    generate(base, [art], request, tmp_path / "out.png", Options(device="cpu"))
    if old:
        old_recipe(tmp_path / "out.png")
        assert pictures.read(tmp_path / "out.png").adapters[0].settings == {}
    kinds.half(tmp_path / "art-neg.pt", 3, 2)
    again = ["--from", tmp_path / "out.png", "--search", base.parent, "--device", "cpu"]
    done = run(*again, "-o", tmp_path / "again.png")
    assert done.exit_code == 0, done.output
    assert [one.name for one in pictures.read(tmp_path / "again.png").adapters] == ["art.pt"]
    assert (pixels(tmp_path / "again.png") == pixels(tmp_path / "out.png")).all()
    asked = run(*again, "--set", "art.pair=on", "-o", tmp_path / "asked.png")
    assert asked.exit_code == 0, asked.output
    names = [(one.name, one.negative) for one in pictures.read(tmp_path / "asked.png").adapters]
    assert names == [("art.pt", False), ("art-neg.pt", True)]
    assert (pixels(tmp_path / "asked.png") != pixels(tmp_path / "out.png")).any()


def test_from_takes_both_halves_of_a_recipe_that_names_both(base: Path, tmp_path: Path) -> None:
    request = Request("art", negative="fog", seeds=(1,), steps=2, guidance=3.0, width=64, height=64)
    generate(base, [kinds.pair(tmp_path)], request, tmp_path / "out.png", Options(device="cpu"))
    done = run("--from", tmp_path / "out.png", "--search", base.parent, "--device", "cpu", "-o", tmp_path / "again.png")
    assert done.exit_code == 0, done.output
    assert len(pictures.read(tmp_path / "again.png").adapters) == 2
    assert (pixels(tmp_path / "again.png") == pixels(tmp_path / "out.png")).all()


@pytest.mark.parametrize("value", ['"text"', "[1]", '{"name": "a"}', '{"name": "a", "sha256": 3}', "1e999"])
def test_damaged_settings_in_a_recipe_are_refused(pipe: Any, value: str, tmp_path: Path) -> None:
    net = kinds.hypernetwork(tmp_path / "net.pt", (64,))
    recipe = json.dumps(generate(pipe, [net], REQUEST, tmp_path / "out.png", Options(dry_run=True)).recipe.to_json())
    info = PngInfo()
    info.add_itxt(pictures.KEYWORD, recipe.replace('"settings": {}', f'"settings": {{"steps": {value}}}'))
    Image.new("RGB", (8, 8)).save(tmp_path / "bad.png", pnginfo=info)
    with pytest.raises(CorruptFile):
        pictures.read(tmp_path / "bad.png")


def test_the_columns_of_a_grid_of_adapters_say_the_strengths_that_are_not_1(
    pipe: Any, style: Path, matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []
    joined = grids.joined

    def spy(cells: Any, rows: Any, columns: Any) -> Any:
        labels.extend(columns)
        return joined(cells, rows, columns)

    monkeypatch.setattr(grids, "joined", spy)
    net = kinds.hypernetwork(tmp_path / "net.pt", (64,))
    options = Options(grid="adapters", settings={"style": {"projection": matrix, "steps": 1}})
    generate(pipe, [(style, 0.7), net], REQUEST, tmp_path / "grid.png", options)
    assert labels == ["none", "style 0.7", "net", "all"]
