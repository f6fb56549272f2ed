"""Keys broken by hand: what is proposed, what it gives back, and what is never touched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from hubtool.actions.convert import Options, convert
from hubtool.cli.main import cli
from hubtool.errors import ConversionError
from hubtool.formats import open_file
from hubtool.layouts import parse_file, receipt, repair
from hubtool.layouts.identify import identify
from hubtool.layouts.repair import mend, propose
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.target import Target
from hubtool.tensors.evaluate import to_bytes
from hubtool.tensors.expr import Read
from hubtool.tensors.ref import TensorRef
from tests.support.adapters import attention, make, write
from tests.support.files import RawTensor, floats, write_safetensors

Spell = Callable[[str], str]
STEM = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
KOHYA = {
    f"lora_unet_{STEM}{name}.lora_{role}.weight": floats(*((4, 320) if role == "down" else (320, 4)))
    for name in ("q", "k", "v")
    for role in ("down", "up")
}
DOTTED = {
    f"diffusion_model.double_blocks.{i}.img_mlp.0.lora_{role}.weight": floats(
        *((2, 3072) if role == "down" else (12288, 2))
    )
    for i in range(2)
    for role in ("down", "up")
}


def hubtool(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def broken(path: Path, spell: Spell, tensors: dict[str, RawTensor] | None = None) -> Path:
    good = KOHYA if tensors is None else tensors
    return write_safetensors(path, {spell(key): tensor for key, tensor in good.items()}, {"ss_output_name": "me"})


def tensors_of(path: Path) -> dict[str, TensorRef]:
    return dict(unwrapped(open_file(path))[0])


DAMAGE: dict[str, Spell] = {
    "the prefix twice, the dot lost": lambda key: key.replace("lora_unet_", "lora_unet_unet_").replace(
        ".lora_", "_lora_"
    ),
    "the whole prefix twice": lambda key: key.replace("lora_unet_", "lora_unet_lora_unet_"),
    "the dot lost": lambda key: key.replace(".lora_", "_lora_"),
    "both dots lost": lambda key: key.replace(".lora_", "_lora_").replace(".weight", "_weight"),
    "no .weight": lambda key: key.removesuffix(".weight"),
    "lora_A after a flat name": lambda key: key.replace(".lora_down.", "_lora_A_").replace(".lora_up.", "_lora_B_"),
    "a stray model.": lambda key: f"model.{key}",
    "DistributedDataParallel": lambda key: f"module.{key}",
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "capitals": str.upper,
    "capitals in the suffix": lambda key: key.replace("lora_down", "LORA_DOWN").replace("lora_up", "LORA_UP"),
    "capitals in the name": lambda key: key.replace("down_blocks", "Down_Blocks"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_keys_are_found_again_exactly(damage: Spell, tmp_path: Path) -> None:
    found = propose(tensors_of(broken(tmp_path / "a.safetensors", damage)))
    assert found is not None
    assert (found.resolved, found.total) == (len(KOHYA), len(KOHYA))
    assert {found.renames.get(damage(key), damage(key)) for key in KOHYA} == set(KOHYA)
    assert all(old != new for old, new in found.renames.items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda key: f"diffusion_model.{key}",
        lambda key: f"model.{key}",
        lambda key: key.replace("img_mlp", "_orig_mod.img_mlp"),
        lambda key: key.removesuffix(".weight"),
    ],
)
def test_dotted_keys_are_mended_too(damage: Spell, tmp_path: Path) -> None:
    found = propose(tensors_of(broken(tmp_path / "a.safetensors", damage, DOTTED)))
    assert found is not None
    assert set(found.renames.values()) == set(DOTTED)
    assert found.resolved == len(DOTTED)


@pytest.mark.parametrize(
    ("key", "mended"),
    [
        ("base_model.model.base_model.model.x.lora_A.weight", "base_model.model.x.lora_A.weight"),
        ("unet.unet.x.lora_A.weight", "unet.x.lora_A.weight"),
        ("text_encoder_2.text_encoder_2.x.lora_B.weight", "text_encoder_2.x.lora_B.weight"),
        ("lora_te1_text_encoder_text_model_x.alpha", "lora_te1_text_model_x.alpha"),
        ("lora_te_lora_te_text_model_x.alpha", "lora_te_text_model_x.alpha"),
        ("lora_unet_x_alpha", "lora_unet_x.alpha"),
        ("lora_unet_x_dora_scale", "lora_unet_x.dora_scale"),
        ("model.diffusion_model.diffusion_model.x_lora_up.weight", "diffusion_model.x.lora_up.weight"),
    ],
)
def test_each_rule_mends_what_it_is_for(key: str, mended: str) -> None:
    assert mend(key)[0] == mended


def test_every_rule_is_met_here() -> None:
    keys = [damage(key) for damage in DAMAGE.values() for key in KOHYA]
    keys += [f"diffusion_model.{key}" for key in DOTTED] + [
        key.replace("img_mlp", "_orig_mod.img_mlp") for key in DOTTED
    ]
    keys += ["base_model.model.base_model.model.x", "unet.unet.x", "lora_te_lora_te_x", "lora_unet_x_alpha"]
    used = {rule.id for key in keys for rule in mend(key)[1]}
    assert used == {rule.id for rule in repair.rules()}


@given(st.text(alphabet="aloruetnd_.mAB0", max_size=80))
def test_mending_ends_and_mends_once(key: str) -> None:
    once = mend(key)[0]
    assert mend(once)[0] == once or len(once) < len(key)


@pytest.mark.parametrize("layout", ["kohya", "kohya/ldm", "diffusers", "comfy", "diffusers-legacy"])
def test_a_healthy_file_is_never_mended(layout: str, tmp_path: Path) -> None:
    path = write(make("sd1", attention("sd1", 4), alphas=(4.0,)), tmp_path / "a.safetensors", layout)
    assert propose(tensors_of(path)) is None
    assert not any(finding.code == "broken-keys" for finding in identify(open_file(path)).findings)


def test_two_keys_that_would_become_one_are_left_alone(tmp_path: Path) -> None:
    tensors = {**KOHYA, **{f"model.{key}": tensor for key, tensor in KOHYA.items()}}
    assert propose(tensors_of(broken(tmp_path / "a.safetensors", str, tensors))) is None


def test_keys_that_mean_nothing_either_way_are_left_alone(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"model.strange.thing": floats(2), "module.other": floats(2)})
    assert propose(tensors_of(path)) is None


def test_letter_case_that_two_modules_share_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hubtool.layouts import repair_case

    path = broken(tmp_path / "a.safetensors", str.upper)
    monkeypatch.setattr(repair_case, "_spellings", lambda *_: {})
    assert propose(tensors_of(path)) is None


def test_the_finding_names_the_damage_and_the_command(tmp_path: Path) -> None:
    path = broken(tmp_path / "my file.safetensors", DAMAGE["the prefix twice, the dot lost"])
    found = identify(open_file(path))
    finding = next(finding for finding in found.findings if finding.code == "broken-keys")
    assert (found.kind, found.variant, found.family_candidates) == ("lora", "broken", ("sd1", "sd2"))
    assert finding.severity == "error"
    assert "is written twice" in finding.message
    assert finding.message.endswith(f"hubtool convert '{path}' -o OUT --repair")


def test_a_file_broken_in_part_is_read_and_warned_about(tmp_path: Path) -> None:
    path = broken(tmp_path / "a.safetensors", lambda key: f"model.{key}" if "to_v" in key else key)
    found = identify(open_file(path))
    finding = next(finding for finding in found.findings if finding.code == "broken-keys")
    assert (found.layout, finding.severity) == ("kohya/diffusers", "warning")


def test_nothing_is_mended_unasked(tmp_path: Path) -> None:
    path = broken(tmp_path / "a.safetensors", DAMAGE["the dot lost"])
    with pytest.raises(ConversionError, match="broken by hand") as refused:
        convert(path, tmp_path / "b.safetensors", Target(layout="diffusers"))
    assert "--repair" in (refused.value.hint or "")
    assert convert(path, tmp_path / "c.safetensors").plan.fidelity == "identical"


@pytest.mark.parametrize("layout", [None, "diffusers", "kohya/ldm", "comfy"])
@pytest.mark.parametrize("damage", [DAMAGE["the prefix twice, the dot lost"], DAMAGE["capitals"]])
def test_the_way_back_gives_the_broken_bytes(layout: str | None, damage: Spell, tmp_path: Path) -> None:
    source = broken(tmp_path / "a.safetensors", damage)
    good, back = tmp_path / "good.safetensors", tmp_path / "back.safetensors"
    done = convert(source, good, Target(layout=layout, repair=True, family="sd1"), Options(verify=True))
    assert done.verdict is not None
    assert (done.verdict.worst, done.verdict.missing) == (0.0, ())
    assert done.plan.repair is not None
    assert len(done.plan.repair.renames) == len(KOHYA)
    again = convert(good, back, Target(layout="origin", family="sd1"))
    assert (again.plan.fidelity, again.plan.layout) == ("identical", "broken")
    assert back.read_bytes() == source.read_bytes()


def test_the_mended_file_holds_the_same_numbers(tmp_path: Path) -> None:
    source = broken(tmp_path / "a.safetensors", DAMAGE["the dot lost"])
    convert(source, tmp_path / "b.safetensors", Target(repair=True))
    file = open_file(tmp_path / "b.safetensors")
    assert list(file.tensors) == list(KOHYA)
    assert all(to_bytes(Read(ref)) == KOHYA[name][2] for name, ref in file.tensors.items())
    assert file.metadata["ss_output_name"] == "me"
    assert str(parse_file(file).layout) == "kohya/diffusers"


def test_metadata_edited_in_between_stays_edited(tmp_path: Path) -> None:
    from hubtool.tensors.writer import write_safetensors as ours

    source = broken(tmp_path / "a.safetensors", DAMAGE["the dot lost"])
    convert(source, tmp_path / "b.safetensors", Target(repair=True))
    file = open_file(tmp_path / "b.safetensors")
    edited = {**file.metadata, "ss_output_name": "renamed"}
    ours(tmp_path / "c.safetensors", {name: Read(ref) for name, ref in file.tensors.items()}, edited)
    convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", Target(layout="origin", family="sd1"))
    back = open_file(tmp_path / "d.safetensors")
    assert list(back.tensors) == list(open_file(source).tensors)
    assert back.metadata["ss_output_name"] == "renamed"


def test_origin_leads_back_from_any_conversion(tmp_path: Path) -> None:
    source = write(make("sd1", attention("sd1", 6), alphas=(1.0, 4.0)), tmp_path / "a.safetensors", "kohya")
    convert(source, tmp_path / "b.safetensors", Target(layout="diffusers"))
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", Target(layout="origin"))
    assert (tmp_path / "c.safetensors").read_bytes() == source.read_bytes()
    with pytest.raises(ConversionError, match="no receipt"):
        convert(source, tmp_path / "d.safetensors", Target(layout="origin"))


def test_an_adapter_changed_since_has_no_way_back(tmp_path: Path) -> None:
    from hubtool.tensors.writer import write_safetensors as ours

    source = broken(tmp_path / "a.safetensors", DAMAGE["the dot lost"])
    convert(source, tmp_path / "b.safetensors", Target(repair=True))
    file = open_file(tmp_path / "b.safetensors")
    ours(
        tmp_path / "c.safetensors",
        {name: Read(ref) for name, ref in list(file.tensors.items())[:2]},
        dict(file.metadata),
    )
    with pytest.raises(ConversionError, match="changed since"):
        convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", Target(layout="origin", family="sd1"))


@pytest.mark.parametrize(
    "text", ["{", '{"x": 1}', '{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "[]", ""]
)
def test_a_forged_receipt_of_a_broken_file_is_no_receipt(text: str) -> None:
    from hubtool.layouts.repair_receipt import mend as mend_receipt

    assert mend_receipt(receipt.Receipt("broken:kohya/diffusers", "safetensors", text.encode())) is None
    assert mend_receipt(receipt.Receipt("kohya/diffusers", "safetensors", text.encode())) is None


def test_repair_of_a_healthy_file_says_so(tmp_path: Path) -> None:
    source = broken(tmp_path / "a.safetensors", str)
    done = convert(source, tmp_path / "b.safetensors", Target(repair=True))
    assert any("nothing to repair" in note for note in done.plan.notes)
    assert (tmp_path / "b.safetensors").read_bytes() == source.read_bytes()


def test_repair_of_what_nobody_knows_is_refused(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "a.safetensors", {"w": floats(2)})
    with pytest.raises(ConversionError, match="no known repair"):
        convert(source, tmp_path / "b.safetensors", Target(repair=True))
    assert not (tmp_path / "b.safetensors").exists()


def test_a_dry_run_lists_every_rename(tmp_path: Path) -> None:
    path = broken(tmp_path / "a.safetensors", DAMAGE["the dot lost"])
    result = hubtool("convert", path, "--repair", "--dry-run")
    assert result.exit_code == 0
    assert len(re.findall(r"renamed: \S+ -> \S+", result.stdout)) == len(KOHYA)
    document = json.loads(hubtool("convert", path, "--repair", "--dry-run", "--json").stdout)
    assert set(document["repair"]["renames"].values()) == set(KOHYA)
    assert [rule["id"] for rule in document["repair"]["rules"]] == ["lost-dot"]


def test_the_real_hand_conversion_is_mended_and_given_back(shared: Path, tmp_path: Path) -> None:
    source = shared / "real" / "lora" / "timohavdk__new.safetensors"
    done = convert(source, tmp_path / "b.safetensors", Target(layout="diffusers", repair=True), Options(verify=True))
    assert done.plan.repair is not None
    assert (done.plan.repair.resolved, done.plan.repair.total, done.plan.repair.candidates) == (256, 256, ("sd1",))
    assert done.verdict is not None
    assert (done.verdict.modules, done.verdict.worst) == (128, 0.0)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", Target(layout="origin"))
    assert (tmp_path / "c.safetensors").read_bytes() == source.read_bytes()


def test_a_torch_file_is_mended_and_keeps_no_receipt(tmp_path: Path) -> None:
    source = broken(tmp_path / "a.safetensors", DAMAGE["the dot lost"])
    done = convert(source, tmp_path / "b.pt", Target(repair=True), Options(allow_loss=True))
    assert done.plan.format == "torch-zip"
    assert set(tensors_of(tmp_path / "b.pt")) == set(KOHYA)


def test_a_repair_is_a_value() -> None:
    from types import MappingProxyType

    one = repair.Repair(MappingProxyType({"a": "b"}), (("x", "y"),), 1, 1, ())
    assert "1 key was broken by hand (y): a should read b" in one.sentence()
    assert replace(one).to_json()["total"] == 1
