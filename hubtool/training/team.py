"""Several processes that train as one: ``accelerate launch --num_processes 4 -m hubtool train ...``.

The batches of one update (``run.accumulate``) are dealt out among the processes and their gradients added, so the number of processes
changes nothing about the result but rounding. Only the first process writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hubtool.errors import UsageProblem


@dataclass(frozen=True, slots=True)
class Team:
    """``rank`` of ``size`` processes."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, batches: int) -> range:
        """The batches of one update that this process computes."""
        return range(self.rank, batches, self.size)

    def add(self, tensors: Iterable[Any]) -> None:
        """Replace each tensor by its sum over all processes."""
        import torch

        for tensor in tensors if self.size > 1 else ():
            torch.distributed.all_reduce(tensor)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The others enter the block when the first process has left it."""
        import torch

        if self.size > 1 and not self.leads:
            torch.distributed.barrier()
        yield
        if self.size > 1 and self.leads:
            torch.distributed.barrier()


def team(batches: int) -> Team:
    """The processes that a launcher started, or this one alone. ``batches``: per update; each process must get as many.

    Raises ``UsageProblem``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Team()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    found = Team(state.process_index, state.num_processes)
    if batches % found.size:
        raise UsageProblem(
            f"{batches} batches cannot be dealt out evenly among {found.size} processes",
            hint=f"--set run.accumulate={found.size}",
        )
    return found


def own_device() -> str:
    """The device of this process, by the rank that the launcher gave it."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
