"""What PEFT has no layer for goes into the weights and comes out of them again, bit for bit: against arithmetic done by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hubtool.actions.load import load, save, unload
from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.registry import make
from hubtool.errors import BadValues, HubtoolError, LoadMismatch, ShapeMismatch, Unsupported, UsageProblem
from hubtool.pipelines import adapter_of, weights
from tests.support import tiny

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 16 x 16, no bias
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"  # 16 x 64, a bias
CONV = "down_blocks.0.resnets.0.conv1"  # 16 x 16 x 3 x 3, a bias
NORM = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"
GROUPED = "conv_norm_out"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pipe() -> Any:
    return tiny.build("sd1")


def rand(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def patch(algorithm: str, tensors: Tensors, alpha: float | None = None, **flavour: str) -> Patch:
    return make(algorithm, {role: tiny.literal(tensor) for role, tensor in tensors.items()}, alpha, **flavour)


def one(algorithm: str, path: str, tensors: Tensors, alpha: float | None = None) -> Adapter:
    return Adapter(None, {("unet", path): patch(algorithm, tensors, alpha)})


def loha(out: int, inside: int, rank: int = 3, seed: int = 1) -> Tensors:
    parts = {f"hada_w{i}_{side}": (out, rank) if side == "a" else (rank, inside) for i in "12" for side in "ab"}
    return {role: rand(*shape, seed=seed + i) for i, (role, shape) in enumerate(parts.items())}


def weight(pipe: Any, path: str, parameter: str = "weight") -> torch.Tensor:
    return getattr(pipe.unet.get_submodule(path), parameter).detach().clone()


def cayley(blocks: torch.Tensor) -> torch.Tensor:
    """Block-diagonal R = (I + Q)(I - Q)^-1 of skew-symmetric Q = B - B^T."""
    q = blocks.double() - blocks.double().transpose(1, 2)
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return torch.block_diag(*((eye + one) @ torch.linalg.inv(eye - one) for one in q))


HADA, HADA_CONV, BLOCKS = loha(16, 16), loha(16, 144), rand(4, 4, 4)
KRON = {"lokr_w1": rand(4, 2), "lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 32)}
GLORA = {"a1": rand(16, 2), "a2": rand(2, 16, seed=9), "b1": rand(16, 2, seed=3), "b2": rand(2, 16, seed=5)}
LORA = {"up": rand(16, 2), "down": rand(2, 16)}
INPUTS = rand(1, 16).abs() + 0.5


def hada(t: Tensors) -> torch.Tensor:
    w1, w2 = (t[f"hada_w{i}_a"].double() @ t[f"hada_w{i}_b"].double() for i in "12")
    return w1 * w2


def directed(w: torch.Tensor) -> torch.Tensor:
    moved = w + 0.5 * LORA["up"].double() @ LORA["down"].double()
    return INPUTS.double() * moved / moved.norm(dim=0, keepdim=True) - w


# algorithm, module, tensors, alpha, the change of the weight (fp64 in, fp64 out) at strength 1
KINDS: dict[str, tuple[str, str, Tensors, float | None, Callable[[torch.Tensor], torch.Tensor]]] = {
    "LoHa": ("loha", Q, HADA, 1.5, lambda w: 0.5 * hada(HADA)),
    "LoHa of a convolution": ("loha", CONV, HADA_CONV, None, lambda w: hada(HADA_CONV).reshape(w.shape)),
    "LoKr": ("lokr", FF, KRON, 4.0, lambda w: 2.0 * torch.kron(KRON["lokr_w1"].double(), KRON["lokr_w2_a"].double() @ KRON["lokr_w2_b"].double())),
    "LoKr without alpha": ("lokr", FF, {"lokr_w1": rand(4, 2), "lokr_w2": rand(4, 32)}, 1e10, lambda w: torch.kron(rand(4, 2).double(), rand(4, 32).double())),
    "GLoRA": ("glora", Q, GLORA, 2.0, lambda w: GLORA["b1"].double() @ GLORA["b2"].double() + w @ GLORA["a1"].double() @ GLORA["a2"].double()),
    "IA3 on rows": ("ia3", FF, {"ia3": rand(16, 1), "on_input": torch.tensor(False)}, None, lambda w: w * rand(16, 1).double()),
    "IA3 on columns": ("ia3", FF, {"ia3": rand(1, 64), "on_input": torch.tensor(True)}, None, lambda w: w * rand(1, 64).double()),
    "OFT": ("oft", Q, {"oft_blocks": BLOCKS}, 0.0, lambda w: cayley(BLOCKS).T @ w - w),
    "full": ("full", CONV, {"diff": rand(16, 16, 3, 3)}, None, lambda w: rand(16, 16, 3, 3).double()),
    "norm": ("norm", NORM, {"w_norm": rand(16)}, None, lambda w: rand(16).double()),
    "norm of groups": ("norm", GROUPED, {"w_norm": rand(16)}, None, lambda w: rand(16).double()),
    "DoRA per input": ("lora", Q, {**LORA, "dora_scale": INPUTS}, 1.0, directed),
    "sparse": ("sparse", Q, {"bias_indices": torch.tensor([[0, 15], [3, 2]]), "bias_values": torch.tensor([0.5, -2.0]), "bias_size": torch.tensor([16, 16])}, None,
               lambda w: torch.zeros_like(w).index_put((torch.tensor([0, 15]), torch.tensor([3, 2])), torch.tensor([0.5, -2.0], dtype=torch.float64))),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_becomes_what_the_formula_says_and_comes_back_bit_for_bit(pipe: Any, kind: str) -> None:
    algorithm, path, tensors, alpha, formula = KINDS[kind]
    before, picture = tiny.weights(pipe), tiny.picture(pipe)
    report = load(pipe, one(algorithm, path, tensors, alpha), strength=0.75, name="style")
    assert report.collapsed
    assert report.modules == {"unet": (path,)}
    changed = {
        name for name, value in tiny.weights(pipe)["unet"].items() if not torch.equal(value, before["unet"][name])
    }
    assert changed == {f"{path}.weight"}
    old = before["unet"][f"{path}.weight"].double()
    torch.testing.assert_close(weight(pipe, path).double(), old + 0.75 * formula(old), rtol=1e-5, atol=1e-6)
    unload(pipe, "style")
    assert tiny.same(tiny.weights(pipe), before)
    assert torch.equal(tiny.picture(pipe), picture)


def test_a_replaced_weight_is_what_it_is_at_any_strength(pipe: Any) -> None:
    value = rand(16)
    load(pipe, one("set", NORM, {"set_weight": value}), strength=0.25)
    torch.testing.assert_close(weight(pipe, NORM), value)


def test_a_bias_changes_beside_its_weight(pipe: Any) -> None:
    before, bias = weight(pipe, FF, "bias"), rand(16)
    report = load(pipe, one("full", FF, {"diff": rand(16, 64), "diff_b": bias}), strength=2.0, name="style")
    assert report.modules == {"unet": (FF,)}
    torch.testing.assert_close(weight(pipe, FF, "bias"), before + 2 * bias)
    unload(pipe, "style")
    assert torch.equal(weight(pipe, FF, "bias"), before)


def test_a_bias_alone_leaves_the_weight_untouched(pipe: Any) -> None:
    before, bias = weight(pipe, FF), weight(pipe, FF, "bias")
    load(pipe, one("full", FF, {"diff_b": rand(16)}))
    assert torch.equal(weight(pipe, FF), before)
    torch.testing.assert_close(weight(pipe, FF, "bias"), bias + rand(16))


def test_a_module_without_a_bias_gets_one_and_loses_it_again(pipe: Any) -> None:
    names = list(pipe.unet.state_dict())
    load(pipe, one("lora", Q, {**LORA, "bias": rand(16)}, 1.0), strength=3.0, name="style")
    torch.testing.assert_close(weight(pipe, Q, "bias"), 3.0 * 0.5 * rand(16))
    assert not torch.allclose(tiny.picture(pipe), tiny.picture(tiny.build("sd1")), atol=1e-4)
    unload(pipe, "style")
    assert pipe.unet.get_submodule(Q).bias is None
    assert list(pipe.unet.state_dict()) == names


def test_a_module_that_cannot_have_a_bias_is_named(pipe: Any) -> None:
    embedding = "text_model.embeddings.token_embedding"
    adapter = Adapter(None, {("text_encoder", embedding): patch("full", {"diff": rand(514, 32), "diff_b": rand(514)})})
    with pytest.raises(Unsupported, match="Embedding cannot have a bias"):
        load(pipe, adapter)


def several() -> dict[str, tuple[Adapter, float]]:
    """Three adapters on one weight, and what only one of them changes."""
    hada, kron = patch("loha", HADA, 1.5), patch("lokr", KRON, 4.0)
    scale = patch("ia3", {"ia3": rand(16, 1), "on_input": torch.tensor(False)})
    return {
        "loha": (Adapter(None, {("unet", Q): hada, ("unet", CONV): patch("loha", HADA_CONV)}), 0.5),
        "ia3": (Adapter(None, {("unet", Q): scale, ("unet", FF): scale}), -1.25),
        "lokr": (Adapter(None, {("unet", FF): kron}), 2.0),
    }


@pytest.mark.parametrize("order", list(itertools.permutations(["loha", "ia3", "lokr"])), ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_leave_in_any_order_as_if_they_had_never_come(order: tuple[str, ...], dtype: torch.dtype) -> None:
    pipe, adapters = tiny.build("sd1"), several()
    pipe.unet.to(dtype)
    base = tiny.weights(pipe)
    for name, (adapter, strength) in adapters.items():
        load(pipe, adapter, name=name, strength=strength)
    for gone in range(1, 4):
        unload(pipe, order[gone - 1])
        other = tiny.build("sd1")
        other.unet.to(dtype)
        for name in (name for name in adapters if name not in order[:gone]):
            load(other, adapters[name][0], name=name, strength=adapters[name][1])
        assert tiny.same(tiny.weights(pipe), tiny.weights(other))
    assert tiny.same(tiny.weights(pipe), base)
    assert not weights.ledger(pipe.unet).kept


def test_half_precision_weights_are_summed_in_fp32_and_rounded_once(pipe: Any) -> None:
    pipe.unet.to(torch.bfloat16)
    old = weight(pipe, FF).float()
    load(pipe, one("lokr", FF, KRON, 4.0), strength=0.7, name="a")
    load(pipe, one("full", FF, {"diff": rand(16, 64)}), strength=-0.3, name="b")
    total = old + 0.7 * patch("lokr", KRON, 4.0).delta(old)
    assert torch.equal(weight(pipe, FF), (total + -0.3 * rand(16, 64)).to(torch.bfloat16))


def test_a_pipeline_that_is_cast_in_between_keeps_the_precision_of_its_originals(pipe: Any) -> None:
    old = weight(pipe, FF)
    load(pipe, one("lokr", FF, KRON, 4.0), name="a")
    pipe.unet.half()
    load(pipe, one("full", FF, {"diff": rand(16, 64)}), name="b")
    total = old + patch("lokr", KRON, 4.0).delta(old)
    assert torch.equal(weight(pipe, FF), (total + rand(16, 64)).half())
    unload(pipe, "a")
    unload(pipe, "b")
    assert torch.equal(weight(pipe, FF), old.half())


def test_layers_and_collapsed_adapters_live_in_the_same_module(pipe: Any) -> None:
    before, made = tiny.weights(pipe), tiny.make(pipe, ["unet"], only="attn1.to_q")
    old = weight(pipe, Q).double()
    load(pipe, made.adapter, name="layers", strength=0.5)
    load(pipe, one("loha", Q, HADA, 1.5), name="inside")
    both = old + made.delta(("unet", Q), 0.5) + 0.5 * hada(HADA)
    torch.testing.assert_close(tiny.effective(pipe)["unet"][f"{Q}.weight"].double(), both, rtol=1e-5, atol=1e-6)
    unload(pipe, "layers")
    torch.testing.assert_close(weight(pipe, Q).double(), old + 0.5 * hada(HADA), rtol=1e-5, atol=1e-6)
    load(pipe, made.adapter, name="again")
    unload(pipe, "inside")
    unload(pipe, "again")
    assert tiny.same(tiny.weights(pipe), before)


def test_a_low_rank_adapter_is_collapsed_when_asked_and_acts_as_its_layers_do(pipe: Any) -> None:
    made, other = tiny.make(pipe, alphas=(1.0, None), ranks=(2, 3)), tiny.build("sd1")
    report = load(pipe, made.adapter, strength=0.8, collapse=True)
    assert (report.collapsed, report.to_json()["collapsed"]) == (True, True)
    assert [finding.message for finding in report.findings] == ["put into the weights: as asked"]
    assert not any("lora_" in name for name in pipe.unet.state_dict())
    load(other, made.adapter, strength=0.8)
    torch.testing.assert_close(tiny.picture(pipe), tiny.picture(other), rtol=1e-4, atol=1e-4)


def test_what_is_not_wanted_in_the_weights_is_refused_with_the_way_out(pipe: Any) -> None:
    adapter = one("loha", Q, HADA, 1.5)
    with pytest.raises(Unsupported, match="no layer for loha") as caught:
        load(pipe, adapter, collapse=False)
    assert "collapse=True" in str(caught.value.hint)
    with pytest.raises(Unsupported, match="no layer for loha") as caught:
        load(pipe, adapter, trainable=True)
    assert "only low-rank layers" in str(caught.value.hint)
    with pytest.raises(UsageProblem, match="no parameters to train"):
        load(pipe, tiny.make(pipe, ["unet"], only=Q).adapter, collapse=True, trainable=True)


class Params4bit(torch.nn.Parameter):
    """Named like bitsandbytes' packed parameter."""


def packed(pipe: Any) -> None:
    module = pipe.unet.get_submodule(Q)
    module.weight = Params4bit(module.weight.data)


def small(pipe: Any) -> None:
    pipe.unet.get_submodule(Q).to(torch.float8_e4m3fn)


def away(pipe: Any) -> None:
    pipe.unet.get_submodule(Q).to("meta")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (packed, "quantised.*Params4bit"),
        (small, "quantised.*float8_e4m3fn"),
        (away, "not in memory"),
    ],
)
def test_weights_that_cannot_take_it_in_are_named(pipe: Any, prepare: Callable[[Any], None], words: str) -> None:
    prepare(pipe)
    with pytest.raises(Unsupported, match=rf"1 weights.*unet.{Q}.*{words}") as caught:
        load(pipe, one("loha", Q, HADA, 1.5))
    assert "before quantising" in str(caught.value.hint)


NAN = torch.full((16, 3), float("nan"))
REFUSED: dict[str, tuple[str, Tensors, float | None, type[HubtoolError], str]] = {
    "NaN": ("loha", {**HADA, "hada_w1_a": NAN}, 1.0, BadValues, "hada_w1_a of unet.*NaN"),
    "alpha": ("loha", HADA, float("inf"), BadValues, "alpha of unet"),
    "another width": ("loha", loha(16, 24), 1.0, ShapeMismatch, "16 x 24, the module's is 16 x 16"),
    "a rotation of another width": ("oft", {"oft_blocks": rand(5, 4, 4)}, 0.0, ShapeMismatch, "rows|weight"),
    "overflow": ("full", {"diff": torch.full((16, 16), 3e38)}, None, BadValues, f"with bad in it, {Q}.weight holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_leaves_every_weight_as_it_was(pipe: Any, what: str) -> None:
    algorithm, tensors, alpha, error, words = REFUSED[what]
    before = tiny.weights(pipe)
    first: dict[ModuleKey, Patch] = {
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"): patch("full", {"diff": rand(128, 32)})
    }
    strength = 10.0 if what == "overflow" else 1.0
    bad = Adapter(None, {**first, ("unet", FF): patch("lokr", KRON), ("unet", Q): patch(algorithm, tensors, alpha)})
    with pytest.raises(error, match=words):
        load(pipe, bad, strength=strength, name="bad")
    assert tiny.same(tiny.weights(pipe), before)
    with pytest.raises(UsageProblem, match="nothing named"):
        unload(pipe, "bad")


def test_names_are_shared_with_layers(pipe: Any) -> None:
    load(pipe, one("loha", Q, HADA), name="style")
    with pytest.raises(UsageProblem, match="is loaded already"):
        load(pipe, tiny.make(pipe, ["unet"], only=Q).adapter, name="style")
    assert load(pipe, one("loha", FF, loha(16, 64))).name == "adapter"
    assert load(pipe, one("loha", FF, loha(16, 64))).name == "adapter_2"


def test_modules_that_do_not_exist_are_listed(pipe: Any) -> None:
    with pytest.raises(LoadMismatch, match="1 of 1 modules are not in this"):
        load(pipe, one("loha", "down_blocks.9.conv", HADA))


def kohya(tensors: Tensors, path: str, alpha: float) -> Tensors:
    stem = f"lora_unet_{path.replace('.', '_')}"
    return {f"{stem}.{role}": tensor for role, tensor in {**tensors, "alpha": torch.tensor(alpha)}.items()}


def test_a_file_may_vanish_while_its_adapter_is_in_the_weights(pipe: Any, tmp_path: Path) -> None:
    before, old = tiny.weights(pipe), weight(pipe, Q).double()
    safetensors.torch.save_file(kohya(HADA, Q, 1.5), tmp_path / "style.safetensors")
    load(pipe, one("ia3", Q, {"ia3": rand(16, 1), "on_input": torch.tensor(False)}), name="other")
    assert load(pipe, tmp_path / "style.safetensors").name == "style"
    (tmp_path / "style.safetensors").unlink()
    unload(pipe, "other")
    torch.testing.assert_close(weight(pipe, Q).double(), old + 0.5 * hada(HADA), rtol=1e-5, atol=1e-6)
    unload(pipe, "style")
    assert tiny.same(tiny.weights(pipe), before)


def test_a_collapsed_adapter_is_saved_as_it_came(pipe: Any, tmp_path: Path) -> None:
    stored = kohya(HADA, Q, 1.5)
    safetensors.torch.save_file(stored, tmp_path / "a.safetensors")
    load(pipe, tmp_path / "a.safetensors", name="style", strength=0.3)
    assert adapter_of(pipe, "style").family == "sd1"
    again = safetensors.torch.load_file(save(pipe, "style", tmp_path / "b.safetensors", layout="kohya"))
    assert {key: value.tolist() for key, value in again.items()} == {
        key: value.tolist() for key, value in stored.items()
    }


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def test_a_patch_of_a_fused_weight_reaches_the_parts_that_the_pipeline_keeps() -> None:
    pipe = tiny.build("flux1")
    before = tiny.weights(pipe)
    tensors = {"lokr_w1": rand(2, 2), "lokr_w2": rand(24, 8)}  # 48 x 16: cuts at 16 and 32 lie inside w2
    adapter = Adapter("flux1", {("transformer", "double_blocks.3.img_attn.qkv"): patch("lokr", tensors)})
    report = load(pipe, adapter, strength=0.5, name="style")
    paths = [f"transformer_blocks.3.{leaf}" for leaf in QKV]
    assert report.modules == {"transformer": tuple(paths)}
    change = 0.5 * torch.kron(tensors["lokr_w1"].double(), tensors["lokr_w2"].double())
    for path, part in zip(paths, change.split(16), strict=True):
        after, old = (state["transformer"][f"{path}.weight"].double() for state in (tiny.weights(pipe), before))
        torch.testing.assert_close(after, old + part, rtol=1e-5, atol=1e-6)
    unload(pipe, "style")
    assert tiny.same(tiny.weights(pipe), before)


def test_a_bare_parameter_is_changed_by_its_own_name() -> None:
    pipe = tiny.build("wan")
    before = pipe.transformer.blocks[3].scale_shift_table.detach().clone()
    diff = rand(*before.shape)
    load(
        pipe,
        Adapter(None, {("transformer", "blocks.3.scale_shift_table"): patch("full", {"diff": diff})}),
        name="style",
    )
    torch.testing.assert_close(pipe.transformer.blocks[3].scale_shift_table.detach(), before + diff)
    unload(pipe, "style")
    assert torch.equal(pipe.transformer.blocks[3].scale_shift_table, before)


def test_pipelines_that_share_a_component_share_what_is_in_its_weights(pipe: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    before = tiny.weights(pipe)
    load(pipe, one("loha", Q, HADA), name="style")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    unload(other, "style")
    assert tiny.same(tiny.weights(pipe), before)
