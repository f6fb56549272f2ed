"""Embeddings that come with other files, encodings that lose something, and the real files of every trainer."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from hubtool.adapters.identity import Identity
from hubtool.errors import UsageProblem
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.ops import artefacts
from hubtool.ops.artefacts import _image
from hubtool.ops.execute import execute
from hubtool.ops.plan import Plan
from hubtool.ops.target import Target
from hubtool.tensors.evaluate import to_bytes
from hubtool.tensors.expr import Read
from tests.support.files import write_json, write_safetensors

torch = pytest.importorskip("torch")


def vectors(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


def a1111(path: Path, count: int = 3, **more: Any) -> Path:
    tree = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(count, 768)}, "name": path.stem, "step": 9}
    return saved(path, {**tree, **more})


def planned(path: Path, **asked: Any) -> Plan:
    file = open_file(path)
    made = artefacts.plan(file, identify(file), Target(**asked))
    assert made is not None
    return made


def found(path: Path) -> Identity:
    return identify(open_file(path))


def told(path: Path, code: str = "companion") -> list[str]:
    return [finding.message for finding in found(path).findings if finding.code == code]


def safetensors(path: Path, **shapes: tuple[int, ...]) -> Path:
    tensors = {
        name: ("F32", shape, struct.pack(f"<{torch.Size(shape).numel()}f", *range(torch.Size(shape).numel())))
        for name, shape in shapes.items()
    }
    return write_safetensors(path, tensors)


# --- companions --------------------------------------------------------------------------------------------------------------


def test_both_halves_of_a_dreamartist_pair_name_the_other_by_its_name_alone(tmp_path: Path) -> None:
    positive, negative = a1111(tmp_path / "style.pt"), a1111(tmp_path / "style-neg.pt", 6)
    assert told(positive) == [
        "style-neg.pt lies beside it: a DreamArtist pair: style belongs in the prompt, style-neg in the negative prompt"
    ]
    assert told(negative)[0].startswith("style.pt lies beside it")
    assert str(tmp_path) not in told(negative)[0]
    assert (found(positive).flags, found(negative).flags) == ((), ("negative",))


def test_half_a_dreamartist_pair_says_that_the_other_is_not_there(tmp_path: Path) -> None:
    [said] = told(a1111(tmp_path / "style-neg.pt"), "dreamartist-pair")
    assert "style is not beside it" in said
    assert told(a1111(tmp_path / "style.pt", name="style")) == [
        "style-neg.pt lies beside it: a DreamArtist pair: style belongs in the prompt, style-neg in the negative prompt"
    ]


def test_a_cog_trio_says_what_its_words_stand_for(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "embeddings.pti", text_encoders_0=(2, 768), text_encoders_1=(2, 1280))
    assert [finding.severity for finding in found(path).findings] == ["warning", "info"]
    assert told(path)[0].startswith("lora.safetensors is not beside it")
    write_json(tmp_path / "special_params.json", {"TOK": "<s0><s1>", "odd": 3})
    safetensors(tmp_path / "unet.safetensors", x=(1,))
    assert told(path) == [
        "unet.safetensors lies beside it: the weights these tokens were trained with",
        "special_params.json lies beside it: TOK in a prompt stands for <s0><s1>",
    ]
    assert found(path).trigger_words == ("TOK",)


@pytest.mark.parametrize("text", ["[1]", "{", "\x80", '{"TOK": "no token"}'])
def test_damaged_special_params_are_as_good_as_none(tmp_path: Path, text: str) -> None:
    path = safetensors(tmp_path / "embeddings.pti", text_encoders_0=(2, 768), text_encoders_1=(2, 1280))
    (tmp_path / "special_params.json").write_text(text, encoding="latin-1")
    assert found(path).trigger_words == ("embeddings",)


def test_the_third_file_of_cloneofsimo_names_the_lists(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.ti.pt", {"<s1>": vectors(768)})
    assert told(path) == ["x.pt is not beside it: the positional lists these tokens were trained with"]
    saved(tmp_path / "x.pt", [1])
    saved(tmp_path / "x.text_encoder.pt", [1])
    assert told(path)[0].startswith("x.pt, x.text_encoder.pt lie beside it")


def test_pivotal_tuning_names_its_lora(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "me_emb.safetensors", clip_l=(2, 768), clip_g=(2, 1280))
    assert told(path) == []
    safetensors(tmp_path / "pytorch_lora_weights.safetensors", x=(1,))
    assert told(path)[0].startswith("pytorch_lora_weights.safetensors lies beside it")


def test_the_second_half_of_an_sdxl_training_is_named(tmp_path: Path) -> None:
    first = safetensors(tmp_path / "learned_embeds.safetensors", **{"<cat>": (1, 768)})
    second = safetensors(tmp_path / "learned_embeds_2.safetensors", **{"<cat>": (1, 1280)})
    assert told(first)[0].startswith("learned_embeds_2.safetensors")
    assert told(second)[0].startswith("learned_embeds.safetensors")


def test_an_identifier_that_contradicts_the_file_is_a_warning(tmp_path: Path) -> None:
    path = saved(tmp_path / "learned_embeds.bin", {"<cat>": vectors(768)})
    (tmp_path / "token_identifier.txt").write_text("<dog>\n\n")
    assert "says <dog>, the file itself <cat>" in told(path, "claim-contradicts")[0]
    (tmp_path / "token_identifier.txt").write_text("<dog>\n<cat>\n\n")
    assert told(path, "claim-contradicts") == []


def test_tokens_beside_custom_diffusion_are_named(tmp_path: Path) -> None:
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
    path = saved(tmp_path / "pytorch_custom_diffusion_weights.bin", {key: vectors(8, 768)})
    assert told(path) == ["<new1>.bin is not beside it: the new tokens, one textual inversion each"]
    saved(tmp_path / "<new1>.bin", {"<new1>": vectors(768)})
    assert told(path)[0].startswith("<new1>.bin lies beside it")


def test_a_null_text_inversion_names_its_picture_and_misses_its_latent(tmp_path: Path) -> None:
    path = saved(tmp_path / "cat.png.pt", vectors(3, 1, 77, 768))
    assert len(told(path)) == 1
    assert "the latent x_T is not in this file" in told(path)[0]
    (tmp_path / "cat.png").write_bytes(b"x")
    assert told(path)[1] == "cat.png lies beside it: the picture that was inverted"
    whole = saved(tmp_path / "y.pt", {"uncond": vectors(3, 1, 77, 768), "x_T": vectors(1, 4, 8, 8)})
    assert "not in this file" not in told(whole)[0]


def test_the_optimizer_of_a_hypernetwork_is_named_and_not_needed(tmp_path: Path) -> None:
    net = {"linear.0.weight": vectors(8, 8), "linear.0.bias": vectors(8)}
    path = saved(tmp_path / "hn.pt", {8: (net, net)})
    assert told(path) == []
    (tmp_path / "hn.pt.optim").write_bytes(b"x")
    assert told(path)[0].startswith("hn.pt.optim lies beside it")


def test_the_folder_of_aesthetic_embeddings_settles_what_values_cannot(tmp_path: Path) -> None:
    folder = tmp_path / "aesthetic_embeddings"
    folder.mkdir()
    tree = vectors(1, 768)
    assert found(saved(tmp_path / "x.pt", tree)).kind == "textual_inversion"
    assert found(saved(folder / "x.pt", tree)).kind == "aesthetic_embedding"


def test_a_user_may_say_that_a_vector_is_an_aesthetic_embedding(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", vectors(768))
    execute(planned(path, layout="aesthetic_embedding", format="safetensors"), tmp_path / "x.safetensors")
    after = found(tmp_path / "x.safetensors")
    assert (after.kind, after.evidence) == ("aesthetic_embedding", ("the key aesthetic_embedding",))
    execute(planned(tmp_path / "x.safetensors", format="torch-zip"), tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), vectors(768))


# --- encodings and losses ------------------------------------------------------------------------------------------------------


def test_an_optimised_history_loses_its_earlier_snapshots_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "h.pt", [{"emb": vectors(768, seed=i), "emb2": vectors(1280)} for i in range(4)])
    made = planned(path, format="safetensors")
    assert [loss.what for loss in made.losses] == ["6 tensors"]
    assert made.layout == "kohya-sdxl"


def test_one_encoders_vectors_can_be_taken_out(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "x.safetensors", clip_l=(2, 768), clip_g=(2, 1280))
    made = planned(path, component="text_encoder_2", layout="diffusers")
    assert [tensor.shape for tensor in made.tensors.values()] == [(2, 1280)]
    with pytest.raises(UsageProblem, match="no vectors for unet"):
        planned(path, component="unet")


def test_an_encoding_that_belongs_in_a_torch_file_is_refused_for_safetensors(tmp_path: Path) -> None:
    path = a1111(tmp_path / "x.pt")
    with pytest.raises(UsageProblem, match="torch file"):
        planned(path, layout="a1111", format="safetensors")
    assert planned(path, layout="a1111").format == "torch-zip"
    with pytest.raises(UsageProblem, match="no such"):
        planned(path, layout="webp")


def test_facts_that_an_encoding_has_no_place_for_are_losses(tmp_path: Path) -> None:
    execute(planned(a1111(tmp_path / "x.pt"), format="safetensors"), tmp_path / "x.safetensors")
    losses = planned(tmp_path / "x.safetensors", layout="diffusers-bin", format="torch-zip").losses
    assert [loss.what for loss in losses] == ["metadata hubtool.extra.step"]
    assert planned(tmp_path / "x.safetensors", layout="a1111", format="torch-zip").losses == ()


def test_other_token_ids_are_told(tmp_path: Path) -> None:
    path = a1111(tmp_path / "x.pt", string_to_token={"*": 9})
    assert "9" in planned(path, format="safetensors").notes[0]


def test_a_safetensors_embedding_that_stays_as_it_is_keeps_its_header(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "x.safetensors", emb_params=(2, 768))
    assert planned(path, format="safetensors").fidelity == "identical"


# --- diffusers reads what is written ---------------------------------------------------------------------------------------------


def encoder(width: int) -> tuple[Any, Any]:
    """A pipeline's text encoder of one small layer, and a tokenizer of its few words."""
    from hubtool.pipelines.tiny import build

    pipe = build("sd1")
    from tests.support.tiny import clip

    return clip(width), pipe.tokenizer


@pytest.mark.parametrize("name", ["out.bin", "out.safetensors"])
def test_diffusers_loads_the_tokens_of_an_a1111_file(tmp_path: Path, name: str) -> None:
    from diffusers.loaders import TextualInversionLoaderMixin

    layout = "diffusers-bin" if name.endswith("bin") else "diffusers"
    source = a1111(tmp_path / "sks.pt")
    container = "torch-zip" if name.endswith("bin") else "safetensors"
    execute(planned(source, layout=layout, format=container), tmp_path / name)
    model, tokenizer = encoder(768)
    loader = TextualInversionLoaderMixin()
    loader.text_encoder, loader.tokenizer = model, tokenizer
    loader.hf_device_map, loader.components = None, {}
    loader.load_textual_inversion(str(tmp_path / name), text_encoder=model, tokenizer=tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["sks", "sks_1", "sks_2"])
    table = model.get_input_embeddings().weight
    assert torch.equal(table[ids].detach(), vectors(3, 768))


# --- real files ------------------------------------------------------------------------------------------------------------------

REAL = ("ti", "aesthetic", "conditioning")
CHANGED = {"HK200202-hub__embeddings.pti", "invoke-ai__test_embedding.safetensors"}  # safetensors already


def real(shared: Path) -> list[Path]:
    files = [path for folder in REAL for path in sorted((shared / "real" / folder).iterdir())]
    return [path for path in files if path.suffix not in (".json", ".txt") and path.name not in CHANGED]


def test_every_real_torch_file_goes_to_safetensors_and_comes_back_byte_for_byte(shared: Path, tmp_path: Path) -> None:
    files = real(shared)
    assert len(files) > 15
    for path in files:
        there = tmp_path / f"{path.name}.safetensors"
        made = planned(path, format="safetensors")
        assert not made.losses, (path.name, made.losses)
        execute(made, there)
        back = planned(there, format="torch-zip")
        assert isinstance(back, _image.Restored), path.name
        back.write(tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
        before, after = found(path), found(there)
        assert (before.kind, before.family) == (after.kind, after.family)


def test_a_picture_gives_its_vectors(shared: Path, tmp_path: Path) -> None:
    path = shared / "real" / "ti-png" / "Ljzd-PRO__gasai_yuno-1000.png"
    execute(planned(path, format="safetensors"), tmp_path / "x.safetensors")
    before, after = open_file(path), open_file(tmp_path / "x.safetensors")
    [ref] = [ref for name, ref in before.tensors.items() if "param" in name]
    assert to_bytes(Read(after.tensors["emb_params"])) == to_bytes(Read(ref))
    assert found(tmp_path / "x.safetensors").trigger_words == found(path).trigger_words


def test_real_files_of_a_collection_find_their_companions(shared: Path) -> None:
    folder = shared / "real" / "ti"
    assert found(folder / "HK200202-hub__embeddings.pti").trigger_words == ("TOK",)
    assert json.loads((folder / "HK200202-hub__special_params.json").read_text()) == {"TOK": "<s0><s1>"}
