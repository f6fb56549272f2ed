"""distill of a pipeline that learnt new words and nothing else: the words are the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hubtool.actions import distill as actions
from hubtool.actions.distill import Distilled, Options
from hubtool.actions.load import load
from hubtool.actions.recipe import RunOptions
from hubtool.actions.recipe import run as run_recipe
from hubtool.adapters.ir import Adapter
from hubtool.cli.main import cli
from hubtool.errors import ConversionError, WouldOverwrite
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.ops.extract.request import Request
from hubtool.ops.factor_space.budget import Budget
from tests.support import checkpoints, tiny


def request(rank: int = 4, **fields: Any) -> Request:
    return Request(budget=Budget(rank=rank), **{"dtype": "fp32", **fields})


def run(tuned: Path, base: Path, output: Path, asked: Request | None = None, **options: Any) -> Distilled:
    output.parent.mkdir(exist_ok=True)
    return actions.distill(tuned, base, output, asked or request(), Options(**options))


def tiny_adapter(token: str, vectors: int, seed: int = 3) -> Adapter:
    return Adapter(None, {}, (tiny.embedding(token, 32, vectors, seed=seed),))


def saver(folder: Path, change: Any) -> Path:
    pipe = tiny.build("sd1")
    change(pipe)
    pipe.save_pretrained(folder)
    return folder


def opened(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.saved("sd1", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def words_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with one new token of two vectors, as textual inversion leaves it."""
    return saver(
        tmp_path_factory.mktemp("words") / "words", lambda pipe: load(pipe, tiny_adapter("<s1>", 2), name="s1")
    )


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_pipeline_that_learnt_one_token_becomes_its_embedding(
    base: Path, words_only: Path, tmp_path: Path, layout: str
) -> None:
    done = run(words_only, base, tmp_path / "out.safetensors", request(layout=layout))
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    assert done.size == done.output.stat().st_size
    assert list(load_file(done.output)) == ["<s1>"]
    assert identify(open_file(done.output)).kind == "textual_inversion"
    pipe = opened(base)
    pipe.load_textual_inversion(str(done.output))
    prompt = "a <s1>"
    assert torch.equal(tiny.picture(pipe, prompt), tiny.picture(opened(words_only), prompt))
    assert done.to_json()["notes"] == ["no weight differs: what was learnt are the tokens alone"]
    run_recipe(done.recipe, tmp_path / "again.safetensors", RunOptions())
    assert (tmp_path / "again.safetensors").read_bytes() == done.output.read_bytes()


def test_several_tokens_alone_lie_in_one_file_or_in_one_each(base: Path, tmp_path: Path) -> None:
    """One file where the layout's readers take several tokens of a file, one each where diffusers shall read them."""

    def teach(pipe: Any) -> None:
        load(pipe, tiny_adapter("<s1>", 2), name="s1")
        load(pipe, tiny_adapter("<s2>", 1, seed=8), name="s2")

    taught_words = saver(tmp_path / "tuned", teach)
    together = run(taught_words, base, tmp_path / "one" / "out.safetensors")
    assert together.others == ()
    pipe = opened(base)
    load(pipe, together.output)
    expected = tiny.picture(opened(taught_words), "a <s1> <s2>")
    assert torch.equal(tiny.picture(pipe, "a <s1> <s2>"), expected)
    apart = run(taught_words, base, tmp_path / "two" / "out.safetensors", request(layout="diffusers"))
    assert [path.name for path in (apart.output, *apart.others)] == ["out-s1.safetensors", "out-s2.safetensors"]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"out-s1.safetensors", "out-s2.safetensors"}
    pipe = opened(base)
    for path in (apart.output, *apart.others):
        pipe.load_textual_inversion(str(path))
    assert torch.equal(tiny.picture(pipe, "a <s1> <s2>"), expected)


def test_one_token_of_two_encoders_alone_has_a_key_for_each(tmp_path: Path) -> None:
    pipe = tiny.build("sdxl")
    pipe.save_pretrained(tmp_path / "base")
    both = tuple(
        tiny.embedding("<s1>", width, encoder=name) for name, width in (("text_encoder", 16), ("text_encoder_2", 24))
    )
    load(pipe, Adapter(None, {}, both), name="s1")
    pipe.save_pretrained(tmp_path / "tuned")
    done = run(tmp_path / "tuned", tmp_path / "base", tmp_path / "out.safetensors", request(2))
    assert {key: tuple(value.shape) for key, value in load_file(done.output).items()} == {
        "clip_l": (1, 16), "clip_g": (1, 24)
    }  # fmt: skip
    assert open_file(done.output).metadata["hubtool.token"] == "<s1>"


def test_the_command_says_that_no_weight_differs(base: Path, words_only: Path, tmp_path: Path) -> None:
    words = [words_only, base, "--rank", "4", "-o", tmp_path / "out.safetensors"]
    result = CliRunner().invoke(cli, ["distill", *map(str, words)])
    assert result.exit_code == 0, result.output
    assert "no weight differs" in result.stdout
    assert "text_encoder: new token <s1>, 2 vectors" in result.stdout


def test_tokens_beside_are_a_file_each_and_an_existing_one_stays(base: Path, words_only: Path, tmp_path: Path) -> None:
    done = run(words_only, base, tmp_path / "out.safetensors", tokens="beside")
    assert [path.name for path in tmp_path.iterdir()] == ["out-s1.safetensors"]
    assert (done.output.name, done.others) == ("out-s1.safetensors", ())
    with pytest.raises(WouldOverwrite):
        run(words_only, base, tmp_path / "out.safetensors", tokens="beside")


def test_the_same_pipeline_twice_has_nothing_to_distill(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="does not differ"):
        run(base, base, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
