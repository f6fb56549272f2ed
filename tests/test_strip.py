"""strip: what leaves a file, and that what stays keeps its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hubtool.actions.recipe import RunOptions
from hubtool.actions.recipe import run as run_recipe
from hubtool.actions.strip import Options, Stripped, strip
from hubtool.cli.main import cli
from hubtool.errors import BadValues, ConversionError, UsageProblem, WouldOverwrite
from hubtool.formats import open_file
from hubtool.ops.recipe import of_metadata
from hubtool.ops.strip.casting import Caster
from hubtool.ops.strip.planning import Request
from tests.support import adapters, checkpoints

UNET, ENCODER, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.single("sd1", tmp_path_factory.mktemp("strip"), metadata={"modelspec.title": "mine"})


@pytest.fixture(scope="module")
def averaged(base: Path) -> Path:
    """The checkpoint with EMA copies as CompVis' trainer keeps them, and a scheduler's buffer."""
    state = load_file(base)
    names = [name for name in state if name.startswith(UNET)]
    copies = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": state[name] + 1 for name in names}
    rest = {"model_ema.decay": torch.tensor(0.9999), "betas": torch.linspace(0, 1, 10)}
    path = base.parent / "averaged.safetensors"
    save_file({**state, **copies, **rest}, path)
    return path


def run(source: Path, output: Path, **asked: Any) -> Stripped:
    return strip(source, output, Request(**asked))


def raw(path: Path) -> dict[str, bytes]:
    with open(path, "rb") as stream:
        data = stream.read()
    return {name: data[ref.start : ref.end] for name, ref in open_file(path).tensors.items()}


def test_ema_copies_leave_and_everything_else_keeps_its_bytes(base: Path, averaged: Path, tmp_path: Path) -> None:
    done = run(averaged, tmp_path / "out.safetensors")
    kept = raw(tmp_path / "out.safetensors")
    assert kept == {name: data for name, data in raw(averaged).items() if not name.startswith("model_ema.")}
    assert done.report.removed.keys() == {"ema"}
    assert done.report.removed["ema"].tensors == sum(name.startswith(UNET) for name in load_file(base)) + 1


def test_ema_copies_can_stay(averaged: Path, tmp_path: Path) -> None:
    run(averaged, tmp_path / "out.safetensors", ema="keep", drop=("vae",))
    names = load_file(tmp_path / "out.safetensors")
    assert any(name.startswith("model_ema.") for name in names)
    assert not any(name.startswith(VAE) for name in names)


def test_ema_copies_can_take_the_place_of_the_weights(base: Path, averaged: Path, tmp_path: Path) -> None:
    run(averaged, tmp_path / "out.safetensors", ema="use")
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert after.keys() == before.keys() | {"betas"}
    assert all(torch.equal(after[name], before[name] + 1) for name in before if name.startswith(UNET))
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith(UNET))
    with pytest.raises(ConversionError, match="no EMA"):
        run(base, tmp_path / "no.safetensors", ema="use")


@pytest.mark.parametrize(("asked", "prefixes"), [({"drop": ("vae",)}, (UNET, ENCODER)), ({"keep": ("unet",)}, (UNET,))])
def test_components_leave(base: Path, tmp_path: Path, asked: dict[str, Any], prefixes: tuple[str, ...]) -> None:
    done = run(base, tmp_path / "out.safetensors", **asked)
    wanted = {name: data for name, data in raw(base).items() if name.startswith(prefixes)}
    assert raw(tmp_path / "out.safetensors") == wanted
    assert sum(one.bytes for one in done.report.kept.values()) == sum(map(len, wanted.values()))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "mine"


def test_components_of_a_folder_leave_with_their_folders(base: Path, tmp_path: Path) -> None:
    run(base.parent / "sd1", tmp_path / "out", drop=("text_encoder", "vae"))
    assert (tmp_path / "out" / "unet" / "config.json").is_file()
    assert not (tmp_path / "out" / "vae").exists()
    weights = next((tmp_path / "out" / "unet").glob("*.safetensors"))
    assert raw(weights) == raw(next((base.parent / "sd1" / "unet").glob("*.safetensors")))


def test_components_of_an_adapter_leave(tmp_path: Path) -> None:
    lora = adapters.write(adapters.make("sd1", alphas=(2.0,)), tmp_path / "lora.safetensors", "kohya")
    run(lora, tmp_path / "out.safetensors", drop=("text_encoder",), family="sd1")
    kept = raw(tmp_path / "out.safetensors")
    assert kept == {name: data for name, data in raw(lora).items() if name.startswith("lora_unet_")}


def test_training_state_of_a_pickle_leaves(base: Path, tmp_path: Path) -> None:
    state = load_file(base)
    document = {"state_dict": state, "optimizer_states": [{"exp_avg": torch.zeros(50)}], "epoch": 3}
    torch.save(document, tmp_path / "trained.ckpt")
    done = run(tmp_path / "trained.ckpt", tmp_path / "out.safetensors", format="safetensors")
    assert done.report.removed["training state"].bytes == 200
    assert checkpoints.same(load_file(tmp_path / "out.safetensors"), state)
    run(tmp_path / "trained.ckpt", tmp_path / "out.ckpt")
    assert checkpoints.same(torch.load(tmp_path / "out.ckpt", weights_only=True), state)


def test_a_cast_counts_what_it_loses(base: Path, tmp_path: Path) -> None:
    state = load_file(base)
    name = f"{UNET}out.2.bias"
    state[name][:3] = torch.tensor([1e-12, 0.0, 0.5])
    save_file(state, tmp_path / "in.safetensors")
    done = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype="fp16")
    assert done.report.caster is not None
    assert done.report.caster.lost[name].to_json() == {"overflow": 0, "underflow": 1, "nonfinite": 0}
    after = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(after[key], tensor.half()) for key, tensor in state.items() if tensor.is_floating_point())


def test_an_overflow_is_refused_or_saturated_as_asked(base: Path, tmp_path: Path) -> None:
    state = load_file(base)
    name = f"{UNET}out.2.bias"
    state[name][:2] = torch.tensor([1e9, -1e9])
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(BadValues, match="2 values are beyond the range of F16"):
        run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
    done = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype="fp16", saturate=True)
    assert done.report.caster is not None
    assert done.report.caster.lost[name].overflow == 2
    assert load_file(tmp_path / "out.safetensors")[name][:2].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3", "fp8_e5m2"])
def test_every_dtype_is_torchs_rounding(dtype: str) -> None:
    names = {"bf16": "BF16", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
    kinds = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    caster = Caster(names[dtype], saturate=False)
    assert torch.equal(caster(values, name="a").float(), values.to(kinds[dtype]).float())


def test_numbers_that_were_not_finite_stay_and_are_counted() -> None:
    caster = Caster("F16", saturate=True)
    result = caster(torch.tensor([float("nan"), float("inf"), 1e6, 1.0]), name="a")
    assert torch.equal(torch.isfinite(result), torch.tensor([False, False, True, True]))
    assert caster.lost["a"].to_json() == {"overflow": 1, "underflow": 0, "nonfinite": 2}


def test_alphas_and_buffers_keep_their_dtype(averaged: Path, tmp_path: Path) -> None:
    run(averaged, tmp_path / "out.safetensors", dtype="bf16")
    after = load_file(tmp_path / "out.safetensors")
    assert after["betas"].dtype == torch.float32
    assert after[f"{UNET}out.2.bias"].dtype == torch.bfloat16
    lora = adapters.write(adapters.make("sd1", alphas=(2.0,)), tmp_path / "lora.safetensors", "kohya")
    run(lora, tmp_path / "half.safetensors", dtype="fp16", family="sd1")
    kept = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for name, tensor in kept.items() if name.endswith("alpha")} == {torch.float32}
    assert {tensor.dtype for name, tensor in kept.items() if "lora_up" in name} == {torch.float16}


def test_nothing_to_do_is_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="nothing to remove"):
        run(base, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"drop": ("unett",)}, "no component 'unett'"),
        ({"drop": ("unet",), "keep": ("vae",)}, "either kept or dropped"),
        ({"drop": ("unet", "vae", "text_encoder")}, "nothing would be left"),
        ({"dtype": "int4"}, "no such dtype"),
        ({"ema": "maybe"}, "cannot be asked to maybe"),
    ],
)
def test_requests_without_sense_are_refused(base: Path, tmp_path: Path, asked: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageProblem, match=text):
        run(base, tmp_path / "out.safetensors", **asked)


def test_an_existing_output_is_never_replaced_unasked(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        run(base, output, drop=("vae",))
    with pytest.raises(UsageProblem, match="the output is the input"):
        strip(base, base, Request(drop=("vae",)), Options(force=True))
    assert output.read_bytes() == b"mine"


def test_the_recipe_gives_the_same_bytes_again(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "out.safetensors", drop=("vae",), dtype="bf16", format="safetensors")
    recipe = of_metadata(open_file(tmp_path / "out.safetensors").metadata)
    assert recipe is not None
    run_recipe(recipe, tmp_path / "again.safetensors", RunOptions(search=(base.parent,)))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def command(*words: object) -> Result:
    return CliRunner().invoke(cli, ["strip", *map(str, words)])


def test_the_command_tells_what_went(averaged: Path, tmp_path: Path) -> None:
    result = command(averaged, "--drop", "vae", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    assert "removed: ema" in result.stdout
    assert "removed: vae" in result.stdout
    known = json.loads(command(averaged, "--dry-run", "--json").stdout)
    assert known["output"] is None
    assert known["removed"]["ema"]["tensors"] > 0
    assert command(averaged).exit_code == 2
