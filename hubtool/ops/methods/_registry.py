"""What a merge method is, and the list of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from hubtool.errors import UsageProblem
from hubtool.tensors.expr import Compute, Expr

if TYPE_CHECKING:
    from torch import Tensor

Base = Literal["none", "optional", "required"]
Tiling = Literal["elements", "rows"]
Weights = Literal["none", "shares", "others", "each"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number or a switch of a method; ``low`` and ``high`` are allowed values themselves."""

    default: float | bool
    help: str
    low: float | None = None
    high: float | None = None

    def checked(self, name: str, value: Any) -> float | bool:
        """``value`` (a text of the command line, too) as the type of the default. Raises ``UsageProblem``."""
        if isinstance(self.default, bool):
            return _switch(name, value)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UsageProblem(f"{name} is a number, not {value!r}") from None
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        if not low <= number <= high or number in (float("inf"), float("-inf")):
            raise UsageProblem(f"{name} is from {low:g} to {high:g}, not {number:g}")
        return number


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in known:
        raise UsageProblem(f"{name} is true or false, not {value!r}")
    return known[str(value).lower()]


@dataclass(frozen=True)
class Method:
    """One way to merge.

    ``inputs``: fewest and most (None: any number), the base not counted. ``base``: whether the inputs are taken as changes of a base;
    without one (``base=None`` in ``apply``) the tensors given *are* changes, and so is the result. ``tiling``: which elements of the
    inputs one output element depends on, apart from what ``survey`` finds out about the whole tensor beforehand. ``weights``: what
    strengths are: nothing, ``shares`` of one whole, for the ``others`` (the first input is the one that is changed), or for ``each``
    change. ``linear``: the result is a sum of inputs and base times numbers that
    the strengths decide. ``source``: where the formula is from.
    """

    id: str
    title: str
    inputs: tuple[int, int | None]
    base: Base
    source: str
    function: Callable[..., Any] = field(repr=False)
    parameters: Mapping[str, Parameter] = field(default_factory=lambda: MappingProxyType({}))
    tiling: Tiling = "elements"
    weights: Weights = "each"
    random: bool = False
    linear: bool = False
    survey: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def help(self) -> str:
        """What the function's docstring says."""
        return (self.function.__doc__ or "").strip()

    def checked(self, params: Mapping[str, Any]) -> dict[str, float | bool]:
        """Every parameter's value, defaults filled in. Raises ``UsageProblem`` for unknown ones and values out of range."""
        unknown = sorted(params.keys() - self.parameters.keys())
        if unknown:
            known_ = ", ".join(self.parameters) or "none"
            raise UsageProblem(f"method {self.id} has no parameter {unknown[0]!r}", hint=f"it has {known_}")
        return {name: one.checked(name, params.get(name, one.default)) for name, one in self.parameters.items()}

    def check_inputs(self, count: int, *, base: bool) -> None:
        """Raise ``UsageProblem`` unless the method takes ``count`` inputs, with or without a base."""
        low, high = self.inputs
        if count < low or (high is not None and count > high):
            wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            raise UsageProblem(f"method {self.id} takes {wanted} inputs, not {count}")
        if base and self.base == "none":
            raise UsageProblem(f"method {self.id} has no use for a base", hint="leave out --base")

    @cached_property
    def kernel(self) -> Callable[..., Any]:
        """The function of the engine: ``kernel(*tensors, weights=, base=, params=, key=, seed=)``; the base comes last when there is one."""
        from hubtool.ops.methods._kernel import Kernel

        return Kernel(self)

    def expr(
        self,
        tensors: Sequence[Expr],
        *,
        weights: Sequence[float],
        dtype: str,
        base: Expr | None = None,
        params: Mapping[str, Any] | None = None,
        key: str = "",
        seed: int = 0,
    ) -> Compute:
        """The merged tensor, lazily. ``key`` (its canonical name) and ``seed`` decide what a random method draws."""
        sources = (*tensors, *([] if base is None else [base]))
        given = self._arguments(weights, base is not None, params, key, seed)
        return Compute(self.kernel, sources, tensors[0].shape, dtype, tuple(given.items()))

    def apply(
        self,
        tensors: Sequence[Tensor],
        *,
        weights: Sequence[float] | None = None,
        base: Tensor | None = None,
        key: str = "",
        seed: int = 0,
        **params: Any,
    ) -> Tensor:
        """The same on whole fp32 tensors of one shape. Raises ``UsageProblem`` for wrong parameters or a wrong number of tensors."""
        self.check_inputs(len(tensors), base=base is not None)
        given = self._arguments(weights or [1.0] * len(tensors), base is not None, params, key, seed)
        every = (*tensors, *([] if base is None else [base]))
        kernel: Any = self.kernel
        state = kernel.survey(lambda: iter((every,)), **given) if self.survey else None
        return kernel(*every, state=state, start=0, **given)

    def _arguments(
        self, weights: Sequence[float], base: bool, params: Mapping[str, Any] | None, key: str, seed: int
    ) -> dict[str, Any]:
        values = tuple(self.checked(params or {}).items())
        given: dict[str, Any] = {"weights": tuple(map(float, weights)), "base": base, "values": values}
        return given | ({"key": key, "seed": seed} if self.random else {})


_METHODS: dict[str, Method] = {}


def method(id: str, title: str, **facts: Any) -> Callable[[Callable[..., Any]], Method]:  # noqa: A002
    """Make a ``Method`` of ``f(tensors, *, weights, base=None, **params) -> Tensor``; ``facts`` are the fields of ``Method``.

    Tensors are fp32 and never written to. A ``survey`` is called as ``survey(tiles, *, weights, based, **params)`` first, ``tiles()``
    giving (tensors, base) of every tile; the function then gets ``state``. A ``random`` one gets ``draw(i)``: numbers in [0, 1) for every
    element of input ``i``, which depend on its key and the seed only.
    """

    def register(function: Callable[..., Any]) -> Method:
        if id in _METHODS:
            raise ValueError(f"two merge methods are called {id}")
        _METHODS[id] = made = Method(id, title, function=function, **facts)
        return made

    return register


@cache
def known() -> Mapping[str, Method]:
    """Every method by id, sorted."""
    package = importlib.import_module("hubtool.ops.methods")
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{info.name}")
    return MappingProxyType(dict(sorted(_METHODS.items())))


def find(name: str) -> Method:
    """The method called ``name`` (``-`` and ``_`` are alike). Raises ``UsageProblem`` listing what there is."""
    found = known().get(name.lower().replace("-", "_"))
    if found is None:
        raise UsageProblem(f"no merge method is called {name!r}", hint=f"there are {', '.join(known())}")
    return found
