"""The intermediate representation: what an adapter is, apart from any file's spelling of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from hubtool.adapters.weight_ops import WeightOp
from hubtool.tensors.expr import Expr
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding, Shape

ModuleKey = tuple[str, str]  # (component, canonical module path): ("unet", "down_blocks.0.attentions.0.proj_in")


class Patch(Protocol):
    """One module's change. Each kind is a file of its own in this room; ``registry.make`` chooses it."""

    @property
    def algorithm(self) -> str: ...

    @property
    def rank(self) -> int | None: ...

    @property
    def alpha_value(self) -> float | None:
        """The stored alpha; None when the file has none (then scale is 1)."""

    @property
    def scale(self) -> float:
        """What multiplies the factors' product at strength 1; 1.0 for kinds without such a factor."""

    @property
    def dora_scale(self) -> Expr | None: ...

    @property
    def needs_base(self) -> bool:
        """Whether ``delta`` depends on the base weight."""

    @property
    def weight_shape(self) -> Shape | None:
        """Shape of the base weight this patch changes; None where the factors alone cannot tell."""

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(out, in * kh * kw) of the base weight, as far as the factors tell."""

    def roles(self) -> Iterator[tuple[str, Expr]]:
        """(role, tensor) pairs in canonical order: up, down, mid, dora_scale, bias ..."""

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` when the tensors do not fit one another. ``name`` is the module, for the message."""

    def under(self, op: WeightOp) -> Patch:
        """The patch of ``op(W)`` such that its delta is ``op(delta)``. Raises ``errors.Unsupported`` with the reason."""

    def delta(self, base: Any = None) -> Any:
        """The change of the base weight at strength 1 as an fp32 torch tensor. Raises ``Unsupported`` without a base that is needed,
        ``ShapeMismatch`` for one of another size."""

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        """The change of the module's bias at strength 1 as an fp32 vector; None where it stays."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token vectors for one text encoder: ``vectors`` is (n, dim)."""

    token: str | None
    encoder: str | None  # text_encoder, text_encoder_2 ...; None where the file cannot tell
    vectors: Expr

    def to_json(self) -> dict[str, Any]:
        n, dim = self.vectors.shape[-2:] if len(self.vectors.shape) > 1 else (1, self.vectors.shape[-1])
        return {"token": self.token, "vectors": n, "dim": dim, "encoder": self.encoder}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A parsed adapter. ``extras`` are tensors kept but not understood; they travel only to layouts that can hold them."""

    family: str | None
    patches: Mapping[ModuleKey, Patch]
    embeddings: tuple[Embedding, ...] = ()
    extras: Mapping[str, TensorRef] = field(default_factory=lambda: MappingProxyType({}))
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    findings: tuple[Finding, ...] = ()

    def components(self) -> dict[str, int]:
        """Number of changed modules by component, in order of appearance."""
        counts: dict[str, int] = {}
        for component, _ in self.patches:
            counts[component] = counts.get(component, 0) + 1
        return counts
