"""The factor space: every kind, truncation, budgets and methods, against the formulas in fp64, full SVDs and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from hubtool.adapters.ir import Patch  # noqa: E402
from hubtool.adapters.low_rank import LowRank  # noqa: E402
from hubtool.errors import Unsupported  # noqa: E402
from hubtool.ops.factor_space.budget import Budget  # noqa: E402
from hubtool.ops.factor_space.modules import Asked  # noqa: E402
from hubtool.ops.methods import find  # noqa: E402
from hubtool.tensors.evaluate import compute  # noqa: E402
from tests.support import adapters, patches, tiny  # noqa: E402
from tests.support.merging import best, deltas, distance, low_rank, merge, merged, mixed_pair, near, style, total  # noqa: E402

ENTRYWISE = ("ties", "dare_ties", "della", "breadcrumbs")
ISOMETRIC = ("slerp", "model_stock", "geometric_median", "orthogonalise")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return mixed_pair(tmp_path_factory.mktemp("pair"))


# --- sums of factors -------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), strengths=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    scale=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_law_a_sum_is_the_sum_of_the_changes(ranks: list[int], strengths: list[float], scale: float, seed: int) -> None:
    terms = [low_rank((7, 9), rank, scale, seed + i) for i, rank in enumerate(ranks)]
    weights = [round(one, 3) or 1.0 for one in strengths[: len(terms)]]
    made = merged(dict(enumerate(terms)), weights)
    wanted = sum(weight * term.delta().double() for weight, term in zip(weights, terms, strict=True))
    assert float((made.delta() - wanted).norm()) <= 2e-6 * sum(
        abs(weight) * float(term.delta().norm()) for weight, term in zip(weights, terms, strict=True)
    )


# --- kinds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", patches.CASES)
def test_every_kind_is_added_exactly_or_refused_with_the_reason(name: str) -> None:
    patch, shape = patches.CASES[name]
    if len(shape) < 2:
        return
    other = low_rank(shape, 2, 0.5, 77)
    if patch.needs_base:
        with pytest.raises(Unsupported) as error:
            merged({0: patch, 1: other}, (0.7, -0.4))
        assert error.value.hint
        return
    made = merged({0: patch, 1: other}, (0.7, -0.4))
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
    assert merged({0: patch}, (1.0,)) is patch
    if patch.needs_base and patch.algorithm != "ia3":
        with pytest.raises(Unsupported):
            merged({0: patch}, (-0.5,))
        return
    made = merged({0: patch}, (-0.5,))
    assert type(made) is type(patch)
    base = torch.full(shape, 2.0)
    torch.testing.assert_close(made.delta(base), -0.5 * patch.delta(base))
    bias = torch.ones(shape[0])
    changed = patch.bias_delta(bias)
    if changed is not None:
        torch.testing.assert_close(made.bias_delta(bias), -0.5 * changed)


def test_norms_are_summed_as_norms() -> None:
    patch, _ = patches.CASES["norm"]
    made = merged({0: patch, 1: patch}, (0.5, 0.25))
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
    terms = {i: low_rank((6, 2, 3, 3), rank, 1.0, seed + i // 2) for i, rank in enumerate(ranks)}
    made = merged(terms, [1.0] * len(terms), kept)
    wanted = sum(term.delta().double() for term in terms.values()).flatten(1)
    least = float((wanted - best(wanted, kept)).norm())
    assert float((made.delta().flatten(1) - wanted).norm()) <= 1.0001 * least + 3e-6 * float(wanted.norm())


def test_changes_that_cancel_out_leave_zeros_and_no_nan() -> None:
    patch = low_rank((8, 8), 4)
    for rank in (None, 2):
        made = merged({0: patch, 1: patch}, (1.0, -1.0), rank)
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

    terms: Mapping[int, Patch] = {0: low_rank((1024, 1024), 4), 1: low_rank((1024, 1024), 8, 1.0, 3)}
    for method in ("weighted_sum", *ISOMETRIC):
        made = merged(terms, (1.0, 1.0), 4, Asked(find(method)))
        with Largest():
            compute(made.up)
    made = merged(terms, (1.0, 1.0), 4, Asked(find("ties"), space="core"))
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
    terms = {i: near((12, 10), 2 + i, i) for i in range(count)}
    made = merged(terms, (0.7, 1.2, 0.4)[:count], None, Asked(find(method)))
    whole = [term.delta().double() for term in terms.values()]
    wanted = find(method).apply(whole, weights=(0.7, 1.2, 0.4)[:count])
    assert float((made.delta() - wanted).norm() / wanted.norm()) < 1e-5


def test_an_input_without_the_module_is_a_zero_change_to_every_method() -> None:
    terms = {0: low_rank((12, 10), 2), 2: low_rank((12, 10), 3, 1.0, 9)}
    whole = [terms[0].delta().double(), torch.zeros(12, 10).double(), terms[2].delta().double()]
    for method in ("n_average", "model_stock", "geometric_median", "orthogonalise"):
        made = merged(terms, (1.0, 1.0, 1.0), None, Asked(find(method)))
        wanted = find(method).apply(whole, weights=(1.0, 1.0, 1.0))
        assert float((made.delta() - wanted).norm()) < 1e-5 * float(whole[0].norm()), method


@pytest.mark.parametrize("method", ENTRYWISE)
def test_methods_of_entries_truncate_what_they_make_of_the_products(method: str) -> None:
    terms = {0: low_rank((24, 20), 2), 1: low_rank((24, 20), 3, 0.5, 9)}
    made = merged(terms, (1.0, 0.7), 20, Asked(find(method), seed=3))
    wanted = find(method).apply([term.delta() for term in terms.values()], weights=(1.0, 0.7), key="unet.x", seed=3)
    assert float((made.delta() - wanted).norm() / wanted.norm()) < 1e-5
    short = merged(terms, (1.0, 0.7), 4, Asked(find(method), seed=3))
    assert float((short.delta() - best(wanted.double(), 4)).norm() / wanted.norm()) < 1e-5


def test_the_core_space_merges_what_the_changes_are_between_common_bases() -> None:
    """Panariello et al. 2025, written out: W_i = U M_i V."""
    terms = {0: low_rank((24, 20), 2), 1: low_rank((24, 20), 3, 0.5, 9)}
    options = {"density": 1.0, "mean": False}
    made = merged(terms, (1.0, 0.7), None, Asked(find("ties"), options, space="core"))
    up, down = _stack(terms)
    left, right = torch.linalg.svd(up, full_matrices=False).U, torch.linalg.svd(down, full_matrices=False).Vh
    cores = [left.T @ term.delta() @ right.T for term in terms.values()]
    wanted = left @ find("ties").apply(cores, weights=(1.0, 0.7), **options) @ right
    assert float((made.delta() - wanted).norm() / wanted.norm()) < 1e-5
    assert made.rank == 5


def test_knots_merges_the_right_parts_of_a_common_svd() -> None:
    """Stoica et al. 2024: [W_1 W_2] = U S [V_1 V_2]; entries of V_i depend on no choice of basis but for signs, which ties respects."""
    terms = {0: low_rank((24, 20), 2), 1: low_rank((24, 20), 3, 0.5, 9)}
    made = merged(terms, (1.0, 0.7), None, Asked(find("weighted_sum")))
    knots = merged(terms, (1.0, 0.7), None, Asked(find("ties"), {"density": 1.0, "mean": False}, space="knots"))
    assert knots.rank == 5
    whole = torch.cat([term.delta() for term in terms.values()], 1)
    u, values, v = torch.linalg.svd(whole.double(), full_matrices=False)
    parts = [part.float() for part in v[:5].split(20, 1)]
    joined = find("ties").apply(parts, weights=(1.0, 0.7), density=1.0, mean=False)
    wanted = (u[:, :5] * values[:5]) @ joined.double()
    assert float((knots.delta() - wanted).norm() / wanted.norm()) < 1e-4
    assert float((knots.delta() - made.delta()).norm()) > 0


def _stack(terms: Mapping[int, LowRank]) -> tuple[Any, Any]:
    up = torch.cat([compute(term.up) for term in terms.values()], 1)
    return up, torch.cat([compute(term.down) for term in terms.values()], 0)


@pytest.mark.parametrize("space", ["core", "knots"])
def test_changes_of_nothing_stay_nothing_in_every_space(space: Any) -> None:
    zero = low_rank((24, 20), 2)
    zero = replace(zero, up=tiny.literal(torch.zeros(24, 2)))
    made = merged({0: zero, 1: zero}, (1.0, 1.0), None, Asked(find("ties"), space=space))
    assert float(made.delta().norm()) == 0


def test_chance_depends_on_the_seed_and_the_module_alone() -> None:
    terms = {0: low_rank((24, 20), 2), 1: low_rank((24, 20), 3, 0.5, 9)}
    made = [merged(terms, (1.0, 0.7), 8, Asked(find("dare_ties"), seed=seed)).delta() for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_difference_of_two_adapters_is_added_to_a_third(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    third = style(tmp_path, "c", modules=adapters.attention("sd1", 3), ranks=(2,), seed=44)
    merge(tmp_path / "out.safetensors", [(pair[0], 1.0), (third, 0.5)], pair[1], method="add_difference", dtype="fp32")
    wanted = total((1.0, deltas(pair[0])), (0.5, deltas(third)), (-0.5, deltas(pair[1])))
    assert distance(deltas(tmp_path / "out.safetensors"), wanted) < 1e-6


@pytest.mark.parametrize("method", ["weighted_sum", "slerp"])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_an_interpolation_ends_at_its_inputs(tmp_path: Path, pair: tuple[Path, Path], method: str, t: float) -> None:
    out = tmp_path / "out.safetensors"
    merge(out, [(pair[0], 1 - t), (pair[1], t)], method=method, dtype="fp32")
    ends, wanted = deltas(out), deltas(pair[int(t)])
    assert all(float((ends[key] - wanted[key]).norm()) < 1e-5 * float(wanted[key].norm()) for key in wanted)
    assert all(float(ends[key].norm()) < 1e-5 for key in ends.keys() - wanted.keys())


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
    made = merged(terms, (0.7, 0.4), rank)
    torch.testing.assert_close(made.delta(), layer.get_delta_weight("ab").detach(), rtol=1e-4, atol=1e-5)
