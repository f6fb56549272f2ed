"""Adapters inside the weights of a live component, with the way back: the collapse that can be undone.

The first adapter that changes a parameter makes a copy of its bytes in main memory. From then on the parameter is always
``cast(original + sum(strength * delta(original)))``: summed in fp32 in the order of loading, cast once, whatever came and went before.
When the last adapter leaves, the copied bytes return.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from hubtool.adapters.ir import ModuleKey, Patch
from hubtool.errors import BadValues, LoadMismatch, ShapeMismatch
from hubtool.pipelines import live

Key = tuple[str, str]  # (live module path, parameter)


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one patch of one adapter adds. ``parts``: the parameters that make up the patch's weight under ``op``; ``biases``: those with a bias change."""

    source: ModuleKey
    patch: Patch
    strength: float
    parts: tuple[Key, ...]
    op: str
    biases: tuple[Key, ...]

    def __str__(self) -> str:
        return ".".join(self.source)


@dataclass(slots=True)
class Ledger:
    """One component. ``kept``: the original of every changed parameter, None where there was no parameter. ``shares``: by adapter."""

    kept: dict[Key, Any] = field(default_factory=dict)
    shares: dict[str, list[Share]] = field(default_factory=dict)


# Weak: the copies go with the component, and pipelines that share a component share them.
_LEDGERS: WeakKeyDictionary[Any, Ledger] = WeakKeyDictionary()


def ledger(model: Any) -> Ledger:
    """The ledger of a component, empty for one that was never changed."""
    return _LEDGERS.setdefault(model, Ledger())


def add(model: Any, name: str, shares: list[Share]) -> None:
    """Put ``shares`` into the weights as adapter ``name``. When it fails, the weights are as before.

    Raises ``ShapeMismatch`` for a change that does not fit, ``BadValues`` for sums that are not finite, and what the patches raise.
    """
    book = ledger(model)
    keys = list(dict.fromkeys(key for share in shares for key in (*share.parts, *share.biases)))
    book.shares[name] = shares
    try:
        for key in keys:
            if key not in book.kept:
                book.kept[key] = _copy(_parameter(model, key))
        for key, value in _rewrite(model, book, keys):
            _check(model, name, key, value)
    except BaseException:
        remove(model, name)
        raise


def remove(model: Any, name: str) -> None:
    """Take adapter ``name`` out again; parameters that no other adapter changes get their own bytes back."""
    book = ledger(model)
    gone = {key: None for share in book.shares.pop(name, ()) for key in (*share.parts, *share.biases)}
    needed = {key for shares in book.shares.values() for share in shares for key in (*share.parts, *share.biases)}
    for _ in _rewrite(model, book, [key for key in gone if key in needed]):
        pass
    for key in gone:
        if key not in needed and key in book.kept:
            _put(model, key, book.kept.pop(key))


def _rewrite(model: Any, book: Ledger, keys: list[Key]) -> Iterator[tuple[Key, Any]]:
    """Write original plus all shares into these parameters, one after another; yield each with the value it was given."""
    touching: dict[Key, list[Share]] = {}
    for share in (share for shares in book.shares.values() for share in shares):
        for key in {*share.parts, *share.biases}:
            touching.setdefault(key, []).append(share)
    fused: dict[str, Any] = {}
    for key in keys:
        value = _sum(model, book, key, touching[key], fused)
        _put(model, key, value)
        yield key, value


def _check(model: Any, name: str, key: Key, value: Any) -> None:
    """The value is finite (large changes overflow fp16 long before fp32), and the parameter holds it."""
    import torch

    if not bool(value.isfinite().all()):
        raise BadValues(f"with {name} in it, {'.'.join(key)} holds NaN or infinity")
    held = _parameter(model, key)
    if held is None or not torch.equal(held.detach().cpu(), value):
        raise LoadMismatch(f"{'.'.join(key)} did not take the values it was given")


def _sum(model: Any, book: Ledger, key: Key, shares: list[Share], fused: dict[str, Any]) -> Any:
    """The value of one parameter in main memory, in the dtype it has now (the pipeline may have been cast since the copy was made)."""
    import torch

    original = book.kept[key]
    base = zeros_for(model, key) if original is None else original
    total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    for share in shares:
        total.add_(change_of(share, key, book, base, fused), alpha=share.strength)
    held = _parameter(model, key)
    return total.to(base.dtype if held is None else held.dtype)


def change_of(share: Share, key: Key, book: Ledger, base: Any, fused: dict[str, Any]) -> Any:
    """The change that one share makes to a parameter at strength 1, in fp32. ``fused``: changes of whole fused modules, kept between their parts."""
    if key in share.biases:
        change = share.patch.bias_delta(base.float())
    elif len(share.parts) == 1:
        change = _outward(share.op, share.patch.delta(_outward(share.op, base.float())))
    else:
        change = _part(share, key, book, fused)
    return _checked(share, change, base)


def _part(share: Share, key: Key, book: Ledger, fused: dict[str, Any]) -> Any:
    """One part's rows of a fused weight's change. The parts of a share are asked for one after another: the change is computed once."""
    import torch

    index = share.parts.index(key)
    sizes = [len(book.kept[part]) for part in share.parts]
    if fused.get("share") is not share:
        whole = torch.cat([book.kept[part].float() for part in share.parts])
        fused |= {"share": share, "change": share.patch.delta(whole).reshape(whole.shape)}
    return fused["change"].split(sizes)[index]


def _outward(op: str, weight: Any) -> Any:
    """The weight as the patch knows it; every operation here is its own inverse."""
    import torch

    if op == "swap_halves":
        return torch.cat(weight.chunk(2)[::-1])
    return weight.transpose(0, 1) if op == "transpose" else weight


def _checked(share: Share, change: Any, base: Any) -> Any:
    if change.numel() != base.numel():
        raise ShapeMismatch(f"{share} changes {tuple(change.shape)}, the module's weight is {tuple(base.shape)}")
    return change.reshape(base.shape)


def _owner(model: Any, key: Key) -> Any:
    return live.base(model.get_submodule(key[0]))


def _parameter(model: Any, key: Key) -> Any:
    return getattr(_owner(model, key), key[1])


def _copy(parameter: Any) -> Any:
    return None if parameter is None else parameter.detach().to("cpu", copy=True)


def zeros_for(model: Any, key: Key) -> Any:
    """Stands for the bias of a module that has none."""
    import torch

    weight = _owner(model, key).weight
    return torch.zeros(weight.shape[0], dtype=weight.dtype)


def _put(model: Any, key: Key, value: Any) -> None:
    """Write into the parameter where it lies; make one for a module that had none, or take that away again."""
    from torch import nn

    owner, parameter = _owner(model, key), _parameter(model, key)
    if value is None or parameter is None:
        made = None if value is None else nn.Parameter(value.to(owner.weight.device), owner.weight.requires_grad)
        setattr(owner, key[1], made)
    else:
        parameter.data.copy_(value)


def adapters(model: Any) -> Iterator[str]:
    """Names of the adapters inside the weights of ``model``."""
    found = _LEDGERS.get(model)
    return iter(found.shares if found else ())
