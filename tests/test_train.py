"""Training: what moves and what does not, the formulas, interruption, and what comes out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hubtool
from hubtool.errors import BadValues, LoadMismatch, LossyConversion, Unsupported, UsageProblem, WouldOverwrite
from hubtool.pipelines.tiny import build
from hubtool.training import checkpoint, loop
from hubtool.training.config import Config, to_toml
from hubtool.training.methods import method
from hubtool.training.session import session
from hubtool.training.train import Trained, train
from tests.support import training
from tests.support.training import bits, config, pictures, prior, whole

METHODS = ("lora", "dreambooth", "textual-inversion", "pivotal", "custom-diffusion")


def one(tmp: Path, pipe: Any, *pairs: str, kind: str = "lora", images: Path | None = None, **options: Any) -> Trained:
    return train(config(tmp, kind, *pairs, images=images), pipe, **options)


def tensors(done: Trained) -> dict[str, torch.Tensor]:
    return {f"{path.name}:{key}": value for path in done.written.files for key, value in load_file(path).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", METHODS)
def test_the_pipeline_has_its_own_bits_again_after_every_method(kind: str, tmp_path: Path) -> None:
    pipe = build("sd1")
    before, vocabulary = bits(pipe), len(pipe.tokenizer)
    extra = prior(tmp_path) if kind in ("dreambooth", "custom-diffusion") else ()
    done = one(tmp_path, pipe, *extra, "run.steps=2", "adapter.text_encoders=true", kind=kind)
    assert equal(bits(pipe), before)
    assert len(pipe.tokenizer) == vocabulary
    assert done.written.main.is_file()


@pytest.mark.parametrize("kind", ["lora", "pivotal", "custom-diffusion"])
def test_only_the_trained_parameters_move_during_training(kind: str, tmp_path: Path) -> None:
    pipe = build("sd1")
    settings = config(tmp_path, kind, *prior(tmp_path), "optimiser.weight_decay=0.5", "optimiser.rate=0.01")
    with session(pipe, settings, method(kind), lambda: None) as made:
        trained = {id(parameter) for parameter in made.parameters.values()}
        frozen = {
            f"{name}.{key}": (p, p.detach().clone())
            for name, model in pipe.components.items()
            if isinstance(model, torch.nn.Module)
            for key, p in model.named_parameters()
            if id(p) not in trained
        }
        start = {name: p.detach().clone() for name, p in made.parameters.items()}
        for step in range(2):
            loop.update(made, step)
        assert all(torch.equal(p, kept) for p, kept in frozen.values())
        moved = [name for name, p in made.parameters.items() if not torch.equal(p, start[name])]
        assert len(moved) == len(start)


@pytest.mark.parametrize("kind", ["lora", "textual-inversion"])
def test_the_loss_falls_on_a_planted_signal(kind: str, tmp_path: Path) -> None:
    images = pictures(tmp_path / "plain", 1, colours=(200,))
    rates = ("optimiser.rate=0.02", "optimiser.token_rate=0.02", "run.steps=16", "adapter.only=[]", "tokens.vectors=4")
    settings = config(tmp_path, kind, *rates, images=images)
    with session(build("sd2"), settings, method(kind), lambda: None) as made:
        before = probe(made)
        for step in range(settings.run.steps):
            loop.update(made, step)
        assert probe(made) < (0.93 if kind == "lora" else 0.995) * before


def probe(made: Any) -> float:
    with torch.no_grad():
        return sum(float(loop.batch_loss(made, number)[0]) for number in range(1000, 1008)) / 8


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("lora", ("optimiser.ema=0.9", "adapter.dropout=0.2", "optimiser.schedule=cosine", "optimiser.warmup=2")),
        ("pivotal", ("tokens.only_steps=1", "tokens.norm_decay=0.1", "data.flip=true", "data.crop=random")),
        ("custom-diffusion", ("run.accumulate=2", "optimiser.name=adafactor")),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    kind: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    pairs = (*more, *(prior(tmp_path) if kind == "custom-diffusion" else ()))
    whole_run = one(tmp_path / "a", build("sd1"), *pairs, kind=kind)

    class Killed(Exception):
        pass

    def kill(step: loop.Step) -> None:
        if step.step == 3:
            raise Killed

    with pytest.raises(Killed):
        one(tmp_path / "b", build("sd1"), *pairs, kind=kind, watch=kill)
    resumed = one(tmp_path / "b", build("sd1"), *pairs, kind=kind, resume=True)
    assert resumed.resumed == 2
    assert equal(tensors(resumed), tensors(whole_run))
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    state = [load_file(tmp_path / run / "out" / "checkpoints" / "step-00000004" / "state.safetensors") for run in "ab"]
    assert equal(*state)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    build("sd1").save_pretrained(tmp_path / "base")
    pairs = (f"base={tmp_path / 'base'}", "run.accumulate=2", "run.steps=2", "optimiser.name=sgd", "optimiser.rate=0.1")
    images = pictures(tmp_path / "images")
    settings = config(tmp_path / "two", "lora", *pairs, images=images)
    (tmp_path / "run.toml").write_text(to_toml(settings))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "hubtool", "train", "lora", "-c", str(tmp_path / "run.toml"), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    alone = tensors(train(config(tmp_path / "one", "lora", *pairs, images=images)))
    both = load_file(tmp_path / "two" / "out" / "adapter.safetensors")
    for key, value in both.items():
        torch.testing.assert_close(value, alone[f"adapter.safetensors:{key}"], rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_a_run_killed_from_outside_resumes_to_the_same_bits(tmp_path: Path) -> None:
    import signal
    import subprocess
    import sys
    import time

    build("sd1").save_pretrained(tmp_path / "base")
    pairs = (f"base={tmp_path / 'base'}", "run.steps=30", "run.checkpoint_every=1")
    settings = config(tmp_path / "killed", "lora", *pairs, images=pictures(tmp_path / "images"))
    (tmp_path / "run.toml").write_text(to_toml(settings))
    command = [sys.executable, "-m", "hubtool", "train", "lora", "-c", str(tmp_path / "run.toml")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while checkpoint.newest(settings) is None and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    resumed = train(settings, resume=True)
    assert 0 < resumed.resumed < 30
    whole_run = train(config(tmp_path / "whole", "lora", *pairs, images=tmp_path / "images"))
    assert equal(tensors(resumed), tensors(whole_run))


def losses(tmp: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (tmp / "out" / "log.ndjson").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = one(tmp_path / "a", build("sd1"), "run.steps=2")
    torch.manual_seed(2)
    assert equal(tensors(first), tensors(one(tmp_path / "b", build("sd1"), "run.steps=2")))
    assert not equal(tensors(first), tensors(one(tmp_path / "c", build("sd1"), "run.steps=2", "run.seed=1")))


def test_training_uses_none_of_the_callers_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one(tmp_path, build("sd1"), "run.steps=1")
    assert torch.equal(torch.rand(3), wanted)


def test_validation_pictures_change_nothing_about_the_training(tmp_path: Path) -> None:
    plain = one(tmp_path / "a", build("sd1"), "run.steps=3")
    shown = one(tmp_path / "b", build("sd1"), "run.steps=3", "validation.every=2", 'validation.prompts=["a {token}"]')
    assert equal(tensors(plain), tensors(shown))
    assert [path.name for path in (tmp_path / "b/out/samples").iterdir()] == ["step-00000002-00-00.png"]


def test_two_accumulated_batches_equal_one_of_twice_the_size(tmp_path: Path) -> None:
    images = pictures(tmp_path / "same", 1)
    small = one(tmp_path / "a", build("sd1"), "run.accumulate=2", "data.repeats=2", "optimiser.name=sgd", images=images)
    large = one(tmp_path / "b", build("sd1"), "run.batch=2", "data.repeats=2", "optimiser.name=sgd", images=images)
    for key, value in tensors(small).items():
        torch.testing.assert_close(value, tensors(large)[key], rtol=1e-4, atol=1e-7)


def test_the_priors_loss_is_the_formula(tmp_path: Path) -> None:
    settings = config(tmp_path, "dreambooth", *prior(tmp_path), "objective.prior_weight=0.7", "run.batch=2")
    with session(build("sd1"), settings, method("dreambooth"), lambda: None) as made, torch.no_grad():
        total, told = loop.batch_loss(made, 0)
        own = made.own.batch(0)
        samples = [*own, *made.prior.alike(own)]
        each = [by_hand(made, sample, at >= len(own)) for at, sample in enumerate(samples)]
        expected = sum(each[:2]) / 2 + 0.7 * sum(each[2:]) / 2
        assert [sample.caption for sample in samples[2:]] == ["a dog", "a dog"]
        assert math.isclose(float(total), expected, rel_tol=1e-5)
        assert math.isclose(float(told), sum(each[2:]) / 2, rel_tol=1e-5)


def by_hand(made: Any, sample: Any, second: bool) -> float:
    """DDPM's noising and the mean squared error, with diffusers' own scheduler, for one image alone."""
    from diffusers import DDPMScheduler

    from hubtool.training import seeds
    from hubtool.training.data import images

    pipe, source = made.pipe, seeds.generator(0, "noise", sample.index, int(second))
    share = torch.rand(1, generator=source)
    torch.randn(1, generator=source)
    latents = pipe.vae.encode(images.pixels(sample.item, sample.cut)[None]).latent_dist
    drawn = torch.randn(latents.mean.shape, generator=seeds.generator(0, "vae", sample.index))
    latents = (latents.mean + latents.std * drawn) * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=source)
    times = (share * 1000).long()
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, times)
    states = pipe.encode_prompt(sample.caption, "cpu", 1, False)[0]
    return float(((pipe.unet(noisy, times, states).sample - noise) ** 2).mean())


def test_missing_class_images_are_made_once_and_by_number(tmp_path: Path) -> None:
    pairs = ("data.class_prompt=a dog", "data.class_images=2", "run.steps=1")
    made: list[int] = []
    one(tmp_path, build("sd1"), *pairs, kind="dreambooth", made=lambda: made.append(1))
    folder = tmp_path / "out" / "class"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["class-00000.png", "class-00001.png"]
    (folder / "class-00000.png").unlink()
    one(tmp_path, build("sd1"), *pairs, kind="dreambooth", made=lambda: made.append(1), force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert len(made) == 3


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    pipe = build("sd1")
    before = bits(pipe)

    def poison(step: loop.Step) -> None:
        if step.step == 3:
            for layer in pipe.unet.modules():
                if hasattr(layer, "lora_B"):
                    layer.lora_B["trained"].weight.data.fill_(math.nan)

    with pytest.raises(BadValues, match=r"the last good checkpoint is step-00000002") as caught:
        one(tmp_path, pipe, "run.steps=6", watch=poison)
    assert caught.value.path.endswith("step-00000002")
    kept = load_file(Path(caught.value.path) / "state.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())
    assert not (tmp_path / "out" / "adapter.safetensors").exists()
    assert equal(bits(pipe), before)


def test_a_step_that_leaves_infinity_behind_is_never_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadValues, match="training stopped"):
        one(tmp_path, build("sd1"), "run.steps=30", "run.checkpoint_every=1", "optimiser.rate=100", "optimiser.clip=0")
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        assert all(bool(value.isfinite().all()) for value in load_file(path / "state.safetensors").values())


def test_a_finished_or_interrupted_run_is_not_overwritten(tmp_path: Path) -> None:
    done = one(tmp_path, build("sd1"), "run.steps=2")
    with pytest.raises(WouldOverwrite, match="a result already"):
        one(tmp_path, build("sd1"), "run.steps=2")
    done.written.main.unlink()
    with pytest.raises(WouldOverwrite, match="interrupted"):
        one(tmp_path, build("sd1"), "run.steps=2")
    again = one(tmp_path, build("sd1"), "run.steps=2", force=True)
    assert len(again.steps) == 2


def test_another_configuration_cannot_resume_a_run(tmp_path: Path) -> None:
    one(tmp_path, build("sd1"), "run.steps=2")
    with pytest.raises(UsageProblem, match=r"optimiser\.rate was 0\.0001, now 0\.5"):
        one(tmp_path, build("sd1"), "run.steps=2", "optimiser.rate=0.5", resume=True)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path) -> None:
    settings = config(tmp_path, "lora", "run.steps=5", "run.checkpoint_every=1", "run.checkpoints_kept=2")
    train(settings, build("sd1"))
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir()) == ["step-00000004", "step-00000005"]
    assert checkpoint.newest(settings) == tmp_path / "out/checkpoints/step-00000005"


def test_a_method_refuses_a_family_it_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="custom-diffusion does not fit flux1"):
        train(config(tmp_path, "custom-diffusion", *prior(tmp_path)), build("flux1"))


def test_a_base_of_another_family_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    folder = tmp_path / "wan"
    build("wan").save_config(folder)
    (folder / "transformer").mkdir()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    settings = config(tmp_path, "lora")
    with pytest.raises((LoadMismatch, Unsupported), match="does not fit wan"):
        train(Config(**{**fields(settings), "base": str(folder)}))


def fields(settings: Config) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in Config.__dataclass_fields__}


def test_a_layout_that_cannot_hold_the_result_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(LossyConversion, match="kohya cannot hold"):
        one(tmp_path, whole("sd3"), "output.layout=kohya", watch=lambda step: pytest.fail("it trained"))


def test_models_that_wait_in_main_memory_change_nothing(tmp_path: Path) -> None:
    more = ("run.steps=2", "validation.every=2", 'validation.prompts=["a cat"]')
    plain = one(tmp_path / "a", build("sd1"), *more)
    spared = one(tmp_path / "b", build("sd1"), *more, "run.offload=true")
    assert equal(tensors(plain), tensors(spared))


def test_tokens_that_no_caption_holds_are_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, "textual-inversion", "data.captions=names")
    with pytest.raises(UsageProblem, match="no caption of the first epoch holds <cat>"):
        train(settings, build("sd1"))


@pytest.mark.parametrize("kind", ["dreambooth", "custom-diffusion"])
def test_preserving_a_prior_needs_a_class(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="images of the class"):
        train(config(tmp_path, kind), build("sd1"))


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3", "flux1"])
def test_every_family_trains_low_rank_layers(family: str, tmp_path: Path) -> None:
    pipe = whole(family)
    before = bits(pipe)
    done = one(tmp_path, pipe, "run.steps=2", "adapter.text_encoders=true", "run.batch=2")
    assert equal(bits(pipe), before)
    assert hubtool.inspect(done.written.main).to_json()["family"] == family
    held = tensors(done)
    assert any(bool(value.any()) for key, value in held.items() if "lora_B" in key)


def test_an_inpainting_base_trains(tmp_path: Path) -> None:
    pipe = training.inpainting()
    done = one(tmp_path, pipe, "run.steps=2", "validation.every=1", 'validation.prompts=["a cat"]')
    assert done.written.main.is_file()
    assert len(list((tmp_path / "out/samples").iterdir())) == 2
