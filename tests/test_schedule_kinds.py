"""Schedules of what has no layers, beside adapters that stay, and in other precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hubtool.adapters.ir import Adapter
from hubtool.pipelines import load, unload
from hubtool.pipelines.schedules import linear, scheduled
from tests.support import tiny
from tests.support.schedules import FF, HADA, STEPS, Q, flux, loha, patch, rand, watched, weight


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def pipe() -> Any:
    return tiny.build("sd1")


def test_a_collapsed_adapter_follows_its_schedule_beside_others_that_stay(pipe: Any) -> None:
    base, before = weight(pipe).double(), tiny.weights(pipe)
    made, fixed = tiny.make(pipe, ["unet"], only="attn1"), tiny.make(pipe, ["unet"], only="attn1", seed=4)
    load(pipe, loha(), name="hada", strength=0.7)
    load(pipe, fixed.adapter, name="fixed", strength=0.2, collapse=True)
    loaded = tiny.weights(pipe)
    change = (HADA["hada_w1_a"].double() @ HADA["hada_w1_b"].double()) * (
        HADA["hada_w2_a"].double() @ HADA["hada_w2_b"].double()
    )
    curve = [0.7, -1.0, 0.0, 2.0]
    with scheduled(pipe, [("hada", curve), (made.adapter, linear(0.0, 3.0))], steps=STEPS):
        seen = watched(pipe, lambda: weight(pipe))
    for step, value in enumerate(seen):
        expected = base + curve[step] * change + made.delta(("unet", Q), step) + fixed.delta(("unet", Q), 0.2)
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=4e-6)
    assert tiny.same(tiny.weights(pipe), loaded)
    unload(pipe, "hada")
    unload(pipe, "fixed")
    assert tiny.same(tiny.weights(pipe), before)


KINDS: dict[str, tuple[str, str, dict[str, torch.Tensor], float | None]] = {
    "LoKr": ("lokr", FF, {"lokr_w1": rand(4, 2), "lokr_w2": rand(4, 32)}, None),
    "IA3": ("ia3", FF, {"ia3": rand(16, 1), "on_input": torch.tensor(False)}, None),
    "OFT": ("oft", Q, {"oft_blocks": rand(4, 4, 4)}, 0.0),
    "GLoRA": ("glora", Q, {"a1": rand(16, 2), "a2": rand(2, 16, seed=9), "b1": rand(16, 2, seed=3), "b2": rand(2, 16, seed=5)}, 2.0),
    "DoRA by output": ("lora", Q, {"up": rand(16, 2), "down": rand(2, 16), "dora_scale": rand(16, 1).abs() + 0.5}, 1.0),
    "DoRA by input": ("lora", Q, {"up": rand(16, 2), "down": rand(2, 16), "dora_scale": rand(1, 16).abs() + 0.5}, 1.0),
    "full with a bias": ("full", FF, {"diff": rand(16, 64), "diff_b": rand(16)}, None),
    "a bias where there was none": ("lora", Q, {"up": rand(16, 2), "down": rand(2, 16), "bias": rand(16)}, 1.0),
    "norm": ("norm", "conv_norm_out", {"w_norm": rand(16)}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_without_layers_change_by_their_own_rule(pipe: Any, kind: str) -> None:
    algorithm, path, tensors, alpha = KINDS[kind]
    own, names = patch(algorithm, tensors, alpha), list(pipe.unet.state_dict())
    old, before = weight(pipe, path), tiny.weights(pipe)
    with scheduled(pipe, [(Adapter(None, {("unet", path): own}), [1.0, 0.3, 0.0, -0.5])], steps=STEPS):
        seen = watched(pipe, lambda: (weight(pipe, path), pipe.unet.get_submodule(path).bias))
        for strength, (value, bias) in zip([1.0, 0.3, 0.0, -0.5], seen, strict=True):
            expected = old.double() + strength * own.delta(old).double().reshape(old.shape)
            torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
            assert (bias is None) == (path == Q and "bias" not in kind)
    assert tiny.same(tiny.weights(pipe), before)
    assert list(pipe.unet.state_dict()) == names


def test_a_bias_follows_too(pipe: Any) -> None:
    old, change = weight(pipe, FF, "bias"), rand(16)
    adapter = Adapter(None, {("unet", FF): patch("full", {"diff_b": change})})
    with scheduled(pipe, [(adapter, [2.0, -1.0])], steps=2):
        seen = watched(pipe, lambda: weight(pipe, FF, "bias"), steps=2)
    torch.testing.assert_close(torch.stack(seen), torch.stack([old + 2 * change, old - change]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_fp32_and_rounded_once(pipe: Any, dtype: torch.dtype) -> None:
    pipe.unet.to(dtype)
    one, two = (tiny.make(pipe, ["unet"], only=Q, seed=seed) for seed in (1, 2))
    old, before = weight(pipe).double(), tiny.weights(pipe)
    with scheduled(pipe, [(one.adapter, 0.7), (two.adapter, [1.0, -0.3])], steps=2) as composition:
        for step, strength in enumerate([1.0, -0.3]):
            composition.at(step)
            exact = (old + one.delta(("unet", Q), 0.7) + two.delta(("unet", Q), strength)).to(dtype)
            assert (weight(pipe) == exact).float().mean() > 0.98
    assert tiny.same(tiny.weights(pipe), before)


def test_a_pipeline_that_is_cast_inside_gets_its_own_weights_back_in_the_new_dtype(pipe: Any) -> None:
    old = weight(pipe)
    with scheduled(pipe, [(tiny.make(pipe, ["unet"], only="attn").adapter, [1.0, 0.5])], steps=2) as composition:
        pipe.unet.half()
        composition.at(1)
        assert weight(pipe).dtype == torch.float16
    assert torch.equal(weight(pipe), old.half())


def test_a_fused_weight_that_cannot_be_cut_changes_in_all_its_parts() -> None:
    pipe, other = flux(), flux()
    factors = {"up": rand(48, 2), "down": rand(2, 16), "dora_scale": rand(1, 16).abs() + 0.5}
    adapter = Adapter("flux1", {("transformer", "double_blocks.0.img_attn.qkv"): patch("lora", factors, 1.0)})
    paths = [f"transformer_blocks.0.attn.to_{which}" for which in "qkv"]
    load(other, adapter, strength=0.4, name="inside")
    before = tiny.weights(pipe)
    with scheduled(pipe, [(adapter, [0.0, 0.4])], steps=2) as composition:
        assert tiny.same(tiny.weights(pipe), before)
        composition.at(1)
        for path in paths:
            torch.testing.assert_close(weight(pipe, path), weight(other, path), rtol=1e-6, atol=1e-6)
        assert not torch.equal(weight(pipe, paths[2]), before["transformer"][f"{paths[2]}.weight"])
    assert tiny.same(tiny.weights(pipe), before)
