"""QLoRA: low-rank layers on weights in four bits. What computes with them runs only where bitsandbytes is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hubtool.actions import train as actions
from hubtool.errors import MissingExtra, UsageProblem
from hubtool.pipelines.tiny import build
from hubtool.training import loop
from hubtool.training.methods import method
from hubtool.training.session import session
from hubtool.training.train import joined, train
from tests.support.training import bits, config, prior, whole


def test_the_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "hubtool.training.quantised.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(MissingExtra) as caught:
        train(config(tmp_path, "lora", "run.quantise=nf4"), build("sd1"))
    assert caught.value.hint == "pip install bitsandbytes"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "more"), [("textual-inversion", ()), ("custom-diffusion", ()), ("dreambooth", ("adapter.full=true",))]
)
def test_weights_that_train_are_not_quantised(kind: str, more: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="cannot train"):
        train(config(tmp_path, kind, *prior(tmp_path), "run.quantise=nf4", *more), build("sd1"))


@pytest.mark.parametrize("family", ["sd1", "flux1"])
def test_layers_train_on_four_bits_and_the_weights_come_back(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pipe = whole(family)
    before = bits(pipe)
    settings = config(tmp_path, "lora", "run.quantise=nf4", "optimiser.rate=0.05")
    with session(pipe, settings, method("lora"), lambda: None) as made:
        assert any(type(one).__name__ == "Linear4bit" for one in made.denoiser.modules())
        loop.update(made, 0)
        loop.update(made, 1)
        ranks = {patch.rank for patch in joined(pipe, made.parts).patches.values()}
    assert ranks == {2}
    after = bits(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_estimate_knows_how_little_four_bits_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubtool.training.quantised.find_spec", lambda name: name)
    pipe = build("sd1")
    pipe.save_pretrained(tmp_path / "base")
    plain, small = (
        actions.plan(config(tmp_path, "lora", f"base={tmp_path / 'base'}", *more)).memory
        for more in ((), ("run.quantise=nf4",))
    )
    assert plain is not None
    assert small is not None
    linear = sum(one.weight.numel() for one in pipe.unet.modules() if type(one) is torch.nn.Linear)
    assert plain["frozen weights"] - small["frozen weights"] == pytest.approx(linear * (4 - 0.5625), rel=1e-6)
    assert plain["trained parameters"] == small["trained parameters"]
