"""Tiny pipelines, adapters for them, and the arithmetic of low-rank factors done by hand in fp64."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hubtool.adapters.ir import Adapter, Embedding, ModuleKey
from hubtool.adapters.low_rank import LowRank
from hubtool.pipelines.tiny import build
from hubtool.tensors.expr import Literal

__all__ = [
    "Made",
    "build",
    "clip",
    "embedding",
    "encoded",
    "flat_path",
    "literal",
    "make",
    "picture",
    "same",
    "weights",
]

_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
State = dict[str, dict[str, torch.Tensor]]


@dataclass
class Made:
    """An adapter, and the plain tensors it was made of: ``factors[component, live path]`` is (up, down, scale)."""

    adapter: Adapter
    factors: dict[ModuleKey, tuple[torch.Tensor, torch.Tensor, float]] = field(default_factory=dict)

    def delta(self, key: ModuleKey, strength: float = 1.0) -> torch.Tensor:
        """strength * scale * up @ down in fp64, flattened to (out, everything else)."""
        up, down, scale = self.factors[key]
        return strength * scale * (up.double().flatten(1) @ down.double().flatten(1))


def literal(tensor: torch.Tensor) -> Literal:
    """The tensor's bytes as an expression."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Literal(raw, _NAMES[tensor.dtype], tuple(tensor.shape))


def modules(pipe: Any, components: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    for component in components:
        for path, module in getattr(pipe, component).named_modules():
            if type(module) in _LAYERS and getattr(module, "groups", 1) == 1 and ".lora_" not in path:
                yield component, path.removesuffix(".base_layer"), module


def kinds(pipe: Any, component: str) -> set[str]:
    """One module for every name that differs in more than its indices, and a second where there is one."""
    found: dict[str, list[str]] = {}
    for _, path, _ in modules(pipe, [component]):
        found.setdefault(re.sub(r"\d+", "#", path), []).append(path)
    return {path for paths in found.values() for path in (paths[0], paths[-1])}


def flat_path(component: str, path: str) -> str:
    """The canonical spelling of a live path: published CLIP names have ``text_model.``."""
    flat = component.startswith("text_encoder") and path.startswith("encoder.layers.")
    return f"text_model.{path}" if flat else path


def make(
    pipe: Any,
    components: Sequence[str] = ("unet", "text_encoder"),
    *,
    only: str | Collection[str] = "",
    ranks: Sequence[int] = (4,),
    alphas: Sequence[float | None] = (None,),
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
    family: str | None = None,
    seed: int = 1,
    shape_of: Callable[[Any], tuple[int, ...]] = lambda module: tuple(module.weight.shape),
    **extra: Any,
) -> Made:
    """Random factors for every module whose path contains ``only`` (or is in it); ranks and alphas are dealt out in turn."""
    generator = torch.Generator().manual_seed(seed)
    deal = zip(itertools.cycle(ranks), itertools.cycle([a for a in alphas for _ in range(len(ranks))]), strict=False)
    made, patches = Made(Adapter(family, {})), {}
    for component, path, module in modules(pipe, components):
        if not (only in path if isinstance(only, str) else path in only):
            continue
        (rank, alpha), (out, inside, *kernel) = next(deal), shape_of(module)
        up = (torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * 0.2).to(dtype)
        down = (torch.randn(rank, inside, *kernel, generator=generator) * 0.2).to(dtype)
        magnitude = literal(1.25 * module.weight.detach().flatten(1).norm(dim=1).view(-1, 1)) if dora else None
        patches[component, flat_path(component, path)] = LowRank(
            literal(up), literal(down), alpha_value=alpha, dora_scale=magnitude, **extra
        )
        made.factors[component, path] = (up, down, 1.0 if alpha is None else alpha / rank)
    made.adapter = Adapter(family, patches)
    return made


def embedding(token: str | None, width: int, vectors: int = 1, encoder: str | None = None, seed: int = 0) -> Embedding:
    values = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
    return Embedding(token, encoder, literal(values))


def weights(pipe: Any) -> State:
    """Copies of all weights, by component and name."""
    found = {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module) and name != "vae"}
    return {name: {key: value.clone() for key, value in one.state_dict().items()} for name, one in found.items()}


def same(one: State, other: State) -> bool:
    """Every name and every bit."""
    return {c: list(s) for c, s in one.items()} == {c: list(s) for c, s in other.items()} and all(
        torch.equal(value, other[component][name]) for component, state in one.items() for name, value in state.items()
    )


def effective(pipe: Any) -> State:
    """The weights as they act now, under their own names: with the delta of every active PEFT layer added, in fp64."""
    found: State = {}
    for name, state in weights(pipe).items():
        found[name] = {k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k}
        for path, layer in getattr(pipe, name).named_modules():
            for adapter in getattr(layer, "active_adapters", ()) if hasattr(layer, "lora_A") else ():
                if adapter in layer.lora_A:
                    key = f"{path}.weight"
                    up, down = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
                    delta = layer.scaling[adapter] * (up.double().flatten(1) @ down.double().flatten(1))
                    found[name][key] = found[name][key].double() + delta.reshape(found[name][key].shape)
    return found


def picture(pipe: Any, prompt: str = "a cat") -> torch.Tensor:
    """Two steps from fixed noise, as latents: deterministic to the bit."""
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt,
        num_inference_steps=2,
        height=64,
        width=64,
        generator=generator,
        output_type="latent",
        guidance_scale=3.0,
    ).images


def encoded(encoder: Any, tokenizer: Any, prompt: str) -> Any:
    """What a text encoder makes of a prompt padded as pipelines pad it."""
    ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(ids)


def clip(width: int) -> Any:
    """A text encoder of one layer and a published width, for files that are recognised by theirs."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
            eos_token_id=2,
        )
    ).eval()
