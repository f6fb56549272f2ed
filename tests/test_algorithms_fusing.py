"""Fusing: parts of one weight become its patch again, byte for byte where they were split from one, exactly otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hubtool.adapters.fusing import fuse, same  # noqa: E402
from hubtool.adapters.ir import Patch  # noqa: E402
from hubtool.adapters.weight_ops import TakeRows  # noqa: E402
from hubtool.errors import Unsupported  # noqa: E402
from hubtool.tensors.evaluate import to_bytes  # noqa: E402
from hubtool.tensors.expr import Literal  # noqa: E402
from tests.support.adapters import values  # noqa: E402
from tests.support.patches import CASES, IN, OUT, base, literal, patch  # noqa: E402

ROWS = (4, 8, 4)
SPLIT = [
    name
    for name in CASES
    if name
    not in {
        "lora with a sparse residual", "sparse", "dora per input", "loha, dora per input", "lokr, dora per input", "oft, constrained",
        "oft of sd-scripts", "boft", "boft, every stage", "oft of early peft",
    }
]  # fmt: skip


def split(made: Patch) -> list[Patch]:
    return [made.under(TakeRows(0, 4)), made.under(TakeRows(4, 12)), made.under(TakeRows(12, 16))]


def stacked(parts: list[Patch | None], rows: tuple[int, ...], weight: torch.Tensor) -> torch.Tensor:
    """The parts' changes one below the other: the oracle."""
    pieces = weight.split(list(rows))
    changes = [torch.zeros_like(w) if p is None else p.delta(w) for p, w in zip(parts, pieces, strict=True)]
    return torch.cat(changes)


def loras(*ranks: int, alphas: tuple[float | None, ...] = (None, None, None), **roles: Any) -> list[Patch]:
    return [
        patch("lora", {"up": (n, r), "down": (r, IN)} | {k: (n, *v) for k, v in roles.items()}, 10 * i, alpha)
        for i, (n, r, alpha) in enumerate(zip(ROWS, ranks, alphas, strict=True))
    ]


@pytest.mark.parametrize("case", SPLIT)
def test_a_split_patch_is_joined_byte_for_byte(case: str) -> None:
    made, shape = CASES[case]
    fused = fuse(split(made), ROWS)
    assert fused.note is None
    before, after = dict(made.roles()), dict(fused.patch.roles())
    assert before.keys() == after.keys()
    assert all(to_bytes(before[role]) == to_bytes(after[role]) for role in before)
    assert torch.equal(fused.patch.delta(base(shape)), made.delta(base(shape)))


def test_equal_bytes_of_different_files_are_one_factor() -> None:
    first, copy = values((3, IN), 5), values((3, IN), 5)
    parts = [patch("lora", {"up": (n, 3)}, i, down=(first, copy, first)[i]) for i, n in enumerate(ROWS)]
    fused = fuse(parts, ROWS).patch
    assert fused.rank == 3
    assert same(dict(fused.roles())["down"], first)
    assert not same(first, values((3, IN), 6))
    assert not same(first, None)


def test_an_alpha_equal_to_the_rank_and_none_at_all_are_the_same_scale() -> None:
    down = values((3, IN), 5)
    parts = [patch("lora", {"up": (n, 3)}, i, (None, 3.0, None)[i], down=down) for i, n in enumerate(ROWS)]
    assert fuse(parts, ROWS).patch.rank == 3


@pytest.mark.parametrize("alphas", [(None, None, None), (1.0, 2.0, 4.0), (3.0, 1.0, None)])
def test_unlike_loras_become_block_diagonal(alphas: tuple[float | None, ...]) -> None:
    parts = loras(2, 4, 8, alphas=alphas)
    fused = fuse(parts, ROWS)
    fused.patch.check("the module")
    assert fused.patch.rank == 14
    assert "rank 14" in str(fused.note)
    assert ("folded into up in fp32" in str(fused.note)) == (alphas == (3.0, 1.0, None))
    weight = base((OUT, IN))
    assert torch.allclose(fused.patch.delta(), stacked(list(parts), ROWS, weight), atol=1e-5)


def test_unlike_loras_of_equal_scale_keep_their_dtype() -> None:
    parts = [
        replace(
            p, up=values(p.up.shape, i, "F16"), down=values(p.down.shape, i + 9, "F16"), alpha=None, alpha_value=1.0
        )  # type: ignore[type-var, attr-defined]
        for i, p in enumerate(loras(2, 2, 2))
    ]
    fused = fuse(parts, ROWS).patch
    assert {tensor.dtype for _, tensor in fused.roles()} == {"F16"}
    assert fused.scale == 0.5
    assert fused.alpha_value == 3.0


@pytest.mark.parametrize(
    "case", ["lora", "locon", "loha", "loha, tucker", "lokr, full", "full", "oft", "full with bias"]
)
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_changes_nothing(case: str, missing: int) -> None:
    made, shape = CASES[case]
    parts: list[Patch | None] = [None if i == missing else part for i, part in enumerate(split(made))]
    fused = fuse(parts, ROWS)
    assert fused.note == "missing parts are filled with zeros"
    weight = base(shape)
    assert torch.allclose(fused.patch.delta(weight), stacked(parts, ROWS, weight), atol=1e-5)


def test_a_missing_part_beside_unlike_loras() -> None:
    first, _, last = loras(2, 4, 8)
    parts: list[Patch | None] = [first, None, last]
    fused = fuse(parts, ROWS).patch
    assert fused.rank == 10
    assert torch.allclose(fused.delta(), stacked(parts, ROWS, base((OUT, IN))), atol=1e-5)


def test_tucker_factors_that_differ_are_folded_first() -> None:
    parts = [
        patch("lora", {"up": (n, 2, 1, 1), "mid": (2, 2, 3, 3), "down": (2, IN, 1, 1)}, 10 * i, 1.0)
        for i, n in enumerate(ROWS)
    ]
    fused = fuse(parts, ROWS).patch
    assert fused.weight_shape == (OUT, IN, 3, 3)
    assert torch.allclose(fused.delta(), stacked(list(parts), ROWS, base((OUT, IN, 3, 3))), atol=1e-5)


@pytest.mark.parametrize("alphas", [(None, None, None), (1.0, 2.0, 3.0), (1.0, 5.0, None)])
def test_unlike_lohas_become_block_diagonal(alphas: tuple[float | None, ...]) -> None:
    parts = [
        patch(
            "loha",
            {"hada_w1_a": (n, r), "hada_w1_b": (r, IN), "hada_w2_a": (n, r), "hada_w2_b": (r, IN)},
            10 * i,
            alphas[i],
        )
        for i, (n, r) in enumerate(zip(ROWS, (1, 2, 3), strict=True))
    ]
    fused = fuse(parts, ROWS)
    fused.patch.check("the module")
    assert fused.patch.rank == 6
    assert torch.allclose(fused.patch.delta(), stacked(list(parts), ROWS, base((OUT, IN))), atol=1e-5)


def test_magnitudes_and_bias_changes_are_laid_one_below_the_other() -> None:
    parts = loras(2, 2, 2, dora_scale=(1,), diff_b=())
    fused = fuse(parts, ROWS).patch
    weight = base((OUT, IN))
    assert torch.allclose(fused.delta(weight), stacked(list(parts), ROWS, weight), atol=1e-5)
    assert torch.allclose(fused.bias_delta(), torch.cat([p.bias_delta() for p in parts]))


def test_lora_biases_are_scaled_with_their_factors() -> None:
    parts = loras(2, 2, 2, alphas=(1.0, 1.0, 1.0), bias=())
    fused = fuse(parts, ROWS).patch
    assert torch.allclose(fused.bias_delta(), torch.cat([p.bias_delta() for p in parts]))
    with pytest.raises(Unsupported, match="unequal scales"):
        fuse(loras(2, 2, 2, alphas=(1.0, 2.0, 1.0), bias=()), ROWS)


def kronecker(seeds: tuple[int, ...]) -> list[Patch]:
    return [
        patch("lokr", {"lokr_w1": (n // 4, 2), "lokr_w2": (4, 4)}, seed) for n, seed in zip(ROWS, seeds, strict=True)
    ]


REFUSED: dict[str, tuple[list[Patch | None], str]] = {
    "two kinds": ([loras(2, 2, 2)[0], CASES["full"][0].under(TakeRows(4, 12)), None], "are full, lora"),
    "lokrs that share nothing": ([*kronecker((0, 50, 90))], "share no factor"),
    "a part without a magnitude": ([loras(2, 2, 2, dora_scale=(1,))[0], loras(2, 2, 2)[1], None], "norms of its base"),
    "a missing part beside a magnitude": ([*loras(2, 2, 2, dora_scale=(1,))[:2], None], "norms of its base"),
    "magnitudes per input": (
        [patch("lora", {"up": (n, 2), "down": (2, IN), "dora_scale": (1, IN)}, i) for i, n in enumerate(ROWS)], "per input",
    ),
    "rotations with a constraint": (
        [patch("oft", {"oft_blocks": (n // 4, 4, 4)}, i, 0.1) for i, n in enumerate(ROWS)], "constraint",
    ),
    "rotations of unlike blocks": (
        [patch("oft", {"oft_blocks": (n // b, b, b)}, n) for n, b in zip(ROWS, (4, 4, 2), strict=True)], "unlike blocks",
    ),
    "unlike rotations of inputs": ([patch("oft", {"oft_R": (2, 6)}, i) for i in range(3)], "rotate their common inputs"),
    "unlike gloras": (
        [patch("glora", {"a1": (IN, 2), "a2": (2, IN), "b1": (n, 2), "b2": (2, IN)}, n) for n in ROWS], "mix their common",
    ),
    "a replaced part": ([CASES["set"][0].under(TakeRows(0, 4)), None, None], "some parts of one fused weight are replaced"),
    "unlike ia3 of inputs": ([patch("ia3", {"ia3_l": (1, IN)}, i) for i in range(3)], "rescale their common inputs"),
    "a part of another size": ([CASES["full"][0], None, None], "a part of 4 rows has a change of 16"),
    "unlike inputs": ([*loras(2, 2, 2)[:2], patch("lora", {"up": (4, 2), "down": (2, IN + 1)})], "unlike inputs"),
    "sparse residuals": (
        [replace(p, bias_indices=literal(torch.zeros(2, 1, dtype=torch.int16)), bias_values=values((1,), 0),  # type: ignore[type-var]
                 bias_size=literal(torch.zeros(2, dtype=torch.int16))) for p in loras(2, 2, 2)], "sparse",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_single_patch_is_refused_with_the_reason(case: str) -> None:
    parts, reason = REFUSED[case]
    with pytest.raises(Unsupported, match=reason):
        fuse(parts, ROWS)


def test_the_way_out_of_a_kronecker_product_is_named() -> None:
    with pytest.raises(Unsupported) as caught:
        fuse(kronecker((0, 50, 90)), ROWS)
    assert "--as lora" in str(caught.value.hint)


def test_one_part_is_itself() -> None:
    (made, _) = CASES["lora"]
    assert fuse([made], [OUT]).patch is made


def test_parts_of_unlike_dtypes_are_widened() -> None:
    down = Literal(values((2, IN), 3).data, "F32", (2, IN))
    parts = [
        patch("lora", {}, 0, 2.0, up=values((n, 2), i, "F16" if i else "F32"), down=down) for i, n in enumerate(ROWS)
    ]
    fused = fuse(parts, ROWS).patch
    assert dict(fused.roles())["up"].dtype == "F32"
    assert torch.allclose(fused.delta(), stacked(list(parts), ROWS, base((OUT, IN))), atol=1e-6)
