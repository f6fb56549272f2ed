"""Hypernetworks in tiny pipelines: the formula before keys and values, in order, beside every other adapter, and gone without a trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.actions.load import load, save, unload
from hubtool.adapters.hypernetwork import run
from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, HubtoolError, LoadMismatch, Unsupported, UsageProblem
from hubtool.pipelines.schedules import Schedule, ScheduleLike, linear, scheduled
from tests.support import kinds, tiny

WIDTHS = (32, 64)  # the context of the cross attention and the second level's channels; the third level's


@pytest.fixture
def pipe() -> Any:
    return tiny.build("sd1")


@contextmanager
def by_hand(pipe: Any, *nets: tuple[Path, float | Sequence[float]]) -> Iterator[None]:
    """The formula in attention's own forward: an oracle that shares nothing with the hooks of to_k and to_v but torch.

    A processor of the test's own computes attention from scaled dot products, with the networks before keys and values.
    """
    states = [(torch.load(path, weights_only=True), strength) for path, strength in nets]
    calls = {"step": -1}

    def strength_of(value: float | Sequence[float]) -> float:
        return value if isinstance(value, int | float) else value[calls["step"]]

    class Written:
        def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
            context = hidden if encoder_hidden_states is None else encoder_hidden_states
            inputs = [context, context]
            for state, strength in states:
                if context.shape[-1] in state:
                    pair = state[context.shape[-1]]
                    inputs = [kinds.fed(net, x, strength_of(strength)) for net, x in zip(pair, inputs, strict=True)]
            q, k, v = attn.to_q(hidden), attn.to_k(inputs[0]), attn.to_v(inputs[1])
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
            out = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1) @ v
            return attn.to_out[0](out.transpose(1, 2).flatten(2))

    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Written())
    counter = pipe.unet.register_forward_pre_hook(lambda *_: calls.update(step=calls["step"] + 1))
    try:
        yield
    finally:
        counter.remove()
        pipe.unet.set_attn_processor(before)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"is_layer_norm": True}], ids=["plain", "normalised"])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_keys_and_values_read_what_the_formula_says(
    pipe: Any, tmp_path: Path, settings: dict[str, Any], strength: float
) -> None:
    plain, path = kinds.picture(pipe), kinds.hypernetwork(tmp_path / "style.pt", WIDTHS, **settings)
    with by_hand(pipe):
        close(kinds.picture(pipe), plain)
    with by_hand(pipe, (path, strength)):
        expected = kinds.picture(pipe)
    report = load(pipe, path, strength=strength)
    close(kinds.picture(pipe), expected)
    assert (expected - plain).abs().max() > 1e-3
    assert report.kind == "hypernetwork"
    assert set(report.modules) == {"unet"}
    wide = {f"{n}.{p}" for n, m in pipe.unet.named_modules() for p in ("to_k", "to_v") if hasattr(m, p)}
    fitting = {n for n in wide if pipe.unet.get_submodule(n).in_features in WIDTHS}
    assert set(report.modules["unet"]) == fitting


def test_several_act_one_after_another_in_order_of_loading(pipe: Any, tmp_path: Path) -> None:
    one = kinds.hypernetwork(tmp_path / "one.pt", WIDTHS, seed=1)
    two = kinds.hypernetwork(tmp_path / "two.pt", (32,), seed=7)
    with by_hand(pipe, (one, 0.7), (two, 1.2)):
        expected = kinds.picture(pipe)
    with by_hand(pipe, (two, 1.2)):
        second = kinds.picture(pipe)
    load(pipe, one, strength=0.7)
    load(pipe, two, strength=1.2)
    close(kinds.picture(pipe), expected)
    unload(pipe, "one")
    close(kinds.picture(pipe), second)


@pytest.mark.parametrize("first", ["lora", "hypernetwork"])
def test_factors_of_a_lora_read_the_changed_context_whichever_came_first(pipe: Any, tmp_path: Path, first: str) -> None:
    path = kinds.hypernetwork(tmp_path / "style.pt", WIDTHS)
    made = tiny.make(pipe, ["unet"], only="attn")
    sources: dict[str, Adapter | Path] = {"lora": made.adapter, "style": path}
    for name in ("lora", "style") if first == "lora" else ("style", "lora"):
        load(pipe, sources[name], name=name)
    mine = kinds.picture(pipe)
    unload(pipe, "style")
    with by_hand(pipe, (path, 1.0)):  # calls the layers of PEFT themselves
        close(mine, kinds.picture(pipe))
    load(pipe, path)
    unload(pipe, "lora")
    mine = kinds.picture(pipe)
    unload(pipe, "style")
    with by_hand(pipe, (path, 1.0)):
        close(mine, kinds.picture(pipe))


def test_it_acts_beside_weights_that_are_changed_themselves(pipe: Any, tmp_path: Path) -> None:
    path, made = kinds.hypernetwork(tmp_path / "style.pt", WIDTHS), tiny.make(pipe, ["unet"], only="to_k")
    load(pipe, path)
    load(pipe, made.adapter, name="inside", collapse=True)
    mine = kinds.picture(pipe)
    unload(pipe, "style")
    with by_hand(pipe, (path, 1.0)):
        close(mine, kinds.picture(pipe))


def test_unloading_leaves_no_trace(pipe: Any, tmp_path: Path) -> None:
    before, plain, count = tiny.weights(pipe), kinds.picture(pipe), kinds.hooks(pipe)
    for _ in range(2):
        load(pipe, kinds.hypernetwork(tmp_path / "style.pt", WIDTHS))
        assert not torch.equal(kinds.picture(pipe), plain)
        unload(pipe, "style")
        assert torch.equal(kinds.picture(pipe), plain)
    assert kinds.hooks(pipe) == count
    assert tiny.same(tiny.weights(pipe), before)
    with pytest.raises(UsageProblem, match="nothing named 'style'"):
        unload(pipe, "style")


def test_the_file_may_go_and_the_pipeline_too(tmp_path: Path) -> None:
    pipe, path = tiny.build("sd1"), kinds.hypernetwork(tmp_path / "style.pt", WIDTHS)
    load(pipe, path)
    path.unlink()
    kinds.picture(pipe)
    model, gone = weakref.ref(pipe.unet), weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    assert model() is None


def test_a_schedule_drives_the_strength_by_step_and_gives_it_back(pipe: Any, tmp_path: Path) -> None:
    path = kinds.hypernetwork(tmp_path / "style.pt", WIDTHS)
    load(pipe, path, strength=0.6)
    constant = kinds.picture(pipe)
    with scheduled(pipe, {"style": linear(1.0, 0.2)}, steps=kinds.STEPS):
        mine = kinds.picture(pipe)
    assert torch.equal(kinds.picture(pipe), constant)
    unload(pipe, "style")
    with by_hand(pipe, (path, [1.0, 0.6, 0.2])):
        close(mine, kinds.picture(pipe))


def test_parts_of_a_schedule_and_other_adapters_beside_it_count(pipe: Any, tmp_path: Path) -> None:
    plain, made = kinds.picture(pipe), tiny.make(pipe, ["unet"], only="attn1.to_q")
    load(pipe, kinds.hypernetwork(tmp_path / "style.pt", WIDTHS))
    load(pipe, made.adapter, name="lora")
    asked: dict[str, ScheduleLike] = {"style": Schedule(1.0, {"unet": 0.0}), "lora": 0.0}
    with scheduled(pipe, asked, steps=kinds.STEPS):
        close(kinds.picture(pipe), plain)
    with pytest.raises(RuntimeError, match="stop"), scheduled(pipe, asked, steps=kinds.STEPS):
        raise RuntimeError("stop")
    assert not torch.equal(kinds.picture(pipe), plain)


def test_each_of_two_that_take_different_blocks_reads_its_own(pipe: Any, tmp_path: Path) -> None:
    """Equal strengths, equal context: what was made for one block is not taken for the other's."""
    made = [kinds.hypernetwork(tmp_path / f"{name}.pt", (32,), seed=i) for i, name in enumerate(("down", "up"), 1)]
    for path in made:
        load(pipe, path)
    asked = {
        "down": Schedule(0.0, {}), "up": Schedule(1.0, {"unet:up_blocks": 1.0, "unet:down_blocks": 0.0, "unet:mid_block": 0.0}),
    }  # fmt: skip
    with scheduled(pipe, asked, steps=kinds.STEPS):
        up = kinds.picture(pipe)
    asked["down"] = Schedule(1.0, {"unet:up_blocks": 0.0, "unet:mid_block": 0.0})
    with scheduled(pipe, asked, steps=kinds.STEPS):
        both = kinds.picture(pipe)
        with torch.inference_mode():
            assert torch.equal(kinds.picture(pipe), both)  # nothing is kept there
    assert not torch.equal(up, both)


def test_the_context_of_the_prompt_goes_through_once(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*words: Any) -> Any:
        calls.append(words)
        return run(*words)

    monkeypatch.setattr("hubtool.pipelines.kinds.hypernetwork.run", counted)
    path = kinds.hypernetwork(tmp_path / "style.pt", (768,))
    wide = kinds.wide()
    load(wide, path)
    kinds.picture(wide)
    assert len(calls) == 2  # one network for keys and one for values, whatever the number of blocks and steps


def test_widths_that_no_attention_has_are_named_and_nothing_changes(pipe: Any, tmp_path: Path) -> None:
    path, count = kinds.hypernetwork(tmp_path / "style.pt", (32, 48, 320)), kinds.hooks(pipe)
    with pytest.raises(LoadMismatch, match=r"48, 320 wide vectors; the attention of this pipeline reads 16, 32, 64"):
        load(pipe, path)
    assert kinds.hooks(pipe) == count


def test_another_family_is_refused_by_the_width_of_its_context(tmp_path: Path) -> None:
    with pytest.raises(LoadMismatch, match="is for sd1, this StableDiffusionXLPipeline is sdxl"):
        load(tiny.build("sdxl"), kinds.hypernetwork(tmp_path / "style.pt", (768,)))
    with pytest.raises(LoadMismatch):
        load(tiny.build("flux1"), kinds.hypernetwork(tmp_path / "style.pt", (32,)))


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"trainable": True}, Unsupported),
        ({"collapse": True}, Unsupported),
        ({"into": {"unet": "unet"}}, UsageProblem),
        ({"components": ["text_encoder"]}, UsageProblem),
        ({"strength": float("nan")}, BadValues),
        ({"settings": {"steps": 3}}, UsageProblem),
        ({"name": "no name"}, UsageProblem),
    ],
)
def test_what_it_cannot_be_told_is_refused(
    pipe: Any, tmp_path: Path, how: dict[str, Any], error: type[HubtoolError]
) -> None:
    count = kinds.hooks(pipe)
    with pytest.raises(error):
        load(pipe, kinds.hypernetwork(tmp_path / "style.pt", WIDTHS), **how)
    assert kinds.hooks(pipe) == count


def test_it_is_never_taken_for_an_adapter_that_could_be_saved(pipe: Any, tmp_path: Path) -> None:
    load(pipe, kinds.hypernetwork(tmp_path / "style.pt", WIDTHS))
    with pytest.raises(Unsupported, match="its own file keeps it"):
        save(pipe, "style", tmp_path / "out.safetensors")
    with pytest.raises(UsageProblem, match="loaded already"):
        load(pipe, tiny.make(pipe, ["unet"], only="to_q").adapter, name="style")


def test_a_safetensors_form_acts_the_same(pipe: Any, tmp_path: Path) -> None:
    from hubtool.actions.convert import convert

    path = kinds.hypernetwork(tmp_path / "style.pt", WIDTHS)
    convert(path, tmp_path / "flat.safetensors")
    load(pipe, path)
    expected = kinds.picture(pipe)
    unload(pipe, "style")
    load(pipe, tmp_path / "flat.safetensors")
    assert torch.equal(kinds.picture(pipe), expected)
