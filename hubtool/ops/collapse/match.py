"""Which module of the base each module of an adapter changes: matched, unmatched and mismatched ones are told apart and counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hubtool.adapters.dense import Dense
from hubtool.adapters.ir import ModuleKey, Patch
from hubtool.adapters.scaling import Scaling
from hubtool.errors import ConversionError, ShapeMismatch, UsageProblem
from hubtool.layouts import tables, vocabulary
from hubtool.layouts.naming import Place
from hubtool.ops.collapse.base import Base, Spot
from hubtool.ops.collapse.parts import Part
from hubtool.ops.collapse.shares import Share
from hubtool.tensors.dtypes import numel
from hubtool.types import Shape

Shares = dict[str, list[Share]]  # stored key -> what is added to it
_BIAS_ONLY = frozenset({"alpha", "diff_b", "b_norm"})
_BIASES = frozenset({"bias", "diff_b", "b_norm"})


@dataclass(slots=True)
class Account:
    """What became of one adapter's modules. ``mismatched``: module -> why; ``skipped``: modules of strength 0."""

    name: str
    matched: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    skipped: int = 0
    embeddings: int = 0
    extras: int = 0
    strengths: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        found = f"{self.name}: {len(self.matched)} of {self.modules} modules matched"
        return (
            f"{found}, {len(self.unmatched)} unmatched, {len(self.mismatched)} mismatched, {self.skipped} at strength 0"
        )

    @property
    def modules(self) -> int:
        return len(self.matched) + len(self.unmatched) + len(self.mismatched) + self.skipped

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "strengths": dict(self.strengths),
            "modules": self.modules,
            "matched": len(self.matched),
            "unmatched": self.unmatched,
            "mismatched": self.mismatched,
            "skipped": self.skipped,
            "embeddings": self.embeddings,
            "extras": self.extras,
        }


def match(base: Base, parts: Sequence[Part], *, allow_mismatch: bool = False) -> tuple[Shares, list[Account]]:
    """The shares of every stored tensor that changes, in the order of the adapters, and what became of each adapter.

    Raises ``ConversionError`` for an adapter that matches nothing, ``ShapeMismatch`` naming module and shapes unless that is allowed.
    """
    _check_names(parts)
    shares: Shares = {}
    accounts = [_matched(base, part, shares) for part in parts]
    for part, account in zip(parts, accounts, strict=True):
        _check(part, account, allow_mismatch)
    _check_replaced(shares)
    return shares, accounts


def _matched(base: Base, part: Part, shares: Shares) -> Account:
    adapter = part.adapter
    account = Account(part.name, embeddings=len(adapter.embeddings), extras=len(adapter.extras))
    account.strengths = part.strengths.to_json()
    for (component, path), patch in adapter.patches.items():
        name, strength = f"{component}.{path}", part.strengths.of(component, path)
        if strength == 0:
            account.skipped += 1
            continue
        try:
            found = list(_shares(base, (component, path), patch, strength, f"{part.name}: {name}"))
        except _MisfitError as error:
            account.mismatched[name] = str(error)
            continue
        for key, share in found:
            shares.setdefault(key, []).append(share)
        (account.matched if found else account.unmatched).append(name)
    return account


def _check_names(parts: Sequence[Part]) -> None:
    """A strength for a component or path that no adapter has is most likely misspelt; one that only some lack is none."""
    known = [module for part in parts for module in part.adapter.patches]
    for part in parts:
        lost = part.strengths.unmatched(known)
        if lost:
            has = ", ".join(dict.fromkeys(component for component, _ in known))
            raise UsageProblem(
                f"a strength for {lost[0]}, and no adapter has such a module", hint=f"their components: {has}"
            )


class _MisfitError(Exception):
    """Why a module of the adapter does not fit the module of the base."""


def _shares(base: Base, key: ModuleKey, patch: Patch, strength: float, label: str) -> Iterator[tuple[str, Share]]:
    roles = {role for role, _ in patch.roles()}
    spot = base.find(*key)
    if spot is None:
        yield from _fused(base, key, patch, strength, label)
        return
    if not roles <= _BIAS_ONLY:
        _fit(patch, spot.shape)
        yield spot.key, _share(label, patch, strength, spot)
    yield from _bias(base, key, patch, strength, label, spot)


def _share(label: str, patch: Patch, strength: float, spot: Spot, *, bias: bool = False) -> Share:
    return Share(label, patch, strength, spot.windows, spot.shape, spot.transposed, bias)


def _bias(
    base: Base, key: ModuleKey, patch: Patch, strength: float, label: str, weight: Spot
) -> Iterator[tuple[str, Share]]:
    """The change of the module's bias. A module without one may only get zeros."""
    if not _changes_bias(patch):
        return
    spot = base.find(*key, "bias")
    if spot is not None:
        yield spot.key, _share(label, patch, strength, spot, bias=True)
    elif not isinstance(patch, Scaling) and _nonzero(patch.bias_delta()):
        raise _MisfitError(f"it changes a bias, and the base's module of shape {list(weight.shape)} has none")


def _changes_bias(patch: Patch) -> bool:
    if isinstance(patch, Scaling):
        return patch.ia3_l is not None and patch.axis != "in"
    return any(role in _BIASES for role, _ in patch.roles())


def _nonzero(change: Any) -> bool:
    return change is not None and bool(change.any())


def _fit(patch: Patch, shape: Shape) -> None:
    """Compare sizes as far as the adapter tells them; the rest is noticed when the change is computed."""
    out, inner = patch.sizes
    rows, rest = (shape[0] if shape else 1), numel(shape[1:])
    if isinstance(patch, Scaling):
        if numel(patch.vector.shape) not in shape[:2]:
            raise _MisfitError(
                f"its vector has {numel(patch.vector.shape)} numbers, the base's weight is {list(shape)}"
            )
    elif (out is not None and out != rows) or (inner is not None and len(shape) > 1 and inner != rest):
        own = list(patch.weight_shape) if patch.weight_shape else [out, inner]
        raise _MisfitError(f"it changes a weight of shape {own}, the base's is {list(shape)}")
    elif isinstance(patch, Dense) and patch.weight is not None and numel(patch.weight.shape) != numel(shape):
        raise _MisfitError(f"it changes a weight of shape {list(patch.weight.shape)}, the base's is {list(shape)}")


def _fused(base: Base, key: ModuleKey, patch: Patch, strength: float, label: str) -> Iterator[tuple[str, Share]]:
    """A module that the adapter keeps fused because its kind cannot be cut: all parts at once where the base has them so too."""
    place = _place(base.family, *key)
    spots = [] if place is None else [base.find(key[0], part) for part in place.parts]
    found = [spot for spot in spots if spot is not None]
    if not found or len(found) < len(spots):
        return
    rows = sum(spot.shape[0] for spot in found)
    _fit(patch, (rows, *found[0].shape[1:]))
    if len({spot.key for spot in found}) == 1 and not any(spot.transposed for spot in found):
        windows = tuple(window for spot in found for window in spot.windows)
        yield found[0].key, Share(label, patch, strength, windows, (rows, *found[0].shape[1:]))
        return
    if patch.needs_base:
        raise _MisfitError(
            f"its {patch.algorithm} spans {len(found)} weights that lie apart in the base: convert the base to its native layout"
        )
    start = 0
    for spot in found:
        span = (start, start + spot.shape[0])
        yield spot.key, Share(label, patch, strength, spot.windows, spot.shape, spot.transposed, rows=span)
        start = span[1]


def _place(family: str, component: str, path: str) -> Place | None:
    """The fused place that an outside name of any naming of the family stands for."""
    if family not in tables.family_ids():
        return None
    for size in vocabulary.models(family, component):
        for naming in tables.family(family).namings:
            for place in vocabulary.places(family, naming, component, size).values():
                if place.outside == path and place.op == "rows":
                    return place
    return None


def _check(part: Part, account: Account, allow_mismatch: bool) -> None:
    if account.mismatched and not allow_mismatch:
        name, why = next(iter(account.mismatched.items()))
        more = f" (and {len(account.mismatched) - 1} more)" if len(account.mismatched) > 1 else ""
        hint = "another base? --skip-mismatched leaves such modules out"
        raise ShapeMismatch(f"{part.name}: {name}: {why}{more}", path=part.file.path, hint=hint)
    if account.matched:
        return
    if account.skipped == account.modules:
        raise UsageProblem(f"every strength of {part.name} is 0: nothing would change")
    first = next(iter(account.unmatched or account.mismatched))
    text = f"{part.name} matches nothing in the base: {account.modules} modules, first {first}"
    raise ConversionError(text, path=part.file.path, hint=f"hubtool explain {part.file.path}")


def _check_replaced(shares: Shares) -> None:
    """Two adapters cannot both replace one weight."""
    for own in shares.values():
        rivals = [share for share in own if share.replaces]
        spans = sorted((span, share.label) for share in rivals for span in share.windows)
        for (first, label), (second, other) in pairwise(spans):
            if second[0] < first[1]:
                raise ConversionError(f"{label} and {other} replace the same weight")
