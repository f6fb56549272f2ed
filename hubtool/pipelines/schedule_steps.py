"""Follow a pipeline's denoising loop from outside: the scheduler is told to begin, and asked once for every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any


@contextmanager
def following(scheduler: Any, at: Callable[[int], None]) -> Iterator[None]:
    """Call ``at(step)`` before each denoising step while the context is open: with 0 as a run begins, with i + 1 after step i.

    The scheduler's own methods are wrapped, on this object alone: every pipeline uses them, whatever it denoises and however often it
    calls its denoiser for a step. Solvers of a higher order ask several times for one step, first and last once less.
    """
    done, order = 0, max(int(getattr(scheduler, "order", 1)), 1)

    def begin(_: int) -> int:
        return 0

    def advance(count: int) -> int:
        return count + 1

    def wrapped(method: Any, count: Callable[[int], int]) -> Any:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            result = method(*args, **kwargs)
            done = count(done)
            at((done + order - 1) // order)
            return result

        return call

    with ExitStack() as undo:
        for name, count in (("set_timesteps", begin), ("step", advance)):
            undo.callback(_put_back, scheduler, name, vars(scheduler).get(name))
            setattr(scheduler, name, wrapped(getattr(scheduler, name), count))
        yield


def _put_back(scheduler: Any, name: str, own: Any) -> None:
    """``own``: what the object itself had under ``name``, usually nothing."""
    if own is not None:
        setattr(scheduler, name, own)
    else:
        vars(scheduler).pop(name, None)
