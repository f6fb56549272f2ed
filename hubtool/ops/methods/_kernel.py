"""The border between the engine, which calls ``function(*tensors, **params)``, and methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from hubtool.ops.methods import _noise

if TYPE_CHECKING:
    from torch import Tensor

Tiles = Callable[[], Iterator[tuple[Any, ...]]]


class Method(Protocol):
    """What a kernel has to know of a method (``_registry.Method``)."""

    @property
    def function(self) -> Callable[..., Any]: ...
    @property
    def tiling(self) -> str: ...
    @property
    def random(self) -> bool: ...
    @property
    def survey(self) -> Callable[..., Any] | None: ...


class Kernel:
    """A method as ``Compute`` wants it; its attributes say how tensors may be cut into tiles (``hubtool.tensors.tiles``)."""

    finite = True

    def __init__(self, method: Method) -> None:
        self._method = method
        self.elementwise = method.tiling == "elements"
        self.rowwise = method.tiling == "rows"
        self.positional = method.random
        self.survey = self._survey if method.survey is not None else None

    def __call__(
        self,
        *tensors: Tensor,
        weights: tuple[float, ...],
        base: bool,
        values: tuple[tuple[str, Any], ...],
        key: str = "",
        seed: int = 0,
        state: Any = None,
        start: int = 0,
    ) -> Tensor:
        inputs, own = _split(tensors, base)
        more: dict[str, Any] = dict(values)
        if self._method.survey is not None:
            more["state"] = state
        if self._method.random:
            more["draw"] = partial(_draw, like=inputs[0], start=start, key=key, seed=seed)
        return self._method.function(inputs, weights=weights, base=own, **more)

    def _survey(
        self, tiles: Tiles, *, weights: tuple[float, ...], base: bool, values: tuple[tuple[str, Any], ...], **_: Any
    ) -> Any:
        assert self._method.survey is not None
        return self._method.survey(lambda: (_split(tile, base) for tile in tiles()), weights=weights, **dict(values))


def _split(tensors: tuple[Any, ...], base: bool) -> tuple[list[Any], Any]:
    return (list(tensors[:-1]), tensors[-1]) if base else (list(tensors), None)


def _draw(index: int, *, like: Tensor, start: int, key: str, seed: int) -> Tensor:
    """Numbers in [0, 1) for the elements of input ``index`` from flat index ``start`` on."""
    state = _noise.seeded(seed, key, index)
    return _noise.uniform(start, like.numel(), state, str(like.device)).reshape(like.shape)
