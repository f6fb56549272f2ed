"""What follows a schedule, all together: set to a step, and everything as before at the end, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hubtool.pipelines.batches import batched
from hubtool.pipelines.schedule_store import TensorStore
from hubtool.pipelines.schedule_weights import State, Weight


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
    """The slots, with equal steps found, and weights that can be composed together put together.

    The cache holds all composed tensors or none: a small part of them would save as small a part of the work, and what is left
    of the room is better used for the deltas that are dear to compute.
    """
    listed, known = list(slots), dict[tuple[State, ...], int]()
    vectors = [known.setdefault(tuple(slot.states[step] for slot in listed), len(known)) for step in range(steps)]
    changed = [slot for slot in listed if isinstance(slot, Weight)]
    whole = sum(weight.size() for weight in changed) <= store.limit
    for weight in changed:
        weight.whole = whole
    others = [slot for slot in listed if not isinstance(slot, Weight)]
    return Composition([*others, *batched(changed)], tuple(vectors), store)
