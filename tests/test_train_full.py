"""DreamBooth on all weights: what moves, what comes out in each form, and that the pipeline is its own again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import hubtool
from hubtool.actions import train as actions
from hubtool.errors import UsageProblem, WouldOverwrite
from hubtool.pipelines.opening import opened
from hubtool.pipelines.tiny import build
from hubtool.training import loop
from hubtool.training.methods import method
from hubtool.training.session import session
from hubtool.training.train import Trained, train
from tests.support.tiny import effective, weights
from tests.support.training import bits, config, prior, whole

FULL = ("adapter.full=true", "run.steps=2", "run.checkpoint_every=0", "optimiser.rate=0.01", "optimiser.text_rate=0.01")


def run(tmp: Path, pipe: Any, *pairs: str, **options: Any) -> tuple[Trained, dict[str, torch.Tensor]]:
    """Train; and the denoiser's weights after the last step."""
    settings, held = config(tmp, "dreambooth", *prior(tmp), *FULL, *pairs), {}

    def last(step: Any) -> None:
        if step.step == settings.run.steps:
            held.update(
                {name: value for name, value in bits(pipe).items() if "unet." in name or "transformer." in name}
            )

    return train(settings, pipe, watch=last, **options), held


def test_all_weights_of_the_denoiser_move_and_none_of_the_others(tmp_path: Path) -> None:
    pipe = build("sd1")
    before = bits(pipe)
    settings = config(tmp_path, "dreambooth", *prior(tmp_path), *FULL)
    with session(pipe, settings, method("dreambooth"), lambda: None) as made:
        assert len(made.parameters) == sum(1 for _ in pipe.unet.parameters())
        loop.update(made, 0)
        now = bits(pipe)
        moved = {name for name, value in before.items() if not torch.equal(now[name], value)}
    trained = {f"unet.{name}" for name, _ in pipe.unet.named_parameters()}
    assert moved <= trained
    assert len(moved) > 0.9 * len(trained)
    after = bits(pipe)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux1"])
def test_a_folder_holds_what_was_trained(family: str, tmp_path: Path) -> None:
    import diffusers

    pipe = whole(family)
    before = bits(pipe)
    done, held = run(tmp_path, pipe)
    again = bits(diffusers.DiffusionPipeline.from_pretrained(done.written.main))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], held.get(name, value)) for name, value in before.items())
    assert any(not torch.equal(again[name], value) for name, value in before.items())
    after = bits(pipe)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["sd1", "flux1"])
def test_a_single_file_holds_what_was_trained(family: str, tmp_path: Path) -> None:
    pipe = whole(family)
    pipe.save_pretrained(tmp_path / "base")
    done, held = run(tmp_path, pipe, "output.form=file")
    assert hubtool.inspect(done.written.main).to_json()["kind"] == "checkpoint"
    again = bits(opened(done.written.main, torch.float32, config_from=tmp_path / "base"))
    assert held
    assert all(torch.equal(again[name], value) for name, value in held.items())
    with safe_open(done.written.main, "pt") as file:
        notes = file.metadata()
    assert "hubtool.train" in notes
    assert "ss_network_dim" not in notes
    assert "/" not in notes["modelspec.architecture"]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_an_extracted_adapter_of_full_rank_is_the_whole_change(layout: str, tmp_path: Path) -> None:
    pipe = build("sd1")
    before = weights(pipe)
    more = (
        f"output.layout={layout}",
        "output.form=extract",
        "adapter.rank=64",
        "adapter.conv_rank=256",
        "adapter.text_encoders=true",
    )
    done, held = run(tmp_path, pipe, *more)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter.safetensors",
        "log.ndjson",
        "train.toml",
    ]
    report = hubtool.load(pipe, done.written.main)
    assert set(report.modules) == {"unet", "text_encoder"}
    after = effective(pipe)["unet"]
    for path in report.modules["unet"]:
        change = after[f"{path}.weight"] - before["unet"][f"{path}.weight"].double()
        wanted = held[f"unet.{path}.weight"].double() - before["unet"][f"{path}.weight"].double()
        assert float((change - wanted).norm() / wanted.norm()) < 1e-3


def test_the_dtype_is_that_of_the_file_alone(tmp_path: Path) -> None:
    pipe = whole("sd3")
    before = bits(pipe)
    done, held = run(tmp_path, pipe, "output.dtype=float16")
    again = load_file(done.written.main / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = {name: again[name] for name, _ in pipe.transformer.named_parameters()}
    assert {value.dtype for value in kept.values()} == {torch.float16}
    assert all(torch.equal(value, held[f"transformer.{name}"].half()) for name, value in kept.items())
    after = bits(pipe)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_a_resumed_run_of_all_weights_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    more = ("run.steps=3", "run.checkpoint_every=2", "optimiser.ema=0.5")
    first, _ = run(tmp_path / "a", build("sd1"), *more)

    class Killed(Exception):
        pass

    def kill(step: loop.Step) -> None:
        if step.step == 3:
            raise Killed

    settings = config(
        tmp_path / "b", "dreambooth", *prior(tmp_path / "a"), *FULL, *more, images=tmp_path / "a" / "images"
    )
    with pytest.raises(Killed):
        train(settings, build("sd1"), watch=kill)
    second = train(settings, build("sd1"), resume=True)
    assert second.resumed == 2
    files = [sorted(done.written.main.rglob("*.safetensors")) for done in (first, second)]
    assert [one.read_bytes() for one in files[0]] == [one.read_bytes() for one in files[1]]


def test_a_result_is_replaced_only_when_forced(tmp_path: Path) -> None:
    run(tmp_path, build("sd1"))
    with pytest.raises(WouldOverwrite, match="a result already"):
        run(tmp_path, build("sd1"))
    done, _ = run(tmp_path, build("sd1"), force=True)
    assert (done.written.main / "model_index.json").is_file()


@pytest.mark.parametrize("kind", ["lora", "textual-inversion", "pivotal", "custom-diffusion"])
def test_the_other_methods_do_not_train_all_weights(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="does not train all weights"):
        train(config(tmp_path, kind, *prior(tmp_path), "adapter.full=true"), build("sd1"))


def test_the_estimate_counts_all_weights_once(tmp_path: Path) -> None:
    pipe = build("sd1")
    pipe.save_pretrained(tmp_path / "base")
    settings = config(tmp_path, "dreambooth", *prior(tmp_path), *FULL, f"base={tmp_path / 'base'}")
    found = actions.plan(settings)
    count = sum(p.numel() for p in pipe.unet.parameters())
    others = sum(4 * p.numel() for name in ("vae", "text_encoder") for p in getattr(pipe, name).parameters())
    assert found.parameters == count
    assert found.memory is not None
    assert (found.memory["trained parameters"], found.memory["optimiser"]) == (4 * count, 8 * count)
    assert found.memory["frozen weights"] == others
