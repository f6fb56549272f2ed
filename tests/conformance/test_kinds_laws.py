"""What every kind of adapter must do. A new kind joins by a case in ``tests.support.patches`` and its refusals below.

The law: ``kind.under(op).delta(op(W)) == op(kind.delta(W))``, or ``Unsupported`` for the reason listed here, and for no other.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hubtool.adapters import registry  # noqa: E402
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp  # noqa: E402
from hubtool.errors import CorruptFile, ShapeMismatch, Unsupported  # noqa: E402
from hubtool.tensors.dtypes import numel  # noqa: E402
from hubtool.tensors.evaluate import compute  # noqa: E402
from hubtool.types import Shape  # noqa: E402
from tests.support.patches import CASES, CONV, IN, LINEAR, OUT, apply, base  # noqa: E402

EIGHTH, UNEVEN = TakeRows(4, 8), TakeRows(3, 9)
COLUMNS, UNEVEN_COLUMNS = TakeCols(4, 8), TakeCols(1, 4)
MATRIX_OPS = {
    "rows on borders": EIGHTH,
    "rows off borders": UNEVEN,
    "halves": SwapHalves(),
    "columns on borders": COLUMNS,
    "columns off borders": UNEVEN_COLUMNS,
    "transpose": Transpose(),
    "reshape": ReshapeWeight((OUT, IN, 1, 1)),
}
KERNEL_OPS = {**MATRIX_OPS, "reshape": ReshapeWeight((OUT, IN * 3, 3))}
KERNEL_OPS.pop("transpose")
VECTOR_OPS = {key: MATRIX_OPS[key] for key in ("rows on borders", "rows off borders", "halves")}

ROWS = ("rows on borders", "rows off borders", "halves")
COLS = ("columns on borders", "columns off borders")
_DORA_OUT = {**dict.fromkeys(COLS, "DoRA magnitude"), "transpose": "DoRA magnitude"}
_DORA_IN = {**_DORA_OUT, **dict.fromkeys(ROWS, "per input")}
_OFF = {"rows off borders": "borders of its blocks of 4 rows", "columns off borders": "blocks of"}
_OFT = {"rows off borders": "mixes", "transpose": "rotate columns"}
_OFT_LIMITED = {**_OFT, "rows on borders": "constraint"}
_PEFT_OFT = {"columns off borders": "mixes", "transpose": "rotate rows"}
_GLORA = {**dict.fromkeys(COLS, "every column"), "transpose": "mixes"}
_SPARSE = dict.fromkeys((*ROWS, *COLS, "transpose"), "sparse residual")
REFUSED: dict[str, dict[str, str]] = {
    "lora with bias": {"transpose": "bias"},
    "lora with a sparse residual": _SPARSE,
    "locon": {"reshape": "reshaping"},
    "tucker": {"reshape": "reshaping"},
    "dora per output": _DORA_OUT,
    "dora per output, flat": _DORA_OUT,
    "dora per input": _DORA_IN,
    "loha, tucker": {},
    "loha, dora per output": _DORA_OUT,
    "loha, dora per input": _DORA_IN,
    "lokr, full": _OFF,
    "lokr, w2 decomposed": _OFF,
    "lokr, w1 decomposed": _OFF,
    "lokr, both decomposed": _OFF,
    "lokr, one row": {"columns off borders": "blocks of"},
    "lokr of a convolution": _OFF,
    "lokr of a convolution, decomposed": _OFF,
    "lokr, early": {"rows off borders": "blocks of 4 rows", "columns off borders": "blocks of 6 columns"},
    "lokr, tucker": _OFF,
    "lokr, dora per output": {**_OFF, **_DORA_OUT},
    "lokr, dora per input": {**_DORA_IN, "rows off borders": "blocks of 4 rows"},
    "oft": _OFT,
    "oft of a convolution": {"rows off borders": "mixes"},
    "oft, rescaled": _OFT,
    "oft, constrained": _OFT_LIMITED,
    "oft of sd-scripts": _OFT_LIMITED,
    "oft of sd-scripts, alpha 0": _OFT,
    "boft": {**_OFT, "rows on borders": "its blocks have 8"},
    "boft, every stage": {**_OFT, **dict.fromkeys(ROWS, "its blocks have 16")},
    "oft of early peft": {**_OFT, **dict.fromkeys(ROWS, "early OFT")},
    "oft of peft": _PEFT_OFT,
    "oft of peft, shared": {"transpose": "rotate rows", **dict.fromkeys(COLS, "serves all")},
    "oft of onetrainer": {**_PEFT_OFT, "reshape": "delta"},
    "boft of peft": _PEFT_OFT,
    "glora": _GLORA,
    "glora, old order": _GLORA,
    "glora of a convolution": {**_GLORA, "reshape": "reshaping"},
    "bias alone": {"transpose": "single matrix", **dict.fromkeys(COLS, "columns")},
    "full with bias": {},
    "sparse": _SPARSE,
    "ia3 on outputs": {"transpose": "names the axis"},
    "ia3 of peft on outputs": {"transpose": "names the axis"},
    "ia3 of peft on inputs": {"transpose": "names the axis"},
    "ia3 on inputs": {"reshape": "IA3 vector"},
}
SKIPPED = {
    ("oft of onetrainer", "reshape")
}  # exact for a linear layer; its delta refuses what looks like a convolution


def operations(shape: Shape) -> dict[str, WeightOp]:
    return {1: VECTOR_OPS, 2: MATRIX_OPS}.get(len(shape), KERNEL_OPS)  # type: ignore[return-value]


PAIRS = [(case, op) for case, (_, shape) in CASES.items() for op in operations(shape) if (case, op) not in SKIPPED]


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_an_operation_on_the_weight_and_on_its_patch_commute_or_are_refused(case: str, name: str) -> None:
    patch, shape = CASES[case]
    op, weight = operations(shape)[name], base(shape)
    reason = REFUSED.get(case, {}).get(name)
    if reason is not None:
        with pytest.raises(Unsupported, match=reason):
            patch.under(op)
        return
    after = patch.under(op)
    after.check("the module")
    got = after.delta(apply(op, weight))
    assert got.dtype == torch.float32
    assert torch.allclose(got, apply(op, patch.delta(weight)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["rows on borders", "halves"])
def test_the_change_of_a_bias_follows_the_rows(case: str, name: str) -> None:
    patch, shape = CASES[case]
    op, bias = MATRIX_OPS[name], base((shape[0],), 7)
    before = patch.bias_delta(bias)
    if before is not None and name not in REFUSED.get(case, {}):
        assert torch.allclose(patch.under(op).bias_delta(apply(op, bias)), apply(op, before))


@pytest.mark.parametrize("case", CASES)
def test_a_patch_that_needs_the_base_says_so(case: str) -> None:
    patch, shape = CASES[case]
    if patch.needs_base:
        with pytest.raises(Unsupported, match="depends on the base weight"):
            patch.delta()
    elif case != "bias alone":
        assert numel(patch.delta().shape) == numel(shape)
    assert patch.delta(base(shape)).shape == shape


@pytest.mark.parametrize("case", CASES)
def test_the_sizes_told_by_the_factors_are_those_of_the_weight(case: str) -> None:
    patch, shape = CASES[case]
    out, inner = patch.sizes
    assert out in (None, shape[0])
    assert inner in (None, numel(shape[1:]))
    assert patch.weight_shape in (None, shape)


@pytest.mark.parametrize("case", CASES)
def test_a_base_of_another_size_is_refused(case: str) -> None:
    patch, shape = CASES[case]
    other = base((shape[0] + 1, *(n + 1 for n in shape[1:])))
    if case in ("bias alone", "oft of early peft"):  # the one has no size, the other's blocks may exceed the weight
        return
    with pytest.raises((ShapeMismatch, Unsupported, CorruptFile)):
        patch.delta(other)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", [TakeRows(8, 99), TakeRows(0, 0)])
def test_rows_outside_the_weight_are_refused(case: str, op: TakeRows) -> None:
    patch, _ = CASES[case]
    if patch.sizes[0] is None or case in ("ia3 on inputs", "ia3 of peft on inputs"):
        return
    with pytest.raises(Unsupported):
        patch.under(op)


@pytest.mark.parametrize("case", CASES)
def test_roles_make_the_same_patch_again(case: str) -> None:
    patch, shape = CASES[case]
    tensors = dict(patch.roles())
    algorithm = {"locon": "lora", "boft": "oft" if "oft_blocks" in tensors else "boft"}.get(
        patch.algorithm, patch.algorithm
    )
    again = registry.make(algorithm, tensors, patch.alpha_value, flavour=getattr(patch, "flavour", None))
    assert torch.equal(again.delta(base(shape)), patch.delta(base(shape)))


def test_every_row_of_the_table_has_a_kind_with_its_roles() -> None:
    for row in registry.rows():
        made = registry.constructor(row.kind)
        names = set(made.__annotations__ if row.kind != "embedding_factors" else ("embedding_A", "embedding_B"))
        assert all(complete <= names for complete in row.sets), row


def test_the_cases_cover_every_row_of_the_table() -> None:
    seen = [frozenset(dict(patch.roles())) for patch, _ in CASES.values()]
    for row in registry.rows():
        missing = [complete for complete in row.sets if not any(complete <= roles for roles in seen)]
        assert all(complete in ({"oft_diag"}, {"b_norm"}) for complete in missing), (row.id, missing)


def test_rows_and_reshapes_of_most_kinds_are_bytes_of_the_file() -> None:
    from hubtool.tensors.evaluate import is_bytes

    for case in ("lora", "loha", "lokr, w2 decomposed", "full", "oft", "ia3 on outputs"):
        cut = CASES[case][0].under(EIGHTH)
        assert all(is_bytes(tensor) for _, tensor in cut.roles()), case


def test_a_butterfly_of_four_dimensions_is_boft() -> None:
    assert CASES["boft"][0].algorithm == "boft"
    assert CASES["oft"][0].algorithm == "oft"


def test_halves_of_an_odd_number_of_rows_are_refused() -> None:
    patch = CASES["full"][0].under(TakeRows(0, 5))
    with pytest.raises(Unsupported, match="no halves"):
        patch.under(SwapHalves())


def test_a_cut_of_a_cut_is_the_cut() -> None:
    patch, shape = CASES["loha"]
    twice = patch.under(TakeRows(4, 12)).under(TakeRows(2, 6))
    assert torch.equal(twice.delta(), patch.under(TakeRows(6, 10)).delta())
    assert compute(dict(twice.roles())["hada_w1_a"]).shape == (4, 3)
    assert shape == LINEAR
    assert CONV[:2] == LINEAR
