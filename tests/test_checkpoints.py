"""Whole checkpoints: single file <-> diffusers folder, both ways, byte for byte where only names change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from hubtool.errors import ConversionError, UnknownFamily, UnknownLayout, UsageProblem, WouldOverwrite  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.layouts import checkpoint_receipt as receipts  # noqa: E402
from hubtool.layouts import checkpoint_tables, receipt  # noqa: E402
from hubtool.ops.checkpoints import plan  # noqa: E402
from hubtool.ops.execute_folder import execute_folder  # noqa: E402
from hubtool.ops.folder_plan import FolderPlan  # noqa: E402
from hubtool.ops.target import Target  # noqa: E402
from tests.support.checkpoints import convert, loaded, pipeline, same, saved, single, states  # noqa: E402

UNETS = ("sd1", "sd2", "sdxl")
FAMILIES = (*UNETS, "sd3", "flux1", "chroma", "flux2", "hunyuan-video", "lumina2", "z-image", "qwen-image")
# families without a table of their pipeline: their denoiser alone
DENOISERS = ("krea2", "hunyuan-image", "ltx-video")


# diffusers' own converters, of those that do not ask for the published widths
CONVERTERS = {
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "ltx-video": "convert_ltx_transformer_checkpoint_to_diffusers",
    "mochi": "convert_mochi_transformer_checkpoint_to_diffusers",
    "hidream": "convert_hidream_transformer_to_diffusers",
}


@pytest.mark.parametrize("family", CONVERTERS)
def test_diffusers_converts_our_single_file_to_the_same_weights(tmp_path: Path, family: str) -> None:
    from diffusers.loaders import single_file_utils

    path = tmp_path / "native.safetensors"
    convert(saved(family, tmp_path), path, "single-file", component="transformer", family=family)
    theirs = getattr(single_file_utils, CONVERTERS[family])(load_file(path))
    assert same(theirs, states(family)["transformer"])


def test_every_number_of_a_pipeline_survives_both_ways(tmp_path: Path) -> None:
    for family in FAMILIES:
        folder = tmp_path / family
        folder.mkdir()
        path = single(family, folder)
        made = convert(path, folder / "back", "diffusers", base=folder / family, family=family)
        table = checkpoint_tables.pipeline(family)
        assert table is not None
        got, want = loaded(folder / "back"), {k: v for k, v in states(family).items() if k in table.components}
        assert {name: same(got[name], want[name]) for name in want} == dict.fromkeys(want, True), family
        assert (made.fidelity, made.needs_torch, made.losses) == ("exact", False, ())


@pytest.mark.parametrize("family", [*UNETS, "flux1"])
def test_a_single_file_comes_back_byte_for_byte(tmp_path: Path, family: str) -> None:
    path = single(family, tmp_path, metadata={"modelspec.title": "mine"})
    convert(path, tmp_path / "folder", "diffusers", base=tmp_path / family, family=family)
    made = convert(tmp_path / "folder", tmp_path / "again.safetensors", "single-file", family=family)
    assert made.fidelity == "identical"
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", [*UNETS, "sd3"])
def test_a_folder_comes_back_byte_for_byte(tmp_path: Path, family: str) -> None:
    folder = saved(family, tmp_path)
    convert(folder, tmp_path / "one.safetensors", "single-file", family=family)
    made = convert(tmp_path / "one.safetensors", tmp_path / "again", "origin", family=family)
    assert made.fidelity == "identical"
    kept = [path for path in folder.rglob("*") if path.is_file() and "tokenizer" not in path.parent.name]
    assert len(kept) >= 5
    for path in kept:
        assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", DENOISERS)
def test_a_family_without_a_pipeline_table_converts_its_denoiser(tmp_path: Path, family: str) -> None:
    path = single(family, tmp_path)
    made = convert(path, tmp_path / "back", "diffusers", family=family)
    got = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert same(got, states(family)["transformer"])
    assert "config.json" in made.notes[0]


@pytest.mark.parametrize("family", UNETS)
def test_diffusers_reads_our_single_file_as_the_same_pipeline(tmp_path: Path, family: str) -> None:
    """Oracle: from_single_file with the configuration of the original folder."""
    path = single(family, tmp_path)
    read = type(pipeline(family)).from_single_file(str(path), config=str(tmp_path / family), local_files_only=True)
    for name in states(family):
        theirs, ours = getattr(read, name).state_dict(), getattr(pipeline(family), name).state_dict()
        assert same(theirs, ours), name


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_reads_our_folder_as_the_same_pipeline(tmp_path: Path, family: str) -> None:
    path = single(family, tmp_path)
    convert(path, tmp_path / "folder", "diffusers", base=tmp_path / family, family=family)
    read = type(pipeline(family)).from_pretrained(str(tmp_path / "folder"), local_files_only=True)
    for name in states(family):
        assert same(getattr(read, name).state_dict(), getattr(pipeline(family), name).state_dict()), name


def edited(path: Path, change: Any) -> Path:
    """The same file with its tensors changed."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return path


def ldm_extras(tensors: dict[str, Any]) -> None:
    tensors["betas"] = torch.linspace(0, 1, 10)
    tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.ones(3)
    tensors["model_ema.decay"] = torch.tensor(0.5)
    tensors["first_stage_model.loss.logvar"] = torch.zeros(())
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]


def test_buffers_and_ema_copies_are_kept_beside_the_components(tmp_path: Path) -> None:
    path = edited(single("sd1", tmp_path), ldm_extras)
    made = convert(path, tmp_path / "folder", "diffusers", base=tmp_path / "sd1", family="sd1")
    assert made.losses == ()
    kept = load_file(tmp_path / "folder" / receipts.EXTRAS)
    assert sorted(kept) == [
        "betas", "first_stage_model.loss.logvar", "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight",
    ]  # fmt: skip
    assert "text_model.embeddings.position_ids" in load_file(tmp_path / "folder/text_encoder/model.safetensors")
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "ldm", family="sd1")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def open_clip_rest(tensors: dict[str, Any]) -> None:
    """The layer and the projection that SD2 files have and SD2 folders do not."""
    head = "cond_stage_model.model."
    for key in [key for key in tensors if ".resblocks.22." in key]:
        tensors[key.replace(".22.", ".23.")] = tensors[key] + 1
    tensors[head + "text_projection"] = torch.randn(24, 24)
    tensors[head + "logit_scale"] = torch.tensor(4.6)


def test_what_sd2_drops_of_its_text_encoder_is_kept(tmp_path: Path) -> None:
    path = edited(single("sd2", tmp_path), open_clip_rest)
    convert(path, tmp_path / "folder", "diffusers", base=tmp_path / "sd2", family="sd2")
    assert same(loaded(tmp_path / "folder")["text_encoder"], states("sd2")["text_encoder"])
    assert len(load_file(tmp_path / "folder" / receipts.EXTRAS)) == 14
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "ldm", family="sd2")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_an_edited_folder_is_written_anew(tmp_path: Path) -> None:
    path = single("sd1", tmp_path, metadata={"modelspec.title": "mine"})
    convert(path, tmp_path / "folder", "diffusers", base=tmp_path / "sd1", family="sd1")
    edited(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors", lambda t: t.pop("decoder.conv_out.bias"))
    made = convert(tmp_path / "folder", tmp_path / "again.safetensors", "ldm", family="sd1")
    assert made.fidelity == "exact"
    again = load_file(tmp_path / "again.safetensors")
    assert load_file(path).keys() - again.keys() == {"first_stage_model.decoder.conv_out.bias"}
    assert open_file(tmp_path / "again.safetensors").metadata["modelspec.title"] == "mine"


def test_old_spellings_are_read(tmp_path: Path) -> None:
    """CLIP without ``text_model.``, and the VAE attention of diffusers before 0.18."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            name = key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
            tensors[name] = tensors.pop(key)

    path = edited(single("sd1", tmp_path), rename)
    convert(path, tmp_path / "folder", "diffusers", base=tmp_path / "sd1", family="sd1")
    assert same(loaded(tmp_path / "folder")["text_encoder"], states("sd1")["text_encoder"])

    def age(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if ".attentions.0." in key]:
            name = next((key.replace(new, past) for new, past in old.items() if f".{new}." in key), key)
            tensors[name] = tensors.pop(key)

    edited(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors", age)
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "ldm", family="sd1")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_torch_file_becomes_a_folder(tmp_path: Path) -> None:
    tensors = load_file(single("sd1", tmp_path))
    torch.save({"state_dict": tensors, "global_step": 5, "optimizer_states": []}, tmp_path / "old.ckpt")
    convert(tmp_path / "old.ckpt", tmp_path / "folder", "diffusers", base=tmp_path / "sd1", family="sd1")
    assert same(loaded(tmp_path / "folder")["unet"], states("sd1")["unet"])
    made = convert(tmp_path / "folder", tmp_path / "new.safetensors", "ldm", family="sd1")
    assert made.fidelity == "exact"
    assert same(load_file(tmp_path / "new.safetensors"), tensors)


def test_a_trainer_state_is_a_loss(tmp_path: Path) -> None:
    tensors = load_file(single("sd1", tmp_path))
    torch.save({"state_dict": tensors, "optimizer_states": [torch.zeros(2)]}, tmp_path / "old.ckpt")
    made = plan(
        open_file(tmp_path / "old.ckpt"), Target(layout="diffusers", family="sd1"), config_from=tmp_path / "sd1"
    )
    assert made is not None
    assert [loss.what for loss in made.losses] == ["1 tensor of the training state"]


def test_a_component_that_no_single_file_holds_is_a_loss(tmp_path: Path) -> None:
    folder = saved("sd1", tmp_path)
    (folder / "safety_checker").mkdir()
    save_file({"x": torch.zeros(3)}, folder / "safety_checker" / "model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    made = plan(open_file(folder), Target(layout="ldm", family="sd1"))
    assert made is not None
    assert [loss.what for loss in made.losses] == ["safety_checker (1 tensor, 12 bytes)"]
    assert not any("safety_checker" in key for key in made.tensors)


def test_one_component_can_be_taken_out_and_named_again(tmp_path: Path) -> None:
    path = single("sdxl", tmp_path)
    convert(path, tmp_path / "vae.safetensors", "sgm", component="vae", family="sdxl")
    bare = load_file(tmp_path / "vae.safetensors")
    assert "decoder.up.0.block.0.conv1.weight" in bare
    convert(tmp_path / "vae.safetensors", tmp_path / "vae", "diffusers", family="sdxl")
    folder = open_file(tmp_path / "vae")
    assert folder.format == "component-folder"
    assert folder.config["config.json"]["scaling_factor"] == 0.13025
    assert same(load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors"), states("sdxl")["vae"])
    convert(tmp_path / "vae", tmp_path / "again.safetensors", "single-file")
    assert same(load_file(tmp_path / "again.safetensors"), bare)


def test_a_denoiser_alone_can_stay_a_file(tmp_path: Path) -> None:
    convert(saved("flux1", tmp_path), tmp_path / "bfl.safetensors", "bfl", component="transformer", family="flux1")
    convert(tmp_path / "bfl.safetensors", tmp_path / "diffusers.safetensors", "diffusers", format="safetensors")
    assert same(load_file(tmp_path / "diffusers.safetensors"), states("flux1")["transformer"])
    convert(tmp_path / "diffusers.safetensors", tmp_path / "comfy.safetensors", "comfy")
    keys = load_file(tmp_path / "comfy.safetensors").keys()
    assert all(key.startswith("model.diffusion_model.") for key in keys)


def test_large_weights_are_sharded(tmp_path: Path) -> None:
    path = single("sd1", tmp_path)
    made = plan(open_file(path), Target(layout="diffusers", family="sd1"), config_from=tmp_path / "sd1")
    assert isinstance(made, FolderPlan)
    execute_folder(made, tmp_path / "folder", shard=2_000_000)
    shards = sorted(path.name for path in (tmp_path / "folder/unet").glob("*-of-*"))
    assert shards[0] == "diffusion_pytorch_model-00001-of-00005.safetensors"
    assert open_file(tmp_path / "folder").findings == ()
    read = type(pipeline("sd1")).from_pretrained(str(tmp_path / "folder"), local_files_only=True)
    assert same(read.unet.state_dict(), pipeline("sd1").unet.state_dict())
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "ldm", family="sd1")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_v_prediction_mark_reaches_the_scheduler(tmp_path: Path) -> None:
    def mark(tensors: dict[str, Any]) -> None:
        tensors["v_pred"] = torch.zeros(0)
        tensors["ztsnr"] = torch.zeros(0)

    path = edited(single("sdxl", tmp_path), mark)
    made = plan(open_file(path), Target(layout="diffusers", family="sdxl"))
    assert isinstance(made, FolderPlan)
    scheduler = json.loads(made.documents["scheduler/scheduler_config.json"])
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    assert sorted(made.extras) == ["v_pred", "ztsnr"]


def test_the_notes_say_what_has_to_be_added(tmp_path: Path) -> None:
    made = plan(open_file(single("sdxl", tmp_path)), Target(layout="diffusers", family="sdxl"))
    assert made is not None
    assert "tokenizer, tokenizer_2" in made.notes[0]
    assert "stabilityai/stable-diffusion-xl-base-1.0" in made.notes[0]
    assert made.to_json()["files"][:2] == ["hubtool.origin.json", "model_index.json"]


def test_an_unknown_form_lists_the_known_ones(tmp_path: Path) -> None:
    file = open_file(single("sd1", tmp_path))
    with pytest.raises(UnknownLayout) as unknown:
        plan(file, Target(layout="kohya", family="sd1"))
    assert unknown.value.hint == "it has diffusers, ldm"
    with pytest.raises(UsageProblem, match="receipt"):
        plan(file, Target(layout="origin", family="sd1"))
    with pytest.raises(UsageProblem, match="safetensors"):
        plan(file, Target(layout="ldm", family="sd1", format="torch-zip"))
    with pytest.raises(UsageProblem, match="component"):
        plan(file, Target(layout="ldm", family="sd1", component="text_encoder_9"))


def test_a_vae_that_fits_two_families_needs_a_word(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(
        {f"{side}.conv_in.weight": torch.zeros(4, 4, 3, 3) for side in ("encoder", "decoder")}
        | {"decoder.up.0.block.0.conv1.weight": torch.zeros(4, 4, 3, 3)},
        path,
    )
    with pytest.raises(UnknownFamily, match="sd1, sd2, sdxl"):
        plan(open_file(path), Target(layout="diffusers"))


def test_fused_rows_of_an_unknown_size_are_refused(tmp_path: Path) -> None:
    def widen(tensors: dict[str, Any]) -> None:
        tensors["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"] = torch.zeros(50, 16)

    path = edited(single("flux1", tmp_path, "comfy"), widen)
    with pytest.raises(ConversionError, match="cannot be cut into 3 parts"):
        plan(open_file(path), Target(layout="diffusers"))


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    path = single("sd1", tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(WouldOverwrite):
        convert(path, tmp_path / "folder", "diffusers", family="sd1", base=tmp_path / "sd1")
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["../x/y.safetensors", "/x/y.safetensors", "unet/../../y.safetensors", "unet/run.py", "a/b/c.safetensors"]
)
def test_a_receipt_that_names_other_places_is_ignored(name: str) -> None:
    text = receipts._packed(b"{}")
    for what in ("header", "text"):
        document = {"version": 1, "folder": {name: {what: text}}}
        assert receipts.load_folder({receipt.KEY: json.dumps(document)}) is None


def test_a_receipt_that_is_nonsense_is_ignored() -> None:
    for text in ("", "[]", "{}", '{"folder": 1}', '{"folder": {"unet/a.safetensors": {"header": "!"}}}'):
        assert receipts.load_folder({receipt.KEY: text}) is None
