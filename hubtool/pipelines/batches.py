"""Parameters of one shape composed by one product: a change of strengths costs a handful of kernels, not a walk through every module.

Members of a batch point at the rows of one buffer. Their originals stay where they are, untouched: each sum begins with a fresh copy of
them, and at the end the parameters point to them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hubtool.pipelines.schedule_weights import State, Weight, finite, gated, wide
from hubtool.tensors.dtypes import numel

Place = tuple[Any, Any]  # (device, dtype)
_REST = -1
_ALIGNED = 64  # bytes: where allocators begin a tensor, and so where fast kernels expect one
_RANKS = 8  # members whose ranks differ less share a batch, filled up with zeros
_LARGEST = 256 << 20  # bytes of the sums of one batch
_CACHED = 1 << 20  # bytes of sums that stay in a core's own cache between the kernels that touch them


@dataclass(slots=True, eq=False)
class Batch:
    """Parameters of one component, shape and dtype whose changes are low-rank and whose strengths change at the same steps.

    ``originals``: without any adapter, and never written to; ``numbers``: by step, which of its distinct strengths the batch has, ``_REST``
    for those on entry. ``buffer``: what the parameters point at, (members, *shape), where it is composed again for every change; ``rows``:
    where each of them was found to do so. ``factors``: (members, out, ranks) and (members, ranks, the rest), kept as long as they are
    needed again; ``gates``: by number, (members, ranks).
    """

    members: tuple[Weight, ...]
    originals: tuple[Any, ...]
    numbers: tuple[int, ...]
    now: int | None = None
    buffer: Any = None
    rows: list[tuple[dict[str, Any], str, int]] = field(default_factory=list)
    factors: tuple[Any, Any] | None = None
    gates: dict[tuple[int, Any], Any] = field(default_factory=dict)
    checked: set[int] = field(default_factory=set)

    @property
    def states(self) -> tuple[State, ...]:
        return tuple((float(number),) for number in self.numbers)

    def put(self, step: int) -> None:
        number = self.numbers[step]
        if number == self.now:
            return
        self.now = None
        if number != _REST and self._aimed():
            self._filled(self.buffer, step)
        else:
            self._walk(step)
        self.now = number

    def _aimed(self) -> bool:
        """Whether every member points at its row still: nothing was moved or cast, and the buffer is all that has to change."""
        return bool(self.rows) and all(own[name].data_ptr() == row for own, name, row in self.rows)

    def _walk(self, step: int) -> None:
        places = {(held.device, held.dtype) for held in (member.held() for member in self.members)}
        if len(places) > 1:  # only a part of them was moved: each by itself, until they are together again
            for member in self.members:
                member.put(step)
        elif self.numbers[step] == _REST:
            self._point(member.settled() for member in self.members)
        else:
            self._point(self._composed(step, places.pop()).unbind())
            self.rows = [] if self.buffer is None else [_row(member) for member in self.members]

    def restore(self) -> None:
        self.now = None
        for member in self.members:
            member.restore()
        self.rows, self.buffer, self.factors = [], None, None

    def _point(self, values: Iterable[Any]) -> None:
        for member, value in zip(self.members, values, strict=True):
            member.point(value)

    def _composed(self, step: int, place: Place) -> Any:
        first = self.members[0]
        if first.varies and first.whole:
            name = (id(self), self.numbers[step], *place)
            return first.component.store.get(name, lambda: self._filled(self._empty(place), step))
        if self.buffer is None or (self.buffer.device, self.buffer.dtype) != place:
            self.rows, self.buffer = [], self._empty(place)
        return self._filled(self.buffer, step)

    def _empty(self, place: Place) -> Any:
        import torch

        device, dtype = place
        return torch.empty((len(self.members), *self.members[0].original.shape), device=device, dtype=dtype)

    def _filled(self, buffer: Any, step: int) -> Any:
        """``buffer`` with the weights of ``step``, finite when they are first computed."""
        self._sum(buffer, step)
        number = self.numbers[step]
        if number not in self.checked and not finite(buffer):
            index = next(index for index, value in enumerate(buffer) if not finite(value))
            raise self.members[index].refuse(self.members[index].states[step])
        self.checked.add(number)
        first = self.members[0]
        if not first.varies or (first.whole and self.checked >= {*self.numbers} - {_REST}):
            self.factors = None
        return buffer

    def _sum(self, buffer: Any, step: int) -> None:
        import torch

        for originals, rows, up, down, gate in self._slices(buffer, step):
            into = rows if rows.dtype == up.dtype == originals[0].dtype else None
            total = torch.stack(originals, out=into).to(up.dtype)
            total.flatten(2).baddbmm_(*gated(up, down, gate))
            if into is None:
                rows.copy_(total)

    def _slices(self, buffer: Any, step: int) -> Iterator[tuple[Any, ...]]:
        """(originals, rows of the buffer, factors, strengths) of a few members after another."""
        up, down = self._factors(buffer.device, wide(self.originals[0].dtype))
        gate = self._gate(step, up)
        count = _at_once(buffer, up.dtype)
        cut = (one.split(count) for one in (buffer, up, down, gate))
        starts = range(0, len(buffer), count)
        for start, *views in zip(starts, *cut, strict=True):
            yield (self._originals(slice(start, start + count), buffer.device), *views)

    def _originals(self, part: slice, device: Any) -> Sequence[Any]:
        own = self.originals[part]  # all in one place
        return own if own[0].device == device else [original.to(device) for original in own]

    def _factors(self, device: Any, dtype: Any) -> tuple[Any, Any]:
        """Those of all members, ranks that are missing filled up with zeros."""
        import torch

        if self.factors is None or self.factors[0].device != device:
            ranks, first = [sum(member.ranks) for member in self.members], self.members[0].original
            up = torch.zeros(len(ranks), len(first), max(ranks), device=device, dtype=dtype)
            down = torch.zeros(len(ranks), max(ranks), numel(first.shape[1:]), device=device, dtype=dtype)
            for index, (rank, member) in enumerate(zip(ranks, self.members, strict=True)):
                up[index, :, :rank], down[index, :rank] = member.join(up)
            self.factors = up, down
        return self.factors

    def _gate(self, step: int, like: Any) -> Any:
        name = (self.numbers[step], like.device)
        if name not in self.gates:
            self.gates[name] = self._spread(step, like)
        return self.gates[name]

    def _spread(self, step: int, like: Any) -> Any:
        """The strengths of every member's ranks; one row serves all where they are the same."""
        import torch
        from torch.nn.functional import pad

        component, ranks = self.members[0].component, like.shape[-1]
        rows = [(member.states[step], member.ranks) for member in self.members]
        if len(set(rows)) == 1:
            return pad(component.gate(*rows[0], like), (0, ranks - sum(rows[0][1]))).expand(len(rows), -1)
        gates = [component.gate(*row, like) for row in rows]
        return torch.stack([pad(gate, (0, ranks - len(gate))) for gate in gates])


def batched(weights: list[Weight]) -> Iterator[Weight | Batch]:
    """The weights, in batches where that is possible, by themselves where it is not."""
    groups: dict[tuple[Any, ...], list[Weight]] = {}
    holders = Counter(id(weight.held()) for weight in weights)
    for weight in weights:
        if _joins(weight) and holders[id(weight.held())] == 1:
            groups.setdefault(_kind(weight), []).append(weight)
        else:
            yield weight
    for (*_, numbers), group in groups.items():
        count = _fitting(_LARGEST, group[0].original, wide(group[0].original.dtype))
        for start in range(0, len(group), count):
            members = tuple(group[start : start + count])
            yield _batch(members, numbers) if len(members) > 1 else members[0]


def _row(member: Weight) -> tuple[dict[str, Any], str, int]:
    """Where to find the parameter, and the address that it has now."""
    return member.owner._parameters, member.key[1], member.held().data_ptr()


def _batch(members: tuple[Weight, ...], numbers: tuple[int, ...]) -> Batch:
    return Batch(members, tuple(member.component.pristine(member.key) for member in members), numbers)


def _joins(weight: Weight) -> bool:
    """Whether low-rank factors are all that changes it, and a buffer of its like has a row for it that begins where tensors do."""
    low_rank = len(weight.joined) == len(weight.shares) and not weight.absent
    return low_rank and weight.original.nbytes > 0 and weight.original.nbytes % _ALIGNED == 0


def _kind(weight: Weight) -> tuple[Any, ...]:
    """Equal for weights that can be in one batch."""
    original, pristine = weight.original, weight.component.pristine(weight.key)
    places = original.device, original.dtype, pristine.device, pristine.dtype
    return id(weight.component), original.shape, *places, -(-sum(weight.ranks) // _RANKS), _numbers(weight)


def _numbers(weight: Weight) -> tuple[int, ...]:
    known = {weight.rest: _REST}
    return tuple(known.setdefault(state, len(known) - 1) for state in weight.states)


def _at_once(buffer: Any, dtype: Any) -> int:
    """How many members: on a CPU as many as its cache has room for, elsewhere as many as memory is lent to."""
    return _fitting(_CACHED if buffer.device.type == "cpu" else _LARGEST, buffer[0], dtype)


def _fitting(room: int, tensor: Any, dtype: Any) -> int:
    return max(1, room // (tensor.numel() * dtype.itemsize))
