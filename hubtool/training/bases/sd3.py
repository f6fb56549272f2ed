"""Stable Diffusion 3: a joint transformer that reads three text encoders, any of which may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hubtool.pipelines.token_tables import spoken
from hubtool.training.bases.base import Sizes, Words, present

_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class SD3:
    denoiser, inpainting = "transformer", False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def words(self, prompts: Sequence[str]) -> dict[str, Any]:
        tokenizers = [getattr(self.pipe, name, None) for name in _TOKENIZERS]
        texts = [[_spoken(self.pipe, one, prompt) for prompt in prompts] for one in tokenizers]
        found = self.pipe.encode_prompt(*texts, device=self.pipe.transformer.device, do_classifier_free_guidance=False)
        return {"states": found[0], "pooled": found[2]}

    def predict(self, noisy: Any, times: Any, words: Words, sizes: Sizes) -> Any:
        return self.pipe.transformer(
            hidden_states=noisy, timestep=times, encoder_hidden_states=words["states"],
            pooled_projections=words["pooled"], return_dict=False,
        )[0]  # fmt: skip


def _spoken(pipe: Any, tokenizer: Any, prompt: str) -> str:
    """This pipeline does not know tokens of several vectors: all of them are written into the prompt."""
    return prompt if tokenizer is None else spoken(pipe, tokenizer, prompt)


def make(pipe: Any, guidance: float, clip_skip: int) -> SD3:
    """Neither ``guidance`` nor ``clip_skip`` means anything to SD 3's training."""
    present(pipe, "vae", "transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    return SD3(pipe)
