"""Weights composed for one vector of strengths after another: ``cast(original + sum(strength * delta(original)))``.

The original tensor of every parameter is set aside and never written to; the parameter points to a composed tensor for as long as
it is needed, and to the original again afterwards. So nothing is "unfused", and nothing can drift (diffusers' fuse and unfuse, ten
times over, move bf16 weights by 2e-3). All low-rank factors of one parameter are joined, and their strengths are a gate on the joined
rank: one product, whatever the number of adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.parts import matrix
from hubtool.errors import BadValues
from hubtool.pipelines import live, weights
from hubtool.pipelines.schedule_store import TensorStore
from hubtool.pipelines.weights import Key, Ledger, Share
from hubtool.tensors.dtypes import numel

State = tuple[float, ...]


class Slot(Protocol):
    """One thing with a strength. ``states``: by step, the strengths of all that acts on it."""

    @property
    def states(self) -> tuple[State, ...]: ...

    def put(self, step: int) -> None:
        """Take the strengths of ``step``."""

    def restore(self) -> None:
        """Be as before; harmless when repeated."""


@dataclass(slots=True, eq=False)
class Layer:
    """One PEFT layer that holds an adapter: its strength is a number in the layer. ``kept``: the scale it had."""

    layer: Any
    name: str
    states: tuple[State, ...]
    kept: float

    def put(self, step: int) -> None:
        self.layer.set_scale(self.name, self.states[step][0])

    def restore(self) -> None:
        self.layer.scaling[self.name] = self.kept


@dataclass(slots=True, eq=False)
class Component:
    """What the parameters of one component share. ``gates``: strengths spread over ranks, the same for many parameters."""

    name: str
    model: Any
    store: TensorStore
    slots: dict[Key, Weight] = field(default_factory=dict)
    gates: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def pristine(self, key: Key) -> Any:
        """The parameter without any adapter, whatever is collapsed into it now."""
        kept = weights.ledger(self.model).kept.get(key)
        return self.slots[key].original if kept is None else kept


@dataclass(slots=True, eq=False)
class Weight:
    """One parameter of ``owner``. ``shares``: all that changes it; ``rest``: their strengths inside ``original``, the tensor it had on entry.

    ``absent``: the module had no such parameter; ``varies``: tensors are needed more than once; ``whole``: the cache has room for every
    composed tensor of the pipeline; ``joined``: numbers of the shares that are one product of two factors; ``now``: the strengths that
    the parameter has at this moment.
    """

    component: Component
    key: Key
    owner: Any
    shares: tuple[Share, ...]
    rest: State
    states: tuple[State, ...]
    original: Any
    absent: bool
    varies: bool = False
    whole: bool = False
    joined: tuple[int, ...] = ()
    now: State | None = None
    checked: set[State] = field(default_factory=set)
    factors: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        self.varies = len(set(self.states)) > 1
        self.joined = tuple(index for index, share in enumerate(self.shares) if self._joins(share))

    def size(self) -> int:
        """Bytes of all its composed tensors that are needed more than once."""
        return len({*self.states} - {self.rest}) * self.original.nbytes if self.varies else 0

    def put(self, step: int) -> None:
        state = self.states[step]
        if state != self.now:
            self.now = None
            self._point(self._settled() if state == self.rest else self._composed(state))
            self.now = state

    def restore(self) -> None:
        self.now = None
        if self.absent:
            setattr(self.owner, self.key[1], None)
        else:
            self._point(self._settled())

    def _settled(self) -> Any:
        """The tensor of the entry, where the parameter lies now: a pipeline may have been moved or cast since."""
        held = self._held()
        return self.original.to(held.device, held.dtype)

    def _held(self) -> Any:
        parameter = self.owner._parameters[self.key[1]]
        return self.original if parameter is None else parameter

    def _point(self, value: Any) -> None:
        from torch import nn

        parameter = self.owner._parameters[self.key[1]]
        if parameter is None:
            setattr(self.owner, self.key[1], nn.Parameter(value, requires_grad=False))
        else:
            parameter.data = value

    def _composed(self, state: State) -> Any:
        held = self._held()
        if not (self.varies and self.whole):
            return self._checked(state, held)
        name = (id(self), state, held.device, held.dtype)
        return self.component.store.get(name, lambda: self._checked(state, held))

    def _checked(self, state: State, held: Any) -> Any:
        """``_sum``, finite when it is first computed: large changes overflow fp16 long before fp32."""
        value = self._sum(state, held)
        if state not in self.checked and not bool(value.isfinite().all()):
            raise BadValues(f"with strengths {state}, {self.component.name}.{'.'.join(self.key)} holds NaN or infinity")
        self.checked.add(state)
        return value

    def _sum(self, state: State, held: Any) -> Any:
        import torch

        base = self.component.pristine(self.key).to(held.device)
        total = base.to(torch.promote_types(base.dtype, torch.float32))
        if self.joined:
            up, down = self._factors(total)
            total = torch.addmm(total.flatten(1), up * self._gate(state, total), down).view(total.shape)
        for index, share in enumerate(self.shares):
            if state[index] and index not in self.joined:
                total = total.add(self._delta(share, total), alpha=state[index])
        return total.to(held.dtype)

    def _joins(self, share: Share) -> bool:
        """Whether the share is one product of two factors, and so can stand in a row with others."""
        patch = share.patch
        if not isinstance(patch, LowRank) or share.parts != (self.key,) or share.op != "rename":
            return False
        if patch.mid is not None or patch.dora_scale is not None or patch.residual is not None:
            return False
        return self.key[1] != "bias" and patch.sizes == (len(self.original), numel(self.original.shape[1:]))

    def _factors(self, total: Any) -> tuple[Any, Any]:
        """(out, all ranks) with the scales in it, and (all ranks, the rest)."""
        import torch

        if self.factors is None or self.factors[0].device != total.device:
            patches = [self.shares[index].patch for index in self.joined]
            ups = [patch.scale * matrix(patch.up).to(total) for patch in patches if isinstance(patch, LowRank)]
            downs = [matrix(patch.down).to(total) for patch in patches if isinstance(patch, LowRank)]
            self.factors = torch.cat(ups, 1), torch.cat(downs)
        return self.factors

    def _gate(self, state: State, total: Any) -> Any:
        """The strength of every joined rank."""
        import torch

        ranks = tuple((state[index], self.shares[index].patch.rank or 0) for index in self.joined)
        name = (ranks, total.device, total.dtype)
        if name not in self.component.gates:
            spread = [strength for strength, rank in ranks for _ in range(rank)]
            self.component.gates[name] = torch.tensor(spread, device=total.device, dtype=total.dtype)
        return self.component.gates[name]

    def _delta(self, share: Share, total: Any) -> Any:
        def make() -> Any:
            return self._change(share).to(total)

        name = (id(self), id(share), total.device, total.dtype)
        return self.component.store.get(name, make) if self.varies and not self.whole else make()

    def _change(self, share: Share) -> Any:
        """What ``share`` adds at strength 1, in main memory."""
        parts = {key: self.component.pristine(key).detach().cpu() for key in {*share.parts, self.key}}
        return weights.change_of(share, self.key, Ledger(kept=parts), parts[self.key], {})


@dataclass(slots=True, eq=False)
class Composition:
    """All slots of a pipeline. ``vectors``: by step, the number of its distinct vector of strengths; ``swaps``: changes so far."""

    slots: Sequence[Slot]
    vectors: tuple[int, ...]
    store: TensorStore
    now: int | None = None
    swaps: int = 0

    def at(self, step: int) -> None:
        """Give every slot the strengths of ``step``; steps after the last are like the last. Nothing happens where none differ."""
        import torch

        step = min(step, len(self.vectors) - 1)
        if self.vectors[step] == self.now:
            return
        self.now, self.swaps = None, self.swaps + 1
        with torch.inference_mode(False), torch.no_grad():
            for slot in self.slots:
                slot.put(step)
        self.now = self.vectors[step]

    def restore(self) -> None:
        """Everything as on entry, bit for bit, also when interrupted once on the way."""
        try:
            self._restore()
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        import torch

        self.now = None
        with torch.inference_mode(False), torch.no_grad():
            for slot in self.slots:
                slot.restore()
        self.store.clear()


def compose(slots: Iterable[Slot], steps: int, store: TensorStore) -> Composition:
    """The slots, with equal steps found.

    The cache holds all composed tensors or none: a small part of them would save as small a part of the work, and what is left
    of the room is better used for the deltas that are dear to compute.
    """
    listed, known = list(slots), dict[tuple[State, ...], int]()
    vectors = [known.setdefault(tuple(slot.states[step] for slot in listed), len(known)) for step in range(steps)]
    changed = [slot for slot in listed if isinstance(slot, Weight)]
    whole = sum(slot.size() for slot in changed) <= store.limit
    for slot in changed:
        slot.whole = whole
    return Composition(listed, tuple(vectors), store)


def weigh(component: Component, shares: Iterable[tuple[Share, float, State]], steps: int) -> Iterable[Weight]:
    """A slot for every parameter that scheduled shares change.

    ``shares``: each with its strength inside the weights now, and its strengths by step. Collapsed adapters that have no schedule stay
    in the sum as they are.
    """
    touching: dict[Key, list[tuple[Share, float, State]]] = {}
    for one in shares:
        for key in dict.fromkeys((*one[0].parts, *one[0].biases)):
            touching.setdefault(key, []).append(one)
    scheduled = {id(share) for rows in touching.values() for share, _, _ in rows}
    for own in weights.ledger(component.model).shares.values():
        for share in (share for share in own if id(share) not in scheduled):
            for key in {*share.parts, *share.biases} & touching.keys():
                touching[key].append((share, share.strength, (share.strength,) * steps))
    for key, rows in touching.items():
        component.slots[key] = _weight(component, key, rows)
    return component.slots.values()


def _weight(component: Component, key: Key, rows: list[tuple[Share, float, State]]) -> Weight:
    shares, rest, series = zip(*rows, strict=True)
    owner = live.base(component.model.get_submodule(key[0]))
    held = owner._parameters[key[1]]
    original = weights.zeros_for(component.model, key) if held is None else held.data
    return Weight(component, key, owner, shares, rest, tuple(zip(*series, strict=True)), original, held is None)
