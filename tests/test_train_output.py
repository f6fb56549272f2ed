"""What training writes: read back by hubtool, diffusers and PEFT, in several layouts, with everything it says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import hubtool
from hubtool.pipelines import adapter_of
from hubtool.pipelines.tiny import build
from hubtool.tensors.evaluate import compute
from hubtool.training import result
from hubtool.training.config import from_mapping
from hubtool.training.methods import method
from hubtool.training.session import session
from hubtool.training.train import Trained, joined, train
from tests.support.tiny import effective, encoded, weights
from tests.support.training import config, pictures, prior, whole

FAST = ("run.steps=2", "optimiser.rate=0.05", "optimiser.text_rate=0.05", "adapter.alpha=3.0", "run.checkpoint_every=0")


def run(tmp: Path, pipe: Any, kind: str = "lora", *pairs: str) -> tuple[Trained, dict[Any, torch.Tensor]]:
    """Train, and what the parts held at the end, as (key) -> change at strength 1."""
    held: dict[Any, torch.Tensor] = {}
    settings = config(tmp, kind, *FAST, *pairs)

    def last(step: Any) -> None:
        if step.step == settings.run.steps and kind == "lora":
            held.update(
                {
                    key: patch.delta()
                    for key, patch in adapter_of(pipe, "trained").patches.items()
                    if not patch.needs_base
                }
            )

    return train(settings, pipe, watch=last), held


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfy", "peft"])
def test_every_layout_reads_back_as_what_was_trained(layout: str, tmp_path: Path) -> None:
    only = () if layout == "peft" else ("adapter.text_encoders=true",)
    pipe = build("sd1")
    done, held = run(tmp_path, pipe, "lora", f"output.layout={layout}", *only)
    syntax = {"diffusers": "peft", "peft": "peft-model"}.get(layout, layout)
    assert hubtool.inspect(done.written.main).to_json()["layout"].partition("/")[0] == syntax
    before = weights(pipe)
    hubtool.load(pipe, done.written.main, name="back", components=None)
    after = effective(pipe)
    for (component, path), delta in held.items():
        live = path.removeprefix("text_model.")
        change = (after[component][f"{live}.weight"] - before[component][f"{live}.weight"].double()).flatten(1)
        torch.testing.assert_close(change, delta.double().flatten(1), rtol=1e-5, atol=1e-6)
    assert len(held) > 3


@pytest.mark.parametrize(
    ("family", "layout"), [("sd1", "diffusers"), ("sd1", "kohya"), ("sdxl", "diffusers"), ("flux1", "diffusers")]
)
def test_diffusers_loads_the_file_exactly(family: str, layout: str, tmp_path: Path) -> None:
    pipe = whole(family)
    done, held = run(tmp_path, pipe, "lora", f"output.layout={layout}", "adapter.text_encoders=true")
    before = weights(pipe)
    pipe.load_lora_weights(str(done.written.main), adapter_name="back")
    after = effective(pipe)
    assert {component for component, _ in held} >= {"text_encoder"}
    for (component, canonical), delta in held.items():
        path = canonical if component == "text_encoder_2" else canonical.removeprefix("text_model.")
        change = (after[component][f"{path}.weight"] - before[component][f"{path}.weight"].double()).flatten(1)
        torch.testing.assert_close(change, delta.double().flatten(1), rtol=1e-5, atol=1e-6)


def test_peft_loads_the_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    pipe = build("sd1")
    done, held = run(tmp_path, pipe, "lora", "output.layout=peft")
    model = PeftModel.from_pretrained(pipe.unet, str(done.written.main))
    for (_, path), delta in held.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        torch.testing.assert_close(layer.get_delta_weight("default").flatten(1), delta.flatten(1), rtol=1e-5, atol=1e-6)


def test_convolutions_and_magnitudes_are_trained_and_read_back(tmp_path: Path) -> None:
    pipe = build("sd1")
    pairs = (
        "adapter.conv_rank=2",
        "adapter.dora=true",
        "adapter.targets=all",
        "output.layout=kohya",
        'adapter.only=["*.up_blocks.2.*"]',
    )
    done, _ = run(tmp_path, pipe, "lora", *pairs)
    told = hubtool.inspect(done.written.main).to_json()
    assert (told["algorithm"], told["flags"]) == ("locon", ["dora"])
    report = hubtool.load(pipe, done.written.main)
    assert any("resnets" in path for path in report.modules["unet"])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_token_vectors_read_back_as_they_were_in_training(family: str, tmp_path: Path) -> None:
    pipe = build(family)
    settings = config(tmp_path, "textual-inversion", "tokens.vectors=3", "run.steps=2", "optimiser.token_rate=0.1")
    seen: list[Any] = []
    with session(pipe, settings, method("textual-inversion"), lambda: None) as made:
        made.parts[0].rows["text_encoder"].data.add_(0.1)
        seen.append(encoded(pipe.text_encoder, pipe.tokenizer, "a <cat> <cat>_1 <cat>_2").last_hidden_state)
        wanted = joined(pipe, made.parts)
    (tmp_path / "out").mkdir()
    written = result.write(wanted, settings.output, {}, force=True) if family == "sd1" else None
    if written is not None:
        report = hubtool.load(pipe, written.main)
        assert report.tokens["text_encoder"] == ("<cat>", "<cat>_1", "<cat>_2")
        again = encoded(pipe.text_encoder, pipe.tokenizer, "a <cat> <cat>_1 <cat>_2").last_hidden_state
        torch.testing.assert_close(again, seen[0])
    assert {one.encoder for one in wanted.embeddings} == (
        {"text_encoder"} if family == "sd1" else {"text_encoder", "text_encoder_2"}
    )


def test_diffusers_loads_a_trained_token(tmp_path: Path) -> None:
    pipe = build("sd1")
    done, _ = run(tmp_path, pipe, "textual-inversion", "tokens.vectors=2")
    pipe.load_textual_inversion(str(done.written.main))
    rows = pipe.text_encoder.get_input_embeddings().weight[-2:]
    assert torch.equal(rows, load_file(done.written.main)["<cat>"])


def test_an_xl_token_has_a_key_for_each_encoder(tmp_path: Path) -> None:
    done, _ = run(tmp_path, build("sdxl"), "textual-inversion")
    assert {key: value.shape[1] for key, value in load_file(done.written.main).items()} == {"clip_l": 16, "clip_g": 24}


def test_pivotal_tuning_writes_an_adapter_and_its_token(tmp_path: Path) -> None:
    pipe = build("sd1")
    done, _ = run(tmp_path, pipe, "pivotal", "tokens.only_steps=1")
    assert [path.name for path in done.written.files] == ["adapter.safetensors", "adapter-cat.safetensors"]
    hubtool.load(pipe, done.written.files[1], name="token")
    hubtool.load(pipe, done.written.files[0], name="layers")
    assert "<cat>" in pipe.tokenizer.get_vocab()


def test_custom_diffusion_writes_replacement_weights_under_diffusers_names(tmp_path: Path) -> None:
    pipe = build("sd1")
    done, _ = run(tmp_path, pipe, "custom-diffusion", *prior(tmp_path))
    held = load_file(done.written.main)
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
    own = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k").weight
    assert held[key].shape == own.shape
    assert not torch.equal(held[key], own)
    assert hubtool.inspect(done.written.main).to_json()["kind"] == "custom_diffusion"


def test_custom_diffusion_in_an_adapter_layout_loads_into_a_pipeline(tmp_path: Path) -> None:
    pipe = build("sd1")
    done, _ = run(tmp_path, pipe, "custom-diffusion", *prior(tmp_path), "output.layout=comfy")
    report = hubtool.load(pipe, done.written.main)
    assert all(".attn2.to_" in path for path in report.modules["unet"])
    assert len(report.modules["unet"]) == 32


def test_the_file_says_what_it_is_and_how_it_was_made(tmp_path: Path) -> None:
    images = pictures(tmp_path / "tagged", 2)
    for at in range(2):
        (images / f"cat_{at}.txt").write_text(f"sks cat, number {at}")
    pairs = ("output.trigger=['sks cat']", "output.author=me", "objective.snr_gamma=5", "output.dtype=float16")
    settings = config(tmp_path, "lora", *FAST, *pairs, images=images)
    done = train(settings, build("sd1"))
    with safe_open(done.written.main, "pt") as file:
        notes, dtypes = file.metadata(), {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 - no mapping
    assert dtypes == {torch.float16}
    assert notes["ss_base_model_version"] == "sd_v1"
    assert (notes["ss_network_dim"], notes["ss_steps"], notes["ss_min_snr_gamma"]) == ("2", "2", "5")
    assert json.loads(notes["ss_tag_frequency"]) == {"tagged": {"sks cat": 2, "number 0": 1, "number 1": 1}}
    assert notes["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert notes["modelspec.trigger_phrase"] == "sks cat"
    assert from_mapping(json.loads(notes["hubtool.train"])) == settings
    assert hubtool.inspect(done.written.main).to_json()["trigger_words"] == ["sks cat"]


def test_training_goes_on_from_an_adapter_file(tmp_path: Path) -> None:
    pipe = build("sd1")
    first, _ = run(tmp_path / "a", pipe, "lora")
    settings = config(tmp_path / "b", "lora", *FAST, f"adapter.start={first.written.main}")
    with session(pipe, settings, method("lora"), lambda: None) as made:
        start = {key: compute(patch.up) for key, patch in joined(pipe, made.parts).patches.items()}
    again = {f"{c}.{path}.lora_B.weight": value for (c, path), value in start.items()}
    held = load_file(first.written.main)
    assert again
    assert all(torch.equal(held[key], value) for key, value in again.items())
