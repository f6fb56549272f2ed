"""Merging adapters without their base, as files: sums, strengths, layouts, refusals, and the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

torch = pytest.importorskip("torch")


from hubtool.adapters.fusing import same  # noqa: E402
from hubtool.adapters.ir import Adapter, Embedding  # noqa: E402
from hubtool.errors import BadValues, ConversionError, ShapeMismatch, Unsupported, UsageProblem  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.layouts.parse import parse_file  # noqa: E402
from hubtool.ops.execute import execute  # noqa: E402
from hubtool.ops.factor_space.budget import Budget  # noqa: E402
from hubtool.ops.merge_adapters import Request, Source, plan  # noqa: E402
from hubtool.ops.strengths import Strengths, parse  # noqa: E402
from tests.support import adapters, tiny  # noqa: E402
from tests.support.merging import deltas, distance, low_rank, merge, merged, mixed_pair, style, total  # noqa: E402


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return mixed_pair(tmp_path_factory.mktemp("pair"))


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
    assert report.error == pytest.approx(distance(deltas(out), wanted), rel=0.2, abs=2e-7)


def test_one_input_at_strength_one_is_copied_byte_for_byte(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for source in pair:
        out = tmp_path / source.name
        _, report = merge(out, [(source, 1.0)])
        before, after = open_file(source).tensors, open_file(out).tensors
        assert {key: _bytes(ref) for key, ref in after.items()} == {key: _bytes(ref) for key, ref in before.items()}
        assert {one.how for one in report.modules.values()} == {"copied"}


def _bytes(ref: Any) -> tuple[str, tuple[int, ...], bytes]:
    return ref.dtype, ref.shape, ref.path.read_bytes()[ref.start : ref.end]


def test_concat_keeps_every_number_where_the_scales_are_equal(tmp_path: Path) -> None:
    a, b = (style(tmp_path, n, ranks=(r,), alphas=(r / 2,), dtype="F16", seed=r) for n, r in (("a", 4), ("b", 6)))
    out = tmp_path / "out.safetensors"
    _, report = merge(out, [(a, 0.3), (b, -0.3)], method="concat")
    assert distance(deltas(out), total((0.3, deltas(a)), (-0.3, deltas(b)))) < 1e-7
    assert {row.how for row in report.modules.values()} == {"copied"}
    for patch in parse_file(open_file(out)).adapter.patches.values():
        assert (patch.rank, patch.alpha_value) == (10, pytest.approx(1.5))


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


# --- strengths ---------------------------------------------------------------------------------------------------------


def test_strengths_count_by_component_and_block(tmp_path: Path) -> None:
    modules = [key for key in adapters.attention("sd1") if key[1].endswith("attn1.to_q") or key[0] != "unet"][:30]
    a, b = (style(tmp_path, name, modules=modules, ranks=(2,), seed=seed) for name, seed in (("a", 1), ("b", 500)))
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


# --- what comes along --------------------------------------------------------------------------------------------------


def test_token_vectors_of_all_inputs_are_kept_and_a_clash_is_told(tmp_path: Path) -> None:
    def bundle(name: str, seed: int, *tokens: str) -> Path:
        words = tuple(
            Embedding(token, "text_encoder", adapters.values((1, 768), seed + len(token))) for token in tokens
        )
        made = replace(adapters.make("sd1", adapters.attention("sd1", 1), ranks=(2,), seed=seed), embeddings=words)
        return adapters.write(made, tmp_path / f"{name}.safetensors", "lycoris")

    a, b = bundle("a", 1, "cat", "bird"), bundle("b", 50, "cat", "horse")
    made, _ = merge(tmp_path / "out.safetensors", [(a, 1.0), (b, 1.0)])
    found = parse_file(open_file(tmp_path / "out.safetensors")).adapter.embeddings
    assert sorted(one.token or "" for one in found) == ["bird", "cat", "horse"]
    first = next(one for one in parse_file(open_file(a)).adapter.embeddings if one.token == "cat")
    assert same(first.vectors, next(one.vectors for one in found if one.token == "cat"))
    assert "token cat: the first input's vectors are kept" in made.notes


@pytest.mark.parametrize("name", ["out.pt", "out"])
def test_torch_files_and_peft_folders_are_written(tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    container, layout = (None, "peft") if name == "out" else ("torch-zip", None)
    request: dict[str, Any] = {"layout": layout, "format": container, "component": "unet", "budget": Budget(rank=4)}
    merge(tmp_path / name, [(pair[0], 0.5), (pair[1], 0.5)], **request)
    merge(tmp_path / "plain.safetensors", [(pair[0], 0.5), (pair[1], 0.5)], component="unet", budget=Budget(rank=4))
    wanted = deltas(tmp_path / "plain.safetensors")
    assert {component for component, _ in wanted} == {"unet"}
    assert distance(deltas(tmp_path / name), wanted) < 1e-7


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_adapters_of_different_families_are_refused_by_name(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    other = adapters.write(adapters.make("sdxl", ranks=(2,)), tmp_path / "xl.safetensors", "kohya")
    with pytest.raises(ConversionError, match=r"a\.safetensors is sd1.*xl\.safetensors is sdxl|sdxl"):
        plan([Source(open_file(pair[0])), Source(open_file(other))], Request())


def test_a_module_of_another_size_is_refused_with_both_shapes() -> None:
    with pytest.raises(ShapeMismatch, match=r"unet\.x.*\(8, 6\).*\(8, 7\)"):
        merged({0: low_rank((8, 6), 2), 1: low_rank((8, 7), 2)}, (1.0, 1.0))


def test_nan_in_a_module_that_is_only_copied_is_refused_too(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    broken, name = with_nan(pair[0], tmp_path)
    with pytest.raises(BadValues, match=name):
        merge(tmp_path / "out.safetensors", [(broken, 1.0)])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


def with_nan(source: Path, folder: Path) -> tuple[Path, str]:
    """A copy of a LoRA with a NaN, and a pattern of the tensor's name."""
    data = bytearray(source.read_bytes())
    refs = open_file(source).tensors.items()
    ref = next(ref for key, ref in refs if key.endswith("lora_up.weight") and "unet" in key)
    data[ref.start : ref.start + 2] = b"\x00\x7e"
    broken = folder / "broken.safetensors"
    broken.write_bytes(data)
    return broken, ref.name.replace(".", r"\.")


@pytest.mark.parametrize("rank", [None, 2])
def test_nan_is_refused_with_the_tensors_name_and_nothing_is_left_behind(
    tmp_path: Path, pair: tuple[Path, Path], rank: int | None
) -> None:
    broken, name = with_nan(pair[0], tmp_path)
    with pytest.raises(BadValues, match=name):
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
