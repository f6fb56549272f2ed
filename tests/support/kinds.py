"""Tiny Stable Diffusion 1 pipelines as wide as the files of its artefacts are, and such files, made with torch alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hubtool.pipelines.tiny.unets import unet
from tests.support import tiny

WIDTH = 768
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
STEPS = 3


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def wide() -> Any:
    """SD1's names and block structure with contexts 768 wide, as published: files are recognised by that."""
    pipe = tiny.build("sd1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.register_modules(unet=unet((16, 32, 64, 64), (True, True, True, False), WIDTH, attention_head_dim=4)())
        pipe.register_modules(text_encoder=tiny.clip(WIDTH))
    return pipe


def saved(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


def network(width: int, seed: int, *, norm: bool = False) -> dict[str, torch.Tensor]:
    """Layer structure 1, 2, 1 with an activation after the first layer, and perhaps a normalisation."""
    last = "linear.3" if norm else "linear.2"
    state = {
        "linear.0.weight": values(2 * width, width, seed=seed, scale=0.3),
        "linear.0.bias": values(2 * width, seed=seed + 1, scale=0.1),
        f"{last}.weight": values(width, 2 * width, seed=seed + 2, scale=0.3),
        f"{last}.bias": values(width, seed=seed + 3, scale=0.1),
    }
    if norm:
        state |= {"linear.2.weight": values(2 * width, seed=9), "linear.2.bias": values(2 * width, seed=10)}
    return dict(sorted(state.items()))


def hypernetwork(path: Path, widths: Sequence[int], seed: int = 1, **settings: Any) -> Path:
    """As A1111 writes it: relu after the first layer only."""
    norm = bool(settings.get("is_layer_norm"))
    pairs = {width: (network(width, seed, norm=norm), network(width, seed + 50, norm=norm)) for width in widths}
    facts = {"layer_structure": [1, 2, 1], "activation_func": "relu", "activate_output": False, **settings}
    return saved(path, {**pairs, "step": 1, "name": path.stem, **facts})


def fed(state: Mapping[str, torch.Tensor], x: torch.Tensor, strength: float) -> torch.Tensor:
    """x + strength * (W2 norm(relu(W1 x + b1)) + b2), written out."""
    hidden = (x @ state["linear.0.weight"].T + state["linear.0.bias"]).clamp(min=0)
    last = "linear.2"
    if "linear.3.weight" in state:
        mean, spread = hidden.mean(-1, keepdim=True), hidden.var(-1, unbiased=False, keepdim=True)
        hidden = (hidden - mean) / (spread + 1e-5).sqrt() * state["linear.2.weight"] + state["linear.2.bias"]
        last = "linear.3"
    return x + strength * (hidden @ state[f"{last}.weight"].T + state[f"{last}.bias"])


def picture(pipe: Any, prompt: Any = "a cat", **how: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": STEPS, "height": 64, "width": 64, "guidance_scale": 3.0, **how}
    return pipe(prompt, generator=generator, output_type="latent", **options).images


def hooks(pipe: Any) -> int:
    """Hooks on all modules of all components."""
    models = [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]
    modules = [module for model in models for module in model.modules()]
    return sum(len(one._forward_pre_hooks) + len(one._forward_hooks) for one in modules)


def half(path: Path, vectors: int, seed: int, name: str | None = None) -> Path:
    """An embedding as A1111 writes it."""
    vectors_of = {"*": values(vectors, WIDTH, seed=seed)}
    tree = {"string_to_token": {"*": 265}, "string_to_param": vectors_of, "name": name or path.stem, "step": 1}
    return saved(path, tree)


def pair(folder: Path, negative: str | None = None) -> Path:
    """``art.pt``, and ``art-neg.pt`` beside it (with ``negative`` for the name inside)."""
    half(folder / "art-neg.pt", 3, 2, negative)
    return half(folder / "art.pt", 2, 1)
