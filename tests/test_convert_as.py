"""``convert --as lora|locon``, and PEFT keys in a single file: what is rewritten, what it costs, what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hubtool.actions.convert import Options, convert
from hubtool.cli.main import cli
from hubtool.errors import LossyConversion, UsageProblem
from hubtool.formats import open_file
from hubtool.layouts import parse_file
from hubtool.ops.target import Target
from tests.support.adapters import attention, make, write
from tests.support.files import RawTensor, floats, scalar, write_safetensors

pytest.importorskip("torch")
BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
UNET = [module for module in attention("sd1") if module[0] == "unet"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def tiny(*shape: int) -> RawTensor:
    return floats(*shape, start=-1.0, step=2**-10)


def loha(stem: str, out: int, inner: int, rank: int = 2) -> dict[str, RawTensor]:
    pairs = {"hada_w1_a": (out, rank), "hada_w1_b": (rank, inner), "hada_w2_a": (out, rank), "hada_w2_b": (rank, inner)}
    return {f"{stem}.{role}": tiny(*shape) for role, shape in pairs.items()} | {f"{stem}.alpha": scalar(1.0)}


def tucker(stem: str) -> dict[str, RawTensor]:
    return {
        f"{stem}.lora_up.weight": tiny(320, 4, 1, 1),
        f"{stem}.lora_mid.weight": tiny(4, 4, 3, 3),
        f"{stem}.lora_down.weight": tiny(4, 320, 1, 1),
        f"{stem}.alpha": scalar(2.0),
    }


def mixed(path: Path, **more: dict[str, RawTensor]) -> Path:
    tensors = loha(f"{BLOCK}_attn2_to_k", 320, 768) | tucker(CONV)
    for extra in more.values():
        tensors |= extra
    return write_safetensors(path, tensors)


def test_every_module_becomes_lora_with_the_same_change(tmp_path: Path) -> None:
    source = mixed(tmp_path / "a.safetensors")
    done = convert(
        source, tmp_path / "b.safetensors", Target(layout="diffusers", algorithm="lora"), Options(verify=True)
    )
    assert done.verdict is not None
    assert done.verdict.modules == 2
    assert done.verdict.worst < 1e-6
    told = {
        one.module.rsplit(".", 1)[1]: (one.before, one.rank_before, one.after, one.rank_after)
        for one in done.plan.promotions
    }
    assert told == {"to_k": ("loha", 2, "lora", 4), "conv1": ("tucker", 4, "locon", 4)}
    assert {
        patch.algorithm for patch in parse_file(open_file(tmp_path / "b.safetensors")).adapter.patches.values()
    } == {"lora", "locon"}


def test_without_a_layout_the_file_keeps_its_own(tmp_path: Path) -> None:
    source = mixed(tmp_path / "a.safetensors")
    done = convert(source, tmp_path / "b.safetensors", Target(algorithm="lora"), Options(verify=True))
    assert done.plan.layout == "kohya/diffusers"
    assert done.verdict is not None
    assert done.verdict.worst < 1e-6


def test_as_locon_folds_tucker_cores_and_nothing_else(tmp_path: Path) -> None:
    source = mixed(tmp_path / "a.safetensors")
    done = convert(source, tmp_path / "b.safetensors", Target(algorithm="locon"), Options(verify=True))
    assert [one.before for one in done.plan.promotions] == ["tucker"]
    after = parse_file(open_file(tmp_path / "b.safetensors")).adapter.patches
    assert sorted(patch.algorithm for patch in after.values()) == ["locon", "loha"]
    assert done.verdict is not None
    assert done.verdict.worst < 1e-6


def test_what_needs_the_base_is_refused_by_name(tmp_path: Path) -> None:
    rotation = {f"{BLOCK}_attn1_to_q.oft_blocks": tiny(4, 80, 80), f"{BLOCK}_attn1_to_q.alpha": scalar(0.0)}
    source = mixed(tmp_path / "a.safetensors", rotation=rotation)
    with pytest.raises(LossyConversion, match=r"attn1\.to_q as lora: stays oft: .*base"):
        convert(source, tmp_path / "b.safetensors", Target(algorithm="lora"))
    assert not (tmp_path / "b.safetensors").exists()
    convert(source, tmp_path / "b.safetensors", Target(algorithm="lora"), Options(allow_loss=True))
    left = parse_file(open_file(tmp_path / "b.safetensors")).adapter.patches
    assert sorted(patch.algorithm for patch in left.values()) == ["locon", "lora", "oft"]


def test_a_plain_lora_is_left_alone(tmp_path: Path) -> None:
    source = write(make("sd1", UNET[:4], alphas=(2.0,)), tmp_path / "a.safetensors", "kohya")
    done = convert(source, tmp_path / "b.safetensors", Target(algorithm="lora"))
    assert (done.plan.promotions, done.plan.losses) == ((), ())


def test_only_adapters_can_be_rewritten(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "a.safetensors", {"w": floats(2)})
    with pytest.raises(UsageProblem, match="only an adapter"):
        convert(source, tmp_path / "b.safetensors", Target(algorithm="lora"))


def test_the_command_prints_the_rank_it_costs(tmp_path: Path) -> None:
    source = mixed(tmp_path / "a.safetensors")
    result = run("convert", source, "-o", tmp_path / "b.safetensors", "--as", "lora", "--layout", "diffusers")
    assert "rewritten: 1 module, loha rank 2 -> lora rank 4" in result.stdout
    document = json.loads(run("convert", source, "--as", "lora", "--dry-run", "--json").stdout)
    assert {(one["from"], one["rank_before"], one["rank_after"]) for one in document["promotions"]} == {
        ("loha", 2, 4),
        ("tucker", 4, 4),
    }
    assert run("convert", source, "--as", "svd", "--dry-run").exit_code == 2


class TestPeftKeysInASingleFile:
    def test_a_path_with_a_suffix_is_a_file_and_one_without_a_folder(self, tmp_path: Path) -> None:
        source = write(make("sd1", UNET[:4], alphas=(4.0,)), tmp_path / "a.safetensors", "kohya")
        convert(source, tmp_path / "b.safetensors", Target(layout="peft"))
        convert(source, tmp_path / "folder", Target(layout="peft"))
        assert (tmp_path / "b.safetensors").is_file()
        assert (tmp_path / "folder" / "adapter_config.json").is_file()
        assert all(name.startswith("base_model.model.") for name in open_file(tmp_path / "b.safetensors").tensors)

    def test_the_way_there_and_back_gives_the_same_bytes(self, tmp_path: Path) -> None:
        source = tmp_path / "a.safetensors"
        tensors = {
            f"base_model.model.down_blocks.0.attentions.0.proj_in.lora_{x}.weight": tiny(*s)
            for x, s in (("A", (4, 320, 1, 1)), ("B", (320, 4, 1, 1)))
        }
        tensors |= {
            f"base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_{x}.weight": tiny(*s)
            for x, s in (("A", (4, 768)), ("B", (320, 4)))
        }
        write_safetensors(source, tensors, {"format": "pt"})
        layout = str(parse_file(open_file(source)).layout)
        convert(source, tmp_path / "b.safetensors", Target(layout="diffusers"))
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", Target(layout=layout))
        assert (tmp_path / "c.safetensors").read_bytes() == source.read_bytes()

    def test_a_scale_that_only_the_configuration_could_carry_is_a_loss(self, tmp_path: Path) -> None:
        source = write(make("sd1", UNET[:4], alphas=(1.0, 4.0)), tmp_path / "a.safetensors", "kohya")
        with pytest.raises(LossyConversion, match=r"the scale is 0\.25: only adapter_config\.json") as refused:
            convert(source, tmp_path / "b.safetensors", Target(layout="peft"))
        assert "and 1 more" in refused.value.message
        convert(source, tmp_path / "folder", Target(layout="peft"))

    def test_leaving_the_folder_loses_what_only_its_configuration_says(self, tmp_path: Path) -> None:
        source = write(make("sd1", UNET[:4], alphas=(1.0,)), tmp_path / "a.safetensors", "kohya")
        convert(source, tmp_path / "folder", Target(layout="peft"))
        with pytest.raises(LossyConversion, match=r"adapter_config\.json"):
            convert(tmp_path / "folder", tmp_path / "b.safetensors")
        convert(tmp_path / "folder", tmp_path / "again")
        config = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("folder", "again")]
        assert config[0] == config[1]
