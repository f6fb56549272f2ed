"""extract: the difference of two checkpoints as an adapter, against formulas in fp64."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hubtool.actions import extract as actions
from hubtool.actions.extract import Extracted, Options
from hubtool.actions.recipe import RunOptions
from hubtool.actions.recipe import run as run_recipe
from hubtool.adapters.ir import Adapter
from hubtool.adapters.low_rank import LowRank
from hubtool.cli.main import cli
from hubtool.errors import (
    BadValues,
    ConversionError,
    LossyConversion,
    ShapeMismatch,
    Unsupported,
    UsageProblem,
    WouldOverwrite,
)
from hubtool.formats import open_file
from hubtool.layouts.emit import emit
from hubtool.layouts.parse import parse, parse_file
from hubtool.ops.extract.factors import Decomposed
from hubtool.ops.extract.pairing import Pairs, pair
from hubtool.ops.extract.planning import low_rank
from hubtool.ops.extract.request import Request, parse_size
from hubtool.ops.extract.spectrum import Spectrum, least, within
from hubtool.ops.extract.units import sort
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.randomised_svd import balanced, seed_of, truncated_svd
from hubtool.ops.recipe import of_metadata
from hubtool.ops.sides import side
from hubtool.tensors.evaluate import compute
from hubtool.tensors.expr import Expr, Read
from hubtool.tensors.ref import TensorRef
from tests.support import checkpoints
from tests.support.adapters import values

State = dict[str, torch.Tensor]


def spectrum_matrix(values: torch.Tensor, columns: int, seed: int) -> torch.Tensor:
    """A matrix with those singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64)).Q
    return (left * values @ right.T).float()


def tune(state: State, seed: int = 0, parts: tuple[str, ...] = ("",)) -> State:
    """The state with strong directions and noise added to every tensor whose name begins with one of ``parts``."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, tensor in state.items():
        change = torch.randn(tensor.shape, generator=generator) * 0.01
        if tensor.dim() > 1:
            rows, columns = tensor.shape[0], tensor[0].numel()
            strong = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
            change = change + 0.1 * strong.reshape(tensor.shape)
        takes = tensor.is_floating_point() and name.startswith(parts)
        tuned[name] = (tensor.float() + change).to(tensor.dtype) if takes else tensor
    return tuned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extract")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return checkpoints.single("sd1", folder)


@pytest.fixture(scope="module")
def tuned(folder: Path, base: Path) -> Path:
    path = folder / "tuned.safetensors"
    save_file(tune(load_file(base)), path, {"modelspec.license": "CreativeML"})
    return path


def run(base: Path, tuned: Path, output: Path, request: Request) -> Extracted:
    return actions.extract(actions.prepare(base, tuned, request), output, Options(force=True))


def request(rank: int = 4, **fields: Any) -> Request:
    return Request(budget=fields.pop("budget", Budget(rank=rank)), **fields)


def changes(base: Path, tuned: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Canonical parameter -> its change in fp64."""
    first, second = side(open_file(base)), side(open_file(tuned))
    assert first is not None
    assert second is not None
    return {key: compute(b).double() - compute(a).double() for key, (a, b) in pair(first, second).common.items()}


def deltas(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {key: patch.delta().double() for key, patch in parse(open_file(path), "sd1").patches.items()}


# the decomposition


@pytest.mark.parametrize("shape", [(12, 9), (96, 300), (300, 96), (256, 256)])
def test_the_decomposition_is_that_of_linalg_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = truncated_svd(matrix, 4)
    values = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(found.values.double(), values[:4], rtol=0.06)
    assert found.energy == pytest.approx(float(values.square().sum()), rel=1e-5)
    error = (matrix - found.left * found.values @ found.right).norm()
    assert float(error) <= 1.005 * float(values[4:].norm())
    assert math.sqrt(found.rest) == pytest.approx(float(error), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    power=st.floats(0, 1.6),
    floor=st.floats(0, 0.5),
    rank=st.sampled_from([1, 4, 16, 24]),
    columns=st.sampled_from([192, 500]),
    seed=st.integers(0, 99),
)
def test_the_error_is_within_a_two_hundredth_of_the_optimum(
    power: float, floor: float, rank: int, columns: int, seed: int
) -> None:
    values = torch.arange(1, 193, dtype=torch.float64).pow(-power) + floor
    matrix = spectrum_matrix(values, columns, seed)
    found = truncated_svd(matrix, rank, seed=seed)
    error = (matrix.double() - found.left.double() * found.values.double() @ found.right.double()).norm()
    assert float(error) <= 1.005 * float(values[rank:].norm()) + 1e-5 * float(values.norm())
    assert torch.allclose(found.left.T @ found.left, torch.eye(rank), atol=1e-4)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])  # the last one falls below what bf16 products can tell
def test_large_matrices_keep_the_bound_with_and_without_bf16(
    power: float, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubtool.ops import randomised_svd

    monkeypatch.setattr(randomised_svd, "_fast_halves", lambda: halves)
    values = torch.arange(1, 769, dtype=torch.float64).pow(-power)
    matrix = spectrum_matrix(values, 768, 1)
    found = truncated_svd(matrix, 16)
    error = (matrix.double() - found.left.double() * found.values.double() @ found.right.double()).norm()
    assert float(error) <= 1.005 * float(values[16:].norm())
    assert float(error) <= 1.001 * found.bound * float(values[16:].norm())
    assert math.sqrt(found.rest) == pytest.approx(float(error), rel=1e-2)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_matrix_of_low_rank_is_found_exactly(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(200, rank, generator=generator) @ torch.randn(rank, 300, generator=generator)
    found = truncated_svd(matrix, 8)
    up, down = balanced(found)
    assert float((up @ down - matrix).norm()) < 1e-5 * float(matrix.norm())


def test_both_factors_get_the_same_share_of_the_size() -> None:
    up, down = balanced(truncated_svd(torch.randn(64, 80), 8))
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)


def test_seeds_depend_on_the_name_and_fit_a_generator() -> None:
    assert seed_of(0, "a") != seed_of(0, "b") != seed_of(1, "b")
    assert 0 <= seed_of(7, "x") < 2**63


# sharing ranks out


def spectrum(*values: float) -> Spectrum:
    return Spectrum(values, sum(v * v for v in values), 0.0, (0.0,) * len(values))


def test_ranks_go_where_they_gain_most_for_a_byte() -> None:
    strong, weak = spectrum(10, 9, 1), spectrum(5, 4, 3)
    assert within([strong, weak], 40, [10, 10], [0, 0]) == [2, 2]
    assert within([strong, weak], 40, [30, 10], [0, 0]) == [1, 1]
    assert within([strong, weak], 15, [10, 10], [4, 4]) == [1, 0]
    assert within([strong, weak], 5, [10, 10], [0, 0]) == [0, 0]


def test_an_error_over_the_file_takes_the_fewest_ranks() -> None:
    strong, weak = spectrum(10, 1), spectrum(2, 1)
    total = 100 + 1 + 4 + 1
    assert least([strong, weak], math.sqrt(6 / total) + 1e-9, [1, 1]) == [1, 0]
    assert least([strong, weak], math.sqrt(2 / total) + 1e-9, [1, 1]) == [1, 1]
    assert least([strong, weak], 1e-9, [1, 1]) == [2, 2]


def test_the_rank_for_an_error_is_the_least_one() -> None:
    one = spectrum(3, 2, 1)
    assert [one.rank_for(error) for error in (0.99, 0.5, 0.2)] == [1, 2, 3]
    assert one.relative_error(1) == pytest.approx(math.sqrt(5 / 14))


@pytest.mark.parametrize(("text", "size"), [("100MB", 10**8), ("1.5 GiB", 3 << 29), ("2000", 2000), ("3k", 3000)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


# the whole way


def _table(parameter: str) -> bool:
    return parameter.endswith(("token_embedding.weight", "position_embedding.weight"))


def test_every_module_gets_its_best_approximation(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(4, dtype="fp32"))
    known, found = changes(base, tuned), deltas(done.output)
    reported = {one.name: one.error for one in done.report.modules}
    matrices = [key for key, change in known.items() if change.dim() > 1 and key[0] != "vae" and not _table(key[1])]
    assert len(found) == len(reported) == len(matrices)
    for component, parameter in matrices:
        change = known[component, parameter]
        module = parameter.removesuffix(".weight")
        values = torch.linalg.svdvals(change.flatten(1))
        error = float((found[component, module].reshape(change.shape) - change).norm() / change.norm())
        assert error <= 1.005 * float(values[4:].norm() / values.norm()) + 1e-6, module
        assert reported[f"{component}.{module}"] == pytest.approx(error, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_tuned_weights_come_back_within_the_reported_error(
    base: Path, tuned: Path, tmp_path: Path, dtype: str
) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(64, dtype=dtype))
    known, found = changes(base, tuned), deltas(done.output)
    for one in done.report.modules:
        component, _, module = one.name.partition(".")
        change = known[component, f"{module}.weight"]
        error = float((found[component, module].reshape(change.shape) - change).norm())
        assert error <= 1.1 * one.error * one.change + 1e-6, one.name
    assert done.report.error is not None
    assert done.report.error < 0.05


def test_factors_stay_in_their_range_and_alpha_is_the_rank(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(4))
    for patch in parse(open_file(done.output), "sd1").patches.values():
        assert isinstance(patch, LowRank)
        assert patch.alpha_value == patch.rank
        assert patch.up.dtype == "F16"
        assert compute(patch.up).norm() == pytest.approx(float(compute(patch.down).norm()), rel=0.01)


def test_equal_input_gives_equal_bytes_with_any_number_of_workers(base: Path, tuned: Path, tmp_path: Path) -> None:
    one, two, other = (tmp_path / f"{name}.safetensors" for name in "abc")
    run(base, tuned, one, request(4, workers=1))
    run(base, tuned, two, request(4, workers=3))
    assert one.read_bytes() == two.read_bytes()
    run(base, tuned, other, request(4, dtype="bf16"))
    assert other.read_bytes() != one.read_bytes()


def test_convolutions_come_with_locon_and_are_told_of_with_lora(base: Path, tuned: Path, tmp_path: Path) -> None:
    locon = run(base, tuned, tmp_path / "locon.safetensors", request(4, conv_rank=2))
    lora = run(base, tuned, tmp_path / "lora.safetensors", request(4, kind="lora"))
    ranks = {one.rank for one in locon.report.modules if len(one.shape) == 4 and one.shape[2] == 3}
    assert ranks == {2}
    assert all(one.shape[2:] in ((), (1, 1)) for one in lora.report.modules)
    told = lora.report.left["convolutions (--as locon)"]
    assert len(told) == len(locon.report.modules) - len(lora.report.modules)


def test_a_text_encoder_that_hardly_changed_is_kept(base: Path, tmp_path: Path) -> None:
    state = load_file(base)
    slight = {
        name: tensor + 1e-4 if name.endswith("q_proj.weight") and "transformer" in name else tensor
        for name, tensor in tune(state, parts=("model.diffusion_model.",)).items()
    }
    save_file(slight, tmp_path / "tuned.safetensors")
    done = run(base, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", request(4))
    parts = done.report.components
    assert parts["text_encoder"].changed == sum(
        name.endswith("q_proj.weight") for name in state if "transformer" in name
    )
    assert parts["text_encoder"].unchanged > 0
    assert parts["unet"].unchanged == 0
    assert {key[0] for key in deltas(done.output)} == {"unet", "text_encoder"}


def test_what_did_not_change_is_not_written(base: Path, tmp_path: Path) -> None:
    save_file(tune(load_file(base), parts=("cond_stage_model",)), tmp_path / "tuned.safetensors")
    done = run(base, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", request(4))
    assert {key[0] for key in deltas(done.output)} == {"text_encoder"}
    assert done.report.components["unet"].changed == 0
    assert done.report.components["unet"].unchanged > 0
    assert not any(name.startswith("vae") for names in done.report.left.values() for name in names)


def test_a_copy_in_another_dtype_did_not_change(base: Path, tmp_path: Path) -> None:
    wide = {name: tensor * 1.0001 if tensor.is_floating_point() else tensor for name, tensor in load_file(base).items()}
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in wide.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(ConversionError, match="does not differ"):
        run(tmp_path / "wide.safetensors", tmp_path / "half.safetensors", tmp_path / "out.safetensors", request(4))
    assert not (tmp_path / "out.safetensors").exists()


def test_layouts_and_containers_of_the_inputs_do_not_matter(
    base: Path, tuned: Path, folder: Path, tmp_path: Path
) -> None:
    expected, found = tmp_path / "single.safetensors", tmp_path / "mixed.safetensors"
    run(base, tuned, expected, request(4))
    torch.save({"state_dict": load_file(tuned)}, tmp_path / "tuned.ckpt")
    run(folder / "sd1", tmp_path / "tuned.ckpt", found, request(4))  # a diffusers folder and a pickle
    first, second = load_file(expected), load_file(found)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "kohya/ldm", "peft"])
def test_every_layout_holds_the_same_changes(base: Path, tuned: Path, tmp_path: Path, layout: str) -> None:
    only = {"modules": ("unet.*",)} if layout == "peft" else {}
    run(base, tuned, tmp_path / "kohya.safetensors", request(4, **only))
    run(base, tuned, tmp_path / "other", request(4, layout=layout, **only))
    first, second = deltas(tmp_path / "kohya.safetensors"), deltas(tmp_path / "other")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].flatten(), second[key].flatten()) for key in first)


def test_modules_that_the_layout_fuses_are_decomposed_as_one() -> None:
    parts = [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    shapes = {**dict.fromkeys(parts, (3072, 3072)), "transformer_blocks.0.attn.to_out.0": (3072, 3072)}
    weights: dict[tuple[str, str], tuple[Expr, Expr]] = {}
    for path, shape in shapes.items():
        both = [Read(TensorRef(path, "F16", shape, Path(name), 0, 2 * math.prod(shape))) for name in ("base", "tuned")]
        weights["transformer", f"{path}.weight"] = (both[0], both[1])
    pairs = Pairs("flux1", weights, (), ())
    units = sort(pairs, request(4)).units
    assert [unit.parts for unit in units] == [tuple(parts), ("transformer_blocks.0.attn.to_out.0",)]
    assert [unit.parts for unit in sort(pairs, request(4, layout="diffusers")).units] == [(path,) for path in shapes]
    found = Decomposed(units[0], spectrum(4, 3, 2), values((9216, 3), 1, "F16"), values((3, 3072), 2, "F16"))
    emission = emit(Adapter("flux1", dict(low_rank([(found, 2)]))), "kohya")
    shaped = {key.partition(".")[2]: tensor.shape for key, tensor in emission.tensors.items()}
    assert shaped == {"lora_up.weight": (9216, 2), "lora_down.weight": (2, 3072), "alpha": ()}
    assert not emission.losses


def test_full_differences_give_the_tuned_weights_back(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", Request(kind="full", dtype="fp32"))
    adapter = parse(open_file(done.output), "sd1")
    known = changes(base, tuned)
    for (component, module), patch in adapter.patches.items():
        bias = patch.bias_delta()
        if bias is not None:
            assert torch.allclose(bias.double(), known[component, f"{module}.bias"], atol=1e-6)
        if patch.weight_shape is not None:
            assert torch.allclose(patch.delta().double(), known[component, f"{module}.weight"], atol=1e-6)
    assert len(done.report.dense) == sum(key[0] != "vae" for key in known)


def test_norms_and_biases_come_along_when_asked(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(4, dense=True, dtype="fp32"))
    known = changes(base, tuned)
    patches = parse(open_file(done.output), "sd1").patches
    bias = patches["unet", "conv_in"].bias_delta()
    assert bias is not None
    assert torch.allclose(bias.double(), known["unet", "conv_in.bias"], atol=1e-6)
    assert patches["unet", "conv_norm_out"].algorithm == "norm"
    assert "norms and biases (--dense)" not in done.report.left


def test_an_error_is_reached_in_every_module(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(budget=Budget(error=0.3), dtype="fp32"))
    assert not done.report.missed
    assert all(one.error <= 0.3 for one in done.report.modules)
    known = changes(base, tuned)
    for one in done.report.modules:  # one rank less would not do
        component, _, module = one.name.partition(".")
        values = torch.linalg.svdvals(known[component, f"{module}.weight"].flatten(1))
        assert float(values[one.rank - 1 :].norm() / values.norm()) > 0.3 / 1.005


def test_an_error_that_the_ranks_allowed_do_not_reach_is_told(base: Path, tuned: Path, tmp_path: Path) -> None:
    budget = Budget(error=0.01, max_rank=2)
    done = run(base, tuned, tmp_path / "out.safetensors", request(budget=budget))
    assert done.report.missed
    assert max(one.rank for one in done.report.modules) == 2


def test_over_the_file_the_same_error_costs_less(base: Path, tuned: Path, tmp_path: Path) -> None:
    each = run(base, tuned, tmp_path / "a.safetensors", request(budget=Budget(energy=0.9)))
    across = run(base, tuned, tmp_path / "b.safetensors", request(budget=Budget(energy=0.9, across=True)))
    assert across.size < each.size
    assert across.report.error is not None
    assert across.report.error <= math.sqrt(0.1) * 1.005


@pytest.mark.parametrize("size", [150_000, 400_000])
def test_a_size_is_kept_and_used(base: Path, tuned: Path, tmp_path: Path, size: int) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(budget=Budget(size=size)))
    same = run(base, tuned, tmp_path / "same.safetensors", request(3))
    assert 0.8 * size < done.size <= size
    if same.size <= size:
        assert done.report.error is not None
        assert same.report.error is not None
        assert done.report.error < same.report.error


def test_only_the_modules_asked_for_are_taken(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(4, modules=("unet.*.attn2.*",)))
    assert done.report.modules
    assert all(".attn2." in one.name for one in done.report.modules)
    assert "not asked for (--modules)" in done.report.left


# what the output says


def test_metadata_names_rank_family_recipe_and_parents(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(4, conv_rank=2))
    said = open_file(done.output).metadata
    assert said["ss_network_module"] == "networks.lora"
    assert said["ss_network_dim"] == "4"
    assert json.loads(said["ss_network_args"]) == {"conv_alpha": "2", "conv_dim": "2"}
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.license"] == "CreativeML"
    recipe = json.loads(said["hubtool.recipe"])
    assert recipe["operation"] == "extract"
    hashes = {one["role"]: one["sha256"] for one in recipe["inputs"]}
    assert hashes == {
        "base": hashlib.sha256(base.read_bytes()).hexdigest(),
        "tuned": hashlib.sha256(tuned.read_bytes()).hexdigest(),
    }
    assert str(base.parent) not in json.dumps(dict(said))


def test_the_output_is_recognised_as_what_it_is(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(base, tuned, tmp_path / "out.safetensors", request(4))
    parsed = parse_file(open_file(done.output), "sd1")
    assert {patch.algorithm for patch in parsed.adapter.patches.values()} == {"lora", "locon"}
    assert str(parsed.layout).startswith("kohya")


# refusals


def test_nan_in_an_input_is_named(base: Path, tmp_path: Path) -> None:
    state = tune(load_file(base))
    name = next(name for name in state if name.endswith("attn1.to_q.weight"))
    state[name][0, 0] = float("nan")
    save_file(state, tmp_path / "tuned.safetensors")
    with pytest.raises(BadValues, match=name.replace(".", r"\.")):
        run(base, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", request(4))
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.safetensors"]


def test_another_shape_is_named_with_both_shapes(base: Path, tmp_path: Path) -> None:
    state = load_file(base)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    shape = tuple(state[name].shape)
    state[name] = torch.zeros(shape[0], 9, 3, 3)
    save_file(state, tmp_path / "tuned.safetensors")
    with pytest.raises(ShapeMismatch, match=r"conv_in.weight is \[.*\] in the base and \[\d+, 9, 3, 3\]"):
        actions.prepare(base, tmp_path / "tuned.safetensors", request(4))


def test_quantised_weights_are_refused(base: Path, tmp_path: Path) -> None:
    state = load_file(base)
    state["model.diffusion_model.out.2.scale_weight"] = torch.ones(())
    save_file(state, tmp_path / "scaled.safetensors")
    with pytest.raises(Unsupported, match="quantised"):
        actions.prepare(base, tmp_path / "scaled.safetensors", request(4))


def test_another_family_is_refused_before_any_number_is_read(base: Path, tmp_path: Path) -> None:
    other = checkpoints.single("sdxl", tmp_path)
    with pytest.raises(ConversionError, match=r"sdxl, .* sd1"):
        actions.prepare(base, other, request(4))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"budget": Budget()}, "how many ranks"),
        ({"kind": "full"}, "has no rank"),
        ({"kind": "tucker"}, "no such kind"),
        ({"dtype": "int8"}, "no such dtype"),
        ({"conv_rank": 0}, "at least 1"),
    ],
)
def test_requests_without_sense_are_refused(base: Path, tuned: Path, fields: Mapping[str, Any], text: str) -> None:
    with pytest.raises(UsageProblem, match=text):
        actions.prepare(base, tuned, replace(request(4), **fields))


def test_an_existing_output_is_kept_and_found_out_at_once(base: Path, tuned: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        actions.extract(actions.prepare(base, tuned, request(4)), output)
    with pytest.raises(UsageProblem, match="is an input"):
        actions.extract(actions.prepare(base, tuned, request(4)), tuned, Options(force=True))
    assert output.read_bytes() == b"mine"


def test_a_device_that_is_not_there_is_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="cannot compute on 'quantum'"):
        run(base, tuned, tmp_path / "out.safetensors", request(4, device="quantum"))
    assert not list(tmp_path.iterdir())


def test_a_layout_without_a_place_for_something_is_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    task = actions.prepare(base, tuned, Request(kind="full", layout="peft", modules=("unet.*",)))
    with pytest.raises(LossyConversion, match="no place"):
        actions.extract(task, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# the command


def test_the_command_reports_as_json(base: Path, tuned: Path, tmp_path: Path) -> None:
    words = ["extract", str(base), str(tuned), "--rank", "4", "-o", str(tmp_path / "out.safetensors"), "--json"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    known = json.loads(result.stdout)
    assert known["ranks"] == [4]
    assert 0 < known["error"] < 1
    assert known["size"] == (tmp_path / "out.safetensors").stat().st_size
    assert set(known["components"]) == {"unet", "text_encoder", "vae"}


def test_a_dry_run_reads_headers_and_writes_nothing(base: Path, tuned: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["extract", str(base), str(tuned), "--rank", "4", "--dry-run"])
    assert result.exit_code == 0
    assert "modules to decompose" in result.stdout
    result = CliRunner().invoke(cli, ["extract", str(base), str(tuned), "-o", str(tmp_path / "x"), "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["code"] == "usage"
    assert not list(tmp_path.iterdir())


def test_the_command_tells_what_was_left_out(base: Path, tuned: Path, tmp_path: Path) -> None:
    words = ["extract", str(base), str(tuned), "--budget", "200kB", "-o", str(tmp_path / "out.safetensors")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "left out, though changed" in result.stdout
    assert "of its energy kept" in result.stdout


def test_the_recipe_gives_the_same_bytes_again(base: Path, tuned: Path, tmp_path: Path) -> None:
    wanted = request(
        budget=Budget(energy=0.8, max_rank=6), kind="lora", modules=("unet.*",), format="safetensors", seed=3
    )
    done = run(base, tuned, tmp_path / "out.safetensors", wanted)
    recipe = of_metadata(open_file(done.output).metadata)
    assert recipe is not None
    run_recipe(recipe, tmp_path / "again.safetensors", RunOptions(search=(base.parent,)))
    assert (tmp_path / "again.safetensors").read_bytes() == done.output.read_bytes()
