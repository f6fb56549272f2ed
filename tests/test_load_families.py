"""Every family with a tiny pipeline: load, act, save, unload, against arithmetic done by hand in fp64."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.actions.load import load, save, unload
from hubtool.adapters.ir import Adapter
from hubtool.errors import LoadMismatch, UsageProblem
from hubtool.layouts import tables
from hubtool.pipelines import live
from hubtool.pipelines.families import family_of
from hubtool.pipelines.tiny import RECIPES
from tests.support import tiny

MIXED = {"ranks": (1, 2, 3), "alphas": (1.0, 3.0, None, 0.5)}
NO_LAYERS = {"cascade", "kandinsky3", "pixart"}  # diffusers has no adapter loader for their transformers


def build(family: str) -> Any:
    if family == "kolors":
        pytest.importorskip("sentencepiece", reason="diffusers has no Kolors pipeline without it")
    return tiny.build(family)


def adapted(pipe: Any) -> list[str]:
    """The components that adapters may change, the denoiser first."""
    found = [name for name in live.modules(pipe) if name not in ("vae", "safety_checker")]
    return sorted(found, key=lambda name: name.startswith("text_encoder"))


def made_for(pipe: Any, component: str, **how: Any) -> tiny.Made:
    return tiny.make(pipe, [component], only=tiny.kinds(pipe, component), **{**MIXED, **how})


def expect(pipe: Any, before: tiny.State, change: Callable[[str, str], torch.Tensor | None]) -> None:
    """``change(component, path)`` is what was added to a weight, flat, in fp64; None: not a bit may differ."""
    after = tiny.effective(pipe)
    for component, state in before.items():
        for name, weight in state.items():
            delta = change(component, name.removesuffix(".weight")) if name.endswith(".weight") else None
            if delta is None:
                assert torch.equal(after[component][name], weight), name
            else:
                got = after[component][name].double().flatten(1)
                torch.testing.assert_close(got, weight.double().flatten(1) + delta, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("family", RECIPES)
def test_every_kind_of_module_changes_by_its_own_scale_and_unloading_restores_every_bit(family: str) -> None:
    pipe = build(family)
    before = tiny.weights(pipe)
    for component in adapted(pipe):
        made = made_for(pipe, component)
        report = load(pipe, made.adapter, strength=-0.75, name="style")
        assert {component: set(report.modules[component])} == {component: {path for _, path in made.factors}}
        assert report.collapsed == (component not in live.components(pipe))
        expect(pipe, before, lambda c, p, made=made: made.delta((c, p), -0.75) if (c, p) in made.factors else None)
        unload(pipe, "style")
        assert tiny.same(tiny.weights(pipe), before)


@pytest.mark.parametrize("family", sorted(NO_LAYERS))
def test_where_diffusers_has_no_loader_the_weights_themselves_take_the_adapter(family: str) -> None:
    pipe = build(family)
    component, *_ = adapted(pipe)
    report = load(pipe, made_for(pipe, component).adapter)
    assert report.collapsed
    assert [finding.code for finding in report.findings] == ["collapsed"]
    assert "no adapter loader" in report.findings[0].message


@pytest.mark.parametrize("family", [name for name in RECIPES if name not in ("sd1", "sd2", "sdxl")])
def test_a_saved_adapter_loads_again_to_the_same_weights(family: str, tmp_path: Path) -> None:
    pipe = build(family)
    component = adapted(pipe)[0]
    load(pipe, made_for(pipe, component).adapter, name="style")
    path, acting = save(pipe, "style", tmp_path / "style.safetensors"), tiny.effective(pipe)
    unload(pipe, "style")
    load(pipe, path, name="again")
    assert tiny.same(tiny.effective(pipe), acting)


@pytest.mark.parametrize("family", RECIPES)
def test_the_family_of_a_pipeline_is_read_from_its_class(family: str) -> None:
    assert family_of(build(family)) == family
    assert family in tables.family_ids()


def test_an_adapter_goes_into_the_second_transformer_when_asked_and_is_saved_as_what_it_was(tmp_path: Path) -> None:
    pipe = build("wan")
    made, before = made_for(pipe, "transformer"), tiny.weights(pipe)
    report = load(pipe, made.adapter, name="low", into={"transformer": "transformer_2"})
    assert set(report.modules) == {"transformer_2"}
    expect(
        pipe, before,
        lambda c, p: made.delta(("transformer", p)) if c == "transformer_2" and ("transformer", p) in made.factors else None,
    )  # fmt: skip
    path = save(pipe, "low", tmp_path / "low.safetensors")
    unload(pipe, "low")
    assert set(load(pipe, path).modules) == {"transformer"}


def test_a_transformer_of_the_tables_is_what_stable_cascade_calls_its_prior(tmp_path: Path) -> None:
    pipe = build("cascade")
    made, before = made_for(pipe, "prior"), tiny.weights(pipe)
    patches = {("transformer", path): patch for (_, path), patch in made.adapter.patches.items()}
    report = load(pipe, Adapter("cascade", patches), name="style")
    assert set(report.modules) == {"prior"}
    expect(pipe, before, lambda c, p: made.delta((c, p)) if (c, p) in made.factors else None)
    path = save(pipe, "style", tmp_path / "style.safetensors")
    unload(pipe, "style")
    assert load(pipe, path).modules == report.modules


def test_a_component_that_is_not_there_is_named_with_what_could_be_asked_instead() -> None:
    pipe = build("wan")
    made = made_for(pipe, "transformer")
    with pytest.raises(LoadMismatch, match="changes unet") as caught:
        load(pipe, made.adapter, into={"transformer": "unet"})
    assert "transformer_2" in str(caught.value.hint)
    with pytest.raises(UsageProblem, match="has no prior"):
        load(pipe, made.adapter, into={"prior": "transformer"})
    both = Adapter(None, {**made.adapter.patches, **made_for(pipe, "transformer_2").adapter.patches})
    with pytest.raises(UsageProblem, match="would go into one"):
        load(pipe, both, into={"transformer": "transformer_2"})


@pytest.mark.parametrize("family", ["flux1", "sd3", "wan", "z-image", "qwen-image"])
def test_transformers_are_trained_on_from_a_loaded_adapter(family: str) -> None:
    pipe = build(family)
    made = made_for(pipe, "transformer", dtype=torch.bfloat16)
    before = tiny.weights(pipe)
    report = load(pipe, made.adapter, name="style", trainable=True)
    assert {(p.dtype, p.requires_grad) for p in report.parameters} == {(torch.float32, True)}
    assert len(report.parameters) == 2 * len(made.factors)
    trained = {id(p) for p in report.parameters}
    assert {id(p) for p in pipe.transformer.parameters() if p.requires_grad} == trained
    unload(pipe, "style")
    assert tiny.same(tiny.weights(pipe), before)
    assert all(p.requires_grad for p in pipe.transformer.parameters())


def calls_to_load(pipe: Any, made: tiny.Made, collapse: bool) -> int:
    """Function calls of loading and unloading, C functions included."""
    count = itertools.count()
    sys.setprofile(lambda frame, event, _: next(count) if event in ("call", "c_call") else None)
    try:
        load(pipe, made.adapter, name="style", collapse=collapse)
        unload(pipe, "style")
    finally:
        sys.setprofile(None)
    return next(count)


@pytest.mark.parametrize("collapse", [False, True], ids=["layers", "weights"])
def test_twice_the_modules_are_twice_the_work(collapse: bool) -> None:
    pipe = build("z-image")
    paths = [path for _, path, _ in tiny.modules(pipe, ["transformer"])]
    work = [
        calls_to_load(pipe, tiny.make(pipe, ["transformer"], only=set(paths[:n]), **MIXED), collapse)
        for n in (60, 60, 120, 240)
    ]
    assert work[3] - work[2] < 2.3 * (work[2] - work[1])
