"""The snippets of cards, run as they are published, in another process: two encoders, a single file that ``hubtool merge`` made, PEFT."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubtool.actions.publish import publish
from hubtool.actions.publish_facts import Said
from tests.support import publishing
from tests.support.checkpoints import single
from tests.support.loading import in_another_process, put_base, snippet

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]
pytestmark = pytest.mark.slow

# where diffusers looks for the configuration of a single file, by what is in it
HOMES = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
UNET = "model.diffusion_model.input_blocks.0.0.weight"


def test_vectors_for_two_text_encoders_reach_both(hub: LocalHub, tmp_path: Path) -> None:
    put_base(hub, tmp_path, "tester/tiny-sdxl", "sdxl")
    vectors = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}
    save_file(vectors, tmp_path / "cat-toy.safetensors")
    said = Said(family="sdxl", base_models=("tester/tiny-sdxl",), licence="mit", words=("<cat-toy>",))
    publish([str(tmp_path / "cat-toy.safetensors")], "tester/cat-toy", said)
    more = (
        "ids = [part.convert_tokens_to_ids(['<cat-toy>', '<cat-toy>_1']) for part in (pipe.tokenizer, pipe.tokenizer_2)]\n"
        "parts = (pipe.text_encoder, pipe.text_encoder_2)\n"
        "torch.save([part.get_input_embeddings().weight[one].detach() for part, one in zip(parts, ids)], 'out.pt')\n"
    )
    in_another_process(hub, tmp_path, snippet(hub, "tester/cat-toy") + more)
    first, second = torch.load(tmp_path / "out.pt")
    assert torch.equal(first, vectors["clip_l"])
    assert torch.equal(second, vectors["clip_g"])
    assert (tmp_path / "image.png").is_file()


@pytest.mark.parametrize("family", HOMES)
def test_a_merged_checkpoint_loads_by_its_repository(hub: LocalHub, tmp_path: Path, family: str) -> None:
    """A real output of ``hubtool merge``, published by the command line, opened by the card's code."""
    put_base(hub, tmp_path, HOMES[family], family)
    first = single(family, tmp_path)
    states = load_file(first)
    other = {key: value * 1.5 if value.is_floating_point() else value for key, value in states.items()}
    second = tmp_path / "other.safetensors"
    save_file(other, second)
    mixed = tmp_path / "mix.safetensors"
    merged = hub.run("merge", str(first), str(second), "--strength", "0.75", "--strength", "0.25", "-o", str(mixed))
    assert merged.returncode == 0, merged.stderr
    done = hub.run("publish", str(mixed), "tester/mix", "--license", "openrail++", "--family", family)
    assert done.returncode == 0, done.stderr
    code = snippet(hub, "tester/mix")
    assert "from_single_file(file" in code
    in_another_process(hub, tmp_path, code + "torch.save(pipe.unet.state_dict(), 'out.pt')\n")
    found = torch.load(tmp_path / "out.pt")["conv_in.weight"]
    torch.testing.assert_close(found, states[UNET] * (0.75 + 0.25 * 1.5), atol=1e-6, rtol=1e-5)
    card = hub.files("tester/mix")["README.md"].decode()
    assert "base_model_relation: merge" in card
    match = re.search(r"<summary>Recipe</summary>\s+```json\n(.*?)\n```", card, re.DOTALL)
    assert match
    recipe = json.loads(match[1])
    assert recipe["operation"] == "merge"
    assert [one["name"] for one in recipe["inputs"]] == [first.name, second.name]
    assert recipe["inputs"][0]["sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert str(tmp_path) not in card


def test_an_adapter_of_a_language_model_loads_by_its_repository(hub: LocalHub, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    base.save_pretrained(tmp_path / "base")
    hub.put("tester/tiny-gpt2", {path.name: path for path in (tmp_path / "base").iterdir()})
    folder = publishing.talk(tmp_path / "talk", 1)
    publish([str(folder)], "tester/talk", Said(base_models=("tester/tiny-gpt2",), licence="mit"))
    card = hub.files("tester/talk")["README.md"].decode()
    match = re.search(r"```py\n(.*?)```", card, re.DOTALL)
    assert match
    more = "import torch\ntorch.save(model.merge_and_unload().state_dict(), 'out.pt')\n"
    in_another_process(hub, tmp_path, match[1] + more)
    name = "transformer.h.0.attn.c_attn.weight"
    a, b = (load_file(folder / "adapter_model.safetensors")[f"{publishing.TALK}.lora_{one}.weight"] for one in "AB")
    expected = base.state_dict()[name] + (8 / 4) * (b @ a).T  # alpha over rank; Conv1D holds its weight transposed
    torch.testing.assert_close(torch.load(tmp_path / "out.pt")[name], expected)
