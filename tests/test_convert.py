"""convert: containers, layouts, encodings and dtypes, with nothing lost in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hubtool.actions.convert import Options, convert
from hubtool.cli.main import cli
from hubtool.errors import BadValues, ConversionError, LossyConversion, UnknownFamily, UsageProblem, WouldOverwrite
from hubtool.formats import open_file
from hubtool.layouts import parse_file
from hubtool.layouts.vocabulary import weight_shape
from hubtool.ops.convert import plan
from hubtool.ops.target import Target
from hubtool.ops.verify import compare
from hubtool.tensors.evaluate import to_bytes
from tests.support.adapters import attention, make, scalar, values, write
from tests.support.files import floats, write_safetensors
from tests.support.files import scalar as raw_scalar

torch = pytest.importorskip("torch")
UNET = [m for m in attention("sd1") if m[0] == "unet"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    adapter = make("sd1", attention("sd1"), ranks=(2, 4), alphas=(1.0, 4.0, None), dtype="F16")
    return write(
        adapter, tmp_path / "kohya.safetensors", "kohya", {"ss_output_name": "me", "sshs_model_hash": "ab" * 32}
    )


def test_kohya_to_diffusers_and_back_is_the_same_file(kohya: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert convert(kohya, there, Target(layout="diffusers")).plan.fidelity == "exact"
    assert convert(there, back, Target(layout="kohya")).plan.fidelity == "identical"
    assert back.read_bytes() == kohya.read_bytes()


def test_factors_are_moved_not_recomputed(kohya: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    convert(kohya, there, Target(layout="diffusers"))
    before, after = parse_file(open_file(kohya)).adapter, parse_file(open_file(there)).adapter
    for key, patch in before.patches.items():
        assert to_bytes(after.patches[key].up) == to_bytes(patch.up)  # type: ignore[attr-defined]
        assert after.patches[key].scale == patch.scale  # type: ignore[attr-defined]


def test_metadata_travels_and_stale_hashes_do_not(kohya: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    convert(kohya, there, Target(layout="diffusers"))
    metadata = open_file(there).metadata
    assert metadata["ss_output_name"] == "me"
    assert "sshs_model_hash" not in metadata


def test_an_edit_made_in_between_survives_the_way_back(kohya: Path, tmp_path: Path) -> None:
    there, edited, back = (tmp_path / f"{n}.safetensors" for n in ("there", "edited", "back"))
    convert(kohya, there, Target(layout="diffusers"))
    file = open_file(there)
    from hubtool.tensors.expr import Read
    from hubtool.tensors.writer import write_safetensors as ours

    ours(edited, {k: Read(r) for k, r in file.tensors.items()}, {**file.metadata, "ss_output_name": "renamed"})
    convert(edited, back, Target(layout="kohya"))
    again = open_file(back)
    assert again.metadata["ss_output_name"] == "renamed"
    assert "sshs_model_hash" not in again.metadata
    assert list(again.tensors) == list(open_file(kohya).tensors)


def test_a_forged_receipt_is_ignored(kohya: Path, tmp_path: Path) -> None:
    from hubtool.layouts import receipt

    for text in ("{}", "[", '{"version": 1, "layout": "kohya", "format": "safetensors", "header": "AAAA"}', "1"):
        assert receipt.load({receipt.KEY: text}) is None
    other = write(make("sd1", UNET[:3], alphas=(2.0,)), tmp_path / "other.safetensors", "kohya")
    there = tmp_path / "there.safetensors"
    convert(other, there, Target(layout="diffusers"))
    stolen = open_file(there).metadata[receipt.KEY]
    mine = parse_file(open_file(kohya)).adapter
    forged = write(mine, tmp_path / "forged.safetensors", "diffusers", {receipt.KEY: stolen})
    back = tmp_path / "back.safetensors"
    assert convert(forged, back, Target(layout="kohya")).plan.fidelity == "exact"
    assert compare(open_file(kohya), open_file(back)).worst == 0.0


def test_an_absent_alpha_means_the_rank_and_stays_absent(tmp_path: Path) -> None:
    source = write(make("sd1", UNET[:8], ranks=(2, 3)), tmp_path / "a.safetensors", "kohya")
    assert not any(key.endswith("alpha") for key in open_file(source).tensors)
    convert(source, tmp_path / "b.safetensors", Target(layout="diffusers"))
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", Target(layout="kohya"))
    assert (tmp_path / "c.safetensors").read_bytes() == source.read_bytes()


def test_a_layout_without_place_for_alpha_folds_and_says_so(tmp_path: Path) -> None:
    source = write(make("sd1", UNET[:8], ranks=(4,), alphas=(2.0, 3.0)), tmp_path / "a.safetensors", "kohya")
    done = convert(source, tmp_path / "b.safetensors", Target(layout="diffusers-legacy"), Options(verify=True))
    assert done.plan.fidelity == "rounded"
    assert len(done.plan.rounded) == 8
    assert done.verdict is not None
    assert done.verdict.worst < 1e-6


def test_folding_a_power_of_two_is_exact(tmp_path: Path) -> None:
    source = write(make("sd1", UNET[:8], ranks=(4,), alphas=(2.0,), dtype="F16"), tmp_path / "a.safetensors", "kohya")
    done = convert(
        source,
        tmp_path / "b.safetensors",
        Target(layout="attn-procs" if False else "diffusers-legacy"),
        Options(verify=True),
    )
    assert done.verdict is not None
    assert done.verdict.worst == 0.0
    assert {t.dtype for t in open_file(tmp_path / "b.safetensors").tensors.values()} == {"F16"}


def test_a_loss_is_refused_by_name_unless_allowed(tmp_path: Path) -> None:
    adapter = make("sd1", UNET[:2], alphas=(1.0,))
    key, patch = next(iter(adapter.patches.items()))
    shape = (1, weight_shape("sd1", *key)[1], 1, 1)  # type: ignore[index]
    per_input = {**adapter.patches, key: replace(patch, dora_scale=values(shape, 9))}  # type: ignore[type-var]
    source = write(replace(adapter, patches=per_input), tmp_path / "a.safetensors", "kohya")
    with pytest.raises(LossyConversion, match="per input") as refused:
        convert(source, tmp_path / "b.safetensors", Target(layout="diffusers"))
    assert "--allow-loss" in (refused.value.hint or "")
    assert not (tmp_path / "b.safetensors").exists()
    assert convert(source, tmp_path / "b.safetensors", Target(layout="diffusers"), Options(allow_loss=True)).plan.losses


def test_an_unknown_tensor_is_a_loss_for_diffusers_and_kept_for_kohya(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    adapter = make("sdxl", attention("sdxl", 4), alphas=(1.0,))
    from hubtool.layouts import emit
    from hubtool.tensors.writer import write_safetensors as ours

    ours(source, {**emit(adapter, "kohya").tensors, "mystery": values((3,), 1)})
    with pytest.raises(LossyConversion, match="mystery"):
        convert(source, tmp_path / "b.safetensors", Target(layout="diffusers"))
    convert(source, tmp_path / "c.safetensors", Target(layout="kohya/diffusers"))
    assert "mystery" in open_file(tmp_path / "c.safetensors").tensors


def test_a_rename_needs_no_torch(kohya: Path) -> None:
    assert not plan(open_file(kohya), Target(layout="diffusers")).needs_torch
    assert not plan(open_file(kohya), Target(layout="kohya/ldm")).needs_torch


def test_a_dry_run_writes_nothing(kohya: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run("convert", kohya, "--layout", "diffusers", "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (document["fidelity"], document["layout"], document["output"]) == ("exact", "peft/diffusers", None)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_overwritten_without_force(kohya: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(WouldOverwrite):
        convert(kohya, out, Target(layout="diffusers"))
    assert out.read_bytes() == b"precious"
    convert(kohya, out, Target(layout="diffusers"), Options(force=True))
    with pytest.raises(UsageProblem, match="the output is the input"):
        convert(out, out, Target(layout="kohya"), Options(force=True))


def test_a_peft_folder_holds_one_component(kohya: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="one component"):
        convert(kohya, tmp_path / "folder", Target(layout="peft"))
    convert(kohya, tmp_path / "folder", Target(layout="peft", component="unet"))
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    again = parse_file(open_file(tmp_path / "folder"))
    before = parse_file(open_file(kohya)).adapter
    assert again.adapter.family == "sd1"
    assert {k: p.scale for k, p in again.adapter.patches.items()} == {  # type: ignore[attr-defined]
        k: p.scale
        for k, p in before.patches.items()
        if k[0] == "unet"  # type: ignore[attr-defined]
    }


def test_a_walk_becomes_names_and_names_a_walk(tmp_path: Path) -> None:
    from hubtool.layouts import tables

    for walk in tables.syntaxes()["cloneofsimo"].walks[:2]:
        made = make("sd1", [("unet", path) for path in walk.paths], ranks=(1, 2))
        source = write(made, tmp_path / f"{len(walk.paths)}.safetensors", "cloneofsimo")
        convert(source, tmp_path / "names.safetensors", Target(layout="kohya"), Options(force=True))
        convert(
            tmp_path / "names.safetensors", tmp_path / "list.pt", Target(layout="cloneofsimo-list"), Options(force=True)
        )
        loaded = torch.load(tmp_path / "list.pt", weights_only=True)
        assert len(loaded) == 2 * len(walk.paths)
        parsed = parse_file(open_file(tmp_path / "list.pt"))
        assert parsed.adapter.family == "sd1"
        for key, patch in made.patches.items():
            assert to_bytes(parsed.adapter.patches[key].up) == to_bytes(patch.up)  # type: ignore[attr-defined]


def test_tokens_beside_positions_travel_as_a_bundle_and_return(tmp_path: Path) -> None:
    from hubtool.layouts import emit, tables
    from hubtool.tensors.writer import write_safetensors as ours

    walk = tables.syntaxes()["cloneofsimo"].walks[0]
    emission = emit(make("sd1", [("unet", path) for path in walk.paths], ranks=(1,)), "cloneofsimo")
    source, there, back = (tmp_path / f"{name}.safetensors" for name in ("pti", "there", "back"))
    ours(source, {**emission.tensors, "<s1>": values((768,), 1)}, {**emission.metadata, "<s1>": "<embed>"})
    convert(source, there, Target(layout="kohya"))
    assert "bundle_emb.<s1>.emb_params" in open_file(there).tensors
    convert(there, back, Target(layout="cloneofsimo"))
    assert back.read_bytes() == source.read_bytes()
    with pytest.raises(LossyConversion, match="embedding <s1>"):
        convert(source, tmp_path / "no.safetensors", Target(layout="diffusers"))


def test_an_incomplete_walk_is_refused(kohya: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="full walk"):
        convert(kohya, tmp_path / "x.safetensors", Target(layout="cloneofsimo"))


def test_modules_no_family_knows_cannot_be_renamed(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_strange_block.lora_down.weight": floats(2, 8),
        "lora_unet_strange_block.lora_up.weight": floats(8, 2),
    }
    source = write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UnknownFamily):
        convert(source, tmp_path / "b.safetensors", Target(layout="diffusers"))


def test_an_ambiguous_family_is_no_obstacle_where_all_candidates_agree(tmp_path: Path) -> None:
    modules = [m for m in UNET if ".attn1." in m[1]][:6]
    source = write(make("sd1", modules), tmp_path / "a.safetensors", "kohya")
    parsed = parse_file(open_file(source))
    assert parsed.adapter.family is None
    assert parsed.candidates == ("sd1", "sd2")
    assert convert(source, tmp_path / "b.safetensors", Target(layout="diffusers")).plan.fidelity == "exact"


def test_in_place_renames_in_the_header_only(tmp_path: Path) -> None:
    adapter = make("sdxl", [m for m in attention("sdxl") if m[0] == "unet"][:12], alphas=(1.0,))
    path = write(adapter, tmp_path / "a.safetensors", "kohya/diffusers")
    body, inode = path.read_bytes(), path.stat().st_ino
    convert(path, None, Target(layout="kohya/sgm"), Options(in_place=True))
    assert (path.stat().st_ino, path.stat().st_size) == (inode, len(body))
    assert str(parse_file(open_file(path)).layout) == "kohya/sgm"
    assert compare_bodies(path.read_bytes(), body)


def compare_bodies(first: bytes, second: bytes) -> bool:
    return first[8 + int.from_bytes(first[:8], "little") :] == second[8 + int.from_bytes(second[:8], "little") :]


def test_in_place_refuses_what_moves_data(kohya: Path) -> None:
    before = kohya.read_bytes()
    with pytest.raises(ConversionError, match="more than names"):
        convert(kohya, None, Target(layout="diffusers"), Options(in_place=True))
    assert kohya.read_bytes() == before


def test_a_checkpoint_leaves_its_pickle(tmp_path: Path) -> None:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    torch.save({"state_dict": weights, "global_step": 7}, tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors")
    from safetensors.torch import load_file

    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert open_file(tmp_path / "model.safetensors").metadata["hubtool.extra.global_step"] == "7"


def test_a_safetensors_file_becomes_a_torch_file(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "a.safetensors", {"x": floats(2, 3)}, {"format": "pt"})
    convert(source, tmp_path / "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["x"], torch.arange(6.0).reshape(2, 3) / 4)


def test_metadata_is_a_loss_for_a_torch_file(kohya: Path, tmp_path: Path) -> None:
    with pytest.raises(LossyConversion, match="metadata ss_output_name"):
        convert(kohya, tmp_path / "a.pt")


@pytest.mark.parametrize("encoding", ["a1111", "diffusers", "diffusers-bin", "kohya", "canonical", "raw"])
def test_an_embedding_keeps_its_vectors_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "style.safetensors", {"emb_params": floats(3, 768)})
    out = tmp_path / ("out.pt" if encoding in ("a1111", "diffusers-bin", "raw") else "out.safetensors")
    convert(source, out, Target(layout=encoding))
    vectors = [ref for ref in open_file(out).tensors.values() if ref.shape == (3, 768)]
    assert len(vectors) == 1
    from hubtool.tensors.expr import Read

    assert to_bytes(Read(vectors[0])) == floats(3, 768)[2]


def test_a_cast_rounds_once_and_leaves_alpha_alone(kohya: Path, tmp_path: Path) -> None:
    done = convert(kohya, tmp_path / "a.safetensors", Target(dtype="bf16"))
    dtypes = {
        (name.endswith("alpha"), ref.dtype) for name, ref in open_file(tmp_path / "a.safetensors").tensors.items()
    }
    assert dtypes == {(True, "F16"), (False, "BF16")}
    assert done.plan.fidelity == "rounded"


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "a.safetensors", {"x": floats(2, start=1e6)})
    with pytest.raises(BadValues, match="overflow"):
        convert(source, tmp_path / "b.safetensors", Target(dtype="fp16"))
    assert not (tmp_path / "b.safetensors").exists()


def test_many_sources_go_on_after_a_failure(kohya: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(kohya.read_bytes()[:2000])
    result = run("convert", kohya, broken, "--out-dir", tmp_path / "out", "--layout", "diffusers", "--json")
    document = json.loads(
        result.stdout[: result.stdout.rindex("}\n{") + 2] if "}\n{" in result.stdout else result.stdout
    )
    assert result.exit_code == 3
    assert len(document["converted"]) == len(document["failed"]) == 1
    assert (tmp_path / "out" / "kohya.safetensors").exists()


def test_rank_stabilised_scales_stay_in_the_configuration(tmp_path: Path) -> None:
    modules = UNET[:6]
    made = make("sd1", modules, ranks=(4,), alphas=(2.0,))
    patches = {key: replace(patch, rank_stabilised=True, alpha=None) for key, patch in made.patches.items()}  # type: ignore[type-var]
    source = write(replace(made, patches=patches), tmp_path / "a.safetensors", "diffusers")
    assert json.loads(open_file(source).metadata["lora_adapter_metadata"])["unet.use_rslora"] is True
    done = convert(source, tmp_path / "b.safetensors", Target(layout="kohya"), Options(verify=True))
    assert done.verdict is not None
    assert done.verdict.worst < 1e-6
    assert done.plan.rounded


def test_alpha_keeps_its_dtype_when_written_anew() -> None:
    from hubtool.layouts.emit import pack

    assert pack(3.0, "F16") == replace(scalar(3.0, "F16"))
    assert pack(1 / 3, "F16") is None
    assert pack(257.0, "BF16") is None
    assert pack(256.0, "BF16") is not None


def test_two_keys_for_one_role_are_refused(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_down.weight": floats(4, 320),
        f"{stem}.lora_up.weight": floats(320, 4),
        f"{stem}.alpha": raw_scalar(float("nan")),
    }
    source = write_safetensors(tmp_path / "a.safetensors", tensors)
    from hubtool.errors import CorruptFile

    with pytest.raises(CorruptFile, match="alpha"):
        parse_file(open_file(source))
