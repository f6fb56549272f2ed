"""Our methods beside those of sd-mecha and mergekit, wherever they mean the same formula.

Both are optional: ``pip install --no-deps --target FOLDER ...`` with the packages of tests/benchmarks/peers.py, then
``PYTHONPATH=FOLDER pytest tests/test_merge_peers.py``. Where a peer is not importable its tests are skipped.

Where they differ on purpose, nothing is compared: sd-mecha's ``ties_sum`` keeps one element more than the density says (so density 1 here),
its ``model_stock`` takes the cosine over the last dimension (so vectors here); mergekit's slerp does not interpolate the
length (so inputs of one length here).
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hubtool.ops.methods import find  # noqa: E402
from hubtool.tensors.evaluate import compute  # noqa: E402
from tests.support.tiny import literal  # noqa: E402

Tensor = torch.Tensor


def some(count: int, *shape: int) -> tuple[list[Any], Any]:
    """Inputs that differ from a base by a few percent, mostly in one direction."""
    torch.manual_seed(7)
    base, common = torch.randn(shape), torch.randn(shape)
    return [base + 0.1 * (common + torch.randn(shape)) for _ in range(count)], base


def ours(method: str, tensors: list[Any], base: Any = None, weights: Any = None, **params: Any) -> Any:
    made = find(method).expr(
        [literal(one) for one in tensors],
        weights=weights or (1.0,) * len(tensors),
        dtype="F32",
        base=None if base is None else literal(base),
        params=params,
        key="x",
    )
    return compute(made)


def same(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < tolerance


class TestMecha:
    """sd-mecha 1.1.8."""

    @pytest.fixture
    def peer(self) -> Any:
        return pytest.importorskip("sd_mecha")

    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_weighted_sum(self, peer: Any, t: float) -> None:
        (a, b), _ = some(2, 12, 9)
        wanted = peer.weighted_sum.__wrapped__({"x": a}, {"x": b}, alpha=torch.tensor(t), key="x")
        same(ours("weighted_sum", [a, b], weights=(1 - t, t)), wanted)

    @pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
    def test_slerp(self, peer: Any, t: float) -> None:
        (a, b), _ = some(2, 12, 9)
        same(ours("slerp", [a, 2 * b], weights=(1 - t, t)), peer.slerp.__wrapped__(a, 2 * b, alpha=torch.tensor(t)))

    def test_average(self, peer: Any) -> None:
        tensors, _ = some(4, 12, 9)
        wanted = peer.n_average.__wrapped__(*({"x": one} for one in tensors), key="x")
        same(ours("n_average", tensors), wanted)

    def test_train_difference(self, peer: Any) -> None:
        (a, b), base = some(2, 12, 9)
        mask = peer.train_difference_mask.__wrapped__(a, b, base, alpha=0.7)
        same(ours("train_difference", [a, b], base, (1.0, 0.7)), a + mask * (b - base))

    def test_orthogonalise(self, peer: Any) -> None:
        (a, b), base = some(2, 12, 9)
        wanted = a + 0.6 * peer.perpendicular_component.__wrapped__(a - base, b - base)
        same(ours("orthogonalise", [a, b], base, (1.0, 0.6)), wanted)

    @pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
    def test_cosine(self, peer: Any, name: str) -> None:
        (a, b), _ = some(2, 12, 9)
        wanted = getattr(peer, f"add_{name}").__wrapped__(a, b, alpha=torch.tensor(0.4))
        same(ours(name, [a, b], weights=(0.6, 0.4)), wanted)

    def test_ties(self, peer: Any) -> None:
        tensors, base = some(3, 12, 9)
        wanted = peer.ties_sum.__wrapped__(*(one - base for one in tensors), k=1.0, vote_sgn=True)
        same(ours("ties", tensors, base, density=1.0) - base, wanted, 1e-4)

    def test_model_stock(self, peer: Any) -> None:
        tensors, base = some(2, 200)
        wanted = peer.model_stock.__wrapped__(*(one - base for one in tensors))
        same(ours("model_stock", tensors, base) - base, wanted, 1e-4)

    def test_geometric_median(self, peer: Any) -> None:
        tensors, _ = some(4, 12, 9)
        tensors[3] = tensors[3] + 5
        same(ours("geometric_median", tensors), peer.geometric_median.__wrapped__(*tensors), 1e-4)

    @pytest.mark.usefixtures("peer")
    def test_dare_that_drops_nothing(self) -> None:
        tensors, base = some(3, 12, 9)
        theirs = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.ties")
        wanted = theirs.dropout.__wrapped__(*(one - base for one in tensors), probability=0.0, seed=1)
        same(ours("dare", tensors, base, (1 / 3,) * 3, density=1.0) - base, wanted, 1e-4)


class TestMergekit:
    """mergekit 0.1.5."""

    @pytest.fixture
    def merge(self) -> Any:
        return pytest.importorskip("mergekit.merge_methods.api").merge_tensors

    @pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.9)])
    def test_linear(self, merge: Any, weights: tuple[float, float]) -> None:
        tensors, _ = some(2, 12, 9)
        wanted = merge(tensors, "linear", parameters={"weight": list(weights), "normalize": False})
        same(ours("weighted_sum", tensors, weights=weights), wanted)

    @pytest.mark.parametrize("t", [0.2, 0.5])
    def test_slerp(self, merge: Any, t: float) -> None:
        (a, b), _ = some(2, 12, 9)
        b = b * (a.norm() / b.norm())
        wanted = merge([a, b], "slerp", parameters={"t": t}, base_index=0)
        same(ours("slerp", [a, b], weights=(1 - t, t)), wanted, 1e-4)

    def test_task_arithmetic(self, merge: Any) -> None:
        tensors, base = some(2, 12, 9)
        wanted = merge(
            [base, *tensors], "task_arithmetic", base_index=0, parameters={"weight": [0.7, -0.3], "lambda": 0.9}
        )
        same(ours("task_arithmetic", tensors, base, (0.7, -0.3), scale=0.9), wanted)

    @pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
    @pytest.mark.parametrize("mean", [True, False])
    def test_ties(self, merge: Any, density: float, mean: bool) -> None:
        tensors, base = some(3, 12, 9)
        parameters = {"weight": 1.0, "density": density, "normalize": mean, "lambda": 1.0}
        wanted = merge([base, *tensors], "ties", base_index=0, parameters=parameters)
        same(ours("ties", tensors, base, density=density, mean=mean) - base, wanted - base, 1e-4)

    @pytest.mark.parametrize(
        ("name", "theirs"),
        [("dare", "dare_linear"), ("dare_ties", "dare_ties"), ("della", "della"), ("della_linear", "della_linear")],
    )
    def test_methods_of_chance_that_drop_nothing(self, merge: Any, name: str, theirs: str) -> None:
        tensors, base = some(3, 12, 9)
        parameters = {"weight": [0.5, 0.3, 0.4], "density": 1.0, "normalize": False, "lambda": 1.0}
        parameters |= {"epsilon": 0.0} if "della" in name else {}
        wanted = merge([base, *tensors], theirs, base_index=0, parameters=parameters)
        same(ours(name, tensors, base, (0.5, 0.3, 0.4), density=1.0) - base, wanted - base, 1e-4)

    @pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
    def test_breadcrumbs(self, merge: Any, name: str) -> None:
        tensors, base = some(2, 20, 10)
        parameters = {"weight": 1.0, "density": 0.6, "gamma": 0.05, "normalize": False, "lambda": 1.0}
        wanted = merge([base, *tensors], name, base_index=0, parameters=parameters)
        same(ours(name, tensors, base, density=0.6, outliers=0.05) - base, wanted - base, 1e-4)

    @pytest.mark.parametrize("count", [2, 4])
    def test_model_stock(self, merge: Any, count: int) -> None:
        tensors, base = some(count, 12, 9)
        wanted = merge([base, *tensors], "model_stock", base_index=0, parameters={"filter_wise": False})
        same(ours("model_stock", tensors, base) - base, wanted - base, 1e-4)
