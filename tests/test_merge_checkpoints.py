"""Checkpoints are merged by their formula whatever their containers and layouts are, and written as the first of them is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from hubtool.errors import BadValues, ConversionError, RecognitionError, ShapeMismatch, Unsupported, UsageProblem  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.ops.execute import execute  # noqa: E402
from hubtool.ops.merge_checkpoints import Report, Request, plan  # noqa: E402
from hubtool.ops.strengths import parse  # noqa: E402
from tests.support.checkpoints import State, convert, loaded, saved, single  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a``, ``b`` and ``c``: SD1 as single files in fp16, around one model."""
    folder = tmp_path_factory.mktemp("models")
    start = load_file(single("sd1", folder))
    torch.manual_seed(1)
    for name in "abc":
        save_file({key: near(key, tensor, name) for key, tensor in start.items()}, folder / f"{name}.safetensors")
    return folder


def near(key: str, tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return (tensor + (0.0 if name == "c" else 0.05) * torch.randn(tensor.shape)).half()


def state(folder: Path, name: str) -> State:
    return load_file(folder / f"{name}.safetensors")


def strengths(*texts: str) -> dict[str, Any]:
    return {"strengths": tuple(parse([text]) for text in texts)}


def merge(
    output: Path, *paths: Path, base: Path | None = None, workers: int | None = None, **asked: Any
) -> tuple[Any, Report]:
    files = [open_file(path) for path in paths]
    made, report = plan(files, Request(**asked), None if base is None else open_file(base))
    execute(made, output, workers=workers)
    return made, report


def rounded(expected: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return expected.to(like.dtype)


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal but for the last bit, where fp32 and fp64 round a sum apart."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape, key
        if tensor.is_floating_point():
            torch.testing.assert_close(found[key].double(), tensor.double(), rtol=2e-3, atol=1e-6, msg=key)
        else:
            assert torch.equal(found[key], tensor)


def test_a_weighted_sum_is_the_formula_rounded_once(made: Path, tmp_path: Path) -> None:
    _, report = merge(tmp_path / "o.safetensors", made / "a.safetensors", made / "b.safetensors", **strengths("0.3"))
    a, b, found = state(made, "a"), state(made, "b"), load_file(tmp_path / "o.safetensors")
    apart, total = 0, 0
    for key, tensor in a.items():
        if tensor.is_floating_point():
            exact = 0.7 * tensor.double() + 0.3 * b[key].double()
            torch.testing.assert_close(found[key].double(), exact, rtol=2**-10, atol=2**-20)
            apart, total = apart + int((exact.half() != found[key]).sum()), total + tensor.numel()
    assert apart < total * 1e-2  # fp32 and fp64 round apart only where a sum lies between two halves
    assert report.matched == sum(tensor.is_floating_point() for tensor in a.values())
    assert not report.kept


def test_the_output_has_the_names_the_order_and_the_shapes_of_the_first_input(made: Path, tmp_path: Path) -> None:
    merge(tmp_path / "o.safetensors", made / "a.safetensors", made / "b.safetensors")
    before, after = (open_file(path).tensors for path in (made / "a.safetensors", tmp_path / "o.safetensors"))
    in_file = sorted(before.values(), key=lambda ref: ref.start)
    assert [(ref.name, ref.dtype, ref.shape) for ref in sorted(after.values(), key=lambda ref: ref.start)] == [
        (ref.name, ref.dtype, ref.shape) for ref in in_file
    ]


@pytest.mark.parametrize("first", ["file", "folder"])
def test_a_single_file_and_a_diffusers_folder_merge_into_either(made: Path, tmp_path: Path, first: str) -> None:
    convert(made / "b.safetensors", tmp_path / "b", "diffusers")
    convert(made / "a.safetensors", tmp_path / "a", "diffusers")
    reference = tmp_path / "reference.safetensors"
    merge(reference, made / "a.safetensors", made / "b.safetensors", **strengths("0.25"))
    if first == "file":
        _, report = merge(tmp_path / "o.safetensors", made / "a.safetensors", tmp_path / "b", **strengths("0.25"))
        assert (tmp_path / "o.safetensors").read_bytes() == reference.read_bytes()
        assert not report.kept
        return
    merge(tmp_path / "o", tmp_path / "a", made / "b.safetensors", **strengths("0.25"))
    convert(reference, tmp_path / "expected", "diffusers")
    found, expected = loaded(tmp_path / "o"), loaded(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for component, own in expected.items():
        assert_close(found[component], own)
    assert (tmp_path / "o" / "model_index.json").read_bytes() == (tmp_path / "a" / "model_index.json").read_bytes()


def test_fused_tensors_of_one_layout_meet_their_parts_in_another(tmp_path: Path) -> None:
    """SD2's text encoder has one in_proj for q, k and v as a single file, and three matrices in a folder."""
    one = single("sd2", tmp_path)
    start = load_file(one)
    torch.manual_seed(2)
    other = {k: v + 0.1 * torch.randn(v.shape) if v.is_floating_point() else v for k, v in start.items()}
    save_file(other, tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "b", "diffusers", family="sd2")
    _, report = merge(tmp_path / "o.safetensors", one, tmp_path / "b", family="sd2", **strengths("0.5"))
    found = load_file(tmp_path / "o.safetensors")
    fused = [key for key in start if key.endswith("in_proj_weight")]
    assert fused
    for key in fused:
        torch.testing.assert_close(found[key], (start[key] + other[key]) / 2)
    assert report.merged["text_encoder"]


def test_strengths_may_differ_inside_a_fused_tensor(tmp_path: Path) -> None:
    one = single("sd2", tmp_path)
    start = load_file(one)
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in start.items()}, tmp_path / "b.safetensors")
    text = "0,text_encoder:*.q_proj=1,text_encoder:*.v_proj=0.5"
    merge(tmp_path / "o.safetensors", one, tmp_path / "b.safetensors", family="sd2", **strengths(text))
    found = load_file(tmp_path / "o.safetensors")
    key = next(key for key in start if key.endswith("in_proj_weight"))
    third = start[key].shape[0] // 3
    change = found[key] - start[key]
    means = [float(change[i * third : (i + 1) * third].mean()) for i in range(3)]
    assert means == pytest.approx([1, 0, 0.5], abs=1e-6)


def test_strengths_by_component_and_block_leave_the_rest_as_raw_bytes(made: Path, tmp_path: Path) -> None:
    text = "0,unet=0.5,unet:down_blocks.0.*=1"
    _, report = merge(tmp_path / "o.safetensors", made / "a.safetensors", made / "b.safetensors", **strengths(text))
    a, b, found = state(made, "a"), state(made, "b"), load_file(tmp_path / "o.safetensors")
    unet = "model.diffusion_model."
    assert torch.equal(
        found[f"{unet}input_blocks.1.0.in_layers.2.weight"], b[f"{unet}input_blocks.1.0.in_layers.2.weight"]
    )
    key = f"{unet}middle_block.0.in_layers.2.weight"
    torch.testing.assert_close(found[key].float(), (a[key].float() + b[key].float()) / 2, rtol=2e-3, atol=1e-6)
    others = [key for key in a if not key.startswith(unet)]
    assert all(torch.equal(found[key], a[key]) for key in others)
    assert report.copied["vae"] == sum(key.startswith("first_stage_model.") for key in a)
    assert set(report.merged) == {"unet"}


@pytest.mark.parametrize(
    "method", ["add_difference", "task_arithmetic", "ties", "dare", "della", "train_difference", "model_stock"]
)
def test_methods_with_a_base_go_through_every_layout(made: Path, tmp_path: Path, method: str) -> None:
    convert(made / "c.safetensors", tmp_path / "c", "diffusers")
    outputs = []
    for base in (made / "c.safetensors", tmp_path / "c"):
        merge(
            tmp_path / "o.safetensors", made / "a.safetensors", made / "b.safetensors", base=base, method=method, seed=3
        )
        outputs.append((tmp_path / "o.safetensors").read_bytes())
        os.unlink(tmp_path / "o.safetensors")
    assert outputs[0] == outputs[1]


def test_add_difference_is_its_formula(made: Path, tmp_path: Path) -> None:
    merge(
        tmp_path / "o.safetensors", made / "a.safetensors", made / "b.safetensors",
        base=made / "c.safetensors", method="add_difference", **strengths("0.6"),
    )  # fmt: skip
    a, b, c = (state(made, name) for name in "abc")
    expected = {
        key: (a[key].double() + 0.6 * (b[key].double() - c[key].double())) if a[key].is_floating_point() else a[key]
        for key in a
    }
    assert_close(load_file(tmp_path / "o.safetensors"), expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8_e4m3"])
def test_dtypes_in_and_out(made: Path, tmp_path: Path, dtype: str) -> None:
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}[dtype]
    a, b = state(made, "a"), state(made, "b")
    cast = {k: v.to(torch_dtype) if v.is_floating_point() else v for k, v in b.items()}
    save_file(cast, tmp_path / "b.safetensors")
    merge(
        tmp_path / "o.safetensors", made / "a.safetensors", tmp_path / "b.safetensors", dtype=dtype, **strengths("0.5")
    )
    found = load_file(tmp_path / "o.safetensors")
    for key, tensor in a.items():
        if tensor.is_floating_point():
            small = dtype.startswith("fp8") and tensor.dim() < 2
            assert found[key].dtype == (tensor.dtype if small else torch_dtype), key
            exact = (tensor.double() + cast[key].double()) / 2
            limit = 0.07 if dtype.startswith("fp8") else 8e-3
            torch.testing.assert_close(found[key].double(), exact, rtol=limit, atol=1e-2 * limit + 2e-3 * (not small))


def test_a_torch_file_merges_like_its_tensors(made: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": state(made, "b"), "epoch": 3}, tmp_path / "b.ckpt")
    for name, other in (("o", tmp_path / "b.ckpt"), ("expected", made / "b.safetensors")):
        merge(tmp_path / f"{name}.safetensors", made / "a.safetensors", other, **strengths("0.3"))
    assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    merge(tmp_path / "o.ckpt", tmp_path / "b.ckpt", made / "a.safetensors", container="torch-zip", **strengths("0.7"))
    found = torch.load(tmp_path / "o.ckpt", weights_only=True)["state_dict"]
    assert_close(found, load_file(tmp_path / "o.safetensors"))


def test_scaled_fp8_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    b = state(made, "b")
    key = next(key for key in b if key.endswith("to_q.weight"))
    b |= {key: b[key].to(torch.float8_e4m3fn), key.replace(".weight", ".scale_weight"): torch.ones(1)}
    save_file(b, tmp_path / "b.safetensors")
    with pytest.raises(Unsupported, match=r"to_q.*is quantised \(there is .*scale_weight\)") as caught:
        merge(tmp_path / "o.safetensors", made / "a.safetensors", tmp_path / "b.safetensors")
    assert caught.value.path == str(tmp_path / "b.safetensors")


def test_a_tensor_that_another_input_lacks_stays_and_is_told(made: Path, tmp_path: Path) -> None:
    b = state(made, "b")
    gone = next(key for key in b if key.endswith("attn1.to_k.weight"))
    del b[gone]
    b["model.diffusion_model.input_blocks.1.0.new.weight"] = torch.ones(3)
    save_file(b, tmp_path / "b.safetensors")
    planned, report = merge(tmp_path / "o.safetensors", made / "a.safetensors", tmp_path / "b.safetensors")
    assert report.kept == {"b.safetensors": [gone]}
    assert torch.equal(load_file(tmp_path / "o.safetensors")[gone], state(made, "a")[gone])
    assert any("lacks 1 tensor" in note for note in planned.notes)


def test_another_family_is_refused_before_anything_is_read(made: Path, tmp_path: Path) -> None:
    other = single("sdxl", tmp_path)
    with pytest.raises(ConversionError, match=r"is sdxl, a\.safetensors is sd1"):
        merge(tmp_path / "o.safetensors", made / "a.safetensors", other)


def test_another_shape_names_the_module_and_both_shapes(made: Path, tmp_path: Path) -> None:
    b = state(made, "b")
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    b[key] = torch.zeros(b[key].shape[0] + 1, *b[key].shape[1:]).half()
    save_file(b, tmp_path / "b.safetensors")
    with pytest.raises(
        ShapeMismatch, match=r"unet.mid_block.resnets.0.conv1.weight is \[.*\] in the first input and \[.*\]"
    ):
        merge(tmp_path / "o.safetensors", made / "a.safetensors", tmp_path / "b.safetensors")


def test_the_mask_channels_of_an_inpainting_model_stay(made: Path, tmp_path: Path) -> None:
    a = state(made, "a")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    extra = torch.randn(a[key].shape[0], 5, 3, 3).half()
    save_file(a | {key: torch.cat([a[key], extra], dim=1)}, tmp_path / "inpaint.safetensors")
    merge(tmp_path / "o.safetensors", tmp_path / "inpaint.safetensors", made / "b.safetensors", **strengths("0.5"))
    found = load_file(tmp_path / "o.safetensors")[key]
    assert torch.equal(found[:, 4:], extra)
    middle = (a[key].float() + state(made, "b")[key].float()) / 2
    torch.testing.assert_close(found[:, :4].float(), middle, rtol=2e-3, atol=1e-6)


def test_nan_in_an_input_names_tensor_and_file_and_writes_nothing(made: Path, tmp_path: Path) -> None:
    b = state(made, "b")
    key = next(key for key in b if key.endswith("attn1.to_k.weight"))
    b[key] = b[key].clone().fill_(float("nan"))
    save_file(b, tmp_path / "b.safetensors")
    with pytest.raises(BadValues, match=r"attn1\.to_k\.weight holds NaN") as caught:
        merge(tmp_path / "o.safetensors", made / "a.safetensors", tmp_path / "b.safetensors")
    assert caught.value.path == str(tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["b.safetensors"]


def test_what_is_no_checkpoint_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(RecognitionError, match="no checkpoint"):
        merge(tmp_path / "o.safetensors", made / "a.safetensors", tmp_path / "x.safetensors")


def test_a_request_that_makes_no_sense_is_refused(made: Path, tmp_path: Path) -> None:
    a, b = made / "a.safetensors", made / "b.safetensors"
    with pytest.raises(UsageProblem, match="needs a base"):
        merge(tmp_path / "o", a, b, method="ties")
    with pytest.raises(UsageProblem, match="3 strengths for 2 inputs"):
        merge(tmp_path / "o", a, b, **strengths("1", "1", "1"))
    with pytest.raises(UsageProblem, match="no module answers to the strength of 'unett'"):
        merge(tmp_path / "o", a, b, **strengths("0.5,unett=1"))
    with pytest.raises(UsageProblem, match="add up to 0"):
        merge(tmp_path / "o", a, b, **strengths("1", "-1"))
    with pytest.raises(UsageProblem, match="no such dtype: fp4"):
        merge(tmp_path / "o", a, b, dtype="fp4")


def test_another_layout_may_be_asked_for(made: Path, tmp_path: Path) -> None:
    merge(tmp_path / "o", made / "a.safetensors", made / "b.safetensors", layout="diffusers", **strengths("0.4"))
    merge(tmp_path / "o.safetensors", made / "a.safetensors", made / "b.safetensors", **strengths("0.4"))
    convert(tmp_path / "o.safetensors", tmp_path / "expected", "diffusers")
    found, expected = loaded(tmp_path / "o"), loaded(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for component, own in expected.items():
        assert_close(found[component], own)


def test_a_vae_by_itself_merges_with_the_vae_of_a_checkpoint(made: Path, tmp_path: Path) -> None:
    prefix = "first_stage_model."
    vae = {k.removeprefix(prefix): v for k, v in state(made, "b").items() if k.startswith(prefix)}
    save_file(vae, tmp_path / "vae.safetensors")
    _, report = merge(
        tmp_path / "o.safetensors", made / "a.safetensors", tmp_path / "vae.safetensors", **strengths("1")
    )
    found, a = load_file(tmp_path / "o.safetensors"), state(made, "a")
    assert all(torch.equal(found[prefix + key], tensor) for key, tensor in vae.items())
    assert torch.equal(found["model.diffusion_model.out.2.weight"], a["model.diffusion_model.out.2.weight"])
    assert len(report.kept["vae.safetensors"]) > len(vae)


RUN = """
import sys
from pathlib import Path
from hubtool.formats import open_file
from hubtool.ops.execute import execute
from hubtool.ops.merge_checkpoints import Request, plan
a, b, c, out, workers = sys.argv[1:]
for method in ("ties", "dare_ties"):
    made, _ = plan([open_file(Path(a)), open_file(Path(b))], Request(method=method, seed=5), open_file(Path(c)))
    execute(made, Path(out) / f"{method}.safetensors", workers=int(workers))
"""


def test_the_same_bytes_under_any_hash_seed_and_thread_count(made: Path, tmp_path: Path) -> None:
    for seed, workers in (("1", "1"), ("77", "4")):
        (tmp_path / seed).mkdir()
        inputs = [str(made / f"{name}.safetensors") for name in "abc"]
        env = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": workers}
        subprocess.run([sys.executable, "-c", RUN, *inputs, str(tmp_path / seed), workers], check=True, env=env)
    for name in ("ties.safetensors", "dare_ties.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "77" / name).read_bytes()


def test_the_report_is_plain_json(made: Path, tmp_path: Path) -> None:
    _, report = merge(tmp_path / "o.safetensors", made / "a.safetensors", made / "b.safetensors")
    document = json.loads(json.dumps(report.to_json()))
    assert document["matched"] == sum(document["merged"].values())
    assert [one["family"] for one in document["inputs"]] == ["sd1", "sd1"]


def test_a_sharded_folder_is_an_input_like_any_other(made: Path, tmp_path: Path) -> None:
    folder = saved("sd1", tmp_path)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    keys = list(weights)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for name, half in zip(names, halves, strict=True):
        save_file({key: weights[key] for key in half}, folder / "unet" / name)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {k: n for n, half in zip(names, halves, strict=True) for k in half},
    }
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    os.unlink(folder / "unet" / "diffusion_pytorch_model.safetensors")
    _, report = merge(tmp_path / "o", folder, made / "a.safetensors", **strengths("0.5"))
    assert not report.kept
    a = load_file(tmp_path / "o" / "unet" / names[0])
    assert list(a) == sorted(halves[0])
