"""Every merge method is its formula (written here once more, in fp64 and without tiles), whatever the tiles, and draws repeatably."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from hubtool.errors import UsageProblem  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.ops.methods import Method, find, known  # noqa: E402
from hubtool.ops.methods._noise import seeded, uniform  # noqa: E402
from hubtool.ops.methods._statistics import largest  # noqa: E402
from hubtool.tensors import tiles  # noqa: E402
from hubtool.tensors.expr import Read  # noqa: E402
from hubtool.tensors.parallel import write_safetensors_parallel  # noqa: E402

Tensor = torch.Tensor


def some(count: int, shape: tuple[int, ...] = (24, 5, 3), seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Inputs that differ from a base by a few percent."""
    torch.manual_seed(seed)
    base = torch.randn(shape)
    return [base + torch.randn(shape) * 0.1 * (i + 1) for i in range(count)], base


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found.double() - expected).norm() / expected.norm()) < tolerance


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def test_weighted_sum_and_average() -> None:
    (a, b, c), _ = some(3)
    assert close(find("weighted_sum").apply([a, b, c], weights=[0.2, 0.5, 0.3]), 0.2 * a + 0.5 * b + 0.3 * c)
    assert close(find("n_average").apply([a, b, c], weights=[9, 9, 1]), (a + b + c) / 3)


def test_task_arithmetic_add_difference_and_subtract() -> None:
    (a, b), base = some(2)
    a_, b_, c_ = wide([a, b, base])
    task = find("task_arithmetic").apply([a, b], weights=[0.7, -0.4], base=base, scale=2)
    assert close(task, c_ + 2 * (0.7 * (a_ - c_) - 0.4 * (b_ - c_)))
    assert close(find("add_difference").apply([a, b], weights=[5, 0.3], base=base), a_ + 0.3 * (b_ - c_))
    assert close(find("subtract").apply([a, b], weights=[5, 0.3], base=base), a_ - 0.3 * (b_ - c_))


def test_a_method_of_differences_takes_changes_where_there_is_no_base() -> None:
    (a, b), base = some(2)
    for method in known().values():
        if method.base == "required":
            on_weights = method.apply([a, b], weights=[0.5, 0.8], base=base, key="k")
            changes = [a - base, b - base]
            first = a if method.id in ("add_difference", "subtract", "train_difference") else None
            if first is None:
                on_changes = method.apply(changes, weights=[0.5, 0.8], key="k")
                assert close(base + on_changes, on_weights.double(), 1e-4), method.id


def test_train_difference_is_the_formula_of_the_original() -> None:
    (a, b), c = some(2)
    c[0] = b[0] = a[0]  # nothing learned, nothing to divide by
    a_, b_, c_ = wide([a, b, c])
    scale = torch.nan_to_num((b_ - a_).abs() / ((b_ - c_).abs() + (b_ - a_).abs()), nan=0.0)
    expected = a_ + (b_ - c_).sign() * scale.abs() * (b_ - c_).abs() * 0.6 * 1.8
    assert close(find("train_difference").apply([a, b], weights=[1, 0.6], base=c), expected)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_by_a_share_of_the_angle_and_interpolates_the_length(t: float) -> None:
    torch.manual_seed(3)
    a, b = torch.randn(40, 6), 3 * torch.randn(40, 6)
    a_, b_ = a.double().flatten(), b.double().flatten()
    angle = torch.arccos((a_ @ b_) / (a_.norm() * b_.norm()))
    direction = torch.sin((1 - t) * angle) * a_ / a_.norm() + torch.sin(t * angle) * b_ / b_.norm()
    expected = direction / torch.sin(angle) * ((1 - t) * a_.norm() + t * b_.norm())
    found = find("slerp").apply([a, b], weights=[1 - t, t])
    assert close(found.flatten(), expected)


def test_slerp_of_parallel_opposite_or_empty_tensors_is_a_line() -> None:
    a = torch.randn(30)
    for b in (2 * a, -a, torch.zeros(30)):
        assert torch.allclose(find("slerp").apply([a, b], weights=[0.75, 0.25]), 0.75 * a + 0.25 * b, atol=1e-6)


def test_slerp_with_a_base_turns_the_changes() -> None:
    (a, b), base = some(2)
    found = find("slerp").apply([a, b], weights=[0.5, 0.5], base=base)
    assert close(found - base, find("slerp").apply([a - base, b - base], weights=[0.5, 0.5]).double())


def test_orthogonalise_adds_only_what_earlier_inputs_do_not_have() -> None:
    (a, b, c), base = some(3)
    x, y, z = (tensor.double().flatten() - base.double().flatten() for tensor in (a, b, c))
    y_ = y - x * (x @ y) / (x @ x)
    z_ = z - x * (x @ z) / (x @ x) - y_ * (y_ @ z) / (y_ @ y_)
    found = find("orthogonalise").apply([a, b, c], weights=[1, 0.5, 2], base=base)
    assert close(found.flatten(), base.double().flatten() + x + 0.5 * y_ + 2 * z_)


def test_model_stock_uses_the_mean_angle_of_the_changes() -> None:
    base = torch.randn(300)
    shared = torch.randn(300)
    inputs = [base + shared + 0.7 * torch.randn(300) for _ in range(3)]
    changes = [(one - base).double() for one in inputs]
    cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in itertools.combinations(changes, 2)]
    cosine = sum(cosines) / 3
    t = 3 * cosine / (1 + 2 * cosine)
    expected = t * sum(wide(inputs)) / 3 + (1 - t) * base.double()
    assert close(find("model_stock").apply(inputs, base=base), expected)


def test_model_stock_of_changes_that_oppose_each_other_is_the_base() -> None:
    base, change = torch.randn(50), torch.randn(50)
    assert torch.equal(find("model_stock").apply([base + change, base - change], base=base), base)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    inputs, _ = some(4)
    inputs[3] = inputs[3] + 50
    found = find("geometric_median").apply(inputs, steps=1000).double().flatten()
    points = torch.stack([tensor.double().flatten() for tensor in inputs])

    def cost(point: Tensor) -> float:
        return float((points - point).norm(dim=1).sum())

    assert all(cost(found) <= cost(found + 1e-2 * torch.randn_like(found)) for _ in range(50))
    assert (found - points[:3].mean(0)).norm() < 0.2 * (points.mean(0) - points[:3].mean(0)).norm()


def test_the_geometric_median_of_equal_inputs_is_each_of_them() -> None:
    a = torch.randn(20)
    assert torch.allclose(find("geometric_median").apply([a, a, a]), a)


def elected(changes: list[Tensor], weights: Sequence[float], mean: bool) -> Tensor:
    weighted = torch.stack([change * weight for change, weight in zip(changes, weights, strict=True)])
    majority = (weighted.sum(0) >= 0).double() * 2 - 1
    mask = (weighted.sign() == majority).double()
    divisor = (mask * torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * changes[0].dim())).sum(0)
    divisor[divisor == 0] = 1
    return (weighted * mask).sum(0) / (divisor if mean else 1)


def trimmed(change: Tensor, keep: int, drop: int = 0) -> Tensor:
    order = change.abs().flatten().argsort(descending=True)
    mask = torch.zeros(change.numel(), dtype=torch.float64)
    mask[order[drop : drop + keep]] = 1
    return change * mask.reshape(change.shape)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages(density: float, mean: bool) -> None:
    inputs, base = some(3)
    changes = [trimmed((one - base).double(), int(density * base.numel())) for one in inputs]
    found = find("ties").apply(inputs, weights=[1, 0.5, 2], base=base, density=density, mean=mean, scale=0.8)
    assert close(found, base.double() + 0.8 * elected(changes, [1, 0.5, 2], mean))


@pytest.mark.parametrize("signs", [True, False])
def test_breadcrumbs_drops_both_tails(signs: bool) -> None:
    inputs, base = some(2)
    count = base.numel()
    changes = [trimmed((one - base).double(), int(0.6 * count), int(0.1 * count)) for one in inputs]
    method = find("breadcrumbs_ties" if signs else "breadcrumbs")
    found = method.apply(inputs, weights=[1, 0.5], base=base, density=0.6, outliers=0.1)
    merged = elected(changes, [1, 0.5], mean=False) if signs else changes[0] + 0.5 * changes[1]
    assert close(found, base.double() + merged)


def test_pruning_keeps_all_of_equal_magnitudes() -> None:
    a = torch.tensor([1.0, -1, 1, 0.5])
    assert torch.equal(find("ties").apply([a], density=0.25), torch.tensor([1.0, -1, 1, 0]))
    assert torch.equal(find("breadcrumbs").apply([torch.ones(9)], density=0.5, outliers=0.2), torch.ones(9))


def test_dare_keeps_the_share_it_says_and_the_expected_change() -> None:
    change = torch.ones(200_000)
    found = find("dare").apply([change], key="x", density=0.3)
    assert found.unique().tolist() == [0.0, pytest.approx(1 / 0.3)]
    assert abs(float((found != 0).double().mean()) - 0.3) < 0.005


def test_dare_ties_elects_among_what_was_not_dropped() -> None:
    inputs, base = some(2)
    alone = [find("dare").apply([one, one], weights=[1, 0], base=base, key="k") - base for one in inputs]
    second = find("dare").apply([inputs[1], inputs[1]], weights=[0, 1], base=base, key="k") - base
    found = find("dare_ties").apply(inputs, weights=[1, 0.5], base=base, key="k")
    assert close(found - base, elected([alone[0].double(), second.double()], [1, 0.5], mean=False), 1e-4)


def test_della_keeps_large_changes_of_a_row_more_often() -> None:
    rows = torch.arange(1.0, 101).repeat(4000, 1)
    found = find("della_linear").apply([rows], key="x", density=0.5, epsilon=0.3)
    share = (found != 0).double().mean(0)
    assert abs(float(share[0]) - 0.2) < 0.03
    assert abs(float(share[-1]) - 0.8) < 0.03
    assert torch.allclose(found.mean(0), rows[0], rtol=0.12)


def test_della_elects_a_sign() -> None:
    a, b = torch.full((4, 50), 2.0), torch.full((4, 50), -1.0)
    found = find("della").apply([a, b], key="x", density=0.9, epsilon=0.05)
    assert bool((found > 0).any())
    alone = find("della_linear").apply([a, b], weights=[1, 0], key="x", density=0.9, epsilon=0.05)
    assert torch.equal(found[alone > 1.5], alone[alone > 1.5])


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_the_cosine_variants_are_those_of_their_sources(name: str) -> None:
    (a, b), _ = some(2, (12, 7))
    a_, b_ = wide([a, b])
    similarity = torch.nn.functional.cosine_similarity(a_, b_, dim=0)
    if name == "cosine_b":
        similarity = (similarity + (a_ * b_).sum() / (a_.norm() * b_.norm())) / 2
    k = 1 - torch.clamp(similarity - 0.9, 0, 1)
    assert close(find(name).apply([a, b], weights=[0.1, 0.9]), torch.lerp(a_, b_, k))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_the_k_th_largest_magnitude_is_exact(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    rank = data.draw(st.integers(1, len(values)))
    halves = list(tensor.split(max(len(values) // 3, 1)))
    ((found,),) = largest(lambda: (([part], None) for part in halves), lambda count: (rank,) if count else ())
    assert found == float(tensor.abs().sort(descending=True).values[rank - 1])


def test_random_numbers_depend_on_the_place_alone_and_are_uniform() -> None:
    state = seeded(7, "unet.a", 0)
    whole = uniform(0, 1000, state)
    assert torch.equal(torch.cat([uniform(0, 300, state), uniform(300, 700, state)]), whole)
    assert not torch.equal(uniform(0, 1000, seeded(8, "unet.a", 0)), whole)
    many = uniform(0, 1_000_000, state).double()
    assert float(many.min()) >= 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 2e-3
    assert abs(float(many.var()) - 1 / 12) < 2e-3


def test_splitmix_is_that_of_its_authors() -> None:
    # first output of the reference implementation (prng.di.unimi.it/splitmix64.c) for seed 0: 0xe220a8397b1dcdaf
    assert float(uniform(0, 1, 0)) == (0xE220A8397B1DCDAF >> 40) * 2.0**-24


def written(
    method: Method, folder: Path, name: str, step: int, monkeypatch: pytest.MonkeyPatch, **given: Any
) -> Tensor:
    monkeypatch.setattr(tiles, "TILE", step)
    refs = open_file(folder / "in.safetensors").tensors
    inputs = [Read(refs[key]) for key in refs if key != "base"]
    base = Read(refs["base"]) if method.base == "required" else None
    expr = method.expr(inputs, weights=[0.6, 0.5], dtype="F32", base=base, key="k", seed=1, **given)
    write_safetensors_parallel(folder / name, {"x": expr}, force=True)
    return load_file(folder / name)["x"]


@pytest.mark.parametrize("shape", [(40, 3, 3), (130,)])
@pytest.mark.parametrize("name", sorted(known()))
def test_tiles_make_no_difference(
    name: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = find(name)
    (a, b), base = some(2, shape)
    save_file({"a": a, "b": b, "base": base}, tmp_path / "in.safetensors")
    found = [written(method, tmp_path, "out", step, monkeypatch) for step in (1 << 19, 30, 7)]
    whole = method.apply([a, b], weights=[0.6, 0.5], base=base if method.base == "required" else None, key="k", seed=1)
    for one in found:
        assert torch.allclose(one, whole, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("name", sorted(known()))
def test_every_method_says_what_it_is_and_returns_one_input_at_full_strength(name: str) -> None:
    method = find(name)
    assert method.title
    assert method.help
    assert method.source
    assert method.inputs[0] >= 1
    (a, _), base = some(2)
    keep = {key: 1.0 for key in ("density",) if key in method.parameters}
    if method.inputs[0] == 1:
        given = base if method.base == "required" else None
        assert torch.allclose(method.apply([a], base=given, key="k", **keep), a, atol=1e-6)


def test_wrong_parameters_and_numbers_of_inputs_are_refused_by_name() -> None:
    with pytest.raises(UsageProblem, match="density is from 0 to 1"):
        find("ties").apply([torch.ones(3)], density=1.5)
    with pytest.raises(UsageProblem, match="has no parameter 'densty'"):
        find("ties").apply([torch.ones(3)], densty=0.5)
    with pytest.raises(UsageProblem, match="takes 2 inputs, not 3"):
        find("slerp").apply([torch.ones(3)] * 3)
    with pytest.raises(UsageProblem, match="no use for a base"):
        find("weighted_sum").apply([torch.ones(3)], base=torch.ones(3))
    with pytest.raises(UsageProblem, match="no merge method is called 'blend'"):
        find("blend")
    with pytest.raises(UsageProblem, match="density - epsilon"):
        find("della").apply([torch.ones(3, 3)], key="k", density=0.05, epsilon=0.1)
    with pytest.raises(UsageProblem, match="mean is true or false"):
        find("ties").apply([torch.ones(3)], mean="maybe")


def test_a_method_is_found_with_a_dash_and_parameters_may_be_texts() -> None:
    assert find("Weighted-Sum").id == "weighted_sum"
    assert find("ties").checked({"density": "0.25", "mean": "no"}) == {"density": 0.25, "mean": False, "scale": 1.0}
    assert math.isclose(float(find("della").checked({})["epsilon"]), 0.1)
