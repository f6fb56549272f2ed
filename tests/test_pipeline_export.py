"""export: a base with adapters becomes a pipeline of its own, which anybody can open without hubtool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import hubtool
from hubtool.actions import pipeline_export as actions
from hubtool.actions.distill import distill
from hubtool.actions.load import load
from hubtool.actions.pipeline_export import Exported, Options, export
from hubtool.actions.recipe import RunOptions, fingerprint
from hubtool.actions.recipe import run as run_recipe
from hubtool.adapters.custom_diffusion import to_processor
from hubtool.adapters.ir import Adapter
from hubtool.cli.main import cli
from hubtool.errors import ConversionError, RecognitionError, Unsupported, UsageProblem, WouldOverwrite
from hubtool.ops import recipe as recipes
from hubtool.ops.extract.request import Request
from hubtool.ops.factor_space.budget import Budget
from hubtool.pipelines import opening
from tests.support import adapters, checkpoints, tiny
from tests.support.files import write_safetensors

PROMPT = "a <cat> there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return checkpoints.saved("sd1", folder)


@pytest.fixture(scope="module")
def style(folder: Path) -> Path:
    made = tiny.make(tiny.build("sd1"), only="attn", family="sd1")
    return adapters.write(made.adapter, folder / "style.safetensors", "kohya/diffusers")


@pytest.fixture(scope="module")
def cat(folder: Path) -> Path:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    return write_safetensors(folder / "cat.safetensors", {"<cat>": ("F32", (2, 32), vectors.numpy().tobytes())})


def opened(path: Path, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(base: Path, refs: Any, output: Path, **options: Any) -> Exported:
    return export(base, refs, output, Options(**options))


def close(first: torch.Tensor, second: torch.Tensor, share: float = 1e-4) -> bool:
    return float((first - second).norm()) < share * float(second.norm())


def test_the_folder_gives_the_picture_of_the_live_pipeline(base: Path, style: Path, cat: Path, tmp_path: Path) -> None:
    done = run(base, [(style, 0.8), cat], tmp_path / "out")
    live = hubtool.pipeline(base, [(style, 0.8), cat], device="cpu")
    live.set_progress_bar_config(disable=True)
    expected = tiny.picture(live, PROMPT)
    assert close(tiny.picture(opened(tmp_path / "out"), PROMPT), expected)
    assert not close(tiny.picture(opened(base), PROMPT), expected, 1e-2)
    assert done.tokens == {"text_encoder": ("<cat>", "<cat>_1")}


def test_another_process_opens_it_with_diffusers_alone(base: Path, style: Path, cat: Path, tmp_path: Path) -> None:
    run(base, [style, cat], tmp_path / "out")
    code = (
        "import sys, torch; from diffusers import DiffusionPipeline; pipe = DiffusionPipeline.from_pretrained(sys.argv[1]);"
        "made = pipe(sys.argv[2], num_inference_steps=2, height=64, width=64, output_type='latent', guidance_scale=3.0,"
        "generator=torch.Generator().manual_seed(0)).images; torch.save(made, sys.argv[3]);"
        "assert not [name for name in sys.modules if name.startswith('hubtool')]"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out"), PROMPT, str(tmp_path / "made.pt")]
    subprocess.run(words, check=True, capture_output=True)
    live = hubtool.pipeline(base, [style, cat], device="cpu")
    assert close(torch.load(tmp_path / "made.pt", weights_only=True), tiny.picture(live, PROMPT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_sum_rounded_once_to_the_dtype(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The formula in fp64, rounded to the output's dtype: at most the last bit of a few sums differs, as fp32 sums."""
    pipe = tiny.build("sd1")
    made = [tiny.make(pipe, only="attn", family="sd1", seed=seed) for seed in (1, 2)]
    paths = [
        adapters.write(one.adapter, tmp_path / f"{i}.safetensors", "kohya/diffusers") for i, one in enumerate(made)
    ]
    word = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    run(base, list(zip(paths, (0.7, -0.3), strict=True)), tmp_path / "out", dtype=word)
    before, after = checkpoints.loaded(base), checkpoints.loaded(tmp_path / "out")
    changed = 0
    for part in ("unet", "text_encoder", "vae"):
        assert before[part].keys() == after[part].keys()
        for key, tensor in before[part].items():
            wide = tensor.double()
            for one, strength in zip(made, (0.7, -0.3), strict=True):
                at = (part, key.removesuffix(".weight"))
                if at in one.factors:
                    wide = wide + one.delta(at, strength).reshape(wide.shape)
            changed += not torch.equal(wide, tensor.double())
            assert after[part][key].dtype == dtype
            far = (after[part][key] != wide.to(dtype)).double().mean()
            assert float(far) < (0.001 if dtype == torch.bfloat16 else 1)
            torch.testing.assert_close(after[part][key].double(), wide.to(dtype).double(), rtol=1e-2, atol=1e-6)
    assert changed > 100


def test_new_rows_hold_the_bits_and_the_encoder_knows_its_size(base: Path, cat: Path, tmp_path: Path) -> None:
    done = run(base, [cat], tmp_path / "out")
    before, after = checkpoints.loaded(base)["text_encoder"], checkpoints.loaded(tmp_path / "out")["text_encoder"]
    key = next(name for name in before if name.endswith("token_embedding.weight"))
    assert torch.equal(after[key], torch.cat([before[key], load_file(cat)["<cat>"]]))
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (516, 513)
    assert (done.plan.fidelity, dict(done.plan.rounded)) == ("exact", {})
    untouched = ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "model_index.json")
    assert all((base / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in untouched)


def test_tokens_of_both_sdxl_encoders_reach_the_pooled_output(tmp_path: Path) -> None:
    """CLIP of transformers pools at the highest id where its configuration has the legacy end of text: a new token would take it."""
    source = checkpoints.saved("sdxl", tmp_path)
    rows = {"clip_l": torch.randn(1, 16), "clip_g": torch.randn(1, 24)}
    path = write_safetensors(
        tmp_path / "cat.safetensors",
        {name: ("F32", tuple(one.shape), one.numpy().tobytes()) for name, one in rows.items()},
        {"hubtool.token": "<cat>"},
    )
    done = run(source, [path], tmp_path / "out")
    assert done.tokens == {"text_encoder": ("<cat>",), "text_encoder_2": ("<cat>",)}
    live, pipe = opened(source), opened(tmp_path / "out")
    load(live, path)
    mine, theirs = pipe.encode_prompt(PROMPT, device="cpu"), live.encode_prompt(PROMPT, device="cpu")
    plain = opened(source).encode_prompt(PROMPT, device="cpu")
    for one, other in ((mine[0], theirs[0]), (mine[2], theirs[2])):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(mine[2], plain[2])


def test_what_was_distilled_gives_the_tuned_pipeline_again(base: Path, cat: Path, tmp_path: Path) -> None:
    pipe = tiny.build("sd1")
    generator = torch.Generator().manual_seed(1)
    for _, _, module in tiny.modules(pipe, ("unet", "text_encoder")):
        rows, columns = module.weight.shape[0], module.weight[0].numel()
        change = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
        module.weight.data += 0.05 * change.reshape(module.weight.shape)
    load(pipe, cat)
    pipe.save_pretrained(tmp_path / "tuned")
    request = Request(budget=Budget(rank=2), dtype="fp32")
    lora = distill(tmp_path / "tuned", base, tmp_path / "lora.safetensors", request).output
    run(base, [lora], tmp_path / "out")
    mine, theirs = checkpoints.loaded(tmp_path / "out"), checkpoints.loaded(tmp_path / "tuned")
    for part in ("unet", "text_encoder"):
        for key, tensor in theirs[part].items():
            torch.testing.assert_close(mine[part][key], tensor, rtol=1e-4, atol=1e-5)
    assert close(tiny.picture(opened(tmp_path / "out"), PROMPT), tiny.picture(opened(tmp_path / "tuned"), PROMPT), 1e-3)


def test_a_single_file_becomes_a_folder_with_another_ones_tokenizers(
    base: Path, style: Path, cat: Path, tmp_path: Path
) -> None:
    single = checkpoints.single("sd1", tmp_path)
    with pytest.raises(ConversionError, match="would have no tokenizer") as caught:
        run(single, [style], tmp_path / "out")
    assert "--config-from" in str(caught.value.hint)
    run(single, [style, cat], tmp_path / "out", config_from=base)
    run(base, [style, cat], tmp_path / "other")
    assert close(tiny.picture(opened(tmp_path / "out"), PROMPT), tiny.picture(opened(tmp_path / "other"), PROMPT), 1e-5)


def test_a_folder_becomes_a_single_file_of_its_family(base: Path, style: Path, tmp_path: Path) -> None:
    done = run(base, [style], tmp_path / "out.safetensors")
    assert any(key.startswith("model.diffusion_model.") for key in load_file(done.output or ""))
    run(base, [style], tmp_path / "folder")
    mine = opening.opened(tmp_path / "out.safetensors", torch.float32, config_from=base)
    assert close(tiny.picture(mine), tiny.picture(opened(tmp_path / "folder")), 1e-5)


def test_a_single_file_has_no_place_for_tokens(base: Path, cat: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no tokenizer for the tokens of cat"):
        run(base, [cat], tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"aesthetic_embedding": torch.ones(1, 768)}, "aesthetic"),
        ([torch.zeros(1, 77, 768) for _ in range(50)], "null-text"),
    ],
)
def test_kinds_that_change_no_weight_are_refused_by_name(base: Path, tmp_path: Path, held: Any, said: str) -> None:
    path = tmp_path / "other.pt"
    torch.save(held, path)
    with pytest.raises(RecognitionError, match=said):
        run(base, [path], tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["other.pt"]


def test_custom_diffusion_takes_the_place_of_the_keys_and_values(base: Path, tmp_path: Path) -> None:
    """diffusers' own file: whole weights of every cross-attention's to_k and to_v."""
    unet = checkpoints.loaded(base)["unet"]
    generator = torch.Generator().manual_seed(4)
    new = {
        key: torch.randn(tensor.shape, generator=generator)
        for key, tensor in unet.items()
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    path = tmp_path / "pytorch_custom_diffusion_weights.safetensors"
    save_file({str(to_processor(key)): tensor for key, tensor in new.items()}, path)
    run(base, [path], tmp_path / "out")
    made = checkpoints.loaded(tmp_path / "out")["unet"]
    assert all(torch.equal(made[key], new.get(key, tensor)) for key, tensor in unet.items())


def test_a_token_that_is_taken_is_refused(base: Path, cat: Path, tmp_path: Path) -> None:
    run(base, [cat], tmp_path / "once")
    with pytest.raises(UsageProblem, match="knows the token <cat> already"):
        run(tmp_path / "once", [cat], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_an_embedding_has_no_strength(base: Path, cat: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="no strength"):
        run(base, [(cat, 0.5)], tmp_path / "out")


def test_large_weights_are_cut_into_shards_that_diffusers_opens(base: Path, style: Path, tmp_path: Path) -> None:
    run(base, [style], tmp_path / "out", shard=200_000)
    assert len(list((tmp_path / "out" / "unet").glob("*-of-*.safetensors"))) > 2
    run(base, [style], tmp_path / "whole")
    assert close(tiny.picture(opened(tmp_path / "out")), tiny.picture(opened(tmp_path / "whole")), 1e-5)
    run(tmp_path / "out", [], tmp_path / "again", dtype="fp32")
    names = sorted(path.name for path in (tmp_path / "again" / "unet").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert close(tiny.picture(opened(tmp_path / "again")), tiny.picture(opened(tmp_path / "whole")), 1e-5)


def test_only_a_pipeline_is_replaced_and_only_when_forced(
    base: Path, style: Path, cat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(base, [style], out)
    first = fingerprint(out)
    with pytest.raises(WouldOverwrite, match="already exists"):
        run(base, [cat], out)
    monkeypatch.setattr(actions, "execute_folder", _full)
    with pytest.raises(OSError, match="No space"):
        run(base, [cat], out, force=True)
    monkeypatch.undo()
    assert fingerprint(out) == first
    run(base, [cat], out, force=True)
    assert fingerprint(out) != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(WouldOverwrite, match="no pipeline"):
        run(base, [style], tmp_path / "mine", force=True)
    with pytest.raises(UsageProblem, match="is an input"):
        run(base, [style], base, force=True)


def _full(*_: Any, **__: Any) -> int:
    raise OSError(28, "No space left on device")


def test_the_recipe_inside_gives_the_same_weights_again(base: Path, style: Path, cat: Path, tmp_path: Path) -> None:
    done = run(base, [(style, 0.5), cat], tmp_path / "out", dtype="fp16")
    assert [text.rpartition(" ")[2] for text in done.plan.rounded.values()] == ["F16"]
    kept = recipes.read(tmp_path / "out")
    assert (kept.operation, [one.role for one in kept.inputs]) == ("pipeline_export", ["base", "adapter", "adapter"])
    assert [one.name for one in kept.inputs] == ["sd1", "style.safetensors", "cat.safetensors"]
    run_recipe(done.recipe, tmp_path / "again", RunOptions())
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "out")


def test_the_command_reports_and_a_dry_run_writes_nothing(base: Path, style: Path, cat: Path, tmp_path: Path) -> None:
    words = ["pipeline", "export", str(base), f"{style}=0.8", str(cat), "-o", str(tmp_path / "out"), "--json"]
    tried = CliRunner().invoke(cli, [*words, "--dry-run"])
    assert tried.exit_code == 0, tried.output
    assert not list(tmp_path.iterdir())
    made = CliRunner().invoke(cli, words)
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert told["tokens"] == {"text_encoder": ["<cat>", "<cat>_1"]}
    assert told["adapters"][0]["matched"] == told["adapters"][0]["modules"] > 100
    done = hubtool.export(base, {style: 0.8, cat: 1.0}, tmp_path / "py")
    assert done.output is not None
    assert fingerprint(done.output) == fingerprint(tmp_path / "out")


def test_an_adapter_with_tokens_of_its_own_brings_both(base: Path, tmp_path: Path) -> None:
    made = tiny.make(tiny.build("sd1"), ["unet"], only="attn1.to_q", family="sd1")
    both = Adapter("sd1", made.adapter.patches, (tiny.embedding("<dog>", 32),))
    path = adapters.write(both, tmp_path / "dog.safetensors", "kohya/diffusers")
    done = run(base, [path], tmp_path / "out")
    assert done.tokens == {"text_encoder": ("<dog>",)}
    assert not any("load them beside" in note for note in done.notes)
    assert opened(tmp_path / "out").tokenizer("<dog>", add_special_tokens=False).input_ids == [514]
