"""What is published loads with diffusers and PEFT by repository id, in another process, with the very code that the card shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubtool.actions.load import load
from hubtool.actions.publish import publish
from hubtool.actions.publish_facts import Said
from hubtool.actions.publish_result import Options
from hubtool.errors import HubtoolError
from hubtool.hub.client import Client
from hubtool.layouts.emit import emit
from hubtool.ops.weights_file import write
from tests.support import publishing, tiny
from tests.support.checkpoints import saved
from tests.support.loading import BASE, in_another_process, put_base, snippet

if TYPE_CHECKING:
    from tests.support.hub import LocalHub

pytest_plugins = ["tests.support.hub"]
pytestmark = pytest.mark.slow

SAID = Said(family="sd1", base_models=(BASE,), licence="creativeml-openrail-m", words=("a sks dog",))
_PICTURE = "from tests.support.tiny import picture\nimport torch\ntorch.save(picture(pipe), 'out.pt')\n"


def lora(folder: Path, layout: str) -> Path:
    pipe = tiny.build("sd1")
    out = emit(tiny.make(pipe, only="attn", family="sd1", alphas=(2.0, 4.0)).adapter, layout)
    path = folder / "style.safetensors"
    write(path, out.tensors, {**out.metadata, "ss_output_name": "style"})
    return path


def test_a_published_lora_gives_the_same_picture_as_the_file(hub_both: LocalHub, tmp_path: Path) -> None:
    """The strength of the card included."""
    put_base(hub_both, tmp_path)
    path = lora(tmp_path, "kohya")
    publish([str(path)], "tester/style", replace(SAID, strength=0.5))
    in_another_process(hub_both, tmp_path, snippet(hub_both, "tester/style") + _PICTURE)
    assert (tmp_path / "image.png").is_file()
    pipe = tiny.build("sd1")
    before = tiny.picture(pipe)
    load(pipe, path, strength=0.5)
    found = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(found, tiny.picture(pipe), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("form", ["a1111.pt", "kohya.safetensors"])
def test_a_published_embedding_is_there_under_its_token(hub: LocalHub, tmp_path: Path, form: str) -> None:
    put_base(hub, tmp_path)
    vectors = torch.randn(3, 32)
    path = tmp_path / f"cat-toy{Path(form).suffix}"
    if form.startswith("a1111"):
        torch.save(
            {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "cat-toy", "step": 1}, path
        )
    else:
        save_file({"emb_params": vectors}, path)
    publish([str(path)], "tester/cat-toy", Said(family="sd1", base_models=(BASE,), licence="mit"))
    code = snippet(hub, "tester/cat-toy")
    more = (
        "import torch\nids = pipe.tokenizer.convert_tokens_to_ids(['cat-toy', 'cat-toy_1', 'cat-toy_2'])\n"
        "torch.save(pipe.text_encoder.get_input_embeddings().weight[ids].detach(), 'out.pt')\n"
    )
    in_another_process(hub, tmp_path, code + more)
    assert torch.equal(torch.load(tmp_path / "out.pt"), vectors)
    assert 'load_textual_inversion("tester/cat-toy")' in code


def test_a_published_pipeline_folder_loads_by_its_id(hub_both: LocalHub, tmp_path: Path) -> None:
    merged = saved("sd1", tmp_path)
    (merged / "hubtool.recipe.json").write_text('{"operation": "merge", "inputs": []}')
    (merged / ".env").write_text("SECRET=1")
    publish([str(merged)], "tester/merged", Said(family="sd1", base_models=("a/x", "b/y"), licence="mit"))
    in_another_process(hub_both, tmp_path, snippet(hub_both, "tester/merged") + _PICTURE)
    expected = tiny.picture(tiny.build("sd1"))
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, atol=1e-4, rtol=1e-4)
    card = hub_both.files("tester/merged")["README.md"].decode()
    assert "base_model_relation: merge" in card
    assert ".env" not in hub_both.files("tester/merged")


def test_a_peft_folder_loads_with_peft_and_with_diffusers(hub: LocalHub, tmp_path: Path) -> None:
    from hubtool.actions.convert import convert
    from hubtool.ops.target import Target

    put_base(hub, tmp_path)
    folder = tmp_path / "peft-style"
    pipe = tiny.build("sd1")
    out = emit(tiny.make(pipe, ("unet",), only="attn", family="sd1", alphas=(4.0,)).adapter, "kohya")
    write(tmp_path / "unet.safetensors", out.tensors)
    convert(tmp_path / "unet.safetensors", folder, Target(format="peft-folder", layout="peft", family="sd1"))
    publish([str(folder)], "tester/peft-style", SAID)
    files = hub.files("tester/peft-style")
    assert {"adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"} <= set(files)
    code = (
        "import torch\nfrom peft import PeftModel\nfrom hubtool.pipelines.tiny import build\n"
        "unet = build('sd1').unet\nmodel = PeftModel.from_pretrained(unet, 'tester/peft-style')\nmodel.merge_and_unload()\n"
        "torch.save(unet.state_dict(), 'out.pt')\n"
    )
    in_another_process(hub, tmp_path, code)
    load(pipe, tmp_path / "unet.safetensors")
    expected = tiny.effective(pipe)["unet"]
    for name, value in torch.load(tmp_path / "out.pt").items():
        torch.testing.assert_close(value.double(), expected[name].double(), atol=1e-5, rtol=1e-5)
    in_another_process(hub, tmp_path, snippet(hub, "tester/peft-style"))


def test_peft_files_can_stand_beside_a_single_file(hub: LocalHub, tmp_path: Path) -> None:
    out = emit(tiny.make(tiny.build("sd1"), ("unet",), only="attn1.to_q", family="sd1").adapter, "kohya")
    write(tmp_path / "style.safetensors", out.tensors)
    publish([str(tmp_path / "style.safetensors")], "tester/both", SAID, Options(layouts=("peft", "kohya")), Client())
    files = hub.files("tester/both")
    assert {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"} <= set(files)
    (tmp_path / "again.safetensors").write_bytes(files["kohya/style.safetensors"])
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / "style.safetensors").keys()


def test_the_snippet_can_be_run_before_anything_is_sent(hub: LocalHub, tmp_path: Path) -> None:
    base = saved("sd1", tmp_path)
    style = publishing.lora(tmp_path)  # made for a width of 768, the tiny encoder has 32
    with pytest.raises(HubtoolError, match="the snippet of the card fails"):
        publish([str(style)], "tester/style", options=Options(try_base=base))
    assert not hub.log("", "POST")
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "toy.safetensors")
    said = Said(base_models=("me/base",), licence="mit")
    done = publish([str(tmp_path / "toy.safetensors")], "tester/toy", said, Options(try_base=base))
    assert "works" in next(finding.message for finding in done.findings if finding.code == "snippet")
