"""The algebra of low-rank patches: an operation on the base weight and on its patch commute."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import CorruptFile, Unsupported
from hubtool.tensors.evaluate import compute
from tests.support.adapters import scalar, values

torch = pytest.importorskip("torch")

from tests.support.patches import apply  # noqa: E402


def linear(out: int, inner: int, rank: int, seed: int, alpha: float | None) -> LowRank:
    return LowRank(
        values((out, rank), seed), values((rank, inner), seed + 1), alpha=alpha and scalar(alpha), alpha_value=alpha
    )


sizes = st.integers(1, 6).map(lambda n: 2 * n)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 5), st.integers(0, 999), st.sampled_from([None, 1.0, 3.0]), st.data())
def test_an_operation_on_the_weight_and_on_its_patch_commute(
    out: int, inner: int, rank: int, seed: int, alpha: float | None, data: st.DataObject
) -> None:
    rows = sorted(data.draw(st.tuples(st.integers(0, out - 1), st.integers(1, out))))
    columns = sorted(data.draw(st.tuples(st.integers(0, inner - 1), st.integers(1, inner))))
    ops: list[WeightOp] = [SwapHalves(), Transpose(), ReshapeWeight((out, inner, 1, 1))]
    ops += [TakeRows(*rows)] if rows[0] < rows[1] else []
    ops += [TakeCols(*columns)] if columns[0] < columns[1] else []
    patch = linear(out, inner, rank, seed, alpha)
    for op in ops:
        assert torch.allclose(patch.under(op).delta(), apply(op, patch.delta()), atol=1e-5), op


def test_rows_of_the_weight_never_touch_down() -> None:
    patch = linear(6, 4, 2, 0, None)
    assert patch.under(SwapHalves()).down is patch.down
    assert patch.under(TakeRows(1, 3)).down is patch.down


def test_delta_is_alpha_over_rank_times_up_times_down() -> None:
    patch = linear(5, 7, 4, 3, 2.0)
    up, down = compute(patch.up).double(), compute(patch.down).double()
    assert torch.allclose(patch.delta().double(), 0.5 * up @ down, atol=1e-6)


def test_rank_stabilised_scale_divides_by_the_root_of_the_rank() -> None:
    patch = LowRank(values((3, 4), 0), values((4, 3), 1), alpha_value=2.0, rank_stabilised=True)
    assert patch.scale == 2.0 / math.sqrt(4)


def test_a_convolution_multiplies_flattened_factors() -> None:
    patch = LowRank(values((6, 2, 1, 1), 0), values((2, 3, 3, 3), 1))
    want = torch.zeros(6, 3, 3, 3)
    for i in range(6):
        for r in range(2):
            want[i] += compute(patch.up)[i, r, 0, 0] * compute(patch.down)[r]
    assert patch.weight_shape == (6, 3, 3, 3)
    assert torch.allclose(patch.delta(), want, atol=1e-5)


def test_tucker_follows_the_formula_of_lycoris() -> None:
    up, mid, down = values((5, 2, 1, 1), 0), values((2, 2, 3, 3), 1), values((2, 4, 1, 1), 2)
    patch = LowRank(up, down, mid=mid)
    u, m, d = (compute(t).double() for t in (up, mid, down))
    want = torch.zeros(5, 4, 3, 3, dtype=torch.float64)
    for i in range(5):
        for j in range(4):
            for a in range(2):
                for b in range(2):
                    want[i, j] += u[i, a, 0, 0] * m[a, b] * d[b, j, 0, 0]
    assert patch.algorithm == "locon"
    assert torch.allclose(patch.delta().double(), want, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((6,), "out"), ((6, 1), "out"), ((1, 4), "in"), ((1, 6, 1, 1), "out")])
def test_the_axis_of_a_magnitude_is_read_from_its_shape(shape: tuple[int, ...], axis: str) -> None:
    assert LowRank(values((6, 2), 0), values((2, 4), 1), dora_scale=values(shape, 2)).dora_axis == axis


def test_a_square_magnitude_with_a_leading_one_is_per_input() -> None:
    assert LowRank(values((4, 2), 0), values((2, 4), 1), dora_scale=values((1, 4), 2)).dora_axis == "in"


@pytest.mark.parametrize("shape", [(6, 1), (1, 4)])
def test_dora_normalises_the_changed_weight(shape: tuple[int, ...]) -> None:
    patch = LowRank(values((6, 2), 0), values((2, 4), 1), dora_scale=values(shape, 2), alpha_value=1.0)
    base = compute(values((6, 4), 3)).double()
    changed = base + 0.5 * compute(patch.up).double() @ compute(patch.down).double()
    norm = changed.norm(dim=1, keepdim=True) if shape == (6, 1) else changed.norm(dim=0, keepdim=True)
    want = compute(values(shape, 2)).double() * changed / norm - base
    assert torch.allclose(patch.delta(base).double(), want, atol=1e-5)


def test_a_magnitude_per_input_refuses_what_its_norm_spans() -> None:
    patch = LowRank(values((6, 2), 0), values((2, 4), 1), dora_scale=values((1, 4), 2))
    for op in (TakeRows(0, 3), SwapHalves()):
        with pytest.raises(Unsupported, match="per input"):
            patch.under(op)


def test_factors_that_share_no_rank_are_corrupt() -> None:
    with pytest.raises(CorruptFile, match="share a rank"):
        LowRank(values((6, 3), 0), values((2, 4), 1)).check("m")
