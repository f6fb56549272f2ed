"""load, unload, save on tiny pipelines, against arithmetic done by hand, PEFT's own modules, safetensors and plain diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hubtool.actions.load import load, save, unload
from hubtool.adapters.ir import Adapter
from hubtool.errors import (
    BadValues,
    HubtoolError,
    LoadMismatch,
    LossyConversion,
    NotFound,
    ShapeMismatch,
    Unsupported,
    UsageProblem,
    WouldOverwrite,
)  # fmt: skip
from hubtool.pipelines import adapter_of
from tests.support import tiny
from tests.support.files import floats, write_safetensors

MIXED = {"ranks": (2, 4, 6, 8), "alphas": (1.0, 3.0, 16.0, None)}
ALL = {
    "sd1": ("unet", "text_encoder"),
    "sd2": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
}
Q = "attn2.to_q"


@pytest.fixture
def pipe() -> Any:
    return tiny.build("sd1")


def fused(pipe: Any) -> tiny.State:
    """The weights with all active adapters in them, under their own names."""
    pipe.fuse_lora()
    plain = {
        c: {k.replace(".base_layer", ""): v for k, v in s.items() if "lora_" not in k}
        for c, s in tiny.weights(pipe).items()
    }
    pipe.unfuse_lora()
    return plain


def assert_fused_is(
    after: tiny.State, before: tiny.State, change: Callable[[tuple[str, str], torch.Tensor], torch.Tensor | None]
) -> None:
    """``change(key, weight)`` gives the expected new fp64 weight, flat, or None where nothing may differ."""
    for component, state in before.items():
        for name, weight in state.items():
            expected = change((component, name.removesuffix(".weight")), weight.double())
            if expected is None or not name.endswith(".weight"):
                assert torch.equal(after[component][name], weight), name
            else:
                torch.testing.assert_close(after[component][name].double().flatten(1), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("family", ALL)
def test_every_module_changes_by_exactly_scale_up_down_and_no_other_weight_does(family: str) -> None:
    pipe = tiny.build(family)
    made = tiny.make(pipe, ALL[family], **MIXED)
    before = tiny.weights(pipe)
    report = load(pipe, made.adapter, strength=0.5)
    assert {(c, p) for c, paths in report.modules.items() for p in paths} == set(made.factors)
    assert_fused_is(
        fused(pipe), before, lambda key, w: w.flatten(1) + made.delta(key, 0.5) if key in made.factors else None
    )


def test_adapters_cover_3x3_convolutions_and_mixed_ranks(pipe: Any) -> None:
    made = tiny.make(pipe, **MIXED)
    kernels = {tuple(down.shape[2:]) for _, down, _ in made.factors.values()}
    assert (3, 3) in kernels
    assert (1, 1) in kernels
    assert () in kernels
    assert len({scale for _, _, scale in made.factors.values()}) > 6


@pytest.mark.parametrize("family", ALL)
def test_pictures_change_and_come_back_bit_for_bit(family: str) -> None:
    pipe = tiny.build(family)
    weights, plain = tiny.weights(pipe), tiny.picture(pipe)
    load(pipe, tiny.make(pipe, ALL[family]).adapter, name="style")
    assert not torch.allclose(tiny.picture(pipe), plain, atol=1e-3)
    unload(pipe, "style")
    assert tiny.same(tiny.weights(pipe), weights)
    assert torch.equal(tiny.picture(pipe), plain)
    assert pipe.get_list_adapters() == {}


def test_dora_is_magnitude_times_direction(pipe: Any) -> None:
    made = tiny.make(pipe, dora=True, alphas=(2.0,))
    before = tiny.weights(pipe)

    def directed(key: tuple[str, str], weight: torch.Tensor) -> torch.Tensor | None:
        if key not in made.factors:
            return None
        flat = weight.flatten(1)
        direction = flat + made.delta(key)
        return 1.25 * flat.norm(dim=1, keepdim=True) * direction / direction.norm(dim=1, keepdim=True)

    load(pipe, made.adapter)
    assert_fused_is(fused(pipe), before, directed)


def test_dora_equals_the_layer_peft_itself_would_make(pipe: Any) -> None:
    from peft import LoraConfig

    made, other = tiny.make(pipe, ["unet"], only=Q, dora=True), tiny.build("sd1")
    load(pipe, made.adapter)
    other.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=[Q], use_dora=True), "mine")
    for (_, path), (up, down, _) in made.factors.items():
        layer = other.unet.get_submodule(path)
        layer.lora_A["mine"].weight.data, layer.lora_B["mine"].weight.data = down, up
        layer.lora_magnitude_vector["mine"].weight.data *= 1.25
    assert torch.allclose(tiny.picture(pipe), tiny.picture(other), atol=1e-5)


@pytest.mark.parametrize("alike", [True, False], ids=["everywhere", "in one module"])
def test_a_rank_stabilised_module_is_scaled_by_the_root_of_its_rank(pipe: Any, alike: bool) -> None:
    made = tiny.make(pipe, ["unet"], only=Q, ranks=(4,), alphas=(3.0,))
    first = next(iter(made.adapter.patches))
    patches = {k: replace(v, rank_stabilised=alike or k == first) for k, v in made.adapter.patches.items()}
    load(pipe, Adapter(None, patches), name="style")
    layers = [pipe.unet.get_submodule(path) for _, path in made.factors]
    assert layers[0].scaling["style"] == pytest.approx(1.5)
    assert layers[1].scaling["style"] == pytest.approx(1.5 if alike else 0.75)


def test_a_tucker_core_gives_the_change_of_its_three_factors(pipe: Any) -> None:
    path = "down_blocks.0.resnets.0.conv1"
    weight = pipe.unet.get_submodule(path).weight.detach().double()
    up, mid, down = torch.randn(16, 3, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(3, 16, 1, 1)
    patch = tiny.LowRank(tiny.literal(up), tiny.literal(down), mid=tiny.literal(mid), alpha_value=1.5)
    load(pipe, Adapter(None, {("unet", path): patch}))
    expected = 0.5 * torch.einsum("im,mnkl,nj->ijkl", up.double()[..., 0, 0], mid.double(), down.double()[..., 0, 0])
    torch.testing.assert_close(fused(pipe)["unet"][f"{path}.weight"].double() - weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "tail"), [("sd1", ()), ("sd2", (1, 1))], ids=["2-d into conv", "conv into linear"])
def test_factors_of_a_1x1_convolution_and_of_a_linear_fit_either_module(family: str, tail: tuple[int, ...]) -> None:
    pipe = tiny.build(family)
    made = tiny.make(pipe, ["unet"], only="proj_in", shape_of=lambda m: (*m.weight.shape[:2], *tail))
    before = tiny.weights(pipe)
    load(pipe, made.adapter)
    assert_fused_is(fused(pipe), before, lambda key, w: w.flatten(1) + made.delta(key) if key in made.factors else None)


def bad_patch(made: tiny.Made, change: Callable[[Any], Any]) -> Adapter:
    """The adapter with its last patch changed."""
    *_, last = made.adapter.patches
    return Adapter(None, {**made.adapter.patches, last: change(made.adapter.patches[last])})


def filled(value: float, *shape: int) -> Any:
    return tiny.literal(torch.full(shape, value))


REFUSED: dict[str, tuple[Callable[[Any], Any], type[HubtoolError], str]] = {
    "NaN": (lambda p: replace(p, up=filled(float("nan"), *p.up.shape)), BadValues, "up of unet.*NaN"),
    "infinity": (lambda p: replace(p, down=filled(float("inf"), *p.down.shape)), BadValues, "down of unet"),
    "alpha NaN": (lambda p: replace(p, alpha_value=float("nan")), BadValues, "alpha of unet"),
    "ranks differ": (lambda p: replace(p, up=filled(0.0, p.up.shape[0], 3)), ShapeMismatch, "ranks differ"),
    "no rank": (lambda p: replace(p, up=filled(0.0, 64, 0), down=filled(0.0, 0, 64)), ShapeMismatch, "ranks differ"),
    "other width": (lambda p: replace(p, down=filled(0.0, 4, 99)), ShapeMismatch, "64 x 99, the module's is 64 x 64"),
    "3x3 for a linear": (lambda p: replace(p, down=filled(0.0, 4, 64, 3, 3)), ShapeMismatch, "3 x 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_loaded_is_refused_before_anything_changes(pipe: Any, what: str) -> None:
    change, error, words = REFUSED[what]
    before, modules = tiny.weights(pipe), dict(pipe.unet.named_modules())
    with pytest.raises(error, match=words):
        load(pipe, bad_patch(tiny.make(pipe, ["unet"], only=Q), change))
    assert tiny.same(tiny.weights(pipe), before)
    assert dict(pipe.unet.named_modules()) == modules


NO_LAYER: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bias": (lambda p: replace(p, bias=filled(0.0, 64)), "1 modules also change their bias"),
    "dora in one module": (lambda p: replace(p, dora_scale=filled(1.0, 64, 1)), "1 of 16 modules of unet"),
    "dora per input": (lambda p: replace(p, dora_scale=filled(1.0, 1, 64)), "a DoRA magnitude per input"),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_LAYER)
def test_what_peft_has_no_layer_for_says_why_and_is_not_trained(pipe: Any, what: str) -> None:
    change, words = NO_LAYER[what]
    adapter = bad_patch(tiny.make(pipe, ["unet"], only=Q), change)
    for asked in ({"collapse": False}, {"trainable": True}):
        with pytest.raises(Unsupported, match=words):
            load(pipe, adapter, **asked)
    report = load(pipe, adapter)
    assert report.collapsed
    assert any(words in finding.message for finding in report.findings)


def test_modules_the_pipeline_does_not_have_are_listed(pipe: Any) -> None:
    patch = tiny.LowRank(filled(0.0, 8, 2), filled(0.0, 2, 8))
    unknown = Adapter(None, {("unet", f"down_blocks.7.conv{i}"): patch for i in range(7)})
    with pytest.raises(LoadMismatch, match=r"7 of 7 modules .*unet.down_blocks.7.conv0.* and 2 more") as caught:
        load(pipe, unknown)
    assert "the pipeline is sd1" in str(caught.value.hint)


def test_a_module_that_is_no_linear_or_convolution_is_refused(pipe: Any) -> None:
    patch = tiny.LowRank(filled(0.0, 16, 2), filled(0.0, 2, 16))
    with pytest.raises(ShapeMismatch, match="weight of 16 x 16, the module's is 16"):
        load(pipe, Adapter(None, {("unet", "conv_norm_out"): patch}))


def test_another_familys_adapter_is_refused_by_name(pipe: Any) -> None:
    made = tiny.make(pipe, ["unet"], only=Q, family="sdxl")
    with pytest.raises(LoadMismatch, match="for sdxl, this StableDiffusionPipeline is sd1"):
        load(pipe, made.adapter)


def test_another_context_width_is_refused_naming_both(pipe: Any) -> None:
    made = tiny.make(tiny.build("sd2"), ["unet"], only="attn2.to_k")
    with pytest.raises(ShapeMismatch, match=r"16 modules do not fit: .* x 24, the module's is .* x 32"):
        load(pipe, made.adapter)


def test_a_component_the_pipeline_lacks_is_refused_unless_left_out(pipe: Any) -> None:
    made = tiny.make(pipe)
    pipe.text_encoder = None
    with pytest.raises(LoadMismatch, match="changes text_encoder") as caught:
        load(pipe, made.adapter)
    assert "components=['unet']" in str(caught.value.hint)
    assert set(load(pipe, made.adapter, components=["unet"]).modules) == {"unet"}
    with pytest.raises(UsageProblem, match="has no vae"):
        load(pipe, made.adapter, components=["vae"], name="other")


@pytest.mark.parametrize("name", ["with.dot", "", "keys", "two words"])
def test_names_that_peft_cannot_hold_are_refused(pipe: Any, name: str) -> None:
    with pytest.raises(UsageProblem, match="cannot name an adapter"):
        load(pipe, tiny.make(pipe, ["unet"], only=Q).adapter, name=name)


def test_a_taken_name_is_refused_and_a_default_name_is_free(pipe: Any) -> None:
    adapter = tiny.make(pipe, ["unet"], only=Q).adapter
    assert [load(pipe, adapter).name, load(pipe, adapter).name] == ["adapter", "adapter_2"]
    with pytest.raises(UsageProblem, match="is loaded already"):
        load(pipe, adapter, name="adapter")


def test_a_strength_that_is_no_number_is_refused(pipe: Any) -> None:
    with pytest.raises(BadValues, match="strength"):
        load(pipe, tiny.make(pipe, ["unet"], only=Q).adapter, strength=float("nan"))


@pytest.mark.parametrize("name", ["e", "encoder", "weight", "lora_style", "default"])
def test_a_name_that_occurs_in_weight_names_does_no_harm(pipe: Any, name: str) -> None:
    before = tiny.weights(pipe)
    load(pipe, tiny.make(pipe, ["text_encoder"]).adapter, name=name)
    unload(pipe, name)
    assert tiny.same(tiny.weights(pipe), before)


def test_fused_adapters_forbid_loading_and_unloading(pipe: Any) -> None:
    adapter = tiny.make(pipe, ["unet"], only=Q).adapter
    load(pipe, adapter, name="one")
    pipe.fuse_lora()
    with pytest.raises(UsageProblem, match="one is fused"):
        load(pipe, adapter, name="two")
    with pytest.raises(UsageProblem, match="one is fused"):
        unload(pipe, "one")


def test_strengths_add_up_and_other_adapters_keep_theirs(pipe: Any) -> None:
    one, two = tiny.make(pipe, only="to_", alphas=(2.0,)), tiny.make(pipe, seed=2)
    before = tiny.weights(pipe)
    load(pipe, one.adapter, name="one", strength=0.5)
    pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").set_scale("one", 0.25)
    load(pipe, two.adapter, name="two", strength=-1.5)

    def both(key: tuple[str, str], weight: torch.Tensor) -> torch.Tensor | None:
        if key not in two.factors:
            return None
        own = 0.25 if "mid_block" in key[1] and key[1].endswith("attn1.to_q") else 0.5
        return weight.flatten(1) + two.delta(key, -1.5) + (one.delta(key, own) if key in one.factors else 0)

    assert_fused_is(fused(pipe), before, both)
    assert pipe.get_active_adapters() == ["one", "two"]


def test_unloading_one_adapter_leaves_the_others_as_they_were(pipe: Any) -> None:
    for name in ("asleep", "awake"):
        load(pipe, tiny.make(pipe, only="to_q", seed=len(name)).adapter, name=name, strength=0.75)
    pipe.set_adapters(["awake"], [0.75])
    picture = tiny.picture(pipe)
    load(pipe, tiny.make(pipe).adapter, name="style", strength=2.0)
    unload(pipe, "style")
    assert torch.equal(tiny.picture(pipe), picture)
    unload(pipe, "awake")
    assert pipe.get_active_adapters() == []
    assert torch.equal(tiny.picture(pipe), tiny.picture(tiny.build("sd1")))


def test_loading_leaves_training_flags_and_the_random_state_alone(pipe: Any) -> None:
    pipe.unet.requires_grad_(False)
    flags, random = [p.requires_grad for p in parameters(pipe)], torch.random.get_rng_state()
    report = load(pipe, Adapter(None, tiny.make(pipe).adapter.patches, (tiny.embedding("<cat>", 32, 2),)), name="style")
    held = [p for n, p in pipe.unet.named_parameters() if "lora_" in n]
    assert held
    assert not any(p.requires_grad for p in held)
    assert report.parameters == ()
    unload(pipe, "style")
    assert [p.requires_grad for p in parameters(pipe)] == flags
    assert torch.equal(torch.random.get_rng_state(), random)


def parameters(pipe: Any) -> list[Any]:
    return [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]


def spoil_keys(state: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(state)).partition(".lora_")[0]
    return {key: value for key, value in state.items() if not key.startswith(first)}


def spoil_values(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value * 2 for key, value in state.items()}


@pytest.mark.parametrize(("spoil", "words"), [(spoil_keys, "1 missing: unet"), (spoil_values, "with other values")])
def test_a_loader_that_does_not_do_as_planned_is_undone(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any], words: str
) -> None:
    load(pipe, tiny.make(pipe, only="to_k").adapter, name="one", strength=0.5)
    before, picture = tiny.weights(pipe), tiny.picture(pipe)
    loader = type(pipe.unet).load_lora_adapter
    monkeypatch.setattr(
        type(pipe.unet), "load_lora_adapter", lambda self, state, **kw: loader(self, spoil(state), **kw)
    )
    with pytest.raises(LoadMismatch, match=words):
        load(pipe, tiny.make(pipe, ["text_encoder", "unet"], seed=3).adapter, name="two")
    assert tiny.same(tiny.weights(pipe), before)
    assert torch.equal(tiny.picture(pipe), picture)
    assert pipe.get_list_adapters() == {"unet": ["one"]}
    assert pipe.get_active_adapters() == ["one"]


def test_a_wrong_scale_is_noticed(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubtool.pipelines.lora.grouped", lambda patterns: {})
    adapter = tiny.make(pipe, ["unet"], only=Q, alphas=(1.0, 4.0, 4.0)).adapter
    with pytest.raises(LoadMismatch, match="6 with another scale"):
        load(pipe, adapter)


def train(pipe: Any, report: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(report.parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    noise, target = torch.randn(2, 1, 4, 8, 8, generator=generator)
    ids = pipe.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    for _ in range(steps):
        context = pipe.text_encoder(ids)[0]
        loss = (pipe.unet(noise, 10, encoder_hidden_states=context).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_goes_on_from_a_loaded_adapter_and_saves_what_it_reached(pipe: Any, tmp_path: Path) -> None:
    base, made = tiny.weights(pipe), tiny.make(pipe, only="to_", dtype=torch.bfloat16, **MIXED)
    report = load(pipe, made.adapter, name="style", trainable=True)
    assert {p.dtype for p in report.parameters} == {torch.float32}
    assert all(p.requires_grad for p in report.parameters)
    assert [id(p) for p in parameters(pipe) if p.requires_grad] == [id(p) for p in report.parameters]
    start = tiny.picture(pipe)
    train(pipe, report)
    trained = tiny.picture(pipe)
    assert not torch.allclose(trained, start, atol=1e-3)

    path = save(pipe, "style", tmp_path / "style.safetensors")
    held = {id(p): n for c in ("unet", "text_encoder") for n, p in getattr(pipe, c).named_parameters()}
    stored = {flat(key): value for key, value in safetensors.torch.load_file(path).items()}
    assert len(stored) == len(report.parameters)
    for parameter in report.parameters:
        assert torch.equal(stored[held[id(parameter)].replace(".style", "")], parameter)

    unload(pipe, "style")
    assert tiny.same(tiny.weights(pipe), base)
    assert all(p.requires_grad for p in parameters(pipe))
    load(pipe, path, name="again")
    assert torch.equal(tiny.picture(pipe), trained)


def flat(key: str) -> str:
    """A stored key as the tiny live component names it."""
    return key.partition(".")[2].removeprefix("text_model.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ALL)
def test_saving_a_loaded_adapter_gives_its_factors_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = tiny.build(family)
    made = tiny.make(pipe, ALL[family], only="to_v" if family == "sdxl" else "", dtype=dtype, **MIXED)
    load(pipe, made.adapter, name="style", strength=0.3)
    stored = safetensors.torch.load_file(save(pipe, "style", tmp_path / "style.safetensors"))
    factors = {f"{c}.{tiny.flat_path(c, p)}": value for (c, p), value in made.factors.items()}
    assert set(stored) == {f"{key}.lora_{side}.weight" for key in factors for side in "AB"}
    for key, (up, down, _) in factors.items():
        for side, wanted in (("B", up), ("A", down)):
            assert stored[f"{key}.lora_{side}.weight"].dtype == dtype
            assert torch.equal(stored[f"{key}.lora_{side}.weight"], wanted)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_saved_file_loads_again_with_every_scale(pipe: Any, tmp_path: Path, layout: str, dora: bool) -> None:
    made = tiny.make(pipe, dora=dora, **MIXED)
    load(pipe, made.adapter, name="style")
    path, picture = save(pipe, "style", tmp_path / "style file.safetensors", layout=layout), tiny.picture(pipe)
    unload(pipe, "style")
    assert load(pipe, path).name == "style_file"
    assert torch.equal(tiny.picture(pipe), picture)


def test_plain_diffusers_reads_a_saved_file_as_it_was_meant(pipe: Any, tmp_path: Path) -> None:
    made, other = tiny.make(pipe, only="to_", **MIXED), tiny.build("sd1")
    load(pipe, made.adapter, name="style")
    before = tiny.weights(other)
    other.load_lora_weights(save(pipe, "style", tmp_path / "a.safetensors", metadata={"title": "mine"}))
    assert_fused_is(
        fused(other), before, lambda key, w: w.flatten(1) + made.delta(key) if key in made.factors else None
    )
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["title"] == "mine"


def test_saving_refuses_what_it_cannot_do(pipe: Any, tmp_path: Path) -> None:
    made = tiny.make(pipe, ["unet"], only=Q)
    load(pipe, Adapter(None, made.adapter.patches, (tiny.embedding("<cat>", 32),)), name="both")
    with pytest.raises(LossyConversion, match="embedding <cat>"):
        save(pipe, "both", tmp_path / "a.safetensors")
    with pytest.raises(UsageProblem, match="nothing named 'other'"):
        save(pipe, "other", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    unload(pipe, "both")
    load(pipe, made.adapter, name="one")
    save(pipe, "one", tmp_path / "a.safetensors")
    with pytest.raises(WouldOverwrite):
        save(pipe, "one", tmp_path / "a.safetensors")


def test_an_adapter_added_by_other_means_is_saved_and_unloaded_too(pipe: Any) -> None:
    from peft import LoraConfig

    before = tiny.weights(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], use_rslora=True), "default")
    patches = adapter_of(pipe, "default").patches.values()
    assert {(p.rank, p.alpha_value, p.scale) for p in patches} == {(2, 6.0, 6 / 2**0.5)}
    unload(pipe, "default")
    assert tiny.same(tiny.weights(pipe), before)


def test_factors_are_never_narrowed_to_a_half_precision_pipeline(pipe: Any) -> None:
    pipe.unet.half()
    pipe.text_encoder.half()
    made = tiny.make(pipe, ["text_encoder"])
    load(pipe, made.adapter, name="style")
    for (_, path), (up, _, _) in made.factors.items():
        assert torch.equal(pipe.text_encoder.get_submodule(path).lora_B["style"].weight, up)


def test_nothing_called_so_is_no_silent_success(pipe: Any) -> None:
    with pytest.raises(UsageProblem, match="nothing named 'style'"):
        unload(pipe, "style")


def test_files_of_other_kinds_and_unexplained_tensors_are_refused(pipe: Any, tmp_path: Path) -> None:
    odd = write_safetensors(tmp_path / "odd.safetensors", {"what.is": floats(3, 5)})
    with pytest.raises(Unsupported, match="cannot be loaded into a pipeline"):
        load(pipe, odd)
    load(pipe, tiny.make(pipe, ["unet"], only=Q).adapter, name="style")
    tensors = safetensors.torch.load_file(save(pipe, "style", tmp_path / "a.safetensors"))
    safetensors.torch.save_file({**tensors, "mystery": torch.zeros(3, 5)}, tmp_path / "b.safetensors")
    with pytest.raises(LoadMismatch, match="1 tensors belong to no module: mystery"):
        load(pipe, tmp_path / "b.safetensors")


def test_a_hash_prefix_names_an_adapter_of_the_library(pipe: Any, tmp_path: Path) -> None:
    import hashlib

    from hubtool.actions.library import open_store
    from hubtool.actions.scan import scan

    load(pipe, tiny.make(pipe, ["unet"], only=Q).adapter, name="style")
    path = save(pipe, "style", tmp_path / "style.safetensors")
    with open_store() as store:
        scan(store, [str(tmp_path)])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load(pipe, digest[:8], name="again").modules == {"unet": tuple(p for p, _ in q_modules(pipe))}
    with pytest.raises(NotFound):
        load(pipe, "nothing-like-it")


def q_modules(pipe: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in pipe.unet.named_modules() if name.endswith(Q)]
