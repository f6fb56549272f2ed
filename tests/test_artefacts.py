"""Artefacts that are no LoRA: every one goes to its other container and back, and nothing is lost in silence."""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hubtool.cli.main import cli
from hubtool.errors import LossyConversion, UsageProblem
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.ops import artefacts
from hubtool.ops.artefacts import _image
from hubtool.ops.execute import execute
from hubtool.ops.plan import Plan
from hubtool.ops.target import Target
from hubtool.tensors.evaluate import to_bytes
from hubtool.tensors.expr import Read
from tests.support.files import write_safetensors

torch = pytest.importorskip("torch")
safe = pytest.importorskip("safetensors.torch")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def planned(source: Path, **asked: Any) -> Plan:
    file = open_file(source)
    made = artefacts.plan(file, identify(file), Target(**asked))
    assert made is not None
    return made


def converted(source: Path, output: Path, **asked: Any) -> Plan:
    """Plan by the output's suffix and write."""
    container = "safetensors" if output.suffix == ".safetensors" else "torch-zip"
    made = planned(source, format=container, **asked)
    assert made.losses == (), made.losses
    if isinstance(made, _image.Restored):
        made.write(output)
    else:
        execute(made, output)
    return made


def content(path: Path) -> dict[str, bytes]:
    """The numbers of an artefact under names that no form changes."""
    file = open_file(path)
    found = artefacts.contents(file, identify(file))
    assert found
    return {name: to_bytes(tensor) for name, tensor in found.items()}


def values(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


def network(width: int, seed: int) -> dict[str, Any]:
    return OrderedDict(
        {
            "linear.0.weight": values(2 * width, width, seed=seed),
            "linear.0.bias": values(2 * width, seed=seed + 1),
            "linear.2.weight": values(width, 2 * width, seed=seed + 2),
            "linear.2.bias": values(width, seed=seed + 3),
        }
    )


def hypernetwork() -> dict[Any, Any]:
    return {
        320: (network(320, 1), network(320, 5)),
        "step": 1999,
        "name": "鏡 style",
        "layer_structure": [1, 2, 1],
        "activation_func": "relu",
        "is_layer_norm": False,
        "weight_initialization": "Normal",
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": None,
        "activate_output": False,
        "use_dropout": False,
        "dropout_structure": None,
        "last_layer_dropout": False,
        "optional_info": "line one\nline two",
    }


def attention(dtype: Any = None) -> dict[str, Any]:
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    return {f"{stem}.to_k.weight": values(8, 768), f"{stem}.to_v.weight": values(8, 768, seed=1)}


A1111 = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": values(3, 768)},
    "name": "cat-500",
    "step": 499,
    "sd_checkpoint": "81761151",
    "sd_checkpoint_name": "v1-5",
}
LDM = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2"
TREES: dict[str, Any] = {
    "textual_inversion a1111": A1111,
    "textual_inversion diffusers": {"<cat>": values(768)},
    "textual_inversion diffusers several vectors": {"<cat>": values(4, 768)},
    "textual_inversion raw": values(2, 1024),
    "textual_inversion kohya-sdxl": {"clip_l": values(2, 768), "clip_g": values(2, 1280)},
    "textual_inversion emb-pair": {"emb": values(768), "emb2": values(1280)},
    "textual_inversion xti": {name: values(1, 768) for name in ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID")}
    | {f"OUT{i:02}": values(1, 768) for i in range(3, 12)},
    "hypernetwork": hypernetwork(),
    "hypernetwork novelai": {768: [{"linear1.weight": values(8, 768), "linear2.weight": values(768, 8)}] * 2},
    "aesthetic_embedding": torch.nn.functional.one_hot(torch.tensor([644]), 768).float() * 20 + 0.1 * values(1, 768),
    "aesthetic_embedding flat": torch.nn.functional.one_hot(torch.tensor(644), 768).half() * 20 + 0.1 * values(768).half(),
    "null_text stacked": values(5, 1, 77, 768),
    "null_text list": [values(1, 77, 768, seed=i) for i in range(4)],
    "null_text dict": {
        "uncond_embeddings": [values(1, 77, 768, seed=i) for i in range(4)],
        "x_t": values(1, 4, 8, 8),
        "prompt": "a cat",
        "guidance": 7.5,
    },
    "conditioning": values(1, 77, 1024),
    "conditioning image": {"image_embeds": values(1, 768)},
    "custom_diffusion compvis": {
        "state_dict": {f"{LDM}.to_k.weight": values(8, 768), f"{LDM}.to_v.weight": values(8, 768), "embed": values(2, 768)}
    },
    "custom_diffusion cmu": {"unet": attention(), "modifier_token": {"<new1>": values(768), "<new2>": values(768, seed=1)}},
    "custom_diffusion cmu-sdxl": {
        "unet": {k: values(8, 2048) for k in attention()},
        "modifier_token": {"<v>": [values(768), values(1280)]},
        "text_encoder": {"text_model.final_layer_norm.weight": values(8)},
    },
    "custom_diffusion compressed": {
        "unet": {k: {"u": values(8, 2), "v": values(2, 768)} for k in attention()},
        "modifier_token": {"<new1>": values(768)},
    },
    "custom_diffusion diffusers": {
        **{
            k.replace(".to_k.", ".processor.to_k_custom_diffusion.").replace(
                ".to_v.", ".processor.to_v_custom_diffusion."
            ): v
            for k, v in attention().items()
        },
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor": {},
    },
}  # fmt: skip


@pytest.fixture(params=TREES, ids=[name.replace(" ", "-") for name in TREES])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    return str(request.param), saved(tmp_path / "source.pt", TREES[request.param])


def test_each_is_recognised(made: tuple[str, Path]) -> None:
    name, path = made
    found = identify(open_file(path))
    assert found.kind == name.split()[0]
    assert found.layout


def test_a_torch_file_becomes_safetensors_of_the_same_kind_family_and_bytes(
    made: tuple[str, Path], tmp_path: Path
) -> None:
    _, path = made
    there = tmp_path / "there.safetensors"
    assert converted(path, there).fidelity == "exact"
    before, after = identify(open_file(path)), identify(open_file(there))
    assert (after.kind, after.family, after.trigger_words) == (before.kind, before.family, before.trigger_words)
    assert content(there) == content(path)
    assert set(safe.load_file(there)) == set(open_file(there).tensors)


def test_the_way_back_gives_the_very_bytes_that_torch_wrote(made: tuple[str, Path], tmp_path: Path) -> None:
    _, path = made
    there, back = tmp_path / "there.safetensors", tmp_path / "other-name.pt"
    converted(path, there)
    assert converted(there, back).fidelity == "identical"
    assert back.read_bytes() == path.read_bytes()


def test_without_the_image_the_way_back_gives_an_equal_object(made: tuple[str, Path], tmp_path: Path) -> None:
    name, path = made
    there, back = tmp_path / "there.safetensors", tmp_path / "source2.pt"
    converted(path, there)
    file = open_file(there)
    stripped = {key: text for key, text in file.metadata.items() if key != _image.KEY}
    bare = tmp_path / "source.safetensors"
    tensors = {key: (ref.dtype, ref.shape, to_bytes(Read(ref))) for key, ref in file.tensors.items()}
    write_safetensors(bare, tensors, stripped)
    assert converted(bare, back).fidelity == "exact"
    loaded = torch.load(back, weights_only=True)
    assert equal(loaded, _usual(name, TREES[name]))


def _usual(name: str, tree: Any) -> Any:
    """The form of the way back where the source's own is another program's habit."""
    if name == "textual_inversion raw":
        return {"string_to_token": {"*": 265}, "string_to_param": {"*": tree}, "name": "source", "step": None,
                "sd_checkpoint": None, "sd_checkpoint_name": None}  # fmt: skip
    if name == "textual_inversion emb-pair":
        return {"clip_l": tree["emb"][None], "clip_g": tree["emb2"][None]}
    return tree


def equal(one: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(other, dict):
        return list(one) == list(other) and all(equal(one[key], item) for key, item in other.items())
    if isinstance(other, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def test_both_files_that_hubtool_wrote_survive_going_round(made: tuple[str, Path], tmp_path: Path) -> None:
    _, path = made
    files = [tmp_path / name for name in ("a.safetensors", "b.pt", "c.safetensors")]
    converted(path, files[0])
    converted(files[0], files[1])
    converted(files[1], files[2])
    assert list(open_file(files[0]).tensors) == list(open_file(files[2]).tensors)
    assert content(files[0]) == content(files[1]) == content(files[2])


def test_the_command_line_converts_there_and_back(made: tuple[str, Path], tmp_path: Path) -> None:
    _, path = made
    there, back = tmp_path / "there.safetensors", tmp_path / "back.pt"
    assert run("convert", path, "-o", there).exit_code == 0
    assert run("convert", there, "-o", back).exit_code == 0
    assert identify(open_file(back)).kind == identify(open_file(path)).kind
    assert content(back) == content(path)


def test_the_command_line_gives_back_the_very_bytes(tmp_path: Path) -> None:
    path, there, back = saved(tmp_path / "hn.pt", hypernetwork()), tmp_path / "hn.safetensors", tmp_path / "back.pt"
    run("convert", path, "-o", there)
    assert "identical" in run("convert", there, "-o", back).output
    assert back.read_bytes() == path.read_bytes()


# --- the image of origin is never trusted ------------------------------------------------------------------------------------


@pytest.fixture
def there(tmp_path: Path) -> Path:
    path = saved(tmp_path / "cat.pt", A1111)
    converted(path, tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


def rewritten(path: Path, change: Any) -> Path:
    """The safetensors file with its metadata and tensors changed."""
    file = open_file(path)
    metadata = dict(file.metadata)
    tensors = {key: (ref.dtype, ref.shape, to_bytes(Read(ref))) for key, ref in file.tensors.items()}
    change(metadata, tensors)
    return write_safetensors(path, tensors, metadata)


def test_edited_vectors_are_written_anew(there: Path, tmp_path: Path) -> None:
    def edit(_: dict[str, str], tensors: dict[str, Any]) -> None:
        dtype, shape, data = tensors["emb_params"]
        tensors["emb_params"] = dtype, shape, struct.pack("<f", 7.0) + data[4:]

    back = converted(rewritten(there, edit), tmp_path / "back.pt")
    assert back.fidelity == "exact"
    loaded = torch.load(tmp_path / "back.pt", weights_only=True)
    assert loaded["string_to_param"]["*"][0, 0] == 7.0
    assert loaded["step"] == 499


def test_a_renamed_token_is_written_anew(there: Path, tmp_path: Path) -> None:
    rewritten(there, lambda metadata, _: metadata.update({"hubtool.token": "dog"}))
    assert converted(there, tmp_path / "back.pt").fidelity == "exact"
    assert torch.load(tmp_path / "back.pt", weights_only=True)["name"] == "dog"


FORGERIES = {
    "no json": "x",
    "another version": json.dumps({"version": 2}),
    "a list": "[]",
    "no cuts": json.dumps({"version": 1, "name": "a.pt", "rest": "", "origin": None, "asked": None, "sha256": "", "cuts": [[1]]}),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_damaged_image_is_ignored(there: Path, tmp_path: Path, forgery: str) -> None:
    rewritten(there, lambda metadata, _: metadata.update({_image.KEY: FORGERIES[forgery]}))
    assert converted(there, tmp_path / "back.pt").fidelity == "exact"


def test_an_image_with_a_dangerous_pickle_is_never_restored(there: Path, tmp_path: Path) -> None:
    import base64
    import hashlib
    import io
    import zipfile
    import zlib

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.")
        archive.writestr("archive/version", b"3\n")
    data = buffer.getvalue()
    image = {"version": 1, "name": "cat.pt", "origin": "a1111", "asked": None, "cuts": []}
    image["sha256"] = hashlib.sha256(data).hexdigest()
    image["rest"] = base64.b64encode(zlib.compress(data)).decode()
    rewritten(there, lambda metadata, _: metadata.update({_image.KEY: json.dumps(image)}))
    assert converted(there, tmp_path / "back.pt").fidelity == "exact"
    assert b"posix" not in (tmp_path / "back.pt").read_bytes()


def test_a_large_rest_leaves_no_image(tmp_path: Path) -> None:
    hidden = torch.zeros(1 << 19)
    hidden[:768] = values(768)
    path = saved(tmp_path / "cat.pt", {"<cat>": hidden[:768]})
    assert _image.KEY not in planned(path, format="safetensors").metadata


# --- losses and refusals -----------------------------------------------------------------------------------------------------


def test_metadata_that_a_torch_file_cannot_hold_is_a_loss(there: Path, tmp_path: Path) -> None:
    rewritten(there, lambda metadata, _: metadata.update({"modelspec.author": "me"}))
    losses = planned(there, format="torch-zip").losses
    assert [loss.what for loss in losses] == ["metadata modelspec.author"]
    result = run("convert", there, "-o", tmp_path / "x.pt")
    assert result.exit_code == LossyConversion.exit_code


def test_what_a_trainer_left_beside_the_artefact_is_a_loss(tmp_path: Path) -> None:
    tree = {
        "state_dict": TREES["custom_diffusion compvis"]["state_dict"],
        "optimizer_states": [{"m": values(3)}],
        "epoch": 2,
    }
    made = planned(saved(tmp_path / "delta.ckpt", tree), format="safetensors")
    assert [loss.what for loss in made.losses] == ["1 tensor of the training state"]
    assert json.loads(made.metadata["hubtool.extra.epoch"]) == 2


def test_a_layout_of_another_kind_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    path = saved(tmp_path / "hn.pt", hypernetwork())
    with pytest.raises(UsageProblem, match="no layout kohya"):
        planned(path, layout="kohya")
    with pytest.raises(UsageProblem, match="no layout kohya"):
        planned(saved(tmp_path / "null.pt", values(5, 1, 77, 768)), layout="kohya")


def test_other_kinds_are_left_to_others(tmp_path: Path) -> None:
    file = open_file(write_safetensors(tmp_path / "x.safetensors", {"a": ("F32", (1,), b"\0" * 4)}))
    assert artefacts.plan(file, identify(file), Target()) is None
    assert artefacts.contents(file, identify(file)) is None
