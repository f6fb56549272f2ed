"""Methods of one pipeline object, wrapped: others of its class do not notice, and its class keeps its name and signatures.

    wrap(pipe, "style", "encode_prompt", around)       # around(pipe, inner, args, kwargs) in place of inner(*args, **kwargs)

Several wrap one another, the last one outermost. With the last of them gone the object has its own class again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

Inner = Callable[..., Any]
Around = Callable[[Any, Inner, tuple[Any, ...], Mapping[str, Any]], Any]

# Weak: what wraps a method is told the pipeline it works for and holds none.
_WRAPS: WeakKeyDictionary[Any, dict[str, dict[str, Around]]] = WeakKeyDictionary()


def wrap(pipe: Any, name: str, method: str, around: Around) -> None:
    """From now on ``around`` stands around ``method`` of ``pipe``."""
    held = _WRAPS.setdefault(pipe, {})
    held.setdefault(method, {})[name] = around
    _dress(pipe, held)


def unwrap(pipe: Any, name: str) -> None:
    """Take all that was wrapped as ``name`` off; harmless where there is nothing."""
    held = _WRAPS.get(pipe, {})
    for method in list(held):
        held[method].pop(name, None)
        if not held[method]:
            del held[method]
    _dress(pipe, held)


def wrapped(pipe: Any, method: str) -> dict[str, Around]:
    """What stands around ``method`` of ``pipe``, by name."""
    return dict(_WRAPS.get(pipe, {}).get(method, {}))


class _Dressed:
    """Marks the classes made here."""


def _dress(pipe: Any, held: Mapping[str, Mapping[str, Around]]) -> None:
    """Give ``pipe`` the class for what is wrapped now. ``__call__`` is looked up in the class only, so an attribute would not do."""
    kind = type(pipe)
    plain = kind.__mro__[1] if issubclass(kind, _Dressed) else kind
    if not held:
        pipe.__class__ = plain
        return
    methods = {method: _chained(getattr(plain, method), list(arounds.values())) for method, arounds in held.items()}
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    pipe.__class__ = type(plain.__name__, (plain, _Dressed), {**names, **methods})


def _chained(method: Any, arounds: list[Around]) -> Any:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner: Inner = partial(method, self)
        for around in arounds:
            inner = _around(around, self, inner)
        return inner(*args, **kwargs)

    return call


def _around(around: Around, pipe: Any, inner: Inner) -> Inner:
    return lambda *args, **kwargs: around(pipe, inner, args, kwargs)
