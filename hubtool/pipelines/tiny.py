"""Tiny Stable Diffusion pipelines, built offline from configs: real module names and depths, random weights, a few megabytes.

They serve the tests and ``make demo``. Block structure, attention layout and text encoder depth are those of the published
models (SD 1.5, SD 2.1, SDXL base 1.0); only widths shrink. Channel ratios stay 1:2:4:4 so that ``conv_shortcut`` appears where
the real UNet has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hubtool.errors import UnknownFamily

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_LENGTH = 77
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_PLAIN = ("DownBlock2D", "UpBlock2D")


@dataclass(frozen=True, slots=True)
class _Shape:
    """What tells one family's pipeline from another: the pipeline class, its encoders as (width, layers), its UNet."""

    pipeline: str
    encoders: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]
    cross: tuple[bool, ...]
    unet: Mapping[str, Any]
    prediction: str = "epsilon"


_SD2 = {"use_linear_projection": True, "attention_head_dim": (2, 4, 8, 8)}
_SDXL = {
    "use_linear_projection": True, "attention_head_dim": (2, 4, 8), "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8,
}  # fmt: skip
SHAPES: Mapping[str, _Shape] = MappingProxyType({
    "sd1": _Shape("StableDiffusionPipeline", ((32, 12),), (16, 32, 64, 64), (True, True, True, False), {"attention_head_dim": 4}),
    "sd2": _Shape("StableDiffusionPipeline", ((24, 23),), (16, 32, 64, 64), (True, True, True, False), _SD2, "v_prediction"),
    "sdxl": _Shape("StableDiffusionXLPipeline", ((16, 12), (24, 32)), (16, 32, 64), (False, True, True), _SDXL),
})  # fmt: skip


def build(family: str, *, seed: int = 0) -> Any:
    """Return a tiny pipeline of ``family`` (``sd1``, ``sd2`` or ``sdxl``); the same seed gives the same bits.

    Images are 64 x 64 pixels, prompts up to 77 tokens of single bytes. Nothing is read from disk or network.
    Raises ``UnknownFamily`` for a family without a tiny pipeline.
    """
    if family not in SHAPES:
        raise UnknownFamily(f"no tiny pipeline for family {family!r}", hint=f"choose one of {', '.join(SHAPES)}")
    shape = SHAPES[family]
    with _seeded(seed):
        return _assemble(shape)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _assemble(shape: _Shape) -> Any:
    import diffusers

    parts = {"vae": _vae(), "unet": _unet(shape), "scheduler": _scheduler(shape.prediction), **_encoders(shape)}
    if shape.pipeline == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        parts |= {"add_watermarker": False}
    pipe = getattr(diffusers, shape.pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _encoders(shape: _Shape) -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    parts: dict[str, Any] = {}
    for i, (width, layers) in enumerate(shape.encoders):
        suffix = f"_{i + 1}" if i else ""
        parts[f"text_encoder{suffix}"] = classes[i](_clip_config(width, layers)).eval()
        parts[f"tokenizer{suffix}"] = tokenizer()
    return parts


def _clip_config(width: int, layers: int) -> Any:
    from transformers import CLIPTextConfig

    # eos_token_id=2 is wrong and published: the pooled output then comes from the highest id of the prompt, as in the real models.
    return CLIPTextConfig(
        vocab_size=len(vocabulary()), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=_LENGTH,
        hidden_act="quick_gelu" if layers == 12 else "gelu", bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip


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


def _unet(shape: _Shape) -> Any:
    from diffusers import UNet2DConditionModel

    down = tuple((_CROSS if cross else _PLAIN)[0] for cross in shape.cross)
    up = tuple((_CROSS if cross else _PLAIN)[1] for cross in reversed(shape.cross))
    context = sum(width for width, _ in shape.encoders)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=shape.channels,
        down_block_types=down, up_block_types=up, cross_attention_dim=context, norm_num_groups=4, **shape.unet,
    ).eval()  # fmt: skip


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, norm_num_groups=4, sample_size=64,
    ).eval()  # fmt: skip


def _scheduler(prediction: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
