"""Follow a pipeline's denoising loop from outside: the scheduler is told to begin, and asked once for every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


@contextmanager
def following(scheduler: Any, at: Callable[[int], None]) -> Iterator[None]:
    """Call ``at(step)`` before each denoising step while the context is open: with 0 as a run begins, with i + 1 after step i.

    Every pipeline uses these two methods, whatever it denoises and however often it calls its denoiser for a step. Solvers of a higher
    order ask several times for one step, first and last once less.
    """
    done, order = 0, max(int(getattr(scheduler, "order", 1)), 1)

    def tell(count: int) -> None:
        nonlocal done
        done = count
        at((done + order - 1) // order)

    kind = type(scheduler)
    methods = {
        "set_timesteps": _telling(kind.set_timesteps, scheduler, lambda: tell(0)),
        "step": _telling(kind.step, scheduler, lambda: tell(done + 1)),
    }
    # a class for this one object, not attributes of the object: LTX-2 copies its scheduler, and a copy would drive the original
    scheduler.__class__ = type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})
    try:
        yield
    finally:
        scheduler.__class__ = kind


def _telling(method: Any, followed: Any, tell: Callable[[], None]) -> Any:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if self is followed:
            tell()
        return result

    return call
