"""Every family whose tiny pipeline is whole makes pictures: what the seed, a batch, an adapter, the negative prompt and a folder mean in each."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from hubtool.actions.generate import Options, generate, pipeline
from hubtool.actions.load import load, unload
from hubtool.adapters.ir import Adapter
from hubtool.cli.main import cli
from hubtool.errors import Unsupported, UsageProblem
from hubtool.pipelines import generating, live, pictures
from hubtool.pipelines.generating import Request
from hubtool.pipelines.schedules import scheduled
from hubtool.pipelines.tiny import RECIPES, WHOLE
from tests.support import adapters, tiny

SIZE: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}
TRANSFORMERS = [family for family in WHOLE if family not in ("sd1", "sd2", "sdxl")]
# how the guidance of a family is asked for where its own number is distilled into the weights, or off by default
GUIDED: dict[str, dict[str, Any]] = {
    "flux1": {"true_cfg": 4.0},
    "qwen-image": {"true_cfg": 4.0},
    "z-image": {"guidance": 4.0},
}
# chroma reads 512 tokens, which is slow; auraflow's second of two steps is next to nothing
FLOWS = [family for family in TRANSFORMERS if family not in ("pixart", "chroma", "auraflow")]
STRENGTHS = {"auraflow": 40.0}  # of random adapters that show; 4 elsewhere


@cache
def pipe_of(family: str) -> Any:
    """One for all tests: each leaves it as it was, and says so."""
    return tiny.build(family)


@cache
def plain(family: str) -> Any:
    return shown(pipe_of(family))[0]


@cache
def style(family: str) -> Adapter:
    """Attention of the first block of every kind."""
    pipe = pipe_of(family)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    paths = {path for path, _ in getattr(pipe, name).named_modules() if re.search(r"(blocks|layers)\.0\.att", path)}
    return tiny.make(pipe, [name], only=paths, family=family).adapter


@contextmanager
def styled(family: str, strength: float) -> Iterator[str]:
    """The shared pipeline with its adapter, by the name it has there."""
    report = load(pipe_of(family), style(family), strength=strength)
    try:
        yield report.name
    finally:
        unload(pipe_of(family), report.name)


def strong(family: str) -> float:
    return STRENGTHS.get(family, 4.0)


def shown(pipe: Any, prompt: str = "a cat", seeds: tuple[int, ...] = (1,), **more: Any) -> list[Any]:
    request = Request(prompt, seeds=seeds, **{**SIZE, **more})
    return [numpy.asarray(image).astype(int) for _, image in generating.pictures(pipe, request)]


def apart(one: Any, other: Any) -> int:
    """Most that any colour of any pixel differs, of 255. Sums in another order round differently: up to 1."""
    return int(abs(one - other).max())


def pixels(path: Path) -> Any:
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def test_five_families_of_diffusion_and_three_more_are_whole() -> None:
    assert {"sd1", "sd2", "sdxl", "sd3", "flux1"} < {*WHOLE}
    assert len(WHOLE) >= 8


@pytest.mark.parametrize("family", WHOLE)
def test_a_seed_is_one_picture_alone_and_in_a_batch_and_another_seed_another(family: str) -> None:
    again, (other, same) = shown(pipe_of(family))[0], shown(pipe_of(family), seeds=(2, 1), batch=2)
    assert again.shape == (64, 64, 3)
    assert again.std() > 10
    assert (again == plain(family)).all()
    assert apart(same, again) <= 1
    assert apart(other, again) > 1


@pytest.mark.parametrize("family", [family for family in WHOLE if family != "chroma"])
def test_an_adapter_changes_the_picture_by_its_strength_and_unloading_brings_every_bit_back(family: str) -> None:
    pipe = pipe_of(family)
    before, seen = tiny.weights(pipe), [plain(family)]
    for strength in (strong(family) / 2, strong(family)):
        with styled(family, strength):
            seen.append(shown(pipe)[0])
    assert tiny.same(before, tiny.weights(pipe))
    assert min(apart(one, other) for one, other in itertools.combinations(seen, 2)) > 1


@pytest.mark.parametrize("family", [family for family in WHOLE if family != "chroma"])
def test_prompt_and_negative_prompt_count(family: str) -> None:
    pipe, guided = pipe_of(family), GUIDED.get(family, {})
    bare, against = (shown(pipe, negative=text, **guided)[0] for text in (" ", "two dogs with a hat"))
    other = shown(pipe, "two dogs with a hat", negative=" ", **guided)[0]
    assert (bare != against).any()
    assert (bare != other).any()


@pytest.mark.parametrize("family", ["flux1", "qwen-image"])
def test_a_negative_prompt_alone_does_nothing_where_guidance_is_distilled(family: str) -> None:
    assert (plain(family) == shown(pipe_of(family), true_cfg=1.0, negative="dogs")[0]).all()


@pytest.mark.parametrize("family", ["sd3", "lumina2", "pixart"])
def test_true_cfg_is_refused_where_the_pipeline_has_none(family: str) -> None:
    with pytest.raises(UsageProblem, match="takes no true_cfg"):
        shown(pipe_of(family), true_cfg=2.0)


@pytest.mark.parametrize("family", FLOWS)
def test_strengths_follow_a_schedule_on_flow_matching(family: str) -> None:
    """Nothing to the end is the plain picture, everything the styled one, and the second half neither."""
    pipe = pipe_of(family)
    before, most = tiny.weights(pipe), strong(family)
    seen = {}
    with styled(family, most) as name:
        want = {(0.0, 0.0): plain(family), (most, most): shown(pipe)[0]}
        for strengths in (*want, (0.0, most)):
            with scheduled(pipe, {name: list(strengths)}, steps=2):
                seen[strengths] = shown(pipe)[0]
    assert max(apart(seen[strengths], picture) for strengths, picture in want.items()) <= 1
    assert min(apart(seen[0.0, most], picture) for picture in want.values()) > 1
    assert tiny.same(before, tiny.weights(pipe))


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_folder_with_an_adapter_file_makes_the_same_picture_and_keeps_its_recipe(family: str, tmp_path: Path) -> None:
    pipe = pipe_of(family)
    pipe.save_pretrained(tmp_path / "base")
    file = adapters.write(style(family), tmp_path / "style.safetensors", "diffusers")
    request = Request("a cat", seeds=(1,), **SIZE)
    done = generate(tmp_path / "base", [(file, strong(family))], request, tmp_path / "out.png", Options(device="cpu"))
    assert apart(pixels(tmp_path / "out.png"), plain(family)) > 1
    with styled(family, strong(family)):
        assert apart(pixels(tmp_path / "out.png"), shown(pipe)[0]) <= 1
    kept = pictures.read(tmp_path / "out.png")
    assert kept == done.outputs[0][1]
    assert (kept.base.name, kept.base.family, kept.adapters[0].strength) == ("base", family, strong(family))
    assert kept.sampler == type(pipe.scheduler).__name__.removesuffix("Scheduler")


@pytest.mark.parametrize("family", ["sd3", "qwen-image"])
def test_a_pipeline_opens_again_as_what_it_was(family: str, tmp_path: Path) -> None:
    pipe_of(family).save_pretrained(tmp_path)
    again = pipeline(tmp_path, device="cpu")
    assert type(again) is type(pipe_of(family))
    assert tiny.same(tiny.weights(again), tiny.weights(pipe_of(family)))


def test_the_command_makes_a_picture_of_flux_with_an_adapter(tmp_path: Path) -> None:
    pipe_of("flux1").save_pretrained(tmp_path / "base")
    file = adapters.write(style("flux1"), tmp_path / "style.safetensors", "diffusers")
    words = [
        "generate",
        tmp_path / "base",
        f"{file}=0.8",
        "-p",
        "a cat",
        "-n",
        "dogs",
        "--true-cfg",
        2,
        "--steps",
        2,
        "--size",
        "64x64",
    ]
    words += ["--seed", 3, "--device", "cpu", "--dtype", "fp32", "-o", tmp_path / "out.png", "--json"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    recipe = json.loads(done.stdout)["recipe"]
    assert (recipe["base"]["family"], recipe["request"]["true_cfg"], recipe["request"]["negative"]) == (
        "flux1",
        2.0,
        "dogs",
    )


@pytest.mark.parametrize(
    "family", [f for f in RECIPES if f not in WHOLE and "Modular" not in RECIPES[f].pipeline and f != "kolors"]
)
def test_a_pipeline_that_lacks_parts_says_which(family: str) -> None:
    with pytest.raises(Unsupported, match=r"makes no pictures: it has no .*(vae|scheduler|text_encoder|movq|vqvae)"):
        generating.check_whole(tiny.build(family))


def test_the_command_tells_what_a_partial_base_lacks_and_leaves_nothing(tmp_path: Path) -> None:
    tiny.build("sana").save_pretrained(tmp_path / "base")
    words = ["generate", tmp_path / "base", "-p", "a cat", "--device", "cpu", "-o", f"{tmp_path}/new/", "--seed", 1]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 1
    assert "SanaPipeline makes no pictures: it has no scheduler, text_encoder, tokenizer, vae" in done.stderr
    assert not (tmp_path / "new").exists()


def test_sd3_makes_pictures_without_t5_and_opens_again(tmp_path: Path) -> None:
    pipe = tiny.build("sd3")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    generating.check_whole(pipe)
    assert (shown(pipe)[0] != plain("sd3")).any()
    pipe.save_pretrained(tmp_path)
    assert apart(shown(pipeline(tmp_path, device="cpu"))[0], shown(pipe)[0]) <= 1


@pytest.mark.parametrize("family", ["sd3", "flux1"])
def test_a_token_of_clip_changes_the_picture_of_a_transformer_and_leaves_no_trace(family: str) -> None:
    pipe = pipe_of(family)
    before, words, without = tiny.weights(pipe), pipe.tokenizer.get_vocab(), shown(pipe, "a <cat>")[0]
    width = pipe.text_encoder.get_input_embeddings().embedding_dim
    made = tiny.embedding("<cat>", width, vectors=2, encoder="text_encoder")
    report = load(pipe, Adapter(family, {}, (made,)), name="cat")
    assert report.tokens["text_encoder"] == ("<cat>", "<cat>_1")
    learned = shown(pipe, "a <cat>")[0]
    unload(pipe, "cat")
    assert (learned != without).any()
    assert tiny.same(before, tiny.weights(pipe))
    assert pipe.tokenizer.get_vocab() == words


def test_every_component_is_on_one_device_and_in_one_dtype(tmp_path: Path) -> None:
    pipe_of("sd3").save_pretrained(tmp_path)
    pipe = pipeline(tmp_path, device="cpu", dtype="bf16")
    assert {(model.dtype, model.device.type) for model in live.modules(pipe).values()} == {(torch.bfloat16, "cpu")}
