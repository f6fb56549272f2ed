"""Custom Diffusion in a pipeline: cross-attention weights that replace the base's, and the new tokens.

W' = W + strength * (W_file - W): at strength 1 the weights are the file's, at 0.5 they lie half-way. So two of them, or one and a LoRA,
add up, in any order. Compressed files are low ranks u v that are added. diffusers keeps each token in a file of its own: those beside
the weights come with them. Facts: spec/artefacts.md E.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.adapters import parts
from hubtool.adapters.custom_diffusion import CustomDiffusion, parse
from hubtool.adapters.dense import ROLES, Dense
from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter, Embedding, ModuleKey, Patch
from hubtool.errors import ConversionError, Unsupported
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.layouts.identify import identify
from hubtool.layouts.kinds.custom_diffusion import token_files
from hubtool.layouts.unwrap import unwrapped
from hubtool.pipelines.kinds import Ask, Content
from hubtool.tensors.expr import Expr

STRENGTH = True
SETTINGS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Replacement(Dense):
    """A weight, and perhaps a bias, to replace the base's. Its change is a difference, so that a strength means something."""

    set_bias: Expr | None = None

    @property
    def algorithm(self) -> str:
        return "custom_diffusion"

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, (*ROLES, "set_bias"))

    def delta(self, base: Any = None) -> Any:
        """The difference in fp64: added to the base and rounded once, it gives the file's own bits."""
        old = parts.needed(base, "the change by a replaced weight").double()
        return old * 0 if self.set_weight is None else parts.number(self.set_weight).double().reshape(old.shape) - old

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        if self.set_bias is None:
            return None
        return parts.number(self.set_bias).double() - parts.needed(base_bias, "the change by a replaced bias").double()


def read(file: TensorFile, identity: Identity, ask: Ask) -> Content:
    """Weights and tokens. Raises ``Unsupported`` for a whole text encoder in the file, unless its component is left out."""
    found = parse(unwrapped(file)[0])
    if found is None:
        raise ConversionError("these tensors are no Custom Diffusion", path=file.path)
    whole = sorted({key.partition(".")[0] for key in found.text_encoders})
    if whole and (ask.components is None or {*whole} & {*ask.components}):
        hint = "components=['unet'] loads the rest"
        raise Unsupported(
            f"the file also holds a whole {', '.join(whole)}, which is no adapter", path=file.path, hint=hint
        )
    tokens = found.tokens or tuple(_beside(file))
    adapter = Adapter(identity.family, patches(found), tokens, findings=identity.findings)
    return Content(adapter, identity.kind, token=ask.token)


def patches(found: CustomDiffusion) -> dict[ModuleKey, Patch]:
    """Every change by module. Raises ``Unsupported`` for a parameter that is neither weight nor bias."""
    held: dict[str, dict[str, Expr]] = {}
    for name, value in found.weights.items():
        path, _, role = name.rpartition(".")
        if role not in ("weight", "bias"):
            raise Unsupported(f"{name} is neither a weight nor a bias")
        held.setdefault(path, {})[role] = value
    made: dict[ModuleKey, Patch] = {
        ("unet", path): Replacement(set_weight=roles.get("weight"), set_bias=roles.get("bias"))
        for path, roles in held.items()
    }
    compressed, _ = CustomDiffusion(found.variant, {}, found.factors, ()).patches()
    return made | compressed


def _beside(file: TensorFile) -> Iterator[Embedding]:
    """The tokens of ``<new1>.bin`` and the like; of two containers with the same token one."""
    names = {Path(name).stem: name for name in sorted(token_files(file))}
    for stem in sorted(names):
        yield from identify(open_file(file.path.with_name(names[stem]))).embeddings
