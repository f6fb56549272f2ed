"""Low-rank layers of T5, which no loader of diffusers serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hubtool
from hubtool.actions import train as actions
from hubtool.pipelines import live
from hubtool.tensors.evaluate import compute
from hubtool.training import loop
from hubtool.training.methods import method
from hubtool.training.session import session
from hubtool.training.train import joined, train
from tests.support.training import bits, config, whole

PLACE = {"sd3": "text_encoder_3", "flux1": "text_encoder_2"}
T5 = (
    "adapter.t5=true",
    "adapter.targets=transformer",
    'adapter.only=["text_encoder*.block.0.*"]',
    "optimiser.text_rate=0.05",
)
TARGETS = {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}


def encoded(pipe: Any, family: str) -> torch.Tensor:
    encoder, tokenizer = live.encoders(pipe)[PLACE[family]]
    with torch.no_grad():
        return encoder(tokenizer("a cat", return_tensors="pt").input_ids)[0]


@pytest.mark.parametrize("family", PLACE)
def test_every_linear_layer_of_t5_is_trained_and_read_back(family: str, tmp_path: Path) -> None:
    pipe = whole(family)
    before, plain = bits(pipe), encoded(pipe, family)
    settings = config(tmp_path, "lora", *T5)
    with session(pipe, settings, method("lora"), lambda: None) as made:
        loop.update(made, 0)
        loop.update(made, 1)
        trained, wanted = joined(pipe, made.parts), encoded(pipe, family)
    assert {path.rpartition(".")[2] for _, path in trained.patches} == TARGETS
    assert all(bool(compute(patch.up).any()) for patch in trained.patches.values())
    after = bits(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not torch.equal(wanted, plain)
    hubtool.load(pipe, trained, name="back")
    torch.testing.assert_close(encoded(pipe, family), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", PLACE)
def test_t5_has_its_keys_in_every_layout(layout: str, family: str, tmp_path: Path) -> None:
    only = 'adapter.only=["text_encoder*.block.0.*", "transformer.transformer_blocks.0.ff.net.*"]'
    done = train(config(tmp_path, "lora", *T5, only, "run.steps=1", f"output.layout={layout}"), whole(family))
    prefix = "lora_te3_encoder_block_0" if layout == "kohya" else f"{PLACE[family]}.encoder.block.0"
    assert len({key.partition(".lora_")[0] for key in load_file(done.written.main) if key.startswith(prefix)}) >= 7
    told = hubtool.inspect(done.written.main).to_json()
    assert sorted(told["components"].values()) == [2, len(TARGETS)]
    report = hubtool.load(whole(family), done.written.main)
    assert len(report.modules[PLACE[family]]) == len(TARGETS)


def test_t5s_own_dropout_stays_off_and_the_layers_own_acts(tmp_path: Path) -> None:
    pipe = whole("flux1")
    with session(pipe, config(tmp_path, "lora", *T5, "adapter.dropout=0.5"), method("lora"), lambda: None) as made:
        with loop._training(made):
            awake = {path for path, module in pipe.text_encoder_2.named_modules() if module.training}
        assert any("lora_dropout" in path for path in awake)
        assert not any(path.endswith((".dropout", "SelfAttention")) for path in awake)
        assert not any(module.training for module in pipe.text_encoder_2.modules())


def test_checkpointing_gives_t5_the_same_gradients(tmp_path: Path) -> None:
    found = []
    for spare in ("false", "true"):
        settings = config(tmp_path, "lora", *T5, f"run.checkpointing={spare}")
        with session(whole("flux1"), settings, method("lora"), lambda: None) as made:
            loop.update(made, 0)
            loop._gradients(made, 1)
            found.append({name: p.grad.clone() for name, p in made.parameters.items() if p.grad is not None})
    assert found[0]
    assert any(bool(value.any()) for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_the_estimate_counts_t5(tmp_path: Path) -> None:
    pipe = whole("flux1")
    pipe.save_pretrained(tmp_path / "base")
    settings = config(tmp_path, "lora", *T5, f"base={tmp_path / 'base'}")
    planned = actions.plan(settings).parameters
    with session(pipe, settings, method("lora"), lambda: None) as made:
        assert planned == sum(p.numel() for p in made.parameters.values())
