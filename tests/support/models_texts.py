"""Text encoders, as the pipelines use them. Language models are listed without the ``model.`` head of their causal form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.model import Model

_CLIP = "transformers:CLIPTextModel"
_CLIP_PROJECTED = "transformers:CLIPTextModelWithProjection"
_QWEN3 = "transformers:Qwen3Model"
# transformers >= 5.6 drops this head in CLIPTextModel; hub files and trainers keep it.
_CLIP_HEAD = "text_model."


def _clip(width: int, layers: int, **more: Any) -> Mapping[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        **more,
    }


def _t5(width: int, hidden: int, heads: int, **more: Any) -> Mapping[str, Any]:
    return {
        "vocab_size": 32128,
        "d_model": width,
        "d_kv": 64,
        "d_ff": hidden,
        "num_layers": 24,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        **more,
    }


def _language(width: int, hidden: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Mapping[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


MODELS: Mapping[str, Model] = {
    "clip-l": Model(_CLIP, _clip(768, 12), prefix=_CLIP_HEAD),
    "clip-l-projected": Model(_CLIP_PROJECTED, _clip(768, 12, projection_dim=768), note="SD3, HiDream"),
    "clip-h": Model(_CLIP, _clip(1024, 23), prefix=_CLIP_HEAD, note="SD2 publishes 23 of the 24 layers"),
    "clip-g": Model(_CLIP_PROJECTED, _clip(1280, 32, projection_dim=1280)),
    "t5-xxl": Model("transformers:T5EncoderModel", _t5(4096, 10240, 64)),
    "umt5-xxl": Model("transformers:UMT5EncoderModel", _t5(4096, 10240, 64, vocab_size=256384), note="Wan"),
    "umt5-xl": Model("transformers:UMT5EncoderModel", _t5(2048, 5120, 32), note="AuraFlow (pile-t5-xl)"),
    "gemma2-2b": Model("transformers:Gemma2Model", note="Lumina2, Sana"),
    "gemma3-12b": Model(
        "transformers:Gemma3TextModel",
        _language(3840, 15360, 48, 16, 8, head_dim=256, vocab_size=262208),
        note="LTX-2, language part",
    ),
    "qwen2.5-vl-7b": Model(
        "transformers:Qwen2_5_VLTextModel",
        _language(3584, 18944, 28, 28, 4, vocab_size=152064),
        note="Qwen-Image, Kandinsky 5, language part",
    ),
    "qwen3-0.6b": Model(_QWEN3, _language(1024, 3072, 28, 16, 8), note="Anima"),
    "qwen3-4b": Model(_QWEN3, _language(2560, 9728, 36, 32, 8), note="Z-Image, FLUX.2 klein 4B"),
    "qwen3-8b": Model(_QWEN3, _language(4096, 12288, 36, 32, 8), note="FLUX.2 klein 9B"),
    "mistral-small": Model(
        "transformers:MistralModel",
        _language(5120, 32768, 40, 32, 8, head_dim=128, vocab_size=131072),
        note="FLUX.2 dev, language part",
    ),
    "llama3-8b": Model(
        "transformers:LlamaModel",
        _language(4096, 14336, 32, 32, 8, vocab_size=128256),
        note="HiDream; HunyuanVideo's has 64 more tokens",
    ),
    "glm4-9b": Model("transformers:GlmModel", note="CogView4"),
    "smollm3-3b": Model("transformers:SmolLM3Model", note="Bria FIBO"),
}
