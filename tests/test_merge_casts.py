"""What an output's dtype costs: modules that are only copied, or summed whole, count in the reported error like all others."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hubtool.formats import open_file  # noqa: E402
from hubtool.ops.factor_space import copies  # noqa: E402
from hubtool.ops.factor_space.blend import Measured  # noqa: E402
from hubtool.ops.factor_space.modules import Asked  # noqa: E402
from hubtool.ops.merge_adapters import Request, Source, plan  # noqa: E402
from hubtool.ops.strengths import Strengths  # noqa: E402
from hubtool.tensors.evaluate import compute  # noqa: E402
from hubtool.tensors.expr import Expr  # noqa: E402
from tests.support import adapters, patches  # noqa: E402
from tests.support.merging import SUM, deltas, distance, merge, merged, style, total  # noqa: E402

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters in fp32 of modules that the other does not change."""
    folder, modules = tmp_path_factory.mktemp("pair"), adapters.attention("sd1", 2)
    first = style(folder, "a", modules=modules[:2], ranks=(4,), alphas=(2.0,), seed=1)
    return first, style(folder, "b", modules=modules[2:], ranks=(3,), seed=70)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_cast_of_copied_modules_is_the_reported_error(tmp_path: Path, pair: tuple[Path, Path], dtype: str) -> None:
    out = tmp_path / "out.safetensors"
    made, report = merge(out, [(pair[0], 1.0), (pair[1], 1.0)], dtype=dtype)
    assert {one.how for one in report.modules.values()} == {"copied"}
    wanted = total((1.0, deltas(pair[0])), (1.0, deltas(pair[1])))
    found = deltas(out)
    assert report.error == pytest.approx(distance(found, wanted), rel=1e-3)
    for key, change in wanted.items():
        error = float((found[key] - change).norm() / change.norm())
        assert report.errors()[".".join(key)] == pytest.approx(error, rel=1e-2)
    assert report.to_json()["cast"] == len(report.modules)
    assert any("cast to" in why for why in made.rounded.values())


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_copies_that_keep_their_numbers_have_no_error(
    tmp_path: Path, pair: tuple[Path, Path], dtype: str | None
) -> None:
    _, report = merge(tmp_path / "out.safetensors", [(pair[0], 1.0), (pair[1], 1.0)], dtype=dtype)
    assert (report.error, report.errors(), report.cast) == (None, {}, [])


def test_computed_and_copied_modules_count_together(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    both = style(tmp_path, "c", ranks=(2,), seed=9)
    out = tmp_path / "out.safetensors"
    _, report = merge(out, [(pair[0], 0.5), (both, 1.0)], dtype="bf16")
    assert {one.how for one in report.modules.values()} == {"copied", "exact"}
    wanted = total((0.5, deltas(pair[0])), (1.0, deltas(both)))
    assert report.error == pytest.approx(distance(deltas(out), wanted), rel=0.05)


def test_a_plan_that_was_not_carried_out_claims_no_error(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    both = style(tmp_path, "c", ranks=(2,), seed=9)
    sources = [Source(open_file(path), Strengths(1.0)) for path in (pair[0], both)]
    _, report = plan(sources, Request(dtype="bf16"))
    assert (report.error, report.errors()) == (None, {})


KINDS = [name for name, (one, _) in patches.CASES.items() if copies.measurable(one)]


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("name", KINDS)
def test_the_cost_of_a_cast_is_that_of_every_tensor_rounded(name: str, dtype: str) -> None:
    """The oracle rounds each tensor by torch and takes the kind's own change of it."""
    patch, shape = patches.CASES[name]
    torch_dtype = TORCH[dtype]
    tensors = {field.name: getattr(patch, field.name) for field in fields(patch)}  # type: ignore[arg-type]
    rounded = {
        field: patches.literal(compute(tensor).to(torch_dtype).float())
        for field, tensor in tensors.items()
        if field != "alpha" and isinstance(tensor, Expr) and tensor.dtype == "F32"
    }
    change = patch.delta(torch.zeros(shape)).double()
    error = replace(patch, **rounded).delta(torch.zeros(shape)).double() - change  # type: ignore[type-var]
    found = copies.measured(patch, dtype)
    assert found[0] == pytest.approx(float(change.square().sum()), rel=1e-5)
    assert found[1] == pytest.approx(float(error.square().sum()), rel=1e-2, abs=1e-12 * found[0])


def test_kinds_that_depend_on_the_base_are_left_out() -> None:
    assert {"dora per output", "oft", "ia3 on outputs", "set", "glora"}.isdisjoint(KINDS)
    assert {"lora", "tucker", "loha", "lokr, full", "full", "norm"} <= set(KINDS)


@pytest.mark.parametrize("name", ["full", "full with bias", "norm"])
def test_sums_of_whole_differences_say_what_rounding_them_costs(name: str) -> None:
    patch, _ = patches.CASES[name]
    told = Measured()
    made: Any = merged({0: patch, 1: patch}, (0.3, 0.4), asked=Asked(SUM, dtype="BF16", report=told))
    wanted = (0.3 * patch.delta() + 0.4 * patch.delta()).double()
    error = made.delta().double() - wanted
    ((norm, squared),) = told.modules.values()
    assert norm == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    assert squared == pytest.approx(float(error.square().sum()), rel=1e-2)
