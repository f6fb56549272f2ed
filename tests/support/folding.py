"""Folding: one line for every run of equal neighbours in a module list, so that a vocabulary file says each block once.

``blocks.{0..18}.attn.to_q`` stands for ``blocks.0.attn.to_q`` to ``blocks.18.attn.to_q``. Neighbours fold only when their
whole subtrees are equal (names, order, shapes), so unfolding gives the modules back in the model's own order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Parameters = Mapping[str, Sequence[int]]
Entries = list[tuple[str, Parameters]]


@dataclass(slots=True)
class _Node:
    parameters: Parameters | None = None
    children: dict[str, _Node] = field(default_factory=dict)


def fold(modules: Mapping[str, Parameters]) -> dict[str, Parameters]:
    """Module path -> parameters, with equal neighbours under one ``{a..b}`` key. ``""`` holds top-level parameters."""
    return {path: {name: list(shape) for name, shape in ps.items()} for path, ps in _folded(_tree(modules))}


def _tree(modules: Mapping[str, Parameters]) -> _Node:
    root = _Node()
    for path, parameters in modules.items():
        node = root
        for segment in path.split(".") if path else ():
            node = node.children.setdefault(segment, _Node())
        node.parameters = parameters
    return root


def _folded(node: _Node) -> Entries:
    entries: Entries = [] if node.parameters is None else [("", node.parameters)]
    for head, below in _runs((segment, _folded(child)) for segment, child in node.children.items()):
        entries += [(f"{head}.{path}" if path else head, parameters) for path, parameters in below]
    return entries


def _runs(children: Iterable[tuple[str, Entries]]) -> Iterable[tuple[str, Entries]]:
    """Join neighbours ``n``, ``n + 1``, ... that have the same entries below them."""
    run: list[str] = []
    held: Entries = []
    for segment, below in children:
        if run and below == held and _follows(run[-1], segment):
            run.append(segment)
            continue
        if run:
            yield _head(run), held
        run, held = [segment], below
    if run:
        yield _head(run), held


def _follows(before: str, after: str) -> bool:
    """``7`` and ``8``, but not ``07`` and ``8``: expanding a range writes plain numbers."""
    return before.isdecimal() and before == str(int(before)) and after == str(int(before) + 1)


def _head(run: list[str]) -> str:
    return run[0] if len(run) == 1 else f"{{{run[0]}..{run[-1]}}}"
