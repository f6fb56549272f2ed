"""What a run will take, before it: steps, trained numbers, and memory by what it is for. No weights are read.

The components are built from their configs without memory (torch's ``meta`` device), the denoiser with its layers runs forwards there,
and what autograd would keep for the way back is counted. Unlike a rule of thumb this knows the resolution, the batch, the method and
checkpointing. What it does not know is the allocator's waste, the temporary memory of kernels, the one block that checkpointing
computes again, and the text encoders' activations where those are trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hubtool.errors import CorruptFile, Unsupported
from hubtool.training.config import Config
from hubtool.training.data.batches import Batches
from hubtool.training.parts.low_rank import chosen, trains_encoder

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

_DENOISERS = ("unet", "transformer")
_WITH_TOKENS = ("textual-inversion", "pivotal", "custom-diffusion")
# optimiser -> numbers of fp32 kept for each trained one
_MOMENTS = {"adamw": 2.0, "adafactor": 0.1, "sgd": 0.0, "adamw8bit": 0.5, "prodigy": 4.0}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by purpose; ``None`` where the base's configs are not here to be read. ``images``: of one epoch, with repeats."""

    images: int
    class_images: int
    epochs: float
    steps: int
    samples: int
    buckets: Mapping[str, int]
    parameters: int | None = None
    memory: Mapping[str, int] | None = None

    @property
    def total(self) -> int | None:
        return None if self.memory is None else sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "class_images": self.class_images,
            "epochs": round(self.epochs, 3),
            "steps": self.steps,
            "samples": self.samples,
            "buckets": dict(self.buckets),
            "parameters": self.parameters,
            "memory": None if self.memory is None else dict(self.memory),
            "total": self.total,
        }


def estimate(config: Config, own: Batches, precision: str) -> Estimate:
    """``precision``: fp32, fp16 or bf16. Raises what reading the base's configs raises."""
    run = config.run
    found = Estimate(
        images=sum(len(members) for members in own.of_bucket.values()),
        class_images=config.data.class_images,
        epochs=run.steps * run.accumulate / own.per_epoch,
        steps=run.steps,
        samples=run.steps * run.accumulate * run.batch,
        buckets={f"{width}x{height}": len(members) for (width, height), members in sorted(own.of_bucket.items())},
    )
    home = Path(config.config_from if config.config_from and Path(config.base).is_file() else config.base)
    if not (home / "model_index.json").is_file():
        return found
    with _without_memory(precision):
        models = _skeletons(home)
        parameters = _trained(models, config)
        memory = _memory(models, parameters, config, own, precision)
    fields = {
        name: getattr(found, name) for name in ("images", "class_images", "epochs", "steps", "samples", "buckets")
    }
    return Estimate(**fields, parameters=parameters, memory=memory)


def _memory(models: dict[str, Any], parameters: int, config: Config, own: Batches, precision: str) -> dict[str, int]:
    size = _BYTES[precision]
    whole = _whole(models, config)
    present = {name: one for name, one in models.items() if not _waits(name, config) and name not in whole}
    frozen = sum(
        _held(one, size, name in _DENOISERS and config.run.quantise != "none") for name, one in present.items()
    )
    average = 1 if config.optimiser.ema else 0
    return {
        "frozen weights": frozen,
        "trained parameters": 4 * parameters * (1 + average),
        "gradients": 4 * parameters,
        "optimiser": int(4 * parameters * _MOMENTS[config.optimiser.name]),
        "activations": _activations(models, config, own, precision),
    }


def _waits(name: str, config: Config) -> bool:
    """Whether a component is in main memory most of the time (``run.offload``)."""
    trains_text = config.adapter.text_encoders or config.adapter.t5 or config.method in _WITH_TOKENS
    return config.run.offload and (name == "vae" or (name.startswith("text_encoder") and not trains_text))


@contextmanager
def _without_memory(precision: str) -> Iterator[None]:
    """Inside the block, models are built in this precision and take no memory."""
    import torch

    from hubtool.pipelines import live

    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(precision))
    try:
        with live.aside(), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _skeletons(folder: Path) -> dict[str, Any]:
    """Every component of a diffusers folder that has weights, without them."""
    index = _document(folder / "model_index.json")
    found = {
        name: _skeleton(folder / name, *value) for name, value in index.items() if isinstance(value, list) and value[0]
    }
    return {name: model for name, model in found.items() if model is not None}


def _skeleton(folder: Path, library: str, name: str) -> Any:
    from importlib import import_module

    if library not in ("diffusers", "transformers") or not (folder / "config.json").is_file():
        return None
    cls, config = getattr(import_module(library), name, None), _document(folder / "config.json")
    if cls is None:
        return None
    if library == "diffusers":
        return cls.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    return cls(cls.config_class(**config))


def _document(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"this is no JSON: {error}", path=path) from error


def _trained(models: dict[str, Any], config: Config) -> int:
    """Numbers that the method trains."""
    count, tokens = 0, config.method in _WITH_TOKENS
    if tokens:
        learners = [model for model in models.values() if _learns(type(model).__name__, config)]
        widths = sum(model.get_input_embeddings().embedding_dim for model in learners)
        count += len(config.tokens.names) * config.tokens.vectors * widths
    if config.method == "custom-diffusion":
        unet = models.get("unet")
        names = unet.named_modules() if unet is not None else ()
        count += sum(module.weight.numel() for path, module in names if path.endswith((".attn2.to_k", ".attn2.to_v")))
    if config.adapter.full:
        return sum(p.numel() for model in _whole(models, config).values() for p in model.parameters())
    if config.method in ("lora", "dreambooth", "pivotal"):
        count += sum(_low_rank(model, component, config) for component, model in models.items())
    return count


def _learns(kind: str, config: Config) -> bool:
    return kind.startswith("CLIPText") or ("T5" in kind and config.tokens.encoders == "all")


def _whole(models: dict[str, Any], config: Config) -> dict[str, Any]:
    """The components all of whose weights train; their own weights wait in main memory."""
    if not config.adapter.full:
        return {}
    return {n: one for n, one in models.items() if n in _DENOISERS or trains_encoder(one, config.adapter)}


def _held(model: Any, size: int, quantised: bool) -> int:
    """Bytes of frozen weights. A quantised linear layer takes half a byte a number, and four for the scale of every 64 (NF4)."""
    from torch import nn

    whole = sum(size * parameter.numel() for parameter in model.parameters())
    linear = sum(one.weight.numel() for one in model.modules() if type(one) is nn.Linear) if quantised else 0
    return whole - size * linear + linear // 2 + linear // 16


def _low_rank(model: Any, component: str, config: Config) -> int:
    if component not in _DENOISERS and not trains_encoder(model, config.adapter):
        return 0
    rows = (
        (model.get_submodule(path).weight, rank) for path, (rank, _) in chosen(model, component, config.adapter).items()
    )
    return sum(rank * (weight.shape[0] + weight[0].numel()) for weight, rank in rows)


def _activations(models: dict[str, Any], config: Config, own: Batches, precision: str) -> int:
    """Bytes that autograd keeps of one forward pass of the denoiser, with the largest bucket."""
    import torch

    name = "unet" if "unet" in models else "transformer"
    dtype, denoiser = _dtype(precision), models[name]
    _with_layers(denoiser, name, config)
    if config.run.checkpointing:
        denoiser.enable_gradient_checkpointing()
        denoiser.train()
    width, height = max(own.of_bucket, key=lambda one: one[0] * one[1])
    count = config.run.batch * (2 if config.data.class_prompt or config.data.class_folder else 1)
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # or the next tensor could get this one's place
        return tensor

    alive: list[Any] = []
    with torch.enable_grad(), _fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(models, denoiser, count, width, height, dtype)
    weights = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


def _fused_attention() -> Any:
    """Attention as every device computes it: queries, keys, values and the answer are kept, never the matrix. ``meta`` keeps that too."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            answer = query.new_empty(*query.shape[:-1], value.shape[-1])
            ctx.save_for_backward(query, key, value, answer, query.new_empty(query.shape[:-1], dtype=torch.float32))
            return answer

    class Fused(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.nn.functional.scaled_dot_product_attention:
                own = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
                return Kept.apply(own["query"], own["key"], own["value"])
            return function(*args, **(kwargs or {}))

    return Fused()


def _with_layers(denoiser: Any, name: str, config: Config) -> None:
    """The low-rank layers, or the weights that train; tokens alone send gradients through the words."""
    denoiser.requires_grad_(False)
    if config.method == "custom-diffusion":
        for path, module in denoiser.named_modules():
            if path.endswith((".attn2.to_k", ".attn2.to_v")):
                module.requires_grad_(True)
    if config.adapter.full:
        denoiser.requires_grad_(True)
    elif config.method in ("lora", "dreambooth", "pivotal"):
        from peft import LoraConfig

        modules = chosen(denoiser, name, config.adapter)
        ranks = {path: rank for path, (rank, _) in modules.items()}
        if not ranks:  # text encoders alone
            return
        settings = LoraConfig(r=config.adapter.rank, target_modules=sorted(ranks), rank_pattern=ranks)
        denoiser.add_adapter(settings, adapter_name="planned")


def _forward(models: dict[str, Any], denoiser: Any, count: int, width: int, height: int, dtype: Any) -> None:
    import torch

    from hubtool.training.bases.base import Sizes
    from hubtool.training.bases.flux import Flux
    from hubtool.training.bases.sd3 import SD3
    from hubtool.training.bases.unet import UNet

    config = denoiser.config
    kind = type(denoiser).__name__
    if kind not in _WORDS:
        raise Unsupported(f"the memory of a {kind} cannot be estimated yet")
    channels, words = _WORDS[kind](models, config)
    tensors = {name: torch.empty(count, *shape, dtype=dtype, requires_grad=True) for name, shape in words.items()}
    pipe = SimpleNamespace(
        unet=denoiser, transformer=denoiser, text_encoder_2=models.get("text_encoder_2"), **_flux_helpers()
    )
    base: Any = {"UNet2DConditionModel": UNet, "SD3Transformer2DModel": SD3}.get(kind, Flux)
    made = base(pipe, *((0,) if base is UNet else (1.0,) if base is Flux else ()))
    noisy = torch.empty(count, channels, height // 8, width // 8, dtype=dtype)
    sides = [(width, height)] * count
    made.predict(noisy, torch.ones(count, dtype=dtype), tensors, Sizes(sides, [(0, 0)] * count, sides))


def _flux_helpers() -> dict[str, Any]:
    from diffusers import FluxPipeline

    names = ("_pack_latents", "_prepare_latent_image_ids")
    return {name: getattr(FluxPipeline, name) for name in names}


def _unet_words(models: dict[str, Any], config: Any) -> tuple[int, dict[str, tuple[int, ...]]]:
    words: dict[str, tuple[int, ...]] = {"states": (77, config.cross_attention_dim)}
    if "text_encoder_2" in models:
        words["pooled"] = (models["text_encoder_2"].config.projection_dim,)
    return config.in_channels, words


def _sd3_words(models: dict[str, Any], config: Any) -> tuple[int, dict[str, tuple[int, ...]]]:
    return config.in_channels, {"states": (333, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


def _flux_words(models: dict[str, Any], config: Any) -> tuple[int, dict[str, tuple[int, ...]]]:
    return config.in_channels // 4, {
        "states": (512, config.joint_attention_dim),
        "pooled": (config.pooled_projection_dim,),
    }


_WORDS = {
    "UNet2DConditionModel": _unet_words, "SD3Transformer2DModel": _sd3_words, "FluxTransformer2DModel": _flux_words,
}  # fmt: skip
