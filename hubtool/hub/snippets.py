"""Python that loads a publication with diffusers or PEFT under its published names. Tests execute every one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType

from hubtool.hub.facts import Facts

_DEVICE = (
    "device = \"cuda\" if torch.cuda.is_available() else \"cpu\"\n"
    "dtype = torch.float16 if device == \"cuda\" else torch.float32\n"
)  # fmt: skip
_TASKS = {
    "text-to-video": ("from diffusers.utils import export_to_video\n", "frames[0]", 'export_to_video(result, "video.mp4")'),
    "image-to-video": ("from diffusers.utils import export_to_video\n", "frames[0]", 'export_to_video(result, "video.mp4")'),
}  # fmt: skip
_PICTURE = ("", "images[0]", 'result.save("image.png")')


def snippet(facts: Facts) -> str | None:
    """The code that loads ``facts.main`` from ``facts.repo``; None where no library loads it without more."""
    made = SNIPPETS.get(facts.loads)
    return made(facts) if made else None


def _text(value: str) -> str:
    """A Python string literal that cannot end the code block it stands in."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f").replace("`", "\\u0060")


def _base(facts: Facts) -> str:
    return facts.base_models[0] if facts.base_models else "BASE/MODEL"


def _program(facts: Facts, opening: str, lines: str, cls: str = "DiffusionPipeline") -> str:
    more, result, save = _TASKS.get(facts.task or "", _PICTURE)
    head = f"import torch\nfrom diffusers import {cls}\n{more}\n{_DEVICE}"
    return f"{head}pipe = {opening}.to(device)\n{lines}result = pipe({_text(facts.prompt)}).{result}\n{save}\n"


def _pipe(model: str) -> str:
    return f"DiffusionPipeline.from_pretrained({_text(model)}, torch_dtype=dtype)"


def _lora(facts: Facts) -> str:
    strength = 1.0 if facts.strength is None else facts.strength
    lines = (
        f'pipe.load_lora_weights({_text(facts.repo)}, adapter_name="lora")\n'
        f'pipe.set_adapters("lora", {strength:g})  # strength\n'
    )
    return _program(facts, _pipe(_base(facts)), lines)


def _embedding(facts: Facts) -> str:
    return _program(facts, _pipe(_base(facts)), f"pipe.load_textual_inversion({_text(facts.repo)})\n")


def _embedding_two(facts: Facts) -> str:
    """Vectors for two text encoders: one call for each."""
    token = _text(facts.words[0] if facts.words else "<token>")
    file = f"hf_hub_download({_text(facts.repo)}, {_text(facts.main)})"
    lines = (
        f"vectors = load_file({file})\n"
        f'pipe.load_textual_inversion(vectors["clip_l"], token={token}, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)\n'
        f'pipe.load_textual_inversion(vectors["clip_g"], token={token}, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)\n'
    )
    made = _program(facts, _pipe(_base(facts)), lines)
    return made.replace(
        "\n\n", "\nfrom huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n", 1
    )


def _folder(facts: Facts) -> str:
    return _program(facts, _pipe(facts.repo), "")


def _single_file(facts: Facts) -> str:
    cls = facts.pipeline or "StableDiffusionPipeline"
    lines = f"file = hf_hub_download({_text(facts.repo)}, {_text(facts.main)})\n"
    made = _program(facts, f"{cls}.from_single_file(file, torch_dtype=dtype)", "", cls)
    made = made.replace("\n\n", "\nfrom huggingface_hub import hf_hub_download\n\n", 1)
    return made.replace("pipe = ", f"{lines}pipe = ", 1)


def _peft(facts: Facts) -> str:
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({_text(_base(facts))})\n"
        f"model = PeftModel.from_pretrained(base, {_text(facts.repo)})\n"
    )


SNIPPETS: Mapping[str, Callable[[Facts], str]] = MappingProxyType(
    {
        "lora": _lora,
        "textual-inversion": _embedding,
        "textual-inversion-two": _embedding_two,
        "pipeline": _folder,
        "single-file": _single_file,
        "peft": _peft,
    }
)
