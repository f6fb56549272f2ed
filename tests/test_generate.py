"""Generating: the same seed is the same picture, the picture says how it was made, and the pipeline is left as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hubtool.actions.generate import Generated, Options, generate, pipeline
from hubtool.actions.load import unload
from hubtool.cli.main import cli
from hubtool.errors import BadValues, CorruptFile, LoadMismatch, NotFound, Unsupported, UsageProblem, WouldOverwrite
from hubtool.pipelines import opening, pictures
from hubtool.pipelines.generating import SCHEDULERS, Request
from tests.support import adapters, checkpoints, tiny
from tests.support.files import write_safetensors

SIZE = {"steps": 2, "width": 64, "height": 64}
REQUEST = Request("a cat", seeds=(1,), **SIZE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.saved("sd1", tmp_path_factory.mktemp("base"))


@pytest.fixture
def pipe() -> Any:
    return tiny.build("sd1")


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes every attention of the UNet a lot."""
    return lora(tmp_path_factory.mktemp("style") / "style.safetensors", seed=1)


def lora(path: Path, seed: int) -> Path:
    made = tiny.make(tiny.build("sd1"), ["unet"], only="attn", family="sd1", seed=seed)
    return adapters.write(made.adapter, path, "kohya/diffusers")


def concept(path: Path, token: str = "<cat>") -> Path:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    return write_safetensors(path, {token: ("F32", (2, 32), vectors.numpy().tobytes())})


def pixels(path: Path) -> Any:
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def made(base: Any, refs: Any, out: Path, request: Request = REQUEST, **options: Any) -> Generated:
    return generate(base, refs, request, out, Options(device="cpu", **options))


def run(*words: Any) -> Any:
    return CliRunner().invoke(cli, ["generate", *map(str, words)])


def asked(*more: Any) -> list[Any]:
    return ["-p", "a cat", "--steps", 2, "--size", "64x64", "--device", "cpu", *more]


def test_a_seed_gives_the_same_pixels_again_and_another_seed_others(base: Path, tmp_path: Path) -> None:
    one, two = made(base, [], tmp_path / "one.png"), made(base, [], tmp_path / "two.png")
    other = made(base, [], tmp_path / "other.png", Request("a cat", seeds=(2,), **SIZE))
    first, second, third = (pixels(done.outputs[0][0]) for done in (one, two, other))
    assert (first == second).all()
    assert (first != third).any()


def test_a_folder_gives_the_picture_that_diffusers_makes_of_it(base: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained(base)
    image = plain(
        "a cat", num_inference_steps=2, width=64, height=64, generator=torch.Generator().manual_seed(1)
    ).images[0]
    made(base, [], tmp_path / "mine.png")
    assert (pixels(tmp_path / "mine.png") == numpy.asarray(image)).all()


def test_a_single_file_gives_the_picture_of_its_folder(base: Path, tmp_path: Path) -> None:
    single = checkpoints.single("sd1", tmp_path)
    made(base, [], tmp_path / "folder.png")
    made(single, [], tmp_path / "single.png", config_from=base)
    assert (pixels(tmp_path / "folder.png") == pixels(tmp_path / "single.png")).all()


def test_weights_that_do_not_fit_the_configuration_are_refused(base: Path, tmp_path: Path) -> None:
    other = checkpoints.saved("sd2", tmp_path)
    with pytest.raises(LoadMismatch, match="do not fit"):
        opening.opened(checkpoints.single("sd1", tmp_path), torch.float32, config_from=other)


def test_adapters_change_the_picture_and_strength_zero_does_not(base: Path, style: Path, tmp_path: Path) -> None:
    made(base, [], tmp_path / "plain.png")
    made(base, [(style, 1.0)], tmp_path / "styled.png")
    made(base, [(style, 0.0)], tmp_path / "zero.png")
    assert (pixels(tmp_path / "plain.png") != pixels(tmp_path / "styled.png")).any()
    assert (pixels(tmp_path / "plain.png") == pixels(tmp_path / "zero.png")).all()


def test_a_batch_gives_every_seed_its_own_picture(pipe: Any, tmp_path: Path) -> None:
    request = Request("a cat", seeds=(1, 2, 3), batch=2, **SIZE)
    done = made(pipe, [], tmp_path / "out.png", request)
    assert [path.name for path, _ in done.outputs] == ["out-1.png", "out-2.png", "out-3.png"]
    made(pipe, [], tmp_path / "alone.png", Request("a cat", seeds=(2,), **SIZE))
    assert abs(pixels(tmp_path / "out-2.png") - pixels(tmp_path / "alone.png")).max() <= 1
    assert (pixels(tmp_path / "out-1.png") != pixels(tmp_path / "out-2.png")).any()


def test_an_open_pipeline_is_left_as_it_was(pipe: Any, style: Path, tmp_path: Path) -> None:
    before, words, scheduler = tiny.weights(pipe), pipe.tokenizer.get_vocab(), pipe.scheduler
    request = Request("a <cat>", seeds=(1,), scheduler="euler", **SIZE)
    made(pipe, [style, concept(tmp_path / "cat.safetensors")], tmp_path / "out.png", request)
    assert tiny.same(before, tiny.weights(pipe))
    assert pipe.tokenizer.get_vocab() == words
    assert pipe.scheduler is scheduler


def test_an_error_on_the_way_leaves_the_pipeline_as_it_was(pipe: Any, style: Path, tmp_path: Path) -> None:
    before = tiny.weights(pipe)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, [style], REQUEST, tmp_path / "out.png", watch=stop)
    assert tiny.same(before, tiny.weights(pipe))
    assert not list(tmp_path.glob("*.png"))


def test_a_picture_of_nan_is_an_error_and_no_black_picture(pipe: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.raises(BadValues, match="NaN"):
        made(pipe, [], tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_pipeline_has_its_adapters_and_loses_them_again(base: Path, style: Path) -> None:
    plain = pipeline(base, device="cpu")
    styled = pipeline(base, {style: 0.5}, device="cpu")
    assert not torch.equal(tiny.picture(plain), tiny.picture(styled))
    unload(styled, "style")
    assert torch.equal(tiny.picture(plain), tiny.picture(styled))
    assert tiny.same(tiny.weights(plain), tiny.weights(styled))


def test_a_negative_embedding_is_the_same_as_its_token_in_the_negative_prompt(pipe: Any, tmp_path: Path) -> None:
    path = concept(tmp_path / "bad.safetensors", "<bad>")
    made(pipe, [], tmp_path / "one.png", negatives=[path])
    made(pipe, [path], tmp_path / "two.png", Request("a cat", "<bad>", seeds=(1,), **SIZE))
    made(pipe, [], tmp_path / "without.png")
    assert (pixels(tmp_path / "one.png") == pixels(tmp_path / "two.png")).all()
    assert (pixels(tmp_path / "one.png") != pixels(tmp_path / "without.png")).any()


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("flow")])
def test_every_scheduler_of_the_list_runs(pipe: Any, name: str, tmp_path: Path) -> None:
    done = made(pipe, [], tmp_path / "out.png", Request("a cat", seeds=(1,), scheduler=name, **SIZE))
    assert done.outputs[0][1].sampler == SCHEDULERS[name][0].removesuffix("Scheduler")


def test_a_scheduler_of_another_kind_of_pipeline_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="flow-euler does not fit"):
        made(pipe, [], tmp_path / "out.png", Request("a cat", scheduler="flow-euler", **SIZE))


@pytest.mark.parametrize("request_", [
    Request("a", seeds=()), Request("a", seeds=(-1,)), Request("a", width=63), Request("a", scheduler="magic"),
    Request("a", steps=0), Request("a", batch=0), Request("a", true_cfg=2.0, **SIZE),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(pipe: Any, request_: Request, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem):
        made(pipe, [], tmp_path / "out.png", request_)


def test_an_adapter_of_another_family_is_refused_before_anything_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = adapters.write(adapters.make("sdxl"), tmp_path / "xl.safetensors", "kohya")
    monkeypatch.setattr(opening, "opened", lambda *a, **k: pytest.fail("the base was opened"))
    with pytest.raises(LoadMismatch, match="sdxl"):
        made(base, [foreign], tmp_path / "out.png")
    with pytest.raises(Unsupported, match="no adapter"):
        made(base, [base], tmp_path / "out.png")
    with pytest.raises(Unsupported, match="makes no pictures"):
        made(foreign, [], tmp_path / "out.png")


def test_an_existing_picture_is_refused_before_anything_is_computed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        made(base, [], tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == b"mine"
    made(base, [], tmp_path / "out.png", force=True)
    with pytest.raises(UsageProblem, match="PNG"):
        made(base, [], tmp_path / "out.jpg")


def test_a_picture_keeps_its_recipe_in_both_forms(base: Path, style: Path, tmp_path: Path) -> None:
    request = Request("a cat, ähnlich", "dog", seeds=(5,), guidance=3.0, **SIZE)
    done = made(base, [(style, 0.8), concept(tmp_path / "cat.safetensors")], tmp_path / "out.png", request)
    assert pictures.read(tmp_path / "out.png") == done.outputs[0][1]
    text = Image.open(tmp_path / "out.png").text  # type: ignore[attr-defined]
    lines = text["parameters"].splitlines()
    assert lines[0] == "a cat, ähnlich <lora:style:0.8>"
    assert lines[1] == "Negative prompt: dog"
    assert lines[2].startswith("Steps: 2, Sampler: DDIM, CFG scale: 3.0, Seed: 5, Size: 64x64, Model hash: ")
    kept = json.loads(text["hubtool.recipe"])
    assert kept["adapters"][0]["sha256"] == done.recipe.adapters[0].sha256
    assert str(tmp_path) not in text["hubtool.recipe"] + text["parameters"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base": 1}', "[" * 100, '{"base": {"name": 3}, "adapters": []}'])
def test_a_damaged_recipe_is_refused(text: str, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt(pictures.KEYWORD, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "bad.png", pnginfo=info)
    with pytest.raises(CorruptFile):
        pictures.read(tmp_path / "bad.png")


def test_a_picture_without_recipe_and_a_file_that_is_none_are_told_apart(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "none.png").write_bytes(b"no picture")
    with pytest.raises(NotFound):
        pictures.read(tmp_path / "plain.png")
    with pytest.raises(CorruptFile):
        pictures.read(tmp_path / "none.png")


def test_a_grid_of_strengths_holds_the_very_pictures(pipe: Any, style: Path, tmp_path: Path) -> None:
    other = lora(tmp_path / "other.safetensors", seed=2)
    done = made(pipe, [style, other], tmp_path / "grid.png", grid=(0.0, 1.0))
    made(pipe, [style], tmp_path / "style.png")
    made(pipe, [style, other], tmp_path / "all.png")
    sheet = pixels(tmp_path / "grid.png")
    assert holds(sheet, pixels(tmp_path / "style.png"))
    assert holds(sheet, pixels(tmp_path / "all.png"))
    assert done.recipe.grid == {"of": "strengths", "strengths": [0.0, 1.0]}


def test_adapters_of_one_file_name_have_a_column_each(pipe: Any, style: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    other = lora(tmp_path / "more" / "style.safetensors", seed=2)
    made(pipe, [style, other], tmp_path / "grid.png", grid="adapters")
    made(pipe, [other], tmp_path / "other.png")
    assert holds(pixels(tmp_path / "grid.png"), pixels(tmp_path / "other.png"))


def holds(sheet: Any, cell: Any) -> bool:
    rows, columns = (sheet.shape[i] - cell.shape[i] + 1 for i in (0, 1))
    spots = ((y, x) for y in range(rows) for x in range(columns) if (sheet[y, x] == cell[0, 0]).all())
    return any((sheet[y : y + cell.shape[0], x : x + cell.shape[1]] == cell).all() for y, x in spots)


def test_a_grid_of_adapters_has_a_column_each_and_a_row_for_every_seed(pipe: Any, style: Path, tmp_path: Path) -> None:
    made(pipe, [style], tmp_path / "grid.png", Request("a cat", seeds=(1, 2), **SIZE), grid="adapters")
    for seed in (1, 2):
        made(pipe, [style], tmp_path / f"styled{seed}.png", Request("a cat", seeds=(seed,), **SIZE))
        assert holds(pixels(tmp_path / "grid.png"), pixels(tmp_path / f"styled{seed}.png"))
    assert tiny.same(tiny.weights(pipe), tiny.weights(tiny.build("sd1")))
    with pytest.raises(UsageProblem, match="no adapter"):
        made(pipe, [], tmp_path / "nothing.png", grid="adapters")


def test_the_command_makes_pictures_and_makes_them_again(base: Path, style: Path, tmp_path: Path) -> None:
    done = run(base, f"{style}=0.7", *asked("--seed", "3-4", "-o", f"{tmp_path}/new/"), "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [one["seeds"] for one in document["outputs"]] == [[3], [4]]
    again = run("--from", tmp_path / "new" / "4.png", "--search", base.parent, "--search", style.parent,
                "--device", "cpu", "-o", tmp_path / "again.png")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert (pixels(tmp_path / "again.png") == pixels(tmp_path / "new" / "4.png")).all()


def test_from_shows_the_recipe_of_a_picture(base: Path, style: Path, tmp_path: Path) -> None:
    made(base, [(style, 0.5)], tmp_path / "out.png")
    told = run("--from", tmp_path / "out.png")
    assert "style.safetensors (strength 0.5, sha256 " in told.stdout
    document = json.loads(run("--from", tmp_path / "out.png", "--json").stdout)
    assert document["request"]["seeds"] == [1]
    assert document["versions"].keys() >= {"hubtool", "torch", "diffusers"}


def test_a_dry_run_names_the_outputs_and_loads_nothing(
    base: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "opened", lambda *a, **k: pytest.fail("the base was opened"))
    done = run(base, style, *asked("--seed", 1, "--count", 3, "-o", tmp_path / "out.png"), "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [Path(one["path"]).name for one in document["outputs"]] == ["out-1.png", "out-2.png", "out-3.png"]
    assert document["recipe"]["base"]["family"] == "sd1"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [
    ["-p", "a"], ["BASE", "-o", "x.png"], ["BASE", "-p", "a"], ["BASE", "-p", "a", "-o", "x.png", "--seed", "x"],
    ["BASE", "-p", "a", "-o", "x.png", "--size", "64"], ["BASE", "-p", "a", "-o", "x.png", "--grid", "magic"],
    ["BASE", "BASE=x", "-p", "a", "-o", "x.png"], ["BASE", "-p", "a", "-o", "x.png", "--seed", "1,1"],
])  # fmt: skip
def test_a_command_that_makes_no_sense_is_a_usage_problem(base: Path, words: list[str]) -> None:
    assert run(*(word.replace("BASE", str(base)) for word in words)).exit_code == 2


def test_a_schedule_changes_strengths_between_steps_and_is_remembered(base: Path, style: Path, tmp_path: Path) -> None:
    """At strength 0 to the end it is the plain picture, at 1 to the end the styled one, else neither."""
    for name, words in {"none": "list:0,0", "full": "linear:1:1", "late": "phases:0.5:1"}.items():
        done = run(base, style, *asked("--seed", 1, "-o", tmp_path / f"{name}.png", "--schedule", f"style={words}"))
        assert done.exit_code == 0, done.output
    made(base, [], tmp_path / "plain.png")
    made(base, [style], tmp_path / "styled.png")
    found = {path.stem: pixels(path) for path in tmp_path.glob("*.png")}
    assert (found["none"] == found["plain"]).all()
    assert abs(found["full"] - found["styled"]).max() <= 1
    assert (found["late"] != found["plain"]).any()
    assert (found["late"] != found["styled"]).any()
    assert pictures.read(tmp_path / "late.png").adapters[0].schedule == "phases:0.5:1"
    again = run("--from", tmp_path / "late.png", "--search", base.parent, "--search", style.parent, "--device", "cpu",
                "-o", tmp_path / "again.png")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert (pixels(tmp_path / "again.png") == found["late"]).all()


@pytest.mark.parametrize("words", ["style=magic:1", "style=linear:1", "style=list:nan,1", "nobody=linear:1:0", "style"])
def test_a_schedule_that_means_nothing_is_refused(base: Path, style: Path, words: str, tmp_path: Path) -> None:
    done = run(base, style, *asked("-o", tmp_path / "out.png", "--schedule", words, "--dry-run"))
    assert done.exit_code == 2, done.output


def test_references_to_the_library_name_base_and_adapter(
    base: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBTOOL_LIBRARY", str(tmp_path / "library.sqlite3"))
    assert CliRunner().invoke(cli, ["scan", str(style.parent)]).exit_code == 0
    from hubtool.actions.recipe import fingerprint

    done = run(base, f"{fingerprint(style)[:12]}=0.5", *asked("--seed", 1, "-o", tmp_path / "out.png"))
    assert done.exit_code == 0, done.output
    made(base, [(style, 0.5)], tmp_path / "same.png")
    assert (pixels(tmp_path / "out.png") == pixels(tmp_path / "same.png")).all()
