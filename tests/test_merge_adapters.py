"""Merging adapters without their base, against the formulas in fp64, full SVDs, PEFT and diffusers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from hubtool.adapters.ir import Adapter, ModuleKey, Patch  # noqa: E402
from hubtool.adapters.low_rank import LowRank  # noqa: E402
from hubtool.errors import BadValues, ConversionError, ShapeMismatch, Unsupported, UsageProblem  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.layouts.parse import parse_file  # noqa: E402
from hubtool.ops.execute import execute  # noqa: E402
from hubtool.ops.factor_space.budget import Budget  # noqa: E402
from hubtool.ops.factor_space.modules import Asked, Slot, finished, prepare  # noqa: E402
from hubtool.ops.factor_space.report import Report  # noqa: E402
from hubtool.ops.merge_adapters import Request, Source, between, plan  # noqa: E402
from hubtool.ops.methods import find  # noqa: E402
from hubtool.ops.plan import Plan  # noqa: E402
from hubtool.ops.strengths import Strengths, parse  # noqa: E402
from tests.support import adapters, patches, tiny  # noqa: E402

Deltas = dict[ModuleKey, Any]
SUM = find("weighted_sum")
ENTRYWISE = ("ties", "dare_ties", "della", "breadcrumbs")
ISOMETRIC = ("slerp", "model_stock", "geometric_median", "orthogonalise")


def deltas(path: Path, family: str = "sd1") -> Deltas:
    """Every module's change by the canonical name, in fp64, from the factors as they lie in the file."""
    found = parse_file(open_file(path), family).adapter.patches
    return {key: _product(patch) for key, patch in found.items()}


def _product(patch: Any) -> Any:
    from hubtool.tensors.evaluate import compute

    if not isinstance(patch, LowRank) or patch.mid is not None:
        return patch.delta().double().flatten(1)
    up, down = (compute(tensor).double().flatten(1) for tensor in (patch.up, patch.down))
    return patch.scale * (up @ down)


def total(*terms: tuple[float, Deltas]) -> Deltas:
    keys = dict.fromkeys(key for _, found in terms for key in found)
    return {key: sum(factor * found[key] for factor, found in terms if key in found) for key in keys}


def distance(found: Mapping[ModuleKey, Any], wanted: Mapping[ModuleKey, Any]) -> float:
    """The relative error over all modules."""
    assert set(found) == set(wanted)
    wrong = sum(float((found[key] - wanted[key]).square().sum()) for key in wanted)
    return float((wrong / sum(float(one.square().sum()) for one in wanted.values())) ** 0.5)


def best(change: Any, rank: int) -> Any:
    """The best approximation at a rank: Eckart and Young."""
    u, values, v = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank] * values[:rank] @ v[:rank]


def write(
    folder: Path, name: str, layout: str = "kohya", modules: Sequence[ModuleKey] | None = None, **options: Any
) -> Path:
    own = adapters.attention("sd1", 2) if modules is None else modules
    return adapters.write(adapters.make("sd1", own, **options), folder / f"{name}.safetensors", layout)


def merge(
    output: Path, inputs: Sequence[tuple[Path, float | Strengths]], base: Path | None = None, **request: Any
) -> tuple[Plan, Report]:
    sources = [Source(open_file(path), one if isinstance(one, Strengths) else Strengths(one)) for path, one in inputs]
    made, report = plan(sources, Request(**request), None if base is None else Source(open_file(base)))
    execute(made, output)
    return made, report


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs of unlike ranks, alphas, layouts, dtypes and modules."""
    folder, modules = tmp_path_factory.mktemp("pair"), adapters.attention("sd1", 3)
    first = write(folder, "a", modules=modules[:-1], ranks=(4, 8), alphas=(2.0, 8.0), dtype="F16", seed=1)
    second = write(folder, "b", "diffusers", modules[1:], ranks=(3, 5), alphas=(None, 1.0), seed=900)
    return first, second


# --- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "concat", "weighted_sum"])
def test_a_sum_of_unlike_ranks_layouts_and_dtypes_is_exact(
    tmp_path: Path, pair: tuple[Path, Path], method: str
) -> None:
    a, b = pair
    _, report = merge(tmp_path / "out.safetensors", [(a, 0.7), (b, -1.3)], method=method)
    wanted = total((0.7, deltas(a)), (-1.3, deltas(b)))
    assert distance(deltas(tmp_path / "out.safetensors"), wanted) < 1e-6
    assert (report.matched, report.single) == (len(deltas(a)) - 1, 2)


def test_the_output_has_the_first_layout_the_sum_of_the_ranks_and_alpha_equal_to_rank(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    made, _ = merge(tmp_path / "out.safetensors", [(pair[0], 1.0), (pair[1], 0.5)])
    assert made.layout == "kohya/diffusers"
    found = parse_file(open_file(tmp_path / "out.safetensors")).adapter.patches
    both = {key: patch for key, patch in found.items() if key in deltas(pair[0]) and key in deltas(pair[1])}
    assert {patch.rank for patch in both.values()} <= {7, 9, 11, 13}
    assert all(patch.alpha_value == patch.rank for patch in both.values())


def test_another_layout_may_be_asked_for(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(tmp_path / "out.safetensors", [(pair[0], 1.0), (pair[1], 1.0)], layout="diffusers")
    assert parse_file(open_file(tmp_path / "out.safetensors")).layout.syntax == "peft"
    wanted = total((1.0, deltas(pair[0])), (1.0, deltas(pair[1])))
    assert distance(deltas(tmp_path / "out.safetensors"), wanted) < 1e-6


@pytest.mark.parametrize(("asked", "limit"), [("fp16", 1e-3), ("bf16", 6e-3), ("fp32", 1e-6)])
def test_every_dtype_rounds_once_and_the_error_says_how_much(
    tmp_path: Path, pair: tuple[Path, Path], asked: str, limit: float
) -> None:
    out = tmp_path / "out.safetensors"
    _, report = merge(out, [(pair[0], 0.7), (pair[1], 0.9)], dtype=asked)
    dtypes = {ref.dtype for key, ref in open_file(out).tensors.items() if not key.endswith("alpha")}
    assert dtypes == {{"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[asked]}
    wanted = total((0.7, deltas(pair[0])), (0.9, deltas(pair[1])))
    assert distance(deltas(out), wanted) < limit
    both = {key for key in wanted if key in deltas(pair[0]) and key in deltas(pair[1])}
    measured = distance(
        {k: v for k, v in deltas(out).items() if k in both}, {k: v for k, v in wanted.items() if k in both}
    )
    assert report.error == pytest.approx(measured, rel=0.05, abs=2e-7)


def test_one_input_at_strength_one_is_copied_byte_for_byte(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for source in pair:
        out = tmp_path / source.name
        _, report = merge(out, [(source, 1.0)])
        before, after = open_file(source).tensors, open_file(out).tensors
        assert {key: _bytes(ref) for key, ref in after.items()} == {key: _bytes(ref) for key, ref in before.items()}
        assert {one.how for one in report.modules.values()} == {"copied"}


def _bytes(ref: Any) -> tuple[str, tuple[int, ...], bytes]:
    return ref.dtype, ref.shape, ref.path.read_bytes()[ref.start : ref.end]


@pytest.mark.parametrize("strength", [0.5, -0.25, 3.0])
def test_a_strength_of_one_input_moves_alpha_and_leaves_the_factors(
    tmp_path: Path, pair: tuple[Path, Path], strength: float
) -> None:
    out = tmp_path / "out.safetensors"
    merge(out, [(pair[0], strength)])
    assert distance(deltas(out), total((strength, deltas(pair[0])))) < 1e-7
    found = parse_file(open_file(out)).adapter.patches
    assert all(patch.alpha_value is not None and patch.alpha_value > 0 for patch in found.values())


def test_zero_strength_leaves_an_input_out(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(tmp_path / "out.safetensors", [(pair[0], 1.0), (pair[1], 0.0)])
    assert distance(deltas(tmp_path / "out.safetensors"), deltas(pair[0])) == 0


def test_the_order_of_inputs_does_not_change_a_sum(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(tmp_path / "ab.safetensors", [(pair[0], 0.3), (pair[1], 0.8)], dtype="fp32")
    merge(tmp_path / "ba.safetensors", [(pair[1], 0.8), (pair[0], 0.3)], dtype="fp32")
    assert distance(deltas(tmp_path / "ab.safetensors"), deltas(tmp_path / "ba.safetensors")) < 1e-6


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), strengths=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    scale=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_law_a_sum_is_the_sum_of_the_changes(ranks: list[int], strengths: list[float], scale: float, seed: int) -> None:
    terms = [_lora((7, 9), rank, scale, seed + i) for i, rank in enumerate(ranks)]
    weights = [round(one, 3) or 1.0 for one in strengths[: len(terms)]]
    made = _merged(dict(enumerate(terms)), weights)
    wanted = sum(weight * term.delta().double() for weight, term in zip(weights, terms, strict=True))
    assert float((made.delta() - wanted).norm()) <= 2e-6 * sum(
        abs(weight) * float(term.delta().norm()) for weight, term in zip(weights, terms, strict=True)
    )


def _lora(shape: tuple[int, ...], rank: int, scale: float = 1.0, seed: int = 0) -> LowRank:
    out, *inner = shape
    up = adapters.values((out, rank, *(1,) * (len(inner) - 1)), seed)
    return LowRank(up, adapters.values((rank, *inner), seed + 5000), alpha_value=scale * rank)


def _near(shape: tuple[int, int], rank: int, seed: int) -> LowRank:
    """Low-rank changes that point roughly the same way."""
    torch.manual_seed(seed)
    up, down = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    up[:, 0], down[0] = up[:, 0] + 3, down[0] + 3
    return LowRank(tiny.literal(up), tiny.literal(down), alpha_value=0.5 * rank)


def _merged(
    found: Mapping[int, Patch],
    strengths: Sequence[float],
    rank: int | None = None,
    asked: Asked | None = None,
    **more: Any,
) -> Any:
    """The merged patch of one module."""
    asked = asked or Asked(SUM, **more)
    job = prepare(Slot(("unet", "x"), found, tuple(strengths)), asked, rank)
    if job.done is not None:
        return job.done
    return finished(job, min(rank or job.usual, job.natural), asked)


# --- kinds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", patches.CASES)
def test_every_kind_is_added_exactly_or_refused_with_the_reason(name: str) -> None:
    patch, shape = patches.CASES[name]
    if len(shape) < 2:
        return
    other = _lora(shape, 2, 0.5, 77)
    if patch.needs_base:
        with pytest.raises(Unsupported) as error:
            _merged({0: patch, 1: other}, (0.7, -0.4))
        assert error.value.hint
        return
    made = _merged({0: patch, 1: other}, (0.7, -0.4))
    base = torch.zeros(shape)
    wanted = 0.7 * patch.delta(base).double() - 0.4 * other.delta(base).double()
    assert float((made.delta(base) - wanted).norm() / wanted.norm()) < 1e-6
    bias = patch.bias_delta()
    assert (bias is None) == (made.bias_delta() is None)
    if bias is not None:
        torch.testing.assert_close(made.bias_delta(), 0.7 * bias)


@pytest.mark.parametrize("name", patches.CASES)
def test_every_kind_alone_is_copied_at_strength_one_and_scaled_or_refused_at_another(name: str) -> None:
    patch, shape = patches.CASES[name]
    assert _merged({0: patch}, (1.0,)) is patch
    if patch.needs_base:
        with pytest.raises(Unsupported):
            _merged({0: patch}, (-0.5,))
        return
    made = _merged({0: patch}, (-0.5,))
    assert type(made) is type(patch)
    torch.testing.assert_close(made.delta(torch.zeros(shape)), -0.5 * patch.delta(torch.zeros(shape)))
    if patch.bias_delta() is not None:
        torch.testing.assert_close(made.bias_delta(), -0.5 * patch.bias_delta())


def test_norms_are_summed_as_norms() -> None:
    patch, _ = patches.CASES["norm"]
    made = _merged({0: patch, 1: patch}, (0.5, 0.25))
    assert made.algorithm == "norm"
    torch.testing.assert_close(made.delta(), 0.75 * patch.delta())
    torch.testing.assert_close(made.bias_delta(), 0.75 * patch.bias_delta())


# --- truncation --------------------------------------------------------------------------------------------------------


def test_truncation_is_the_best_of_its_rank_and_the_report_says_its_error(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    out = tmp_path / "out.safetensors"
    _, report = merge(out, [(pair[0], 0.7), (pair[1], 0.9)], budget=Budget(rank=4), dtype="fp32")
    wanted, found = total((0.7, deltas(pair[0])), (0.9, deltas(pair[1]))), deltas(out)
    for key, change in wanted.items():
        least = float((change - best(change, 4)).norm())
        assert float((found[key] - change).norm()) <= 1.0001 * least + 1e-5 * float(change.norm())
        if least > 1e-3 * float(change.norm()):
            error = float((found[key] - change).norm() / change.norm())
            assert report.errors()[".".join(key)] == pytest.approx(error, rel=1e-3)
    assert distance(found, wanted) == pytest.approx(report.error, rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3), kept=st.integers(1, 12), seed=st.integers(0, 1000))
def test_law_no_rank_loses_more_than_the_best_approximation(ranks: list[int], kept: int, seed: int) -> None:
    """Ranks may exceed the weight's own size, and factors may repeat one another."""
    terms = {i: _lora((6, 2, 3, 3), rank, 1.0, seed + i // 2) for i, rank in enumerate(ranks)}
    made = _merged(terms, [1.0] * len(terms), kept)
    wanted = sum(term.delta().double() for term in terms.values()).flatten(1)
    least = float((wanted - best(wanted, kept)).norm())
    assert float((made.delta().flatten(1) - wanted).norm()) <= 1.0001 * least + 3e-6 * float(wanted.norm())


def test_changes_that_cancel_out_leave_zeros_and_no_nan() -> None:
    patch = _lora((8, 8), 4)
    for rank in (None, 2):
        made = _merged({0: patch, 1: patch}, (1.0, -1.0), rank)
        assert float(made.delta().norm()) < 1e-5


def test_no_matrix_of_the_weights_size_is_ever_formed() -> None:
    seen: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            seen.extend(
                one.numel() for one in (found if isinstance(found, tuple | list) else [found]) if hasattr(one, "numel")
            )
            return found

    terms: Mapping[int, Patch] = {0: _lora((1024, 1024), 4), 1: _lora((1024, 1024), 8, 1.0, 3)}
    from hubtool.tensors.evaluate import compute

    for method in ("weighted_sum", *ISOMETRIC):
        made = _merged(terms, (1.0, 1.0), 4, Asked(find(method)))
        with Largest():
            compute(made.up)
    made = _merged(terms, (1.0, 1.0), 4, Asked(find("ties"), space="core"))
    with Largest():
        compute(made.up)
    assert 1024 * 12 <= max(seen) < 1024 * 1024 // 8


@pytest.mark.parametrize("across", [False, True])
def test_an_error_is_kept_below_in_every_module_or_over_the_file(
    tmp_path: Path, pair: tuple[Path, Path], across: bool
) -> None:
    out = tmp_path / "out.safetensors"
    _, report = merge(out, [(pair[0], 0.7), (pair[1], 0.9)], budget=Budget(error=0.25, across=across), dtype="fp32")
    wanted = total((0.7, deltas(pair[0])), (0.9, deltas(pair[1])))
    found = {key: deltas(out).get(key, torch.zeros_like(change)) for key, change in wanted.items()}
    assert distance(found, wanted) <= 0.25
    errors = [float((found[key] - change).norm() / change.norm()) for key, change in wanted.items()]
    assert (max(errors) <= 0.25) is not across
    assert report.error is not None
    assert report.error <= 0.25 + 1e-6


def test_a_budget_over_the_file_is_never_worse_than_the_same_numbers_shared_evenly(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    wanted, sizes, errors = total((0.7, deltas(pair[0])), (0.9, deltas(pair[1]))), [], []
    for across in (False, True):
        out = tmp_path / f"{across}.safetensors"
        made, _ = merge(out, [(pair[0], 0.7), (pair[1], 0.9)], budget=Budget(rank=4, across=across), dtype="fp32")
        found = {key: deltas(out).get(key, torch.zeros_like(change)) for key, change in wanted.items()}
        errors.append(distance(found, wanted))
        sizes.append(made.bytes_out)
    assert errors[1] < errors[0]
    assert sizes[1] <= sizes[0] * 1.05


def test_a_size_is_kept(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    made, _ = merge(tmp_path / "out.safetensors", [(pair[0], 1.0), (pair[1], 1.0)], budget=Budget(size=90_000))
    assert 60_000 < made.bytes_out <= 90_000 + 4 * len(made.tensors)


# --- methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*ISOMETRIC, "n_average", "task_arithmetic", "subtract", "add_difference"])
def test_methods_of_lengths_and_angles_give_what_the_whole_changes_would(method: str) -> None:
    count = 2 if method == "slerp" else 3
    terms = {i: _near((12, 10), 2 + i, i) for i in range(count)}
    made = _merged(terms, (0.7, 1.2, 0.4)[:count], None, Asked(find(method)))
    whole = [term.delta().double() for term in terms.values()]
    wanted = find(method).apply(whole, weights=(0.7, 1.2, 0.4)[:count])
    assert float((made.delta() - wanted).norm() / wanted.norm()) < 1e-5


def test_an_input_without_the_module_is_a_zero_change_to_every_method() -> None:
    terms = {0: _lora((12, 10), 2), 2: _lora((12, 10), 3, 1.0, 9)}
    whole = [terms[0].delta().double(), torch.zeros(12, 10).double(), terms[2].delta().double()]
    for method in ("n_average", "model_stock", "geometric_median", "orthogonalise"):
        made = _merged(terms, (1.0, 1.0, 1.0), None, Asked(find(method)))
        wanted = find(method).apply(whole, weights=(1.0, 1.0, 1.0))
        assert float((made.delta() - wanted).norm()) < 1e-5 * float(whole[0].norm()), method


@pytest.mark.parametrize("method", ENTRYWISE)
def test_methods_of_entries_truncate_what_they_make_of_the_products(method: str) -> None:
    terms = {0: _lora((24, 20), 2), 1: _lora((24, 20), 3, 0.5, 9)}
    made = _merged(terms, (1.0, 0.7), 20, Asked(find(method), seed=3))
    wanted = find(method).apply([term.delta() for term in terms.values()], weights=(1.0, 0.7), key="unet.x", seed=3)
    assert float((made.delta() - wanted).norm() / wanted.norm()) < 1e-5
    short = _merged(terms, (1.0, 0.7), 4, Asked(find(method), seed=3))
    assert float((short.delta() - best(wanted.double(), 4)).norm() / wanted.norm()) < 1e-5


def test_the_core_space_merges_what_the_changes_are_between_common_bases() -> None:
    """Panariello et al. 2025, written out: W_i = U M_i V."""
    terms = {0: _lora((24, 20), 2), 1: _lora((24, 20), 3, 0.5, 9)}
    options = {"density": 1.0, "mean": False}
    made = _merged(terms, (1.0, 0.7), None, Asked(find("ties"), options, space="core"))
    up, down = _stack(terms)
    left, right = torch.linalg.svd(up, full_matrices=False).U, torch.linalg.svd(down, full_matrices=False).Vh
    cores = [left.T @ term.delta() @ right.T for term in terms.values()]
    wanted = left @ find("ties").apply(cores, weights=(1.0, 0.7), **options) @ right
    assert float((made.delta() - wanted).norm() / wanted.norm()) < 1e-5
    assert made.rank == 5


def test_knots_merges_the_right_parts_of_a_common_svd() -> None:
    """Stoica et al. 2024: [W_1 W_2] = U S [V_1 V_2]; entries of V_i depend on no choice of basis but for signs, which ties respects."""
    terms = {0: _lora((24, 20), 2), 1: _lora((24, 20), 3, 0.5, 9)}
    made = _merged(terms, (1.0, 0.7), None, Asked(find("weighted_sum")))
    knots = _merged(terms, (1.0, 0.7), None, Asked(find("ties"), {"density": 1.0, "mean": False}, space="knots"))
    assert knots.rank == 5
    right = torch.linalg.qr(_stack(terms)[1].T).Q.T
    whole = torch.cat([term.delta() @ right.T for term in terms.values()], 1)
    u, values, v = torch.linalg.svd(whole.double(), full_matrices=False)
    parts = v[:5].split(5, 1)
    merged = find("ties").apply([part.float() for part in parts], weights=(1.0, 0.7), density=1.0, mean=False)
    wanted = (u[:, :5] * values[:5]) @ merged.double() @ right.double()
    assert float((knots.delta() - wanted).norm() / wanted.norm()) < 1e-4
    assert float((knots.delta() - made.delta()).norm()) > 0


def _stack(terms: Mapping[int, LowRank]) -> tuple[Any, Any]:
    from hubtool.tensors.evaluate import compute

    up = torch.cat([compute(term.up) for term in terms.values()], 1)
    return up, torch.cat([compute(term.down) for term in terms.values()], 0)


def test_chance_depends_on_the_seed_and_the_module_alone() -> None:
    terms = {0: _lora((24, 20), 2), 1: _lora((24, 20), 3, 0.5, 9)}
    made = [_merged(terms, (1.0, 0.7), 8, Asked(find("dare_ties"), seed=seed)).delta() for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_difference_of_two_adapters_is_added_to_a_third(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    third = write(tmp_path, "c", modules=adapters.attention("sd1", 3), ranks=(2,), seed=44)
    merge(tmp_path / "out.safetensors", [(pair[0], 1.0), (third, 0.5)], pair[1], method="add_difference", dtype="fp32")
    wanted = total((1.0, deltas(pair[0])), (0.5, deltas(third)), (-0.5, deltas(pair[1])))
    assert distance(deltas(tmp_path / "out.safetensors"), wanted) < 1e-6


@pytest.mark.parametrize("method", ["weighted_sum", "slerp"])
def test_steps_lead_from_one_adapter_to_the_other(tmp_path: Path, pair: tuple[Path, Path], method: str) -> None:
    sources = [Source(open_file(path)) for path in pair]
    found = list(between(sources, 3, Request(method=method, dtype="fp32")))
    assert [t for t, _, _ in found] == [0.0, 0.5, 1.0]
    for t, made, _ in found:
        execute(made, tmp_path / f"{t}.safetensors")
    for t, source in ((0.0, pair[0]), (1.0, pair[1])):
        ends, wanted = deltas(tmp_path / f"{t}.safetensors"), deltas(source)
        assert all(float((ends[key] - wanted[key]).norm()) < 1e-5 * float(wanted[key].norm()) for key in wanted)
        assert all(float(ends[key].norm()) < 1e-5 for key in ends.keys() - wanted.keys())


# --- strengths ---------------------------------------------------------------------------------------------------------


def test_strengths_count_by_component_and_block(tmp_path: Path) -> None:
    modules = [key for key in adapters.attention("sd1") if key[1].endswith("attn1.to_q") or key[0] != "unet"][:30]
    a, b = (write(tmp_path, name, modules=modules, ranks=(2,), seed=seed) for name, seed in (("a", 1), ("b", 500)))
    one = parse(["0.5", "text_encoder=2"], "0,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0")
    merge(tmp_path / "out.safetensors", [(a, one), (b, parse(["IN01=3"]))])
    found, first, second = (deltas(path) for path in (tmp_path / "out.safetensors", a, b))
    for key in modules:
        down = key[1].startswith("down_blocks")
        shares = (0.5 if down else 0.0), 3.0 if key[1].startswith("down_blocks.0.attentions.0") else 1.0
        wanted = shares[0] * first[key] + shares[1] * second[key]
        assert float((found[key] - wanted).norm()) < 1e-5 * float(wanted.norm()), key


def test_a_strength_that_means_no_module_is_an_error(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageProblem, match="no module is called unet:donw_blocks"):
        plan([Source(open_file(pair[0]), parse(["unet:donw_blocks.*=1"]))], Request())


def test_strengths_that_leave_nothing_are_an_error(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageProblem, match="nothing"):
        plan([Source(open_file(pair[0]), parse(["unet=0,text_encoder=0"]))], Request())
    with pytest.raises(UsageProblem, match="nothing"):
        plan([Source(open_file(pair[0]), Strengths(0.0))], Request())


# --- fused modules -----------------------------------------------------------------------------------------------------


def test_modules_that_the_layout_fuses_are_merged_as_one_and_share_their_ranks(tmp_path: Path) -> None:
    modules = adapters.closed("flux1", [("transformer", "transformer_blocks.0.attn.to_q")])
    a, b = (
        adapters.write(adapters.make("flux1", modules, ranks=(4,), alphas=(2.0,), seed=seed), tmp_path / f"{seed}.safetensors", "kohya/bfl")
        for seed in (1, 99)
    )  # fmt: skip
    out = tmp_path / "out.safetensors"
    merge(out, [(a, 0.5), (b, 0.5)])
    assert [ref.shape for key, ref in open_file(out).tensors.items() if key.endswith("lora_down.weight")] == [(8, 3072)]
    wanted = total((0.5, deltas(a, "flux1")), (0.5, deltas(b, "flux1")))
    assert len(wanted) == 3
    assert distance(deltas(out, "flux1"), wanted) < 1e-6
    merge(tmp_path / "same.safetensors", [(a, 1.0)])
    assert {k: _bytes(r) for k, r in open_file(tmp_path / "same.safetensors").tensors.items()} == {
        k: _bytes(r) for k, r in open_file(a).tensors.items()
    }


def test_parts_of_unlike_strength_are_merged_apart(tmp_path: Path) -> None:
    modules = adapters.closed("flux1", [("transformer", "transformer_blocks.0.attn.to_q")])
    a = adapters.write(
        adapters.make("flux1", modules, ranks=(2,), alphas=(2.0,)), tmp_path / "a.safetensors", "kohya/bfl"
    )
    merge(tmp_path / "out.safetensors", [(a, parse(["1", "transformer_blocks.0.attn.to_q=0.5"]))])
    found, before = deltas(tmp_path / "out.safetensors", "flux1"), deltas(a, "flux1")
    wanted = {key: change * (0.5 if key[1].endswith("to_q") else 1.0) for key, change in before.items()}
    assert distance(found, wanted) < 1e-6


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_adapters_of_different_families_are_refused_by_name(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    other = adapters.write(adapters.make("sdxl", ranks=(2,)), tmp_path / "xl.safetensors", "kohya")
    with pytest.raises(ConversionError, match=r"a\.safetensors is sd1.*xl\.safetensors is sdxl|sdxl"):
        plan([Source(open_file(pair[0])), Source(open_file(other))], Request())


def test_a_module_of_another_size_is_refused_with_both_shapes() -> None:
    with pytest.raises(ShapeMismatch, match=r"unet\.x.*\(8, 6\).*\(8, 7\)"):
        _merged({0: _lora((8, 6), 2), 1: _lora((8, 7), 2)}, (1.0, 1.0))


@pytest.mark.parametrize("rank", [None, 2])
def test_nan_is_refused_with_the_tensors_name_and_nothing_is_left_behind(
    tmp_path: Path, pair: tuple[Path, Path], rank: int | None
) -> None:
    broken = tmp_path / "broken.safetensors"
    data, ref = (
        bytearray(pair[0].read_bytes()),
        next(
            ref for key, ref in open_file(pair[0]).tensors.items() if key.endswith("lora_up.weight") and "unet" in key
        ),
    )
    data[ref.start : ref.start + 2] = b"\x00\x7e"
    broken.write_bytes(data)
    with pytest.raises(BadValues, match=ref.name.replace(".", r"\.")):
        merge(tmp_path / "out.safetensors", [(broken, 1.0), (pair[0], 1.0)], budget=Budget(rank=rank))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


def test_a_dora_beside_another_change_is_refused_by_module(tmp_path: Path) -> None:
    key = ("unet", "mid_block.attentions.0.proj_in")
    plain = adapters.make("sd1", [key], ranks=(2,))
    patch = replace(plain.patches[key], dora_scale=adapters.values((1280,), 3))  # type: ignore[type-var]
    dora = Adapter("sd1", MappingProxyType({key: patch}))
    paths = [adapters.write(one, tmp_path / f"{i}.safetensors", "kohya") for i, one in enumerate((plain, dora))]
    with pytest.raises(Unsupported, match=r"unet\.mid_block\.attentions\.0\.proj_in: a DoRA"):
        plan([Source(open_file(path)) for path in paths], Request())
    _, report = plan([Source(open_file(paths[1]))], Request())
    assert report.modules[".".join(key)].how == "copied"


def test_requests_that_contradict_themselves_are_refused(pair: tuple[Path, Path]) -> None:
    sources = [Source(open_file(path)) for path in pair]
    with pytest.raises(UsageProblem, match="concat keeps"):
        plan(sources, Request(method="concat", budget=Budget(rank=4)))
    with pytest.raises(UsageProblem, match="same in every space"):
        plan(sources, Request(space="core"))
    with pytest.raises(UsageProblem, match="one way"):
        Budget(rank=4, error=0.1)
    with pytest.raises(UsageProblem, match="no merge method"):
        plan(sources, Request(method="magic"))
    with pytest.raises(UsageProblem, match="no parameter"):
        plan(sources, Request(method="ties", parameters={"densty": 0.1}))


# --- reproducibility and independent oracles -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_", [{}, {"budget": Budget(rank=4)}, {"method": "dare_ties", "budget": Budget(rank=4)}]
)
def test_the_bytes_depend_on_no_number_of_workers(
    tmp_path: Path, pair: tuple[Path, Path], request_: dict[str, Any]
) -> None:
    made = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}.safetensors"
        sources = [Source(open_file(path), Strengths(0.7)) for path in pair]
        execute(plan(sources, Request(**request_, workers=workers))[0], out, workers=workers)
        made.append(out.read_bytes())
    assert made[0] == made[1]


_SCRIPT = """
import sys
from pathlib import Path
from hubtool.formats import open_file
from hubtool.ops.execute import execute
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.merge_adapters import Request, Source, plan
sources = [Source(open_file(Path(path))) for path in sys.argv[2:]]
execute(plan(sources, Request(budget=Budget(error=0.2, across=True)))[0], Path(sys.argv[1]))
"""


def test_the_bytes_depend_on_no_hash_seed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    made = []
    for seed in ("0", "4711"):
        out = tmp_path / f"{seed}.safetensors"
        subprocess.run(
            [sys.executable, "-c", _SCRIPT, out, *pair], check=True, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        made.append(out.read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(("combination", "rank"), [("cat", None), ("svd", 4)])
def test_peft_gives_the_same(tmp_path: Path, combination: str, rank: int | None) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(12, 10)), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), "a"
    )
    model.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    for name in ("a", "b"):
        torch.nn.init.normal_(layer.lora_B[name].weight)
    options = {} if rank is None else {"svd_rank": rank}
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "ab", combination_type=combination, **options)
    terms = {
        i: LowRank(tiny.literal(layer.lora_B[name].weight), tiny.literal(layer.lora_A[name].weight), alpha_value=alpha)
        for i, (name, alpha) in enumerate((("a", 3.0), ("b", 6.0)))
    }
    made = _merged(terms, (0.7, 0.4), rank)
    torch.testing.assert_close(made.delta(), layer.get_delta_weight("ab").detach(), rtol=1e-4, atol=1e-5)


def test_diffusers_fuses_two_adapters_to_the_weights_that_the_merged_one_gives(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    paths, modules = [], None
    for seed, rank in ((1, 2), (2, 3)):
        pipe = tiny.build("sd1")
        made = tiny.make(pipe, ("unet",), family="sd1", ranks=(rank,), seed=seed)
        modules = made.factors.keys() if modules is None else modules
        paths.append(adapters.write(replace(made.adapter, family="sd1"), tmp_path / f"{seed}.safetensors", "diffusers"))
    theirs = tiny.build("sd1")
    for name, path in zip("ab", paths, strict=True):
        theirs.load_lora_weights(path, adapter_name=name)
    theirs.set_adapters(["a", "b"], [0.7, -0.4])
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    sources = [Source(open_file(path), Strengths(one)) for path, one in zip(paths, (0.7, -0.4), strict=True)]
    execute(plan(sources, Request(family="sd1"))[0], tmp_path / "out.safetensors")
    ours = tiny.build("sd1")
    ours.load_lora_weights(tmp_path / "out.safetensors")
    ours.fuse_lora()
    ours.unload_lora_weights()
    wanted = theirs.unet.state_dict()
    for key, tensor in ours.unet.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-6)
