"""The changes of one module by several inputs as one: factors in, factors out, evaluated by the engine as one joint computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal

from hubtool.errors import BadValues
from hubtool.ops.factor_space import algebra
from hubtool.ops.factor_space.algebra import Decomposed
from hubtool.ops.factor_space.coefficients import combines, found, plain
from hubtool.ops.factor_space.terms import Factors
from hubtool.ops.methods import Method
from hubtool.ops.randomised_svd import seed_of
from hubtool.tensors.expr import Expr, Item, Joint
from hubtool.tensors.tiles import TILE
from hubtool.types import Shape

Space = Literal["dense", "core", "knots"]
Tensors = Sequence[Any]
Term = tuple[Any, Any, float]
Rows = Callable[[int, int], list[Any]]


@dataclass(slots=True)
class Measured:
    """What computing found out: module -> (squared norm of the wanted change, squared error of what was written). Filled by workers."""

    modules: dict[str, tuple[float, float]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def add(self, name: str, norm: float, error: float) -> None:
        with self._lock:
            self.modules[name] = norm, error


@dataclass(frozen=True, slots=True)
class Blend:
    """How the changes of one module become one.

    ``weights``: the strength of every input here; ``present``: which inputs change the module (the base counts as one more, the last);
    ``scales``: of their factors. A method that is no sum of the changes looks at entries, in ``space``: of the products themselves, of
    their cores (arXiv 2509.17786) or of the V parts of their common SVD (arXiv 2410.19735). ``tensors``: names, for messages.
    """

    name: str
    method: Method
    weights: tuple[float, ...]
    present: tuple[int, ...]
    scales: tuple[float, ...]
    based: bool = False
    space: Space = "dense"
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0
    tensors: tuple[str, ...] = ()

    @property
    def combines(self) -> bool:
        return combines(self.method)

    @property
    def stays_low(self) -> bool:
        """Whether the result has no more ranks than the inputs together."""
        return self.combines or self.space != "dense"

    def terms(self, tensors: Tensors) -> list[Term]:
        """(up, down, scale) of every present change."""
        factors = [tensor.float() for tensor in tensors]
        return list(zip(factors[::2], factors[1::2], self.scales, strict=True))

    def summands(self, tensors: Tensors) -> list[Term]:
        """(up, down, coefficient * scale): what a method that combines sums."""
        terms = self.terms(tensors)
        coefficients = self._plain() if self.method.linear else self._found(algebra.inner_products(terms))
        shares = [coefficients[i] for i in self.present]
        return [(up, down, share * scale) for (up, down, scale), share in zip(terms, shares, strict=True)]

    def _plain(self) -> tuple[float, ...]:
        return plain(self.method, self.weights, self.parameters, based=self.based)

    def _found(self, products: list[list[float]]) -> tuple[float, ...]:
        """Inputs that leave the module alone are zero vectors."""
        count, at = len(self.weights) + self.based, {index: row for row, index in enumerate(self.present)}
        gram = [[products[at[i]][at[j]] if i in at and j in at else 0.0 for j in range(count)] for i in range(count)]
        return found(self.method, gram, self.weights, self.parameters, based=self.based)

    def entrywise(self, rows: Rows, shape: tuple[int, int]) -> Any:
        """The method on changes of one shape, a few rows at a time. ``rows(start, stop)``: those of every present change."""
        import torch

        step = max(TILE // shape[1], 1)
        spans = [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
        kernel: Any = self.method.kernel
        given = self._given()
        if kernel.survey is not None:
            given["state"] = kernel.survey(lambda: (self._every(rows(*span)) for span in spans), **given)
        made = [kernel(*self._every(rows(*span)), start=span[0] * shape[1], **given) for span in spans]
        return torch.cat(made)

    def _given(self) -> dict[str, Any]:
        values = tuple(self.method.checked(self.parameters).items())
        given: dict[str, Any] = {"weights": self.weights, "base": self.based, "values": values}
        return given | ({"key": self.name, "seed": self.seed} if self.method.random else {})

    def _every(self, present: Sequence[Any]) -> tuple[Any, ...]:
        """Zeros for inputs that leave the module alone; the base last."""
        import torch

        known = {index: tile.float() for index, tile in zip(self.present, present, strict=True)}
        zero = torch.zeros_like(present[0], dtype=torch.float32)
        return tuple(known.get(i, zero) for i in range(len(self.weights) + self.based))


def decomposed(tensors: Tensors, blend: Blend, most: int) -> Decomposed:
    """The merged change of one module, its ``most`` largest singular values at least. ``tensors``: up, down, up, down ... in fp32."""
    _finite(tensors, blend)
    if blend.combines:
        return algebra.of_factors(*algebra.stacked(blend.summands(tensors)))
    terms = blend.terms(tensors)
    if blend.space == "dense":
        return algebra.of_dense(_products(terms, blend), most, seed_of(blend.seed, blend.name))
    common = algebra.bases(terms)
    if blend.space == "core":
        return algebra.of_core(common.left, _whole(common.cores, blend), common.right)
    left, parts = algebra.aligned(common)
    return algebra.of_factors(left, _whole(parts, blend))


def _products(terms: Sequence[Term], blend: Blend) -> Any:
    """What the method makes of the products, of which no more than a tile is formed at a time."""
    flat = [(up.flatten(1), down.flatten(1), scale) for up, down, scale in terms]
    shape = flat[0][0].shape[0], flat[0][1].shape[1]
    return blend.entrywise(lambda a, b: [scale * (up[a:b] @ down) for up, down, scale in flat], shape)


def _whole(changes: Sequence[Any], blend: Blend) -> Any:
    """What the method makes of small matrices."""
    return blend.entrywise(lambda a, b: [change[a:b] for change in changes], tuple(changes[0].shape))


def _finite(tensors: Tensors, blend: Blend) -> None:
    """LAPACK does not say which input was wrong."""
    import torch

    for index, tensor in enumerate(tensors):
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            name = blend.tensors[index] if blend.tensors else blend.name
            raise BadValues(f"{name} holds NaN or infinity", hint="hubtool inspect tells more of the file")


def values(*tensors: Any, blend: Blend, most: int) -> tuple[list[float], float]:
    """(singular values of the merged change, its squared norm): what ranks are chosen by."""
    if not blend.combines:
        whole = decomposed(tensors, blend, most)
        return whole.values.tolist(), whole.energy
    _finite(tensors, blend)
    listed = algebra.spectrum(*algebra.stacked(blend.summands(tensors)))
    return listed, sum(value * value for value in listed)


@dataclass(frozen=True, slots=True)
class Written:
    """How the result is kept: ``rank`` ranks, ``scale`` = alpha / rank, in ``dtype``; measured by ``report``."""

    rank: int
    shape: Shape
    dtype: str
    scale: float
    report: Measured


def merged(factors: Sequence[Factors], blend: Blend, written: Written) -> tuple[Expr, Expr]:
    """up (out, rank[, 1, 1]) and down (rank, in[, kh, kw]) of the merged change, as expressions."""
    out, *inner = written.shape
    shapes: tuple[Shape, Shape] = (out, written.rank, *(1,) * (len(inner) - 1)), (written.rank, *inner)
    kept = written.rank >= sum(one.rank for one in factors) and blend.combines
    joint = Joint(
        _joined if kept else _truncated,
        tuple(tensor for one in factors for tensor in (one.up, one.down)),
        tuple((shape, written.dtype) for shape in shapes),
        (("blend", blend), ("written", written)),
    )
    return Item(joint, 0), Item(joint, 1)


def _joined(*tensors: Any, blend: Blend, written: Written) -> tuple[Any, Any]:
    """Every rank kept: factors side by side."""
    _finite(tensors, blend)
    up, down = algebra.stacked(blend.summands(tensors))
    return _stored(up, down, 0.0, None, blend, written)


def _truncated(*tensors: Any, blend: Blend, written: Written) -> tuple[Any, Any]:
    whole = decomposed(tensors, blend, written.rank)
    up, down = whole.factors(written.rank)
    return _stored(up, down, whole.lost(written.rank), whole.energy, blend, written)


def _stored(up: Any, down: Any, lost: float, energy: float | None, blend: Blend, written: Written) -> tuple[Any, Any]:
    """Both factors in their shapes, after measuring what leaving out and rounding cost."""
    from hubtool.tensors.evaluate import torch_dtype

    norm = algebra.product_norm(up, down) if energy is None else energy
    up = up / written.scale
    rounded = (
        written.scale**2 * algebra.rounding(up, down, torch_dtype(written.dtype)) if written.dtype != "F32" else 0.0
    )
    written.report.add(blend.name, norm, lost + rounded)
    out, *inner = written.shape
    return up.reshape(out, written.rank, *(1,) * (len(inner) - 1)), down.reshape(written.rank, *inner)


_joined.finite = _truncated.finite = True  # type: ignore[attr-defined]
