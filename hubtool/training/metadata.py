"""What a trained file says about itself: sd-scripts' ``ss_*`` fields, ModelSpec, and hubtool's own configuration, so that it can be repeated."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hubtool.training.config import Config
from hubtool.training.data.batches import Batches

CONFIG = "hubtool.train"  # the whole configuration as JSON
# family -> (ModelSpec's architecture, sd-scripts' name), as their writers spell them
_NAMES = {
    "sd1": ("stable-diffusion-v1", "sd_v1"), "sd2": ("stable-diffusion-v2", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"), "sd3": ("stable-diffusion-3-medium", "sd3m"),
    "flux1": ("flux-1-dev", "flux1"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Facts:
    """What happened. ``kind``: lora or textual-inversion, empty for a whole checkpoint; ``prediction``: the objective's name."""

    family: str
    kind: str
    prediction: str
    steps: int
    started: datetime
    finished: datetime


def make(config: Config, own: Batches, prior: Batches | None, facts: Facts) -> dict[str, str]:
    """Metadata of the output: all values are strings, as safetensors asks."""
    found = {
        **_base(config, facts),
        **_network(config),
        **_loop(config, own, prior, facts),
        **_images(config, own),
        **_spec(config, facts),
    }
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
    return {**told, CONFIG: json.dumps(config.to_json(), sort_keys=True, separators=(",", ":"))}


def trigger_words(config: Config, tokens: bool) -> tuple[str, ...]:
    """The words named in the configuration, else the new tokens."""
    return config.output.trigger or (config.tokens.names if tokens else ())


def _base(config: Config, facts: Facts) -> dict[str, Any]:
    return {
        "ss_base_model_version": _NAMES[facts.family][1],
        "ss_sd_model_name": Path(config.base).name if Path(config.base).exists() else config.base or "None",
        "ss_v2": str(facts.family == "sd2"),
        "ss_model_prediction_type": facts.prediction,
        "ss_clip_skip": str(config.objective.clip_skip or None),
    }


def _network(config: Config) -> dict[str, Any]:
    if config.method in ("textual-inversion", "custom-diffusion"):
        return {}
    if config.adapter.full and config.output.form != "extract":
        return {}
    adapter = config.adapter
    extra = {"conv_dim": str(adapter.conv_rank), "conv_alpha": str(adapter.conv_alpha)} if adapter.conv_rank else {}
    extra |= {"dora_wd": "True"} if adapter.dora else {}
    extra |= {"rs_lora": "True"} if adapter.rank_stabilised else {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        "ss_network_dropout": str(adapter.dropout),
        **({"ss_network_args": extra} if extra else {}),
    }


def _loop(config: Config, own: Batches, prior: Batches | None, facts: Facts) -> dict[str, Any]:
    rates, run = config.optimiser, config.run
    epochs = max(1, -(-facts.steps * run.accumulate // own.per_epoch))
    return {
        "ss_output_name": config.output.name,
        "ss_learning_rate": str(rates.rate),
        "ss_unet_lr": str(rates.rate),
        "ss_text_encoder_lr": str(rates.text_rate),
        "ss_optimizer": rates.name,
        "ss_lr_scheduler": rates.schedule,
        "ss_lr_warmup_steps": str(rates.warmup),
        "ss_max_grad_norm": str(rates.clip),
        "ss_steps": str(facts.steps),
        "ss_max_train_steps": str(run.steps),
        "ss_epoch": str(epochs),
        "ss_num_epochs": str(epochs),
        "ss_batch_size_per_device": str(run.batch),
        "ss_gradient_accumulation_steps": str(run.accumulate),
        "ss_gradient_checkpointing": str(run.checkpointing),
        "ss_mixed_precision": run.precision,
        "ss_seed": str(run.seed),
        "ss_min_snr_gamma": str(config.objective.snr_gamma or None),
        "ss_noise_offset": str(config.objective.noise_offset or None),
        "ss_prior_loss_weight": str(config.objective.prior_weight),
        "ss_num_reg_images": str(len(prior.items) if prior else 0),
        "ss_training_started_at": f"{facts.started.timestamp():.3f}",
        "ss_training_finished_at": f"{facts.finished.timestamp():.3f}",
    }


def _images(config: Config, own: Batches) -> dict[str, Any]:
    """What the images were: folder, buckets, and how often each tag was read in one epoch."""
    folder = Path(config.data.folder).name
    tags: Counter[str] = Counter()
    for number in range(own.per_epoch):
        for sample in own.batch(number):
            if sample.item.caption is not None:  # a template's words are no tags
                tags.update(tag.strip() for tag in sample.caption.split(",") if tag.strip())
    count = sum(len(members) for members in own.of_bucket.values())
    buckets = [{"resolution": list(size), "count": len(members)} for size, members in sorted(own.of_bucket.items())]
    return {
        "ss_num_train_images": str(count),
        "ss_num_batches_per_epoch": str(own.per_epoch),
        "ss_resolution": f"({config.data.resolution}, {config.data.resolution})",
        "ss_enable_bucket": str(config.data.buckets),
        "ss_bucket_info": {"buckets": dict(enumerate(buckets))},
        "ss_dataset_dirs": {folder: {"n_repeats": config.data.repeats, "img_count": count}},
        "ss_tag_frequency": {folder: dict(tags.most_common(5000))},
    }


def _spec(config: Config, facts: Facts) -> dict[str, Any]:
    output = config.output
    words = ", ".join(trigger_words(config, "tokens" in facts.kind or config.method in _WITH_TOKENS))
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(facts.prediction)
    optional = {
        "modelspec.author": output.author,
        "modelspec.description": output.description,
        "modelspec.license": output.license,
        "modelspec.tags": ", ".join(output.tags),
        "modelspec.trigger_phrase": words,
        "modelspec.prediction_type": prediction,
    }
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "/".join(part for part in (_NAMES[facts.family][0], facts.kind) if part),
        "modelspec.implementation": "diffusers",
        "modelspec.title": output.title or output.name,
        "modelspec.date": facts.finished.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "modelspec.resolution": f"{config.data.resolution}x{config.data.resolution}",
        **{name: value for name, value in optional.items() if value},
    }


_WITH_TOKENS = ("textual-inversion", "pivotal", "custom-diffusion")
