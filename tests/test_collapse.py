"""collapse: adapters into checkpoints and out of them again, against the formula in fp64 and diffusers' own fuse_lora."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from click.testing import CliRunner  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from hubtool.actions.collapse import Collapsed, Options, collapse  # noqa: E402
from hubtool.adapters.ir import Adapter  # noqa: E402
from hubtool.adapters.registry import make  # noqa: E402
from hubtool.cli.main import cli  # noqa: E402
from hubtool.errors import (  # noqa: E402
    BadValues,
    ConversionError,
    NotFound,
    RecognitionError,
    ShapeMismatch,
    Unsupported,
    UsageProblem,
    WouldOverwrite,
)
from hubtool.formats import open_file  # noqa: E402
from hubtool.ops.collapse import Base  # noqa: E402
from hubtool.ops.collapse.shares import Share, changed  # noqa: E402
from hubtool.ops.recipe import Input  # noqa: E402
from hubtool.tensors.evaluate import compute  # noqa: E402
from tests.support import adapters, patches, tiny  # noqa: E402
from tests.support.checkpoints import loaded, pipeline, saved, single, states  # noqa: E402
from tests.support.files import write_safetensors  # noqa: E402

ENCODERS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
MIXED = {"ranks": (2, 4, 3), "alphas": (1.0, None)}
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 16 x 16, no bias
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"  # 16 x 64, a bias
CONV = "down_blocks.0.resnets.0.conv1"  # 16 x 16 x 3 x 3, a bias
LDM = {
    Q: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    FF: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.2",
    CONV: "model.diffusion_model.input_blocks.1.0.in_layers.2",
}


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1 checkpoint as a single file (``sd1.safetensors``) and as the folder it was made of (``sd1``)."""
    folder = tmp_path_factory.mktemp("sd1")
    single("sd1", folder, metadata={"modelspec.title": "tiny", "modelspec.license": "openrail"})
    return folder


def write(adapter: Adapter, path: Path, layout: str = "diffusers", **metadata: str) -> Path:
    return adapters.write(replace(adapter, family=adapter.family or "sd1"), path, layout, metadata)


def lora(path: Path, modules: Sequence[str] = (Q,), **options: Any) -> tuple[Path, tiny.Made]:
    made = tiny.make(pipeline("sd1"), ("unet",), only=modules, family="sd1", **options)
    return write(made.adapter, path), made


def one(path: Path, algorithm: str, tensors: Mapping[str, Any], module: str = Q, alpha: float | None = None) -> Path:
    """An adapter of one module in LyCORIS' keys."""
    patch = make(algorithm, {role: tiny.literal(tensor) for role, tensor in tensors.items()}, alpha)
    return write(Adapter("sd1", {("unet", module): patch}), path, "kohya")


def rand(*shape: int, seed: int = 7) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def run(base: Path, *inputs: Path | Input, out: Path, **options: Any) -> Collapsed:
    named = [one if isinstance(one, Input) else Input(path=str(one)) for one in inputs]
    return collapse(base, named, out, Options(family=options.pop("family", "sd1"), **options))


def header(path: Path) -> dict[str, tuple[str, list[int]]]:
    document = json.loads(open_file(path).header_bytes or b"{}")
    return {key: (value["dtype"], value["shape"]) for key, value in document.items() if key != "__metadata__"}


def plain(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """transformers writes CLIP's names with ``text_model.`` or without."""
    return {c: {key.removeprefix("text_model."): value for key, value in state.items()} for c, state in found.items()}


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_every_module_changes_by_strength_scale_up_down_and_nothing_else_does(
    tmp_path: Path, family: str, form: str
) -> None:
    base = single(family, tmp_path) if form == "file" else saved(family, tmp_path)
    made = tiny.make(pipeline(family), ("unet", *ENCODERS[family]), family=family, **MIXED)
    style = write(made.adapter, tmp_path / "style.safetensors")
    out = tmp_path / ("out.safetensors" if form == "file" else "out")
    done = run(base, Input(path=str(style), strength=0.5), out=out, family=family, check=2000)
    assert done.verdict is not None
    assert done.verdict.passed
    assert [(len(a.matched), a.unmatched, a.mismatched) for a in done.report.accounts] == [(len(made.factors), [], {})]
    folder = out
    if form == "file":
        assert header(out) == header(base)
        from tests.support.checkpoints import convert

        convert(out, tmp_path / "back", "diffusers", base=tmp_path / family, family=family)
        folder = tmp_path / "back"
    after, before = plain(loaded(folder)), plain(states(family))
    changes = {(c, path.removeprefix("text_model.")): made.delta((c, path), 0.5) for c, path in made.factors}
    for component, state in before.items():
        for key, weight in state.items():
            change = changes.get((component, key.removesuffix(".weight"))) if key.endswith(".weight") else None
            if change is None:
                assert torch.equal(after[component][key], weight), key
            else:
                wanted = weight.double() + change.reshape(weight.shape)
                torch.testing.assert_close(after[component][key].double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_result_is_what_diffusers_fuses(tmp_path: Path, family: str) -> None:
    folder = saved(family, tmp_path)
    made = [
        tiny.make(pipeline(family), ("unet",), only=only, family=family, seed=seed, alphas=(2.0,))
        for seed, only in ((1, "attn"), (2, "attn1.to_q"))
    ]
    files = [write(m.adapter, tmp_path / f"{i}.safetensors") for i, m in enumerate(made)]
    out = tmp_path / "out"
    run(
        folder,
        Input(path=str(files[0]), strength=0.7),
        Input(path=str(files[1]), strength=-0.4),
        out=out,
        family=family,
    )
    pipe = tiny.build(family)
    for name, file in zip("ab", files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    pipe.fuse_lora(adapter_names=["a", "b"])
    pipe.unload_lora_weights()
    got = loaded(out)["unet"]
    for key, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(got[key.replace(".base_layer", "")], value, rtol=1e-5, atol=1e-6)


def test_the_parts_of_fused_native_weights_change_in_place(tmp_path: Path) -> None:
    """Flux keeps q, k, v and the MLP's input in one tensor; SDXL's second encoder q, k and v with their biases."""
    base = single("flux1", tmp_path)
    made = tiny.make(pipeline("flux1"), ("transformer",), family="flux1", **MIXED)
    style = write(made.adapter, tmp_path / "style.safetensors")
    out = tmp_path / "out.safetensors"
    done = run(base, style, out=out, family="flux1", check=1000)
    assert done.verdict is not None
    assert done.verdict.passed
    assert header(out) == header(base)
    assert any("linear1" in key or "qkv" in key for key in done.report.shares)
    from tests.support.checkpoints import convert

    convert(out, tmp_path / "back", "diffusers", base=tmp_path / "flux1", family="flux1")
    after, before = loaded(tmp_path / "back")["transformer"], states("flux1")["transformer"]
    for _, path in made.factors:
        wanted = before[f"{path}.weight"].double() + made.delta(("transformer", path)).reshape(
            before[f"{path}.weight"].shape
        )
        torch.testing.assert_close(after[f"{path}.weight"].double(), wanted, rtol=1e-5, atol=2e-6)


CASES = {name: case for name, case in patches.CASES.items() if name != "embedding"}
WINDOWS = {"whole": (0, 0, False), "inside a fused tensor": (3, 2, False), "turned over": (0, 0, True)}


def stored(tmp_path: Path, weight: Any, before: int, after: int, turned: bool) -> Any:
    """A file with ``weight`` inside a larger tensor, or transposed; its reference."""
    rest = tuple(weight.shape[1:])
    whole = torch.cat([rand(before, *rest), weight, rand(after, *rest)]) if before else weight
    path = tmp_path / "stored.safetensors"
    save_file({"w": (whole.T if turned else whole).contiguous()}, path)
    return open_file(path).tensors["w"]


PAIRS = [
    (name, window)
    for name, (_, shape) in CASES.items()
    for window in WINDOWS
    if len(shape) == 2 or not WINDOWS[window][2]
]


@pytest.mark.parametrize(("name", "window"), PAIRS)
def test_every_kind_changes_the_stored_tensor_by_its_delta(tmp_path: Path, name: str, window: str) -> None:
    patch, shape = CASES[name]
    before, after, turned = WINDOWS[window]
    weight = patches.base(shape)
    ref = stored(tmp_path, weight, before, after, turned)
    share = Share(name, patch, 0.75, ((before, before + shape[0]),), shape, turned)
    got = compute(changed(ref, [share]))
    got = got.T if turned else got
    wanted = (
        patch.delta(weight).double() + weight
        if name == "set"
        else weight.double() + 0.75 * patch.delta(weight).double()
    )
    torch.testing.assert_close(got[before : before + shape[0]].double(), wanted, rtol=1e-5, atol=1e-5)
    old = load_file(tmp_path / "stored.safetensors")["w"]
    old = old.T if turned else old
    assert torch.equal(got[:before], old[:before])
    assert torch.equal(got[before + shape[0] :], old[before + shape[0] :])


@pytest.mark.parametrize("name", CASES)
def test_every_kind_comes_out_again_or_says_why_not(tmp_path: Path, name: str) -> None:
    patch, shape = CASES[name]
    weight = patches.base(shape)
    ref = stored(tmp_path, weight, 0, 0, False)
    share = Share(name, patch, 0.2, ((0, shape[0]),), shape)
    save_file({"w": compute(changed(ref, [share]))}, tmp_path / "result.safetensors")
    result = open_file(tmp_path / "result.safetensors").tensors["w"]
    if name == "set" or "dora" in name:
        with pytest.raises(Unsupported, match="gone"):
            changed(result, [share], inverse=True)
        return
    if "dora_scale" in dict(patch.roles()):
        with pytest.raises(Unsupported):
            changed(result, [share], inverse=True)
        return
    torch.testing.assert_close(compute(changed(result, [share], inverse=True)), weight, rtol=1e-5, atol=1e-5)


def test_several_adapters_are_summed_and_rounded_once(tmp_path: Path, sd1: Path) -> None:
    tensors = {key: value.half() for key, value in load_file(sd1 / "sd1.safetensors").items()}
    save_file(tensors, tmp_path / "half.safetensors")
    inputs, total = [], 0
    for seed, strength in enumerate((0.3, -0.6, 1.1, 0.45)):
        path, made = lora(tmp_path / f"{seed}.safetensors", seed=seed, dtype=torch.float16)
        inputs.append(Input(path=str(path), strength=strength))
        total = total + made.delta(("unet", Q), strength)
    out = tmp_path / "out.safetensors"
    run(tmp_path / "half.safetensors", *inputs, out=out)
    key = f"{LDM[Q]}.weight"
    once = (tensors[key].double() + total).half()
    assert torch.equal(load_file(out)[key], once)


def test_biases_norms_and_full_differences_change(tmp_path: Path, sd1: Path) -> None:
    bias, diff = rand(16), rand(16, 64)
    style = one(tmp_path / "style.safetensors", "full", {"diff": diff, "diff_b": bias}, FF)
    out = tmp_path / "out.safetensors"
    run(sd1 / "sd1.safetensors", Input(path=str(style), strength=0.5), out=out)
    before, after = load_file(sd1 / "sd1.safetensors"), load_file(out)
    torch.testing.assert_close(after[f"{LDM[FF]}.bias"], before[f"{LDM[FF]}.bias"] + 0.5 * bias)
    torch.testing.assert_close(after[f"{LDM[FF]}.weight"], before[f"{LDM[FF]}.weight"] + 0.5 * diff)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3), ("float8_e4m3fn", 0.07)]
)
def test_every_float_dtype_is_kept(tmp_path: Path, sd1: Path, dtype: str, tolerance: float) -> None:
    kind = getattr(torch, dtype)
    tensors = {
        key: value.to(kind) if value.is_floating_point() else value
        for key, value in load_file(sd1 / "sd1.safetensors").items()
    }
    save_file(tensors, tmp_path / "base.safetensors")
    path, made = lora(tmp_path / "style.safetensors")
    run(tmp_path / "base.safetensors", path, out=tmp_path / "out.safetensors")
    key = f"{LDM[Q]}.weight"
    after = load_file(tmp_path / "out.safetensors")[key]
    assert after.dtype == kind
    wanted = tensors[key].double() + made.delta(("unet", Q))
    assert float((after.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


# --- strengths ---------------------------------------------------------------------------------------------------------


def test_strengths_by_component_and_by_path(tmp_path: Path, sd1: Path) -> None:
    made = tiny.make(pipeline("sd1"), ("unet", "text_encoder"), only=(Q, FF, "encoder.layers.0.mlp.fc1"), family="sd1")
    style = write(made.adapter, tmp_path / "style.safetensors")
    texts = ("unet=0.5,text_encoder=0", f"unet:{FF}=-1")
    done = run(sd1 / "sd1.safetensors", Input(path=str(style), strengths=texts), out=tmp_path / "out.safetensors")
    assert (len(done.report.accounts[0].matched), done.report.accounts[0].skipped) == (2, 1)
    before, after = load_file(sd1 / "sd1.safetensors"), load_file(tmp_path / "out.safetensors")
    for module, strength in ((Q, 0.5), (FF, -1.0)):
        key = f"{LDM[module]}.weight"
        wanted = before[key].double() + made.delta(("unet", module), strength).reshape(before[key].shape)
        torch.testing.assert_close(after[key].double(), wanted, rtol=1e-5, atol=2e-6)


def test_a_strength_for_a_component_that_the_adapter_lacks_is_a_mistake(tmp_path: Path, sd1: Path) -> None:
    path, _ = lora(tmp_path / "style.safetensors")
    with pytest.raises(UsageProblem, match="text_encoder_9"):
        run(
            sd1 / "sd1.safetensors",
            Input(path=str(path), strengths=("text_encoder_9=1",)),
            out=tmp_path / "out.safetensors",
        )


def test_a_strength_for_a_component_that_only_one_of_the_adapters_has_is_none(tmp_path: Path, sd1: Path) -> None:
    made = tiny.make(pipeline("sd1"), ("unet", "text_encoder"), only=(FF, "encoder.layers.0.mlp.fc1"), family="sd1")
    both = write(made.adapter, tmp_path / "both.safetensors")
    path, _ = lora(tmp_path / "style.safetensors")
    inputs = [Input(path=str(file), strengths=("text_encoder=0",)) for file in (both, path)]
    done = run(sd1 / "sd1.safetensors", *inputs, out=tmp_path / "out.safetensors")
    assert [(account.skipped, len(account.matched)) for account in done.report.accounts] == [(1, 1), (0, 1)]


def test_a_replaced_weight_is_what_it_is_at_any_strength(tmp_path: Path, sd1: Path) -> None:
    value = rand(16, 16)
    path = tmp_path / "cd.safetensors"
    patch = make("set", {"set_weight": tiny.literal(value)})
    write(Adapter("sd1", {("unet", Q): patch}), path, "comfy")
    run(sd1 / "sd1.safetensors", Input(path=str(path), strength=0.3), out=tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[f"{LDM[Q]}.weight"], value)
    with pytest.raises(ConversionError, match="replace the same weight"):
        run(sd1 / "sd1.safetensors", path, path, out=tmp_path / "two.safetensors")


# --- containers --------------------------------------------------------------------------------------------------------


def test_a_file_keeps_its_names_order_shapes_and_every_other_byte(tmp_path: Path, sd1: Path) -> None:
    path, _ = lora(tmp_path / "style.safetensors")
    out = tmp_path / "out.safetensors"
    done = run(sd1 / "sd1.safetensors", path, out=out)
    assert list(header(out)) == list(header(sd1 / "sd1.safetensors"))
    assert list(done.report.shares) == [f"{LDM[Q]}.weight"]
    before, after = load_file(sd1 / "sd1.safetensors"), load_file(out)
    assert [key for key in before if not torch.equal(before[key], after[key])] == [f"{LDM[Q]}.weight"]
    assert done.plan.metadata["modelspec.title"] == "tiny"


def test_a_folder_keeps_every_other_file_byte_for_byte(tmp_path: Path, sd1: Path) -> None:
    path, _ = lora(tmp_path / "style.safetensors")
    out = tmp_path / "out"
    run(sd1 / "sd1", path, out=out)
    changed_files = [
        file.relative_to(sd1 / "sd1").as_posix()
        for file in sorted((sd1 / "sd1").rglob("*"))
        if file.is_file() and (out / file.relative_to(sd1 / "sd1")).read_bytes() != file.read_bytes()
    ]
    assert changed_files == ["unet/diffusion_pytorch_model.safetensors"]
    assert json.loads((out / "hubtool.recipe.json").read_text())["operation"] == "collapse"
    pipe = type(pipeline("sd1")).from_pretrained(out, local_files_only=True)
    assert not torch.equal(pipe.unet.get_submodule(Q).weight, pipeline("sd1").unet.get_submodule(Q).weight)


def test_other_variants_of_changed_weights_stay_behind(tmp_path: Path, sd1: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(sd1 / "sd1", base)
    shutil.copy(
        base / "unet/diffusion_pytorch_model.safetensors", base / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    path, _ = lora(tmp_path / "style.safetensors")
    done = run(base, path, out=tmp_path / "out")
    assert not (tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors").exists()
    assert any("fp16" in note for note in done.plan.notes)


def test_sharded_components_keep_their_shards(tmp_path: Path) -> None:
    pipeline("sd1").save_pretrained(tmp_path / "base", max_shard_size="2MB")
    shards = sorted(path.name for path in (tmp_path / "base/unet").glob("*.safetensors"))
    assert len(shards) > 1
    path, made = lora(tmp_path / "style.safetensors")
    run(tmp_path / "base", path, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/unet").glob("*.safetensors")) == shards
    pipe = type(pipeline("sd1")).from_pretrained(tmp_path / "out", local_files_only=True)
    wanted = pipeline("sd1").unet.get_submodule(Q).weight.double() + made.delta(("unet", Q))
    torch.testing.assert_close(pipe.unet.get_submodule(Q).weight.double(), wanted, rtol=1e-5, atol=2e-6)


def test_pickled_weights_of_a_folder_become_safetensors_where_they_change(tmp_path: Path) -> None:
    pipeline("sd1").save_pretrained(tmp_path / "base", safe_serialization=False)
    path, made = lora(tmp_path / "style.safetensors")
    run(tmp_path / "base", path, out=tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").rglob("*") if file.suffix in (".bin", ".safetensors"))
    before = sorted(file.name for file in (tmp_path / "base").rglob("*") if file.suffix in (".bin", ".safetensors"))
    assert "diffusion_pytorch_model.safetensors" in names
    assert len(names) == len(before)
    got = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")[f"{Q}.weight"]
    wanted = states("sd1")["unet"][f"{Q}.weight"].double() + made.delta(("unet", Q))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6)


def test_a_ckpt_becomes_a_ckpt_with_its_other_values(tmp_path: Path, sd1: Path) -> None:
    torch.save({"state_dict": load_file(sd1 / "sd1.safetensors"), "global_step": 7}, tmp_path / "base.ckpt")
    path, made = lora(tmp_path / "style.safetensors")
    run(tmp_path / "base.ckpt", path, out=tmp_path / "out.ckpt")
    before = torch.load(tmp_path / "base.ckpt", weights_only=True)
    after = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert after["global_step"] == 7
    assert list(after["state_dict"]) == list(before["state_dict"])
    key = f"{LDM[Q]}.weight"
    wanted = before["state_dict"][key].double() + made.delta(("unet", Q))
    torch.testing.assert_close(after["state_dict"][key].double(), wanted, rtol=1e-5, atol=2e-6)
    assert all(torch.equal(after["state_dict"][k], v) for k, v in before["state_dict"].items() if k != key)
    run(tmp_path / "base.ckpt", path, out=tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[key], after["state_dict"][key])


def test_a_denoiser_alone_takes_what_concerns_it(tmp_path: Path, sd1: Path) -> None:
    made = tiny.make(pipeline("sd1"), ("unet", "text_encoder"), only=(Q, "encoder.layers.0.mlp.fc1"), family="sd1")
    style = write(made.adapter, tmp_path / "style.safetensors")
    done = run(sd1 / "sd1/unet/diffusion_pytorch_model.safetensors", style, out=tmp_path / "out.safetensors")
    account = done.report.accounts[0]
    assert (account.matched, account.unmatched) == ([f"unet.{Q}"], ["text_encoder.text_model.encoder.layers.0.mlp.fc1"])


def test_a_component_folder_becomes_one_again(tmp_path: Path, sd1: Path) -> None:
    path, made = lora(tmp_path / "style.safetensors")
    run(sd1 / "sd1/unet", path, out=tmp_path / "unet")
    assert (tmp_path / "unet/config.json").read_bytes() == (sd1 / "sd1/unet/config.json").read_bytes()
    got = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")[f"{Q}.weight"]
    wanted = states("sd1")["unet"][f"{Q}.weight"].double() + made.delta(("unet", Q))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["native", "diffusers"])
def test_a_product_that_spans_a_fused_weight_is_added_where_its_parts_lie(tmp_path: Path, form: str) -> None:
    """A LoKr of Flux' qkv cannot be cut into q, k and v; its change can."""
    base = single("flux1", tmp_path) if form == "native" else tmp_path / "flux1"
    if form == "diffusers":
        saved("flux1", tmp_path)
    parts = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    before = states("flux1")["transformer"]
    rows, columns = sum(before[part].shape[0] for part in parts), before[parts[0]].shape[1]
    w1, w2 = rand(2, 2), rand(rows // 2, columns // 2)  # two blocks of rows: a border inside k
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    style = tmp_path / "style.safetensors"
    save_file({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(1e10)}, style)
    out = tmp_path / ("out.safetensors" if form == "native" else "out")
    done = run(base, Input(path=str(style), strength=0.5), out=out, family="flux1", check=10)
    assert done.passed
    assert len(done.report.shares) == (1 if form == "native" else 3)
    if form == "native":
        after = load_file(out)
        got = next(after[key] for key in done.report.shares)
    else:
        got = torch.cat([loaded(out)["transformer"][part] for part in parts])
    wanted = torch.cat([before[part] for part in parts]).double() + 0.5 * torch.kron(w1.double(), w2.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6)


# --- refusals ----------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, base: Path, *inputs: Path | Input, **options: Any) -> pytest.ExceptionInfo[Any]:
    """Run something that must fail and leave nothing behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((ConversionError, RecognitionError, UsageProblem)) as caught:
        run(base, *inputs, out=tmp_path / "never.safetensors", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return caught


def test_an_adapter_that_matches_nothing_is_an_error(tmp_path: Path, sd1: Path) -> None:
    made = tiny.make(pipeline("sd1"), ("text_encoder",), only="mlp.fc1", family="sd1")
    path = write(made.adapter, tmp_path / "a.safetensors")
    denoiser = sd1 / "sd1/unet/diffusion_pytorch_model.safetensors"
    assert "matches nothing" in refused(tmp_path, denoiser, path).value.message
    silent = Input(path=str(path), strength=0)
    assert "every strength" in refused(tmp_path, sd1 / "sd1.safetensors", silent).value.message


def test_a_shape_that_does_not_fit_names_the_module_and_both_shapes(tmp_path: Path, sd1: Path) -> None:
    good = make("lora", {"up": tiny.literal(rand(16, 2)), "down": tiny.literal(rand(2, 16))})
    bad = make("lora", {"up": tiny.literal(rand(16, 2)), "down": tiny.literal(rand(2, 24))})
    path = write(Adapter("sd1", {("unet", Q): good, ("unet", FF): bad}), tmp_path / "a.safetensors")
    caught = refused(tmp_path, sd1 / "sd1.safetensors", path)
    assert caught.type is ShapeMismatch
    assert all(text in caught.value.message for text in (FF, "[16, 24]", "[16, 64]"))
    done = run(sd1 / "sd1.safetensors", path, out=tmp_path / "out.safetensors", allow_mismatch=True)
    assert (done.report.accounts[0].matched, list(done.report.accounts[0].mismatched)) == (
        [f"unet.{Q}"],
        [f"unet.{FF}"],
    )


def test_another_family_is_refused_before_anything_is_read(tmp_path: Path, sd1: Path) -> None:
    path = adapters.write(adapters.make("sdxl"), tmp_path / "a.safetensors", "kohya")
    with pytest.raises(ConversionError, match="is for sdxl, the base is sd1"):
        collapse(sd1 / "sd1.safetensors", [Input(path=str(path))], tmp_path / "out.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_are_refused_by_name(tmp_path: Path, sd1: Path, value: float) -> None:
    up = rand(16, 2)
    up[3, 1] = value
    path = one(tmp_path / "a.safetensors", "lora", {"up": up, "down": rand(2, 16)})
    caught = refused(tmp_path, sd1 / "sd1.safetensors", path)
    assert caught.type is BadValues
    assert f"up of a: unet.{Q}" in caught.value.message
    tensors = load_file(sd1 / "sd1.safetensors")
    tensors[f"{LDM[Q]}.weight"][0, 0] = value
    save_file(tensors, tmp_path / "base.safetensors")
    good, _ = lora(tmp_path / "good.safetensors")
    assert LDM[Q] in refused(tmp_path, tmp_path / "base.safetensors", good).value.message


def test_an_overflow_is_refused(tmp_path: Path, sd1: Path) -> None:
    save_file(
        {key: value.half() for key, value in load_file(sd1 / "sd1.safetensors").items()}, tmp_path / "half.safetensors"
    )
    path, _ = lora(tmp_path / "style.safetensors")
    caught = refused(tmp_path, tmp_path / "half.safetensors", Input(path=str(path), strength=1e6))
    assert "overflow F16" in caught.value.message


def test_quantised_weights_are_refused(tmp_path: Path, sd1: Path) -> None:
    tensors = load_file(sd1 / "sd1.safetensors")
    tensors[f"{LDM[Q]}.weight"] = tensors[f"{LDM[Q]}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{LDM[Q]}.scale_weight"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "base.safetensors")
    path, _ = lora(tmp_path / "style.safetensors")
    assert "quantised" in refused(tmp_path, tmp_path / "base.safetensors", path).value.message


def test_what_is_no_change_of_weights_is_refused_by_name(tmp_path: Path, sd1: Path) -> None:
    write_safetensors(tmp_path / "token.safetensors", {"emb_params": ("F32", (1, 768), bytes(4 * 768))})
    assert (
        "textual inversion" in refused(tmp_path, sd1 / "sd1.safetensors", tmp_path / "token.safetensors").value.message
    )
    assert "it is a checkpoint" in refused(tmp_path, sd1 / "sd1.safetensors", sd1 / "sd1.safetensors").value.message
    path, _ = lora(tmp_path / "style.safetensors")
    assert "the base is no checkpoint" in refused(tmp_path, path, path).value.message


def hypernetwork(path: Path, activation: str) -> Path:
    """The keys and values of the tiny UNet's text context, as A1111 writes hypernetworks."""
    from hubtool.layouts.identify import identify

    width = pipeline("sd1").unet.config.cross_attention_dim
    layers = {
        side: {"linear.0.weight": rand(width, width, seed=n), "linear.0.bias": torch.zeros(width)}
        for n, side in enumerate("kv")
    }
    document = {
        width: (layers["k"], layers["v"]),
        "activation_func": activation,
        "layer_structure": [1, 1],
        "activate_output": True,
    }
    torch.save({**document, "name": "hyper", "is_layer_norm": False}, path)
    assert identify(open_file(path)).kind == "hypernetwork"
    return path


def test_an_affine_hypernetwork_is_a_change_of_keys_and_values(tmp_path: Path, sd1: Path) -> None:
    net = hypernetwork(tmp_path / "hyper.pt", "linear")
    out = tmp_path / "out.safetensors"
    done = run(sd1 / "sd1.safetensors", Input(path=str(net), strength=0.5), out=out)
    key = f"{LDM[Q].replace('attn1.to_q', 'attn2.to_k')}.weight"
    width = pipeline("sd1").unet.config.cross_attention_dim
    weight = load_file(sd1 / "sd1.safetensors")[key].double()
    wanted = weight + 0.5 * weight @ rand(width, width, seed=0).double()
    torch.testing.assert_close(load_file(out)[key].double(), wanted, rtol=1e-5, atol=2e-6)
    assert all(".to_k." in name or ".to_v." in name for name in done.report.shares)


def test_a_hypernetwork_with_an_activation_is_refused_by_name(tmp_path: Path, sd1: Path) -> None:
    net = hypernetwork(tmp_path / "hyper.pt", "relu")
    message = refused(tmp_path, sd1 / "sd1.safetensors", net).value.message
    assert "hyper.pt cannot be collapsed" in message
    assert "relu" in message


# --- the way back ------------------------------------------------------------------------------------------------------


def whole(tmp_path: Path, sd1: Path) -> tuple[Path, Path]:
    """A base and an adapter of small integers over powers of two: sums in fp32 are exact (and no zero is negative)."""
    tensors = {
        key: (value * 8).round() / 8 + 0.0 if value.is_floating_point() else value
        for key, value in load_file(sd1 / "sd1.safetensors").items()
    }
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt", "modelspec.title": "exact"})
    up, down = (torch.randint(-4, 5, shape).float() / 8 for shape in ((16, 2), (2, 16)))
    return tmp_path / "base.safetensors", one(
        tmp_path / "style.safetensors", "lora", {"up": up, "down": down}, alpha=1.0
    )


def test_undo_gives_the_very_bytes_of_the_base_where_sums_are_exact(tmp_path: Path, sd1: Path) -> None:
    base, style = whole(tmp_path, sd1)
    run(base, Input(path=str(style), strength=0.5), out=tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() != base.read_bytes()
    done = run(tmp_path / "out.safetensors", out=tmp_path / "again.safetensors", undo=True, compare=base)
    assert (done.restored, done.compared and done.compared.equal) == (True, True)
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


def test_undo_takes_adapters_that_are_named(tmp_path: Path, sd1: Path) -> None:
    base, style = whole(tmp_path, sd1)
    run(base, Input(path=str(style), strength=0.5), out=tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    run(
        tmp_path / "bare.safetensors",
        Input(path=str(style), strength=0.5),
        out=tmp_path / "again.safetensors",
        undo=True,
    )
    again, before = load_file(tmp_path / "again.safetensors"), load_file(base)
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_undo_of_a_folder_finds_its_recipe(tmp_path: Path, sd1: Path) -> None:
    path, _ = lora(tmp_path / "style.safetensors")
    run(sd1 / "sd1", path, out=tmp_path / "out")
    done = run(tmp_path / "out", out=tmp_path / "again", undo=True, compare=sd1 / "sd1")
    assert done.compared is not None
    assert done.compared.worst < 1e-6
    assert not (tmp_path / "again/hubtool.parents.json").exists() or done.recipe.parameters["undo"]


def test_undo_counts_the_values_that_rounding_keeps_from_coming_back(tmp_path: Path, sd1: Path) -> None:
    save_file(
        {key: value.half() for key, value in load_file(sd1 / "sd1.safetensors").items()}, tmp_path / "half.safetensors"
    )
    path, _ = lora(tmp_path / "style.safetensors")
    run(tmp_path / "half.safetensors", path, out=tmp_path / "out.safetensors")
    done = run(
        tmp_path / "out.safetensors",
        out=tmp_path / "again.safetensors",
        undo=True,
        compare=tmp_path / "half.safetensors",
    )
    key = f"{LDM[Q]}.weight"
    truth = int((load_file(tmp_path / "again.safetensors")[key] != load_file(tmp_path / "half.safetensors")[key]).sum())
    assert done.compared is not None
    assert done.compared.differing == ({key: truth} if truth else {})
    assert done.restored is (truth == 0)


def test_undo_without_a_recipe_or_the_adapter_says_what_is_missing(tmp_path: Path, sd1: Path) -> None:
    with pytest.raises(NotFound, match="no recipe of a collapse"):
        run(sd1 / "sd1.safetensors", out=tmp_path / "x.safetensors", undo=True)
    path, _ = lora(tmp_path / "style.safetensors")
    run(sd1 / "sd1.safetensors", path, out=tmp_path / "out.safetensors")
    path.unlink()
    with pytest.raises(NotFound, match=r"style\.safetensors"):
        run(tmp_path / "out.safetensors", out=tmp_path / "x.safetensors", undo=True)


# --- the command -------------------------------------------------------------------------------------------------------


def hubtool(*args: str | Path) -> Any:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="hubtool")


def test_the_command_collapses_checks_and_undoes(tmp_path: Path, sd1: Path) -> None:
    base, style = whole(tmp_path, sd1)
    out, again = tmp_path / "sub/out.safetensors", tmp_path / "again.safetensors"
    done = hubtool("collapse", base, f"{style}=0.5", "-o", out, "--check", "--family", "sd1")
    assert done.exit_code == 0, done.output
    assert "1 of 1 modules matched" in done.stdout
    assert "check: passed" in done.stdout
    back = hubtool(
        "collapse", out, "--undo", "-o", again, "--compare", base, "--search", tmp_path, "--family", "sd1", "--json"
    )
    document = json.loads(back.stdout)
    assert (document["restored"], document["compare"]["differing"], document["undone"]) == (True, 0, True)


def test_a_dry_run_writes_nothing_and_an_existing_output_is_kept(tmp_path: Path, sd1: Path) -> None:
    path, _ = lora(tmp_path / "style.safetensors")
    done = hubtool(
        "collapse",
        sd1 / "sd1.safetensors",
        path,
        "-o",
        tmp_path / "out.safetensors",
        "--dry-run",
        "--json",
        "--family",
        "sd1",
    )
    assert json.loads(done.stdout)["adapters"][0]["matched"] == 1
    assert not (tmp_path / "out.safetensors").exists()
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        run(sd1 / "sd1.safetensors", path, out=tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


def test_an_output_never_replaces_an_input(tmp_path: Path, sd1: Path) -> None:
    path, _ = lora(tmp_path / "style.safetensors")
    with pytest.raises(UsageProblem, match="the output is an input"):
        run(sd1 / "sd1.safetensors", path, out=path, force=True)


def test_lineage_goes_into_the_library(tmp_path: Path, sd1: Path) -> None:
    path, _ = lora(tmp_path / "style.safetensors")
    assert hubtool("scan", tmp_path, sd1).exit_code == 0
    run(sd1 / "sd1.safetensors", path, out=tmp_path / "out.safetensors")
    shown = json.loads(hubtool("show", tmp_path / "out.safetensors", "--json").stdout)
    assert [edge["op"] for edge in shown["lineage"]["parents"]] == ["collapse", "collapse"]


def test_metadata_of_all_inputs_is_merged(tmp_path: Path, sd1: Path) -> None:
    made = tiny.make(pipeline("sd1"), ("unet",), only=(Q,), family="sd1").adapter
    style = write(made, tmp_path / "style.safetensors", **{
        "modelspec.license": "cc-by-nc-4.0", "modelspec.trigger_phrase": "zwx, style", "ss_steps": "100", "sshs_model_hash": "0" * 64,
    })  # fmt: skip
    run(sd1 / "sd1.safetensors", style, out=tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        said = file.metadata()
    assert said["modelspec.license"] == "openrail, cc-by-nc-4.0"
    assert said["modelspec.trigger_phrase"] == "zwx, style"
    assert said["modelspec.merged_from"] == "tiny, style.safetensors"
    assert "ss_steps" not in said
    assert "sshs_model_hash" not in said
    first, second = json.loads(said["hubtool.parents"])
    assert (first["name"], second["metadata"]["ss_steps"]) == ("sd1.safetensors", "100")


def test_the_base_reports_its_components(sd1: Path) -> None:
    base = Base(open_file(sd1 / "sd1.safetensors"), "sd1")
    assert set(base.components) == {"unet", "vae", "text_encoder"}
    assert base.find("unet", "no.such.module") is None
