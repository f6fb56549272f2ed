"""What stands in front of attention's keys and values: functions of the context, several in order, each with its strength.

One stack per U-Net. A hook on the attention keeps the hooks of ``to_k`` and ``to_v`` on whatever modules stand there now: PEFT wraps and
unwraps them as adapters come and go, and a hook that stayed on the inner module would not reach an adapter's own factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from hubtool.pipelines import live

SIDES = ("k", "v")
_ATTENTIONS = ("attn1", "attn2")  # of a transformer block: what CrossAttention is in the original code
Feed = Callable[[Any], Any]
State = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Entry:
    """``feeds``: (context width, side) -> function; ``strengths``: path of a projection -> what multiplies the function's value."""

    feeds: Mapping[tuple[int, str], Feed]
    strengths: dict[str, float]


@dataclass(slots=True, eq=False)
class Stack:
    """``entries`` by name, in order of loading; ``held``: path of a projection -> (its module now, the handle of its hook).

    ``kept``: the last context of each side and width, the state that what was made of it depends on, and that.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    held: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    kept: dict[tuple[str, int], tuple[Any, State, Any]] = field(default_factory=dict)

    def follow(self, path: str, attention: Any) -> None:
        """Hook the projections that ``attention`` has at this moment."""
        for side in SIDES:
            key, module = f"{path}.to_{side}", getattr(attention, f"to_{side}")
            known = self.held.get(key)
            if known is None or known[0] is not module:
                if known is not None:
                    known[1].remove()
                self.held[key] = module, module.register_forward_pre_hook(partial(self._feed, key, side))

    def _feed(self, key: str, side: str, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The prompt's context is the same tensor in every block and at every step: what stands before it is computed once."""
        import torch

        x, *others = inputs
        active = [
            (strength, feed)
            for entry in self.entries.values()
            if (strength := entry.strengths.get(key)) and (feed := entry.feeds.get((x.shape[-1], side))) is not None
        ]
        if not active:
            return inputs
        if (
            torch.is_grad_enabled() or x.is_inference()
        ):  # a graph serves one backward pass; nobody counts versions there
            return (_through(active, x), *others)
        state = (x._version, *((strength, id(feed)) for strength, feed in active))
        known = self.kept.get((side, x.shape[-1]))
        if known is None or known[0]() is not x or known[1] != state:
            known = ref(x), state, _through(active, x)
            self.kept[side, x.shape[-1]] = known
        return (known[2], *others)

    def close(self) -> None:
        """Take every hook away."""
        for handle in (*self.handles, *(handle for _, handle in self.held.values())):
            handle.remove()
        self.handles, self.held, self.kept = [], {}, {}


# Weak: a stack goes with its model. It holds modules of the model, which do not know the model they are in.
_STACKS: WeakKeyDictionary[Any, Stack] = WeakKeyDictionary()


def _through(active: Iterable[tuple[float, Feed]], x: Any) -> Any:
    for strength, feed in active:
        x = x + strength * feed(x)
    return x


def attentions(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, attention) of every attention of a transformer block."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in _ATTENTIONS and hasattr(module, "to_k") and hasattr(module, "to_v"):
            yield path, module


def width(attention: Any, side: str = "k") -> int:
    """How wide the context is that the projection reads."""
    return int(live.base(getattr(attention, f"to_{side}")).in_features)


def push(model: Any, name: str, feeds: Mapping[tuple[int, str], Feed], strength: float) -> tuple[str, ...]:
    """Put ``feeds`` behind those that are there already; return the paths of the projections they reach."""
    stack = _STACKS.setdefault(model, Stack())
    reached = [(path, module) for path, module in attentions(model) if any((width(module), s) in feeds for s in SIDES)]
    paths = tuple(f"{path}.to_{s}" for path, module in reached for s in SIDES if (width(module, s), s) in feeds)
    if not stack.entries:
        for path, module in attentions(model):
            stack.handles.append(module.register_forward_pre_hook(_following(stack, path)))
    stack.entries[name] = Entry(feeds, dict.fromkeys(paths, strength))
    stack.kept.clear()
    for path, module in attentions(model):
        stack.follow(path, module)
    return paths


def pop(model: Any, name: str) -> None:
    """Take the feeds of ``name`` out; the last one takes the hooks with it."""
    stack = _STACKS.get(model)
    if stack is not None and stack.entries.pop(name, None) is not None:
        stack.kept.clear()
        if not stack.entries:
            stack.close()


def entry(model: Any, name: str) -> Entry:
    """What ``name`` put into the stack of ``model``."""
    return _STACKS[model].entries[name]


def _following(stack: Stack, path: str) -> Callable[[Any, Any], None]:
    def hook(attention: Any, inputs: Any) -> None:
        stack.follow(path, attention)

    return hook
