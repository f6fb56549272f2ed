"""Custom Diffusion in tiny pipelines: the file's weights, judged by diffusers' own processors; tokens, strengths, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.actions.load import load, save, unload
from hubtool.errors import LoadMismatch, ShapeMismatch, Unsupported
from hubtool.pipelines.schedules import linear, scheduled
from tests.support import kinds, tiny

PROJECTIONS = (".attn2.to_k.weight", ".attn2.to_v.weight")


@pytest.fixture
def pipe() -> Any:
    return kinds.wide()


def trained(pipe: Any, *, whole: bool = False, seed: int = 3) -> dict[str, torch.Tensor]:
    """New keys and values, or the whole cross attention with the bias of its output."""
    state = pipe.unet.state_dict()
    names = [name for name in state if ".attn2." in name and (whole or name.endswith(PROJECTIONS))]
    return {name: kinds.values(*state[name].shape, seed=seed + i, scale=0.1) for i, name in enumerate(names)}


def cmu(path: Path, weights: dict[str, Any], **more: Any) -> Path:
    return kinds.saved(path, {"unet": weights, **more})


def processors(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As ``train_custom_diffusion.py`` saves its processors, with the empty ones of the self attention."""
    tree: dict[str, Any] = {}
    for name, value in weights.items():
        path, _, rest = name.partition(".attn2.")
        role, _, parameter = rest.partition(".")
        tree.setdefault(f"{path}.attn1.processor", {})
        tree[f"{path}.attn2.processor.{role}_custom_diffusion.{parameter}"] = value
    return tree


@pytest.mark.parametrize("whole", [False, True], ids=["keys and values", "all of attn2"])
def test_at_strength_1_the_weights_are_the_files_own_bits(pipe: Any, tmp_path: Path, whole: bool) -> None:
    new, before = trained(pipe, whole=whole), tiny.weights(pipe)
    report = load(pipe, cmu(tmp_path / "delta.bin", new))
    state = pipe.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in new.items())
    assert all(torch.equal(state[name], value) for name, value in before["unet"].items() if name not in new)
    assert {f"{path}.weight" for path in report.modules["unet"]} == {n for n in new if n.endswith("weight")}
    assert report.collapsed
    assert report.kind == "custom_diffusion"
    unload(pipe, "delta")
    assert tiny.same(tiny.weights(pipe), before)


def test_the_picture_is_that_of_diffusers_own_processors(tmp_path: Path) -> None:
    """``load_attn_procs`` with ``_pipeline``: as documented, without, it is a silent no-op (diffusers 7261)."""
    theirs, mine = kinds.wide(), kinds.wide()
    path = kinds.saved(tmp_path / "pytorch_custom_diffusion_weights.bin", processors(trained(theirs, whole=True)))
    plain = kinds.picture(theirs)
    theirs.unet.load_attn_procs(torch.load(path, weights_only=True), _pipeline=theirs)
    kinds_of = {type(one).__name__ for one in theirs.unet.attn_processors.values()}
    assert any(name.startswith("CustomDiffusion") for name in kinds_of)
    expected = kinds.picture(theirs)
    load(mine, path)
    torch.testing.assert_close(kinds.picture(mine), expected, atol=2e-5, rtol=2e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_a_strength_lies_between_the_base_and_the_file(pipe: Any, tmp_path: Path) -> None:
    new, base = trained(pipe), {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    load(pipe, cmu(tmp_path / "delta.bin", new), strength=0.3)
    state = pipe.unet.state_dict()
    for name, value in new.items():
        torch.testing.assert_close(state[name].double(), 0.7 * base[name].double() + 0.3 * value.double())


def test_compressed_factors_are_added(pipe: Any, tmp_path: Path) -> None:
    name = f"{kinds.CROSS}.to_k.weight"
    base = pipe.unet.state_dict()[name].clone()
    u, v = kinds.values(len(base), 2, scale=0.1), kinds.values(2, kinds.WIDTH, seed=1, scale=0.1)
    report = load(pipe, cmu(tmp_path / "compressed_delta.bin", {name: {"u": u, "v": v}}), strength=0.5, collapse=True)
    assert report.modules == {"unet": (f"{kinds.CROSS}.to_k",)}
    torch.testing.assert_close(pipe.unet.state_dict()[name].double(), base.double() + 0.5 * u.double() @ v.double())


def test_names_of_compvis_reach_the_same_modules(pipe: Any, tmp_path: Path) -> None:
    stem = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2"
    new = kinds.values(16, kinds.WIDTH)
    path = kinds.saved(tmp_path / "delta.ckpt", {"state_dict": {f"{stem}.to_k.weight": new}})
    load(pipe, path)
    assert torch.equal(pipe.unet.get_submodule(f"{kinds.CROSS}.to_k").weight, new)


def test_its_tokens_come_and_go_with_it(pipe: Any, tmp_path: Path) -> None:
    vector = kinds.values(kinds.WIDTH, seed=5)
    path = cmu(tmp_path / "delta.bin", trained(pipe), modifier_token={"<new1>": vector})
    words, before = pipe.tokenizer.get_vocab(), tiny.weights(pipe)
    report = load(pipe, path)
    assert report.tokens == {"text_encoder": ("<new1>",)}
    row = pipe.tokenizer.convert_tokens_to_ids("<new1>")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[row], vector)
    unload(pipe, "delta")
    assert pipe.tokenizer.get_vocab() == words
    assert tiny.same(tiny.weights(pipe), before)


def test_tokens_in_files_of_their_own_are_found_beside_it(pipe: Any, tmp_path: Path) -> None:
    path = kinds.saved(tmp_path / "pytorch_custom_diffusion_weights.bin", processors(trained(pipe)))
    kinds.saved(tmp_path / "<new1>.bin", {"<new1>": kinds.values(kinds.WIDTH)})
    kinds.saved(tmp_path / "<new2>.bin", {"<new2>": kinds.values(kinds.WIDTH, seed=1)})
    assert load(pipe, path).tokens == {"text_encoder": ("<new1>", "<new2>")}
    unload(pipe, "pytorch_custom_diffusion_weights")
    assert load(pipe, path, token=["<cat>", "<dog>"], name="mine").tokens == {"text_encoder": ("<cat>", "<dog>")}


def test_with_another_and_a_lora_the_differences_add_up_in_any_order(pipe: Any, tmp_path: Path) -> None:
    first, second = trained(pipe), trained(pipe, seed=90)
    one, two = cmu(tmp_path / "one.bin", first), cmu(tmp_path / "two.bin", second)
    made = tiny.make(pipe, ["unet"], only="attn2.to_k")
    base = {name: value.double() for name, value in tiny.weights(pipe)["unet"].items()}
    for source in (made.adapter, one, two):
        load(pipe, source, strength=0.5)
    found = tiny.effective(pipe)["unet"]
    for name in first:
        wanted = base[name] + 0.5 * (first[name] - base[name]) + 0.5 * (second[name] - base[name])
        if ".to_k." in name:
            wanted = wanted + made.delta(("unet", name.removesuffix(".weight")), 0.5)
        torch.testing.assert_close(found[name].double(), wanted, atol=1e-6, rtol=1e-6)


def test_a_schedule_goes_from_the_file_to_the_base(pipe: Any, tmp_path: Path) -> None:
    name = f"{kinds.CROSS}.to_k.weight"
    new, base = trained(pipe)[name], pipe.unet.state_dict()[name].clone()
    load(pipe, cmu(tmp_path / "delta.bin", {name: new}))
    with scheduled(pipe, {"delta": linear(1.0, 0.0)}, steps=3) as composition:
        for step, share in enumerate((1.0, 0.5, 0.0)):
            composition.at(step)
            torch.testing.assert_close(pipe.unet.state_dict()[name], base + share * (new - base))
    assert torch.equal(pipe.unet.state_dict()[name], new)


def test_a_whole_text_encoder_in_the_file_is_refused_unless_it_is_left_out(pipe: Any, tmp_path: Path) -> None:
    state = {"text_model.final_layer_norm.weight": kinds.values(kinds.WIDTH)}
    path = cmu(tmp_path / "delta.bin", trained(pipe), text_encoder=state)
    before = tiny.weights(pipe)
    with pytest.raises(Unsupported, match="a whole text_encoder"):
        load(pipe, path)
    assert tiny.same(tiny.weights(pipe), before)
    assert load(pipe, path, components=["unet"]).modules.keys() == {"unet"}


def test_another_width_is_refused_before_anything_changes(tmp_path: Path) -> None:
    pipe, before = tiny.build("sd1"), tiny.weights(tiny.build("sd1"))
    with pytest.raises(LoadMismatch, match="is for sd2"):
        load(pipe, cmu(tmp_path / "delta.bin", {f"{kinds.CROSS}.to_k.weight": kinds.values(16, 1024)}))
    with pytest.raises(ShapeMismatch, match="do not fit"):
        load(pipe, cmu(tmp_path / "delta.bin", {f"{kinds.CROSS}.to_k.weight": kinds.values(16, 768)}))
    assert tiny.same(tiny.weights(pipe), before)


def test_it_can_be_saved_as_replaced_weights(pipe: Any, tmp_path: Path) -> None:
    new = trained(pipe)
    load(pipe, cmu(tmp_path / "delta.bin", new))
    path = save(pipe, "delta", tmp_path / "out.safetensors", layout="comfy")
    other = kinds.wide()
    load(other, path)
    torch.testing.assert_close({n: other.unet.state_dict()[n] for n in new}, new)
