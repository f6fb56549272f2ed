"""Custom Diffusion: five shapes of one thing, folded exactly, judged by diffusers' own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hubtool.adapters.custom_diffusion import from_ldm, parse, to_ldm
from hubtool.errors import CorruptFile, Unsupported, UsageProblem
from hubtool.formats import open_file
from hubtool.layouts import parse_file
from hubtool.layouts.identify import identify
from hubtool.ops import artefacts
from hubtool.ops.execute import execute
from hubtool.ops.plan import Plan
from hubtool.ops.target import Target
from hubtool.tensors.evaluate import compute
from tests.support.tensor_files import base_lists, tensor

torch = pytest.importorskip("torch")
PROJECTIONS = ("attn2.to_k.weight", "attn2.to_v.weight")


def tiny_unet(width: int = 768) -> Any:
    """Real names of SD1's first and last attention, at the width that says SD1."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=8,
        cross_attention_dim=width,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def trained(unet: Any, *, whole: bool = False) -> dict[str, Any]:
    """New weights for keys and values, or for the whole cross attention."""
    generator = torch.Generator().manual_seed(3)
    names = [name for name in unet.state_dict() if ".attn2." in name and (whole or name.endswith(PROJECTIONS))]
    return {name: torch.randn(unet.state_dict()[name].shape, generator=generator) * 0.1 for name in names}


def factors(unet: Any, rank: int = 3) -> dict[str, dict[str, Any]]:
    found = {}
    for name, weight in trained(unet).items():
        found[name] = {"u": torch.randn(weight.shape[0], rank) * 0.1, "v": torch.randn(rank, weight.shape[1])}
    return found


def tokens() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    return {"<new1>": torch.randn(768, generator=generator), "<new2>": torch.randn(768, generator=generator)}


def cmu(path: Path, unet: Any, **more: Any) -> Path:
    torch.save({"unet": trained(unet), "modifier_token": tokens(), **more}, path)
    return path


def planned(path: Path, **asked: Any) -> Plan:
    file = open_file(path)
    made = artefacts.plan(file, identify(file), Target(**asked))
    assert made is not None
    return made


def written(path: Path, output: Path, *, lossy: bool = False, **asked: Any) -> Path:
    container = "safetensors" if output.suffix == ".safetensors" else "torch-zip"
    made = planned(path, format=container, **asked)
    assert lossy or not made.losses, made.losses
    execute(made, output)
    return output


def picture(unet: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    latent, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 6, 768, generator=generator)
    with torch.no_grad():
        return unet(latent, 5, context).sample


def _pipeline(unet: Any) -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(unet, DDPMScheduler())


def test_diffusers_loads_the_bin_that_hubtool_makes_of_a_cmu_delta(tmp_path: Path) -> None:
    """Through ``load_attn_procs`` with ``_pipeline``: as documented, without, it is a silent no-op (diffusers 7261)."""
    unet, copied = tiny_unet(), tiny_unet()
    source = cmu(tmp_path / "delta.bin", unet)
    output = written(source, tmp_path / "pytorch_custom_diffusion_weights.bin", layout="diffusers", lossy=True)

    copied.load_state_dict({**copied.state_dict(), **trained(unet)})
    before = picture(unet)
    unet.load_attn_procs(torch.load(output, weights_only=True), _pipeline=_pipeline(unet))
    assert torch.allclose(picture(unet), picture(copied), atol=1e-5)
    assert (picture(unet) - before).abs().max() > 1e-4


def test_tokens_of_the_diffusers_form_are_losses_and_can_be_written_alone(tmp_path: Path) -> None:
    source = cmu(tmp_path / "delta.bin", tiny_unet())
    assert [loss.what for loss in planned(source, layout="diffusers").losses] == ["token <new1>", "token <new2>"]
    output = written(source, tmp_path / "new.bin", component="tokens")
    loaded = torch.load(output, weights_only=True)
    assert {name: vector.tolist() for name, vector in loaded.items()} == {
        name: vector.tolist() for name, vector in tokens().items()
    }
    assert identify(open_file(output)).kind == "textual_inversion"


@pytest.mark.parametrize("whole", [False, True], ids=["keys and values", "the whole cross attention"])
def test_compvis_cmu_and_diffusers_names_go_round_without_touching_a_bit(tmp_path: Path, whole: bool) -> None:
    unet = tiny_unet()
    source = tmp_path / "delta.bin"
    torch.save({"unet": trained(unet, whole=whole), "modifier_token": tokens()}, source)
    compvis = written(source, tmp_path / "delta.ckpt", layout="compvis")
    state = torch.load(compvis, weights_only=True)["state_dict"]
    assert state["embed"].shape == (2, 768)
    assert identify(open_file(compvis)).variant == "compvis"
    back = written(compvis, tmp_path / "back.bin", layout="cmu")
    first, last = (torch.load(path, weights_only=True) for path in (source, back))
    assert list(first["unet"]) == list(last["unet"])
    assert all(torch.equal(first["unet"][name], last["unet"][name]) for name in first["unet"])
    assert all(torch.equal(last["modifier_token"][name], vector) for name, vector in tokens().items())


def test_ldm_names_are_those_of_the_original_checkpoints(shared: Path) -> None:
    """The oracle is the pair of key lists of Stable Diffusion 1.5."""
    lists = {
        naming: keys for base, naming, part, keys in base_lists(shared / "bases") if (base, part) == ("sd15", "unet")
    }
    start = "model.diffusion_model."
    original = {key.removeprefix(start) for key in lists["original"] if ".attn2." in key}
    diffusers = {key for key in lists["diffusers"] if ".attn2." in key}
    assert len(original) == 80
    assert {from_ldm(key) for key in original} == diffusers
    assert {to_ldm(key) for key in diffusers} == original


@pytest.mark.parametrize(
    "name", ["input_blocks.3.1.transformer_blocks.0.x", "middle_block.0.transformer_blocks.0.x", "x"]
)
def test_places_without_attention_have_no_name(name: str) -> None:
    assert from_ldm(name) is None
    assert to_ldm(name) is None


def test_replaced_weights_fold_into_an_adapter_exactly_and_without_the_base(tmp_path: Path) -> None:
    unet = tiny_unet()
    output = written(cmu(tmp_path / "delta.bin", unet), tmp_path / "folded.safetensors", layout="kohya")
    adapter = parse_file(open_file(output)).adapter
    assert {item.token for item in adapter.embeddings} == {"<new1>", "<new2>"}
    assert "hubtool.image" not in open_file(output).metadata
    for name, weight in trained(unet).items():
        patch = adapter.patches["unet", name.removesuffix(".weight")]
        assert patch.algorithm == "set"
        base = unet.state_dict()[name]
        assert torch.allclose(base + patch.delta(base), weight, atol=1e-6)
        assert torch.equal(compute(dict(patch.roles())["set_weight"]), weight)


def test_compressed_factors_become_a_low_rank_adapter_exactly(tmp_path: Path) -> None:
    unet = tiny_unet()
    parts = factors(unet)
    torch.save({"unet": parts, "modifier_token": tokens()}, tmp_path / "delta.bin")
    assert identify(open_file(tmp_path / "delta.bin")).ranks == (3,)
    output = written(tmp_path / "delta.bin", tmp_path / "lora.safetensors", layout="kohya")
    adapter = parse_file(open_file(output)).adapter
    for name, pair in parts.items():
        patch = adapter.patches["unet", name.removesuffix(".weight")]
        assert (patch.rank, patch.scale) == (3, 1.0)
        assert torch.allclose(patch.delta(), pair["u"] @ pair["v"], atol=1e-6)


def test_compressed_factors_keep_their_shape_between_compvis_and_cmu(tmp_path: Path) -> None:
    torch.save({"unet": factors(tiny_unet()), "modifier_token": tokens()}, tmp_path / "delta.bin")
    compvis = written(tmp_path / "delta.bin", tmp_path / "delta.ckpt", layout="compvis")
    back = written(compvis, tmp_path / "back.bin", layout="cmu")
    first, last = (torch.load(path, weights_only=True)["unet"] for path in (tmp_path / "delta.bin", back))
    assert all(torch.equal(first[name][role], last[name][role]) for name in first for role in "uv")
    losses = planned(back, layout="diffusers").losses
    assert {loss.reason for loss in losses if not loss.what.startswith("token")} == {
        "its factors are added to the base weight, and diffusers' form holds whole weights"
    }


def test_whole_weights_cannot_be_compressed_without_their_base(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="difference to the base"):
        planned(cmu(tmp_path / "delta.bin", tiny_unet()), layout="compressed")


def test_what_compvis_cannot_hold_is_named(tmp_path: Path) -> None:
    vectors = {"<dog>": torch.randn(768)}
    source = cmu(tmp_path / "delta.bin", tiny_unet(), modifier_token=vectors, text_encoder={"w": torch.randn(3)})
    assert [loss.what for loss in planned(source, layout="compvis").losses] == [
        "the name <dog>",
        "the whole text_encoder",
    ]
    pair = {"<dog>": [torch.randn(768), torch.randn(1280)]}
    assert [loss.reason for loss in planned(cmu(tmp_path / "x.bin", tiny_unet(), modifier_token=pair), layout="compvis").losses] == [
        "CompVis has one text encoder"
    ] * 2  # fmt: skip


def test_a_replaced_bias_is_a_loss_for_adapters(tmp_path: Path) -> None:
    torch.save({"unet": trained(tiny_unet(), whole=True)}, tmp_path / "delta.bin")
    losses = planned(tmp_path / "delta.bin", layout="kohya").losses
    assert {loss.reason for loss in losses} == {"no adapter layout has a role for a replaced bias"}


def test_one_component_can_be_taken_out(tmp_path: Path) -> None:
    encoder = {"text_model.final_layer_norm.weight": torch.randn(4)}
    source = cmu(tmp_path / "delta.bin", tiny_unet(), text_encoder=encoder)
    output = written(source, tmp_path / "encoder.safetensors", component="text_encoder")
    assert list(open_file(output).tensors) == list(encoder)
    with pytest.raises(UsageProblem, match="no component vae"):
        planned(source, component="vae")


def test_a_token_of_two_encoders_is_written_as_one_embedding(tmp_path: Path) -> None:
    pair = {"<v>": [torch.randn(768), torch.randn(1280)]}
    source = cmu(tmp_path / "delta.bin", tiny_unet(), modifier_token=pair)
    found = identify(open_file(written(source, tmp_path / "v.safetensors", component="tokens")))
    assert (found.variant, found.family, found.trigger_words) == ("kohya-sdxl", "sdxl", ("<v>",))


def test_rows_of_compvis_embed_are_separate_tokens() -> None:
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    found = parse({key: tensor(key, 8, 768), "embed": tensor("embed", 3, 768)})
    assert found is not None
    assert [item.token for item in found.tokens] == ["<new1>", "<new2>", "<new3>"]


STEM = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    "shapes",
    [
        {f"unet.{STEM}.u": (8, 2), f"unet.{STEM}.v": (3, 768)},
        {f"unet.{STEM}.u": (8, 2)},
        {f"unet.{STEM}.v": (2, 768)},
        {f"unet.{STEM}": (8, 768), "modifier_token.<a>": (1, 1, 768)},
    ],
)
def test_factors_and_tokens_that_do_not_fit_are_corrupt(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CorruptFile):
        parse({name: tensor(name, *shape) for name, shape in shapes.items()})


def test_an_adapter_on_the_cross_attention_is_no_custom_diffusion() -> None:
    assert parse({"unet.x.attn1.to_k.lora_A.weight": tensor("a", 4, 4)}) is None
    assert parse({}) is None
