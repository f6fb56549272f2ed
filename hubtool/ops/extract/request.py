"""What an extraction is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from hubtool.errors import UsageProblem
from hubtool.ops.factor_space.budget import Budget

KINDS = ("lora", "locon", "full")
DTYPES = MappingProxyType({"fp16": "F16", "bf16": "BF16", "fp32": "F32"})
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?", re.IGNORECASE)
_LIMITS = ("rank", "energy", "error", "size", "across", "max_rank")
_MOST = 128  # ranks computed where their number follows from the data


@dataclass(frozen=True, slots=True)
class Request:
    """``kind``: ``lora`` (matrices and 1x1 convolutions), ``locon`` (all convolutions too), ``full`` (differences as they are).

    ``budget``: how many ranks; ``conv_rank``: another number for convolutions larger than 1x1. ``dense``: norms and biases too, as
    differences. ``modules``: globs of ``component.path`` to take.
    """

    kind: str = "locon"
    budget: Budget = field(default_factory=Budget)
    conv_rank: int | None = None
    dense: bool = False
    modules: tuple[str, ...] = ()
    layout: str = "kohya"
    dtype: str = "fp16"
    format: str | None = None
    family: str | None = None
    seed: int = 0
    device: str = "cpu"
    workers: int | None = None

    def check(self) -> None:
        """Raise ``UsageProblem`` for what cannot be meant."""
        asked = self.budget.rank is not None or self.budget.needs_spectra
        rules = (
            (self.kind in KINDS, f"no such kind of extraction: {self.kind}", f"one of {', '.join(KINDS)}"),
            (self.dtype in DTYPES, f"no such dtype: {self.dtype}", f"one of {', '.join(DTYPES)}"),
            (self.conv_rank is None or self.conv_rank > 0, "a rank is at least 1", None),
            (self.kind != "full" or not asked, "a full difference has no rank", "leave out --rank and its kin"),
            (self.kind == "full" or asked, "say how many ranks", "--rank, --energy, --error or --budget"),
        )
        for holds, text, hint in rules:
            if not holds:
                raise UsageProblem(text, hint=hint)

    def most(self, convolution: bool) -> int:
        """Ranks to compute for a module."""
        if convolution and self.conv_rank is not None:
            return self.conv_rank
        return self.budget.cap or max(_MOST, self.budget.rank or 0)

    def takes(self, name: str) -> bool:
        """Whether the module ``component.path`` is asked for."""
        return not self.modules or any(fnmatchcase(name, glob) for glob in self.modules)

    @classmethod
    def of(cls, parameters: Mapping[str, Any], **fields: Any) -> Request:
        """The request whose ``parameters()`` a recipe keeps; of ``fields`` those that are not None count. Raises ``UsageProblem``."""
        limits = {name: parameters[name] for name in _LIMITS if name in parameters}
        own = {name: parameters[name] for name in ("kind", "conv_rank", "dense") if name in parameters}
        unknown = parameters.keys() - limits.keys() - own.keys() - {"modules"}
        if unknown:
            raise UsageProblem(f"an extraction has no parameter {', '.join(sorted(unknown))}")
        given = {name: value for name, value in fields.items() if value is not None}
        return cls(**{**own, **given}, budget=Budget(**limits), modules=tuple(parameters.get("modules", ())))

    def parameters(self) -> dict[str, Any]:
        """What of this decides the output's numbers, for a recipe; what was not asked is left out."""
        asked: dict[str, Any] = self.budget.to_json()
        asked |= {"conv_rank": self.conv_rank} if self.conv_rank is not None else {}
        asked |= {"dense": True} if self.dense else {}
        return {**asked, "modules": list(self.modules)} if self.modules else asked


def parse_size(text: str) -> int:
    """Bytes of ``100MB``, ``1.5 GiB`` or ``2000000``. Raises ``UsageProblem``."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageProblem(f"no size: {text!r}", hint="write it as 100MB, 1.5GiB or a number of bytes")
    number, unit, binary = match.groups()
    power = " kmg".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
