"""Custom Diffusion's weights: keys and values of cross-attention, trained whole (Kumari et al. 2022, arXiv 2212.04488)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.adapters.registry import make
from hubtool.errors import Unsupported
from hubtool.pipelines.families import family_of
from hubtool.training.bases.base import Base
from hubtool.training.config import Config
from hubtool.training.parts.base import Group, literal

_TRAINED = (".attn2.to_k", ".attn2.to_v")


class CrossAttentionPart:
    """As the reference does, the first token (the start of every prompt) gives no gradient to keys and values."""

    def __init__(self, base: Base, config: Config) -> None:
        from torch import nn

        self.pipe, model = base.pipe, getattr(base.pipe, base.denoiser)
        self.modules = dict(_modules(model))
        if not self.modules:
            raise Unsupported(f"{type(model).__name__} has no cross-attention of its own to train")
        self.kept = {path: module.weight for path, module in self.modules.items()}
        for module in self.modules.values():
            module.weight = nn.Parameter(module.weight.detach().float().clone())
        self.hooks = [module.register_forward_hook(_without_first) for module in self.modules.values()]
        held = {f"{base.denoiser}.{path}.weight": module.weight for path, module in self.modules.items()}
        self.groups: tuple[Group, ...] = (
            Group("denoiser", held, config.optimiser.rate, config.optimiser.weight_decay),
        )

    def after_step(self, step: int) -> None:
        """Weights need nothing."""

    def adapter(self) -> Adapter:
        """Replacement weights, which is what Custom Diffusion files hold."""
        patches = {
            ("unet", path): make("set", {"set_weight": literal(module.weight)}) for path, module in self.modules.items()
        }
        return Adapter(family_of(self.pipe), patches)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for path, module in self.modules.items():
            module.weight = self.kept[path]


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if path.endswith(_TRAINED))


def _without_first(module: Any, inputs: Sequence[Any], output: Any) -> Any:
    import torch

    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1) if torch.is_grad_enabled() else output
