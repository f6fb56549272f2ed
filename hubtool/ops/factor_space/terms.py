"""A patch as one addend of a sum: factor * up @ down, or a difference of the weight's own shape, and what it does to the bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters.dense import Dense
from hubtool.adapters.ir import Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.promote import to_lora
from hubtool.adapters.scaling import Scaling
from hubtool.adapters.sparse import Sparse
from hubtool.errors import Unsupported
from hubtool.ops.factor_space import scalings
from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import torch_dtype
from hubtool.tensors.expr import Compute, Expr
from hubtool.types import Shape

Told = Callable[[float, float], None]  # a squared norm, a squared error

# algorithm -> the tensors of which one carries the strength
_CARRIERS = {
    "loha": ("hada_w1_a",),
    "lokr": ("lokr_w1", "lokr_w1_a"),
    "full": ("diff",),
    "norm": ("w_norm",),
    "sparse": ("bias_values",),
}
_HINT = "collapse the adapters into their base one after the other, then extract"


@dataclass(frozen=True, slots=True)
class Factors:
    """scale * up @ down, with up (out, r[, 1, 1]) and down (r, in[, kh, kw])."""

    up: Expr
    down: Expr
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Addend:
    """One input's change of one module at strength 1. ``factors`` or ``dense`` (not both) change the weight, ``biases`` its bias;
    ``norm``: the module is a normalisation layer."""

    factors: Factors | None = None
    dense: Expr | None = None
    biases: tuple[tuple[float, Expr], ...] = ()
    norm: bool = False

    @property
    def shape(self) -> Shape | None:
        """Shape of the weight's change; None where only the bias changes."""
        if self.factors is None:
            return None if self.dense is None else self.dense.shape
        return (self.factors.up.shape[0], *self.factors.down.shape[1:])


def addend(patch: Patch, shape: Shape | None = None) -> Addend:
    """``patch`` as an addend; ``shape``: the base weight's, where it is known. Raises ``Unsupported`` for a change that depends on the base."""
    if patch.dora_scale is not None:
        raise Unsupported("a DoRA magnitude rescales the base weight, so that changes cannot be added", hint=_HINT)
    if isinstance(patch, Dense):
        return _dense(patch)
    if isinstance(patch, Sparse) or (isinstance(patch, LowRank) and patch.residual is not None):
        return Addend(dense=_whole(patch, shape), biases=_biases(patch))
    try:
        made = to_lora(patch, fitting(patch, shape))
    except Unsupported as reason:
        raise Unsupported(reason.message, hint=_HINT) from reason
    return Addend(factors=Factors(made.up, made.down, made.scale), biases=_biases(made))


def _dense(patch: Dense) -> Addend:
    if patch.set_weight is not None:
        raise Unsupported("a replaced weight is no change that could be added to another", hint=_HINT)
    biases = tuple((1.0, tensor) for tensor in (patch.diff_b, patch.b_norm) if tensor is not None)
    return Addend(dense=patch.weight, biases=biases, norm=patch.algorithm == "norm")


def _biases(patch: Patch) -> tuple[tuple[float, Expr], ...]:
    if not isinstance(patch, LowRank):
        return ()
    found = ((patch.scale, patch.bias), (1.0, patch.diff_b))
    return tuple((scale, tensor) for scale, tensor in found if tensor is not None)


def _whole(patch: LowRank | Sparse, shape: Shape | None) -> Expr:
    """The whole difference of a patch with a sparse residual."""
    own = patch.weight_shape or _stated(patch, shape)
    return Compute(_delta, (), own, "F32", (("patch", patch), ("shape", own)))


def _stated(patch: LowRank | Sparse, shape: Shape | None) -> Shape:
    """The size that a sparse change states, as the shape a table knows where both agree. Reads two numbers."""
    from hubtool.tensors.evaluate import scalars

    assert patch.bias_size is not None
    size = tuple(int(number) for number in scalars(patch.bias_size))
    return shape if shape and numel(shape) == numel(size) else size


def _delta(*, patch: Patch, shape: Shape) -> Any:
    return patch.delta().reshape(shape)


def strengthened(patch: Patch, strength: float) -> Patch:
    """``patch`` with its change multiplied: LoRA by its alpha, whose factors stay as they are; others in one tensor. Raises ``Unsupported``.

    A negative strength changes the signs in one factor: loaders do not expect a negative alpha (diffusers' never returns from one).
    """
    if strength == 1.0:
        return patch
    if isinstance(patch, Scaling):
        return scalings.summed([patch], [strength])
    if patch.needs_base:
        raise Unsupported(
            f"a strength of {strength:g}: the change of this {_called(patch)} depends on the base", hint=_HINT
        )
    if isinstance(patch, LowRank):
        return _by_alpha(patch, strength)
    carriers = _CARRIERS.get(patch.algorithm, ())
    role = next((role for role, _ in patch.roles() if role in carriers), None)
    changed = {name for name in (role, "diff_b", "b_norm") if name is not None}
    tensors = {name: scaled(tensor, strength) for name, tensor in patch.roles() if name in changed}
    if not tensors:
        raise Unsupported(f"a strength of {strength:g} of a {_called(patch)}", hint=_HINT)
    return replace(patch, **tensors)  # type: ignore[type-var]


def _by_alpha(patch: LowRank, strength: float) -> LowRank:
    sign = -1.0 if strength < 0 else 1.0
    alpha = abs(strength) * (patch.rank if patch.alpha_value is None else patch.alpha_value)
    changed: dict[str, Any] = {"alpha": None, "alpha_value": alpha, "diff_b": scaled(patch.diff_b, strength)}
    values = patch.bias_values  # beside up, so that both change sign
    return replace(
        patch, up=scaled(patch.up, sign), bias=scaled(patch.bias, sign), bias_values=scaled(values, sign), **changed
    )


def _called(patch: Patch) -> str:
    return "DoRA module" if patch.dora_scale is not None else f"{patch.algorithm} module"


def scaled(tensor: Any, factor: float) -> Any:
    """``factor * tensor`` in the tensor's dtype; None stays None."""
    if tensor is None or factor == 1.0:
        return tensor
    return Compute(_times, (tensor,), tensor.shape, tensor.dtype, (("factor", factor),))


def _times(tensor: Any, *, factor: float) -> Any:
    return tensor * factor


def cast(tensor: Expr, dtype: str) -> Expr:
    """The tensor rounded once to another dtype; a value that overflows is refused when it is met."""
    return Compute(_times, (tensor,), tensor.shape, dtype, (("factor", 1.0),))


def summed(addends: list[tuple[float, Expr]], shape: Shape, dtype: str, told: Told | None = None) -> Expr:
    """The weighted sum of tensors of one size, in fp32 with one rounding. ``told``: gets its squared norm and what rounding costs of it."""
    params = {"factors": tuple(factor for factor, _ in addends), "shape": shape, "dtype": dtype, "told": told}
    return Compute(_sum, tuple(tensor for _, tensor in addends), shape, dtype, tuple(params.items()))


def _sum(*tensors: Any, factors: tuple[float, ...], shape: Shape, dtype: str, told: Told | None) -> Any:
    total = tensors[0].float() * factors[0]
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total = total + tensor.reshape(total.shape) * factor
    if told is not None:
        stored = total.to(torch_dtype(dtype)).to(total.dtype)
        told(float(total.double().square().sum()), float((stored - total).double().square().sum()))
    return total.reshape(shape)


_times.elementwise = True  # type: ignore[attr-defined]
_times.finite = _sum.finite = True  # type: ignore[attr-defined]


def fitting(patch: Patch, shape: Shape | None) -> Shape | None:
    """``shape`` where the factors agree with it: a table's shape may be that of another size of the model."""
    return shape if shape and len(shape) > 1 and patch.sizes == numbers(shape) else None


def numbers(shape: Shape) -> tuple[int, int]:
    """(out, in * kh * kw) of a weight."""
    return shape[0], numel(shape[1:])
