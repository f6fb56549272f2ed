"""Tiny text encoders of the published depths, and a CLIP tokenizer made of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from hubtool.pipelines.tiny.recipe import Part

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_LENGTH = 77


def clip(width: int, layers: int, *, projected: bool = False) -> Part:
    """A CLIP text encoder; ``projected``: with the projection of the pooled output that SDXL and SD 3 use."""
    return partial(_clip, width, layers, projected)


def t5(width: int, layers: int = 24) -> Part:
    """T5's encoder half, with gated feed-forward layers as in T5 1.1 (depth 24: T5-XXL)."""
    return partial(_t5, width, layers)


def gemma2(width: int, layers: int = 26) -> Part:
    """Gemma 2 without its output head (depth 26: the 2B model)."""
    return partial(_gemma2, width, layers)


def _clip(width: int, layers: int, projected: bool) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(_clip_config(width, layers)).eval()


def _clip_config(width: int, layers: int) -> Any:
    from transformers import CLIPTextConfig

    # eos_token_id=2 is wrong and published: the pooled output then comes from the highest id of the prompt, as in the real models.
    return CLIPTextConfig(
        vocab_size=len(vocabulary()), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=_LENGTH,
        hidden_act="quick_gelu" if layers == 12 else "gelu", bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip


def _t5(width: int, layers: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32, d_model=width, d_kv=4, d_ff=2 * width, num_layers=layers, num_heads=2, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def _gemma2(width: int, layers: int) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Gemma2Model(config).eval()


def vocabulary() -> dict[str, int]:
    """CLIP's vocabulary without merges: 256 byte symbols, the same at a word's end, the two special tokens (514 in all)."""
    symbols = list(_byte_symbols())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), _BOS, _EOS]
    return {word: i for i, word in enumerate(words)}


def _byte_symbols() -> Iterator[str]:
    """GPT-2's printable stand-ins for the 256 byte values (byte-level BPE)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = 256
    for byte in range(256):
        yield chr(byte if byte in printable else spare)
        spare += byte not in printable


def tokenizer() -> Any:
    """A CLIP tokenizer whose only words are bytes; ids of the special tokens are the two highest, as in CLIP."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=vocabulary(), merges=[], model_max_length=_LENGTH)
