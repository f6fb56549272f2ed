"""generate with every kind that a pipeline takes: as loading by hand does it, recorded in the picture, and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from hubtool.actions.generate import Options, generate, pipeline
from hubtool.actions.generate_inputs import ready
from hubtool.actions.load import load, unload
from hubtool.cli.main import cli
from hubtool.errors import LoadMismatch, UsageProblem
from hubtool.pipelines import kinds as registry
from hubtool.pipelines import pictures
from hubtool.pipelines.generating import Request
from tests.support import kinds, tiny

REQUEST = Request("a cat", seeds=(1,), steps=kinds.STEPS, guidance=3.0, width=64, height=64)


@pytest.fixture
def pipe() -> Any:
    return kinds.wide()


def custom(folder: Path) -> Path:
    weights = {
        f"{kinds.CROSS}.{part}.weight": kinds.values(16, kinds.WIDTH, seed=i) for i, part in enumerate(("to_k", "to_v"))
    }
    return kinds.saved(folder / "delta.bin", {"unet": weights, "modifier_token": {"<new1>": kinds.values(kinds.WIDTH)}})


def aesthetic(folder: Path) -> Path:
    """With a projection beside it, as there is no word for one on the command line."""
    kinds.saved(folder / "text_projection.pt", {"text_projection.weight": torch.eye(kinds.WIDTH)})
    return kinds.saved(folder / "style.pt", torch.nn.functional.one_hot(torch.tensor([644]), kinds.WIDTH) * 20.0)


def null_text(folder: Path) -> Path:
    steps = [kinds.values(1, 77, kinds.WIDTH, seed=i) for i in range(kinds.STEPS)]
    return kinds.saved(folder / "cat.pt", {"uncond_embeddings": steps, "x_t": kinds.values(1, 4, 8, 8)})


MAKERS: dict[str, Callable[[Path], Path]] = {
    "hypernetwork": lambda folder: kinds.hypernetwork(folder / "net.pt", (64,)),
    "custom_diffusion": custom,
    "aesthetic_embedding": aesthetic,
    "null_text": null_text,
}


def pixels(path: Path) -> Any:
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def has_strength(kind: str) -> bool:
    found = registry.find(kind)
    assert found is not None
    return found.STRENGTH


def by_hand(pipe: Any, prompt: str = "a cat", negative: str | None = None) -> Any:
    noise = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": kinds.STEPS, "guidance_scale": 3.0, "height": 64, "width": 64}
    return numpy.asarray(pipe(prompt, negative_prompt=negative, generator=noise, **options).images[0]).astype(int)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_of_each_kind_makes_the_picture_that_loading_it_makes(pipe: Any, tmp_path: Path, kind: str) -> None:
    path, before, plain = MAKERS[kind](tmp_path), tiny.weights(pipe), by_hand(pipe)
    strength = 0.7 if has_strength(kind) else 1.0
    done = generate(pipe, [(path, strength)], REQUEST, tmp_path / "out.png", Options(device="cpu"))
    assert tiny.same(tiny.weights(pipe), before)
    assert (by_hand(pipe) == plain).all()
    report = load(pipe, path, strength=strength)
    expected = by_hand(pipe)
    unload(pipe, report.name)
    assert (pixels(tmp_path / "out.png") == expected).all()
    assert (expected != plain).any()
    kept = pictures.read(tmp_path / "out.png").adapters
    assert [(one.kind, one.strength) for one in kept] == [(kind, strength)]
    assert done.loads[0].to_json()["kind"] == kind


def test_all_of_them_at_once(pipe: Any, tmp_path: Path) -> None:
    before, plain = tiny.weights(pipe), by_hand(pipe)
    paths = [make(tmp_path) for make in MAKERS.values()]
    generate(pipe, paths, REQUEST, tmp_path / "out.png", Options(device="cpu", schedules={"net": "linear:1:0"}))
    assert tiny.same(tiny.weights(pipe), before)
    assert (by_hand(pipe) == plain).all()
    assert (pixels(tmp_path / "out.png") != plain).any()


def test_the_negative_half_of_a_pair_goes_into_the_negative_prompt_by_itself(pipe: Any, tmp_path: Path) -> None:
    path = kinds.pair(tmp_path)
    request = Request("art", negative="fog", seeds=(1,), steps=kinds.STEPS, guidance=3.0, width=64, height=64)
    done = generate(pipe, [path], request, tmp_path / "one.png", Options(device="cpu"))
    assert any("the negative half of art.pt" in finding.message for one in done.loads for finding in one.findings)
    assert [(one.name, one.negative) for one in done.recipe.adapters] == [("art.pt", False), ("art-neg.pt", True)]
    load(pipe, path)
    expected = by_hand(pipe, "art", "fog, art-neg")
    unload(pipe, "art")
    assert (pixels(tmp_path / "one.png") == expected).all()
    generate(pipe, [path], request, tmp_path / "two.png", Options(device="cpu", negatives=[tmp_path / "art-neg.pt"]))
    assert (pixels(tmp_path / "two.png") == expected).all()


def test_a_schedule_for_what_has_no_strength_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="no strength"):
        generate(pipe, [null_text(tmp_path)], REQUEST, tmp_path / "o.png", Options(schedules={"cat": "linear:1:0"}))


def test_the_kinds_of_the_registry_are_those_that_generate_takes(pipe: Any, tmp_path: Path) -> None:
    assert {*MAKERS, "lora", "textual_inversion"} == {*registry.names()}
    found = ready(pipe, [make(tmp_path) for make in MAKERS.values()])
    assert [one.fixed for one in found.adapters] == [False, False, False, True]
    with pytest.raises(LoadMismatch):
        ready(tiny.build("sdxl"), [custom(tmp_path)])


def test_the_command_line_takes_a_pair_and_says_so(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "base")
    words = ["-p", "art", "--steps", "2", "--size", "64x64", "--device", "cpu", "--seed", "1", "-o", tmp_path / "o.png"]
    net = MAKERS["hypernetwork"](tmp_path)
    done = CliRunner().invoke(
        cli, ["generate", *map(str, [tmp_path / "base", kinds.pair(tmp_path), f"{net}=0.5", *words])]
    )
    assert done.exit_code == 0, done.output
    assert "art-neg.pt (negative embedding" in done.output
    assert "where generate adds it" in done.output
    assert "networks for 64 wide vectors" in done.output


def test_a_pipeline_that_is_opened_with_a_pair_knows_both_tokens(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "base")
    opened = pipeline(tmp_path / "base", [kinds.pair(tmp_path)], device="cpu")
    assert {"art", "art-neg"} <= {*opened.tokenizer.get_vocab()}
