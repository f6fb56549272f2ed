"""Tiny text encoders of the published depths."""

from __future__ import annotations

from functools import partial
from typing import Any

from hubtool.pipelines.tiny.recipe import Part
from hubtool.pipelines.tiny.tokenizers import gemma_words, qwen_words, t5_words, vocabulary

_CLIP_LENGTH = 77


def clip(width: int, layers: int, *, projected: bool = False) -> Part:
    """A CLIP text encoder; ``projected``: with the projection of the pooled output that SDXL and SD 3 use."""
    return partial(_clip, width, layers, projected)


def t5(width: int, layers: int = 24, *, each_biased: bool = False) -> Part:
    """T5's encoder half, with gated feed-forward layers as in T5 1.1 (depth 24: T5-XXL). ``each_biased``: UMT5, a bias in every layer."""
    return partial(_t5, width, layers, each_biased)


def gemma2(width: int, layers: int = 26) -> Part:
    """Gemma 2 without its output head (depth 26: the 2B model)."""
    return partial(_gemma2, width, layers)


def qwen3(width: int, layers: int = 36) -> Part:
    """Qwen 3 without its output head (depth 36: the 4B model)."""
    return partial(_qwen3, width, layers)


def qwen25_vl(width: int, layers: int = 28, images: int = 32) -> Part:
    """Qwen 2.5 VL (depths: the 7B model); ``images``: layers of the part that reads pictures, which making pictures never asks."""
    return partial(_qwen25_vl, width, layers, images)


def _clip(width: int, layers: int, projected: bool) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(_clip_config(width, layers)).eval()


def _clip_config(width: int, layers: int) -> Any:
    from transformers import CLIPTextConfig

    # eos_token_id=2 is wrong and published: the pooled output then comes from the highest id of the prompt, as in the real models.
    return CLIPTextConfig(
        vocab_size=len(vocabulary()), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=_CLIP_LENGTH,
        hidden_act="quick_gelu" if layers == 12 else "gelu", bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip


def _t5(width: int, layers: int, each_biased: bool) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    make, model = (UMT5Config, UMT5EncoderModel) if each_biased else (T5Config, T5EncoderModel)
    config = make(
        vocab_size=len(t5_words()), d_model=width, d_kv=4, d_ff=2 * width, num_layers=layers, num_heads=2, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    return model(config).eval()


def _gemma2(width: int, layers: int) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(gemma_words()), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return Gemma2Model(config).eval()


def _qwen3(width: int, layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(qwen_words()), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3Model(config).eval()


def _qwen25_vl(width: int, layers: int, images: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(qwen_words()), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 1, "num_key_value_heads": 1, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    vision = {"depth": images, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
