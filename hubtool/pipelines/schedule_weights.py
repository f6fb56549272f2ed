"""Parameters composed for one vector of strengths after another: ``cast(original + sum(strength * delta(original)))``.

The original tensor of every parameter is set aside and never written to; the parameter points to a composed tensor for as long as
it is needed, and to the original again afterwards. So nothing is "unfused", and nothing can drift (diffusers' fuse and unfuse, ten
times over, move bf16 weights by 2e-3). All low-rank factors of one parameter are joined, and their strengths are a gate on the joined
rank: one product, whatever the number of adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.parts import matrix
from hubtool.errors import BadValues
from hubtool.pipelines import live, weights
from hubtool.pipelines.schedule_store import TensorStore
from hubtool.pipelines.weights import Key, Ledger, Share
from hubtool.tensors.dtypes import numel

State = tuple[float, ...]


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

    def gate(self, strengths: State, ranks: tuple[int, ...], like: Any) -> Any:
        """The strength of every joined rank, (sum of ranks,), where and in the dtype that ``like`` is."""
        import torch

        name = (strengths, ranks, like.device, like.dtype)
        if name not in self.gates:
            spread = [one for one, rank in zip(strengths, ranks, strict=True) for _ in range(rank)]
            self.gates[name] = torch.tensor(spread, device=like.device, dtype=like.dtype)
        return self.gates[name]


@dataclass(slots=True, eq=False)
class Weight:
    """One parameter of ``owner``. ``shares``: all that changes it; ``rest``: their strengths inside ``original``, the tensor it had on entry.

    ``absent``: the module had no such parameter; ``varies``: tensors are needed more than once; ``whole``: the cache has room for every
    composed tensor of the pipeline; ``joined``: numbers of the shares that are one product of two factors, ``ranks`` long; ``now``: the
    strengths that the parameter has at this moment.
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
    ranks: tuple[int, ...] = ()
    now: State | None = None
    checked: set[State] = field(default_factory=set)
    factors: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        self.varies = len(set(self.states)) > 1
        self.joined = tuple(index for index, share in enumerate(self.shares) if self._joins(share))
        self.ranks = tuple(self.shares[index].patch.rank or 0 for index in self.joined)

    def size(self) -> int:
        """Bytes of all its composed tensors that are needed more than once."""
        return len({*self.states} - {self.rest}) * self.original.nbytes if self.varies else 0

    def put(self, step: int) -> None:
        state = self.states[step]
        if state != self.now:
            self.point(self.settled() if state == self.rest else self._composed(state))
            self.now = state

    def restore(self) -> None:
        self.now = None
        if self.absent:
            setattr(self.owner, self.key[1], None)
        else:
            self.point(self.settled())

    def settled(self) -> Any:
        """The tensor of the entry, where the parameter lies now: a pipeline may have been moved or cast since."""
        held = self.held()
        return self.original.to(held.device, held.dtype)

    def held(self) -> Any:
        """What tells the present device and dtype."""
        parameter = self.owner._parameters[self.key[1]]
        return self.original if parameter is None else parameter

    def point(self, value: Any) -> None:
        """Let the parameter be ``value``, without a copy."""
        self.now = None
        parameter = self.owner._parameters[self.key[1]]
        if parameter is None:
            from torch import nn

            setattr(self.owner, self.key[1], nn.Parameter(value, requires_grad=False))
        else:
            parameter.data = value

    def refuse(self, state: State) -> BadValues:
        """The error for a sum that is not finite."""
        return BadValues(f"with strengths {state}, {self.component.name}.{'.'.join(self.key)} holds NaN or infinity")

    def join(self, like: Any) -> tuple[Any, Any]:
        """(out, all ranks) with the scales in it, and (all ranks, the rest), where and in the dtype that ``like`` is."""
        import torch

        patches = [self.shares[index].patch for index in self.joined]
        ups = [patch.scale * matrix(patch.up).to(like) for patch in patches if isinstance(patch, LowRank)]
        downs = [matrix(patch.down).to(like) for patch in patches if isinstance(patch, LowRank)]
        return torch.cat(ups, 1), torch.cat(downs)

    def _composed(self, state: State) -> Any:
        held = self.held()
        self.now = None
        if not (self.varies and self.whole):
            return self._checked(state, held)
        name = (id(self), state, held.device, held.dtype)
        return self.component.store.get(name, lambda: self._checked(state, held))

    def _checked(self, state: State, held: Any) -> Any:
        """``_sum``, finite when it is first computed: large changes overflow fp16 long before fp32."""
        value = self._sum(state, held)
        if state not in self.checked and not finite(value):
            raise self.refuse(state)
        self.checked.add(state)
        return value

    def _sum(self, state: State, held: Any) -> Any:
        base = self.component.pristine(self.key).to(held.device)
        total = base.to(wide(base.dtype))
        if self.joined:
            strengths = tuple(state[index] for index in self.joined)
            up, down = gated(*self._factors(total), self.component.gate(strengths, self.ranks, total))
            total = total.flatten(1).addmm(up, down).view(total.shape)
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
        if self.factors is None or self.factors[0].device != total.device:
            self.factors = self.join(total)
        return self.factors

    def _delta(self, share: Share, total: Any) -> Any:
        def make() -> Any:
            return self._change(share).to(total)

        name = (id(self), id(share), total.device, total.dtype)
        return self.component.store.get(name, make) if self.varies and not self.whole else make()

    def _change(self, share: Share) -> Any:
        """What ``share`` adds at strength 1, in main memory."""
        parts = {key: self.component.pristine(key).detach().cpu() for key in {*share.parts, self.key}}
        return weights.change_of(share, self.key, Ledger(kept=parts), parts[self.key], {})


def wide(dtype: Any) -> Any:
    """The dtype of sums onto weights of ``dtype``: fp32, or fp64 for fp64."""
    import torch

    return torch.promote_types(dtype, torch.float32)


def gated(up: Any, down: Any, gate: Any) -> tuple[Any, Any]:
    """The factors with the strengths of all ranks in the smaller of the two: (..., out, r), (..., r, in), (..., r)."""
    if up.shape[-2] <= down.shape[-1]:
        return up * gate.unsqueeze(-2), down
    return up, down * gate.unsqueeze(-1)


def finite(value: Any) -> bool:
    """Whether neither NaN nor infinity is in it: the extremes tell both, without a mask as large as the tensor."""
    if not value.numel():
        return True
    low, high = value.aminmax()
    return bool(low.isfinite() & high.isfinite())


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
