"""``--as lora``: modules of other algorithms rewritten as low-rank factors where that is exact; the rank it costs is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import Unsupported, UsageProblem
from hubtool.layouts import vocabulary
from hubtool.layouts.emission import Loss
from hubtool.ops.plan import Promoted, Promotion
from hubtool.types import Shape


def promote(adapter: Adapter, algorithm: str | None, family: str | None = None) -> Promoted:
    """Every module as ``lora`` (any algorithm whose change is a product of two factors) or ``locon`` (Tucker cores folded, nothing else).

    None leaves the adapter alone. A module that cannot be rewritten exactly is refused by name and stays as it is.
    """
    if algorithm is None:
        return Promoted(adapter)
    if algorithm not in _WANTED:
        raise UsageProblem(f"nothing can be rewritten as {algorithm}", hint="--as lora or --as locon")
    wanted = _WANTED[algorithm]
    patches: dict[ModuleKey, Patch] = dict(adapter.patches)
    promotions: list[Promotion] = []
    refused: list[Loss] = []
    for key, patch in adapter.patches.items():
        if not wanted(patch):
            continue
        name = ".".join(key)
        try:
            made = _to_lora(patch, _shape(adapter.family or family, key))
        except Unsupported as reason:
            refused.append(Loss(f"{name} as {algorithm}", f"stays {_called(patch)}: {reason.message}"))
            continue
        patches[key] = made
        promotions.append(Promotion(name, _called(patch), made.algorithm, patch.rank, made.rank))
    return Promoted(replace(adapter, patches=MappingProxyType(patches)), tuple(promotions), tuple(refused))


def _tucker(patch: Patch) -> bool:
    return isinstance(patch, LowRank) and patch.mid is not None


_WANTED: MappingProxyType[str, Callable[[Patch], bool]] = MappingProxyType(
    {"lora": lambda patch: not isinstance(patch, LowRank) or patch.mid is not None, "locon": _tucker}
)


def _called(patch: Patch) -> str:
    return "tucker" if _tucker(patch) else patch.algorithm


def _to_lora(patch: Patch, shape: Shape | None) -> LowRank:
    from hubtool.adapters.promote import to_lora

    return to_lora(patch, shape)


def _shape(family: str | None, key: ModuleKey) -> Shape | None:
    return vocabulary.weight_shape(family, *key) if family else None
