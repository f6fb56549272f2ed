"""diff: what differs between two files, against formulas on whole matrices."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from hubtool.actions.diff import diff
from hubtool.adapters.dense import Dense
from hubtool.adapters.hadamard import Hadamard
from hubtool.adapters.ir import Adapter, Embedding
from hubtool.adapters.low_rank import LowRank
from hubtool.cli.main import cli
from hubtool.errors import ConversionError, UsageProblem
from hubtool.ops.diff.adapters import compare
from hubtool.ops.diff.report import Moments
from hubtool.tensors.evaluate import compute
from hubtool.tensors.expr import Concat, Literal
from tests.support import adapters, checkpoints

KEY = ("unet", "mid_block.attentions.0.proj_in")


def literal(tensor: torch.Tensor) -> Literal:
    return Literal(tensor.float().contiguous().numpy().tobytes(), "F32", tuple(tensor.shape))


def low_rank(rank: int, seed: int, shape: tuple[int, int] = (24, 16), alpha: float | None = None) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(size, generator=generator) for size in ((shape[0], rank), (rank, shape[1])))
    return LowRank(literal(up), literal(down), alpha_value=alpha)


def adapter(*patches: Any, **fields: Any) -> Adapter:
    return Adapter(
        "sd1", MappingProxyType({(KEY[0], f"{KEY[1]}{n}"): patch for n, patch in enumerate(patches)}), **fields
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.single("sd1", tmp_path_factory.mktemp("diff"))


# adapters


def test_low_rank_changes_are_compared_as_whole_matrices() -> None:
    first, second = low_rank(4, 1, alpha=2.0), low_rank(3, 2)
    (entry,) = compare(adapter(first), adapter(second), None, None).entries
    a, b = first.delta().double(), second.delta().double()
    assert entry.moments.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)
    assert entry.moments.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-5)
    assert entry.moments.most == pytest.approx(float((b - a).abs().max()), rel=1e-5)
    assert entry.ranks == (4, 3)


def test_principal_angles_are_those_between_the_spaces() -> None:
    first, second = low_rank(3, 1), low_rank(2, 2)
    (entry,) = compare(adapter(first), adapter(second), None, None).entries
    spaces = [torch.linalg.qr(compute(patch.up).double()).Q for patch in (first, second)]
    cosines = torch.linalg.svdvals(spaces[0].T @ spaces[1])
    angles = [math.degrees(math.acos(float(cosine))) for cosine in cosines]
    assert entry.outputs is not None
    assert entry.outputs.smallest == pytest.approx(min(angles), abs=1e-4)
    assert entry.outputs.largest == pytest.approx(max(angles), abs=1e-4)
    assert entry.outputs.overlap == pytest.approx(float(cosines.square().mean()), rel=1e-5)


def test_other_factors_of_the_same_change_are_equal() -> None:
    first = low_rank(4, 1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    up, down = compute(first.up), compute(first.down)
    order = torch.tensor([2, 0, 3, 1])
    permuted = LowRank(literal(up[:, order] * 0.5), literal(down[order]), alpha_value=8.0)
    assert compare(adapter(first), adapter(permuted), None, None).equal
    turned = LowRank(literal(up.double() @ turn), literal(turn.T @ down.double()))
    found = compare(adapter(first), adapter(turned), None, None)
    assert found.similarity == pytest.approx(1.0)
    assert found.entries[0].outputs is not None
    assert found.entries[0].outputs.largest < 0.1


def test_a_zero_change_has_no_angles_and_no_cosine() -> None:
    nothing = LowRank(literal(torch.zeros(24, 2)), literal(torch.zeros(2, 16)))
    (entry,) = compare(adapter(nothing), adapter(low_rank(2, 1)), None, None).entries
    assert entry.outputs is None
    assert entry.moments.cosine is None
    assert entry.moments.relative is None
    assert compare(adapter(nothing), adapter(nothing), None, None).equal


def test_algorithms_that_are_products_are_compared_with_each_other() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = ((24, 2), (2, 16), (24, 2), (2, 16))
    w1_a, w1_b, w2_a, w2_b = (literal(torch.randn(size, generator=generator)) for size in sizes)
    loha = Hadamard(w1_a, w1_b, w2_a, w2_b)
    full = Dense(diff=literal(loha.delta()))
    (entry,) = compare(adapter(loha), adapter(low_rank(3, 1)), None, None).entries
    a, b = loha.delta().double(), low_rank(3, 1).delta().double()
    assert entry.moments.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)
    (entry,) = compare(adapter(loha), adapter(full), None, None).entries
    assert entry.moments.relative == pytest.approx(0.0, abs=1e-6)


def test_kinds_that_need_the_base_are_compared_by_their_tensors_and_say_so() -> None:
    scale = literal(torch.rand(24, 1) + 0.5)
    first = replace(low_rank(2, 1), dora_scale=scale)
    second = replace(low_rank(2, 2), dora_scale=scale)
    (entry,) = compare(adapter(first), adapter(second), None, None).entries
    assert entry.note is not None
    assert "base weight" in entry.note
    found = compare(adapter(first), adapter(low_rank(2, 1)), None, None)
    assert list(found.unknown or {}) == [f"{KEY[0]}.{KEY[1]}0"]
    assert not found.equal


def test_biases_and_tokens_count() -> None:
    first = replace(low_rank(2, 1), diff_b=literal(torch.ones(24)))
    (entry,) = compare(adapter(first), adapter(low_rank(2, 1)), None, None).entries
    assert entry.moments.change == pytest.approx(24.0)
    tokens = (Embedding("<a>", "text_encoder", literal(torch.ones(2, 8))),)
    found = compare(adapter(low_rank(2, 1), embeddings=tokens), adapter(low_rank(2, 1)), None, None)
    assert found.only_first == ("text_encoder.<a>",)


def test_a_module_of_one_side_counts_as_a_change_from_nothing() -> None:
    one, more = adapter(low_rank(2, 1)), adapter(low_rank(2, 1), low_rank(2, 2))
    found = compare(one, more, None, None)
    a, b = low_rank(2, 1).delta().double().norm(), low_rank(2, 2).delta().double().norm()
    assert found.only_second == (f"{KEY[0]}.{KEY[1]}1",)
    assert found.similarity == pytest.approx(float(a / (a * a + b * b).sqrt()), rel=1e-5)


def test_weights_of_other_sizes_are_listed() -> None:
    found = compare(adapter(low_rank(2, 1)), adapter(low_rank(2, 1, (24, 8))), None, None)
    assert [one.to_json() for one in found.shapes] == [
        {"name": f"{KEY[0]}.{KEY[1]}0", "first": [24, 16], "second": [24, 8]}
    ]
    assert not found.equal


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "kohya/ldm", "peft/diffusers"])
def test_an_adapter_equals_itself_in_another_layout(tmp_path: Path, layout: str) -> None:
    made = adapters.make("sd1", ranks=(4, 2), alphas=(2.0,) if layout != "peft/diffusers" else (None,))
    first = adapters.write(made, tmp_path / "a.safetensors", "kohya")
    second = adapters.write(made, tmp_path / "b.safetensors", layout)
    found = diff(first, second)
    assert found.equal
    assert found.similarity == 1.0
    assert len(found.entries) == len(made.patches)


def test_adapters_of_two_families_are_refused(tmp_path: Path) -> None:
    first, second = (
        adapters.write(adapters.make(f), tmp_path / f"{f}.safetensors", "kohya") for f in ("sdxl", "flux1")
    )
    with pytest.raises(ConversionError, match=r"sdxl.*flux1"):
        diff(first, second)


# checkpoints and other files


def test_checkpoints_are_compared_by_canonical_names(base: Path, tmp_path: Path) -> None:
    state = load_file(base)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = state[name] * 1.5
    save_file(state, tmp_path / "tuned.safetensors")
    found = diff(base, tmp_path / "tuned.safetensors")
    (entry,) = found.largest(5)
    assert entry.name == "unet.conv_in.weight"
    assert entry.moments.relative == pytest.approx(0.5)
    assert entry.moments.cosine == pytest.approx(1.0)
    assert entry.moments.most == pytest.approx(float(load_file(base)[name].abs().max()) / 2, rel=1e-5)


def test_a_folder_equals_the_single_file_it_became(base: Path) -> None:
    assert diff(base.parent / "sd1", base).equal


def test_missing_parts_shapes_and_dtypes_are_listed(base: Path, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in load_file(base).items() if not name.startswith("first_stage_model")}
    half, other = "model.diffusion_model.out.2.bias", "model.diffusion_model.out.2.weight"
    state[half] = state[half].bfloat16()
    state[other] = state[other][:, :2].clone()
    save_file(state, tmp_path / "other.safetensors")
    found = diff(base, tmp_path / "other.safetensors")
    assert found.only_first
    assert all(name.startswith("vae.") for name in found.only_first)
    assert [one.name for one in found.dtypes] == ["unet.conv_out.bias"]
    assert [one.name for one in found.shapes] == ["unet.conv_out.weight"]
    assert found.similarity is not None
    assert found.similarity < 1


def test_nan_is_a_difference(base: Path, tmp_path: Path) -> None:
    state = load_file(base)
    state["model.diffusion_model.out.2.bias"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    found = diff(base, tmp_path / "nan.safetensors")
    assert not found.equal
    assert found.largest(1)[0].name == "unet.conv_out.bias"
    assert diff(tmp_path / "nan.safetensors", tmp_path / "nan.safetensors").equal


def test_other_files_are_compared_by_their_keys(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.arange(4)}, tmp_path / "a.safetensors")
    save_file({"a": torch.ones(3) * 2, "c": torch.zeros(0)}, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (found.kind, found.only_first, found.only_second) == ("tensors", ("b",), ("c",))
    assert found.entries[0].moments.relative == pytest.approx(1.0)


def test_an_adapter_against_a_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    lora = adapters.write(adapters.make("sd1"), tmp_path / "a.safetensors", "kohya")
    with pytest.raises(UsageProblem, match="nothing in common"):
        diff(lora, base)


def test_sums_of_pieces_are_those_of_the_whole() -> None:
    assert Moments(1, 2, 3, 4, 5) + Moments(1, 1, 1, 1, 9) == Moments(2, 3, 4, 5, 9)
    assert math.isnan((Moments(most=math.nan) + Moments(most=1)).most)


def test_tiles_of_a_fused_tensor_are_compared_in_step() -> None:
    parts = tuple(literal(torch.full((3, 4), float(n))) for n in range(3))
    whole = literal(torch.cat([compute(part) for part in parts]))
    from hubtool.ops.diff.tensors import compare as compare_tensors

    found = compare_tensors("tensors", None, {("", "a"): Concat(parts)}, {("", "a"): whole})
    assert found.equal


# the command


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["diff", *map(str, words)])


def test_exit_code_0_is_equal_and_1_is_different(base: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "b.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path / "a.safetensors").exit_code == 0
    result = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert result.exit_code == 1
    assert "different: 1 of 1 tensors" in result.stdout


def test_json_has_every_module(tmp_path: Path) -> None:
    first, second = adapters.make("sd1", seed=1), adapters.make("sd1", seed=2)
    paths = [adapters.write(one, tmp_path / f"{n}.safetensors", "kohya") for n, one in enumerate((first, second))]
    result = run(*paths, "--json")
    assert result.exit_code == 1
    known = json.loads(result.stdout)
    assert known["kind"] == "adapters"
    assert len(known["entries"]) == len(first.patches) == known["different"]
    assert {"outputs", "inputs"} == set(known["entries"][0]["angles"])
    assert set(known["components"]) == set(first.components())
    shown = run(*paths, "--top", "3").stdout
    assert shown.count("unet.") + shown.count("text_encoder.") == 3
