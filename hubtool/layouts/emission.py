"""What emitting makes: the tensors, keys and documents of one layout, and every loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hubtool.adapters.ir import ModuleKey, Patch
from hubtool.layouts.tables import Layout
from hubtool.tensors.expr import Expr


class Loss(NamedTuple):
    """A tensor or fact that the target cannot hold, and why."""

    what: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "reason": self.reason}


@dataclass(slots=True, eq=False, repr=False)
class Emission:
    """Tensors in output order and metadata of one layout. ``roles``: (component, path, role) -> key, a fused module by the paths of its parts joined by +;
    ``patches``: the modules as this naming keeps them, by (component, path). ``config``: adapter_config.json.

    ``rounded``: module -> why its numbers are not those of the source bit for bit.
    """

    layout: Layout
    container: str
    tensors: dict[str, Expr] = field(default_factory=dict)
    roles: dict[tuple[str, str, str], str] = field(default_factory=dict)
    patches: dict[ModuleKey, Patch] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rounded: dict[str, str] = field(default_factory=dict)
