"""``content_id`` of every kind: one for a fused file, its split form, and either in another layout; another as soon as the effect differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubtool.adapters.ir import Adapter
from hubtool.errors import CorruptFile
from hubtool.formats import open_file
from hubtool.layouts import parse_file
from hubtool.layouts.content import content_id
from hubtool.tensors.expr import Expr
from hubtool.tensors.writer import write_safetensors
from tests.support.adapters import scalar, values

HIDDEN = 3072
FUSED = {"kohya": "lora_unet_double_blocks_0_img_attn_qkv", "comfy": "diffusion_model.double_blocks.0.img_attn.qkv"}
SPLIT = {"kohya": "lora_unet_transformer_blocks_0_attn_to_", "comfy": "diffusion_model.transformer_blocks.0.attn.to_"}
# Modules that make the file one of Flux.1's and nobody else's.
LANDMARKS = {
    "double_blocks.18.img_mod.lin": (6 * HIDDEN, HIDDEN),
    "single_blocks.37.linear2": (HIDDEN, 5 * HIDDEN),
    "guidance_in.in_layer": (HIDDEN, 256),
}
SPELLED = {
    "up": "lora_up.weight",
    "down": "lora_down.weight",
    "a1": "a1.weight",
    "a2": "a2.weight",
    "b1": "b1.weight",
    "b2": "b2.weight",
}

KINDS: dict[str, dict[str, Expr]] = {
    "lora": {"up": values((3 * HIDDEN, 2), 1), "down": values((2, HIDDEN), 2), "alpha": scalar(1.0)},
    "dora": {"up": values((3 * HIDDEN, 2), 1), "down": values((2, HIDDEN), 2), "dora_scale": values((3 * HIDDEN, 1), 3)},
    "loha": {
        "hada_w1_a": values((3 * HIDDEN, 2), 1), "hada_w1_b": values((2, HIDDEN), 2),
        "hada_w2_a": values((3 * HIDDEN, 2), 3), "hada_w2_b": values((2, HIDDEN), 4), "alpha": scalar(1.0),
    },
    "lokr": {"lokr_w1": values((24, 8), 1), "lokr_w2_a": values((384, 1), 2), "lokr_w2_b": values((1, 384), 3), "alpha": scalar(0.5)},
    "glora": {
        "a1": values((HIDDEN, 2), 1), "a2": values((2, HIDDEN), 2), "b1": values((3 * HIDDEN, 2), 3), "b2": values((2, HIDDEN), 4),
    },
    "oft": {"oft_blocks": values((2304, 4, 4), 1), "alpha": scalar(0.0)},
    "bias": {"diff_b": values((3 * HIDDEN,), 1)},
}  # fmt: skip
WHOLE: dict[str, dict[str, Expr]] = {  # what cannot be cut there, and so stays one module
    "lokr": {"lokr_w1": values((64, 32), 1), "lokr_w2": values((144, 96), 2)},
    "oft": {"oft_blocks": values((2304, 4, 4), 1), "alpha": scalar(0.5)},
}


def landmarks(syntax: str) -> dict[str, Expr]:
    tensors: dict[str, Expr] = {}
    for module, (out, inner) in LANDMARKS.items():
        stem = f"lora_unet_{module.replace('.', '_')}" if syntax == "kohya" else f"diffusion_model.{module}"
        tensors |= {f"{stem}.lora_down.weight": values((1, inner), 11), f"{stem}.lora_up.weight": values((out, 1), 12)}
    return tensors


def fused(path: Path, syntax: str, roles: dict[str, Expr]) -> Path:
    named = {f"{FUSED[syntax]}.{SPELLED.get(role, role)}": tensor for role, tensor in roles.items()}
    write_safetensors(path, named | landmarks(syntax), None)
    return path


def split(path: Path, syntax: str, adapter: Adapter) -> Path:
    """The same modules as q, k and v, named as diffusers does."""
    tensors = dict(landmarks(syntax))
    for part in ("q", "k", "v"):
        patch = adapter.patches["transformer", f"transformer_blocks.0.attn.to_{part}"]
        tensors |= {f"{SPLIT[syntax]}{part}.{SPELLED.get(role, role)}": tensor for role, tensor in patch.roles()}
    write_safetensors(path, tensors, None)
    return path


def identity(path: Path) -> str | None:
    return content_id(open_file(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_file_its_split_form_and_their_other_layouts_are_one_adapter(kind: str, tmp_path: Path) -> None:
    paths = [fused(tmp_path / f"{syntax}.safetensors", syntax, KINDS[kind]) for syntax in FUSED]
    parsed = parse_file(open_file(paths[0]))
    assert parsed.adapter.family == "flux1"
    assert "fused-whole" not in {finding.code for finding in parsed.adapter.findings}
    paths += [split(tmp_path / f"split-{syntax}.safetensors", syntax, parsed.adapter) for syntax in SPLIT]
    assert len({identity(path) for path in paths}) == 1


@pytest.mark.parametrize("kind", WHOLE)
def test_what_stays_whole_is_one_adapter_in_every_layout_of_the_naming(kind: str, tmp_path: Path) -> None:
    paths = [fused(tmp_path / f"{syntax}.safetensors", syntax, WHOLE[kind]) for syntax in FUSED]
    findings = parse_file(open_file(paths[0])).adapter.findings
    assert [finding.code for finding in findings] == ["fused-whole"]
    assert identity(paths[0]) == identity(paths[1])


def both(tmp_path: Path, first: dict[str, Expr], second: dict[str, Expr]) -> bool:
    paths = [tmp_path / f"{len(list(tmp_path.iterdir()))}-{i}.safetensors" for i in range(2)]
    first_id, second_id = (identity(fused(p, "kohya", roles)) for p, roles in zip(paths, (first, second), strict=True))
    return first_id == second_id


def test_an_alpha_equal_to_the_rank_may_be_left_out(tmp_path: Path) -> None:
    bare = {role: tensor for role, tensor in KINDS["loha"].items() if role != "alpha"}
    assert both(tmp_path, bare, {**bare, "alpha": scalar(2.0)})
    assert not both(tmp_path, bare, {**bare, "alpha": scalar(1.0)})


def test_the_dtype_of_an_alpha_does_not_count(tmp_path: Path) -> None:
    assert both(tmp_path, KINDS["lokr"], {**KINDS["lokr"], "alpha": scalar(0.5, "F16")})


def test_the_alpha_of_full_matrices_means_nothing(tmp_path: Path) -> None:
    assert both(tmp_path, WHOLE["lokr"], {**WHOLE["lokr"], "alpha": scalar(9999999999.0)})


def test_another_constraint_is_another_adapter(tmp_path: Path) -> None:
    assert not both(tmp_path, WHOLE["oft"], {**WHOLE["oft"], "alpha": scalar(0.25)})


def rotation(path: Path, prefix: str, alpha: float) -> str | None:
    """A rotation of one SD module, spelled as sd-scripts' OFT or as LyCORIS'."""
    stem = f"{prefix}_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    write_safetensors(path, {f"{stem}.oft_blocks": values((4, 80, 80), 1), f"{stem}.alpha": scalar(alpha)}, None)
    return identity(path)


def test_the_two_spellings_of_a_constrained_rotation_are_one_adapter(tmp_path: Path) -> None:
    first = rotation(tmp_path / "a.safetensors", "oft", 0.5)
    assert first == rotation(tmp_path / "b.safetensors", "lora", 0.5)


def test_alpha_zero_is_another_rotation_to_sd_scripts_than_to_lycoris(tmp_path: Path) -> None:
    first = rotation(tmp_path / "a.safetensors", "oft", 0.0)
    assert first != rotation(tmp_path / "b.safetensors", "lora", 0.0)


BROKEN: dict[str, dict[str, Expr]] = {
    "halves of a LoHa": {**KINDS["loha"], "hada_w2_a": values((7, 2), 1)},
    "a LoHa's rank": {**KINDS["loha"], "hada_w1_b": values((3, HIDDEN), 1)},
    "a LoKr's rank": {**KINDS["lokr"], "lokr_w2_b": values((2, 384), 1)},
    "a scalar for a factor": {**KINDS["lokr"], "lokr_w1": scalar(1.0)},
    "blocks that are not square": {"oft_blocks": values((4, 4, 5), 1)},
    "a GLoRA of no order": {**KINDS["glora"], "b1": values((9, 5), 1)},
    "a magnitude of another length": {**KINDS["dora"], "dora_scale": values((5,), 1)},
    "a bias of another length": {"diff": values((4, 4), 1), "diff_b": values((5,), 1)},
    "factors without numbers": {"up": values((4, 0), 1), "down": values((0, 4), 1)},
    "an empty difference": {"diff": values((0, 4), 1)},
}


@pytest.mark.parametrize("what", BROKEN)
def test_factors_that_do_not_fit_are_corrupt_and_name_their_file(what: str, tmp_path: Path) -> None:
    path = fused(tmp_path / "a.safetensors", "kohya", BROKEN[what])
    with pytest.raises(CorruptFile) as caught:
        parse_file(open_file(path))
    assert caught.value.path == str(path)
    assert "double_blocks_0_img_attn_qkv" in str(caught.value)
