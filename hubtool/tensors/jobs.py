"""What the parallel writer has to do, cut into jobs: neighbours that are copied, tensors that are computed, groups that share a computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import is_bytes, joints
from hubtool.tensors.expr import Compute, Concat, Expr, Joint, Reshape, inner, size, sources
from hubtool.tensors.tiles import tiled

_RUN = 32 << 20  # bytes that one job copies


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and the offset of its bytes in the output."""

    name: str
    expr: Expr
    offset: int


@dataclass(frozen=True, slots=True)
class Job:
    """Tensors one worker writes: neighbours that are copied, or what shares computations. ``memory``: bytes it needs at once."""

    tensors: tuple[Placed, ...]
    copies: bool
    memory: int

    @property
    def weight(self) -> int:
        return sum(size(placed.expr) for placed in self.tensors)


def jobs_of(placed: Sequence[Placed]) -> deque[Job]:
    """Every job, those of most bytes first: what is left for the end is small, and the workers end together."""
    copied = [one for one in placed if is_bytes(one.expr)]
    jobs = [Job(run, True, 0) for run in _runs(copied)]
    jobs += [Job(group, False, _memory(group)) for group in _groups([one for one in placed if not is_bytes(one.expr)])]
    return deque(sorted(jobs, key=lambda job: (-job.weight, job.tensors[0].offset)))


def _runs(placed: Iterable[Placed]) -> Iterator[tuple[Placed, ...]]:
    """Neighbours in the output, up to some bytes together."""
    run: list[Placed] = []
    held = 0
    for one in placed:
        if run and (held >= _RUN or run[-1].offset + size(run[-1].expr) != one.offset):
            yield tuple(run)
            run, held = [], 0
        run.append(one)
        held += size(one.expr)
    if run:
        yield tuple(run)


def _groups(placed: Iterable[Placed]) -> Iterator[tuple[Placed, ...]]:
    """Tensors that need the same ``Joint``, directly or through others, come together."""
    groups: dict[int, tuple[list[Placed], set[Joint]]] = {}
    by_joint: dict[Joint, int] = {}
    for index, one in enumerate(placed):
        needed = set(joints(one.expr))
        members = [one]
        for other in sorted({by_joint[joint] for joint in needed if joint in by_joint}):
            others, theirs = groups.pop(other)
            members, needed = [*others, *members], needed | theirs
        groups[index] = (members, needed)
        by_joint.update(dict.fromkeys(needed, index))
    return (tuple(members) for members, _ in groups.values())


def _memory(group: Sequence[Placed]) -> int:
    """An estimate: stored bytes and an fp32 copy of each source, the result in fp32 and a temporary of its size."""
    whole = [expr for one in group for expr in _whole(one.expr)]
    refs = {(ref.path, ref.start, ref.end): ref for expr in whole for ref in sources(expr)}
    held = sum(ref.nbytes + 4 * numel(ref.shape) for ref in refs.values())
    return held + sum(8 * numel(expr.shape) for expr in whole)


def _whole(expr: Expr) -> Iterator[Expr]:
    """The parts of an expression that are computed in one piece."""
    match expr:
        case Compute() if tiled(expr):
            yield from (source for source in expr.sources if not is_bytes(source))
        case Reshape() | Concat(axis=0):
            for part in inner(expr):
                yield from _whole(part)
        case _ if not is_bytes(expr):
            yield expr
