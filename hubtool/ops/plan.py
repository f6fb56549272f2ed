"""A plan: everything a conversion will write, known before anything is written. ``--dry-run`` prints it, ``execute`` runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hubtool.adapters.ir import Adapter
from hubtool.layouts.emission import Loss
from hubtool.tensors.evaluate import is_bytes
from hubtool.tensors.expr import Expr, size, sources

if TYPE_CHECKING:
    from hubtool.layouts.repair import Repair


class Promotion(NamedTuple):
    """One module rewritten exactly as another algorithm, and the rank that costs."""

    module: str
    before: str
    after: str
    rank_before: int | None
    rank_after: int

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "from": self.before,
            "to": self.after,
            "rank_before": self.rank_before,
            "rank_after": self.rank_after,
        }


class Promoted(NamedTuple):
    """An adapter after promotion. ``refused``: modules that stay what they are, each with the reason."""

    adapter: Adapter
    promotions: tuple[Promotion, ...] = ()
    refused: tuple[Loss, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written.

    ``tensors``: key -> expression, in output order. ``tree``: the pickled object of a torch file (its leaves are those tensors).
    ``header``: exact JSON header to reuse, so that the file is its origin byte for byte. ``config``: adapter_config.json of a PEFT folder.
    ``fidelity``: ``identical`` (the origin's very bytes), ``exact`` (every number kept), ``rounded``, ``lossy``.
    ``promotions``: modules rewritten by ``--as``. ``repair``: what ``--repair`` mended first.
    """

    source: Path
    format: str
    layout: str | None
    tensors: Mapping[str, Expr]
    metadata: Mapping[str, str] = field(default_factory=dict)
    tree: Any = None
    header: bytes | None = None
    config: Mapping[str, Any] | None = None
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    rounded: Mapping[str, str] = field(default_factory=dict)
    promotions: tuple[Promotion, ...] = ()
    repair: Repair | None = None

    @property
    def fidelity(self) -> str:
        if self.losses:
            return "lossy"
        if self.rounded:
            return "rounded"
        return "identical" if self.header is not None else "exact"

    @property
    def bytes_out(self) -> int:
        return sum(map(size, self.tensors.values()))

    @property
    def bytes_in(self) -> int:
        return sum(
            {(r.path, r.start, r.end): r.end - r.start for t in self.tensors.values() for r in sources(t)}.values()
        )

    @property
    def needs_torch(self) -> bool:
        return not all(map(is_bytes, self.tensors.values()))

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json`` and ``--dry-run``."""
        return {
            "source": str(self.source),
            "format": self.format,
            "layout": self.layout,
            "fidelity": self.fidelity,
            "tensors": len(self.tensors),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "needs_torch": self.needs_torch,
            "losses": [loss.to_json() for loss in self.losses],
            "rounded": dict(self.rounded),
            "notes": list(self.notes),
            "promotions": [promotion.to_json() for promotion in self.promotions],
            "repair": None if self.repair is None else self.repair.to_json(),
        }
