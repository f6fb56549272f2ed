"""One recogniser per kind of artefact.

``KINDS`` is every kind a file can have: those that DESIGN 5 lists, and two that its list has no word for, because calling them by a
neighbour's name would be wrong: ``conditioning`` (the hidden states of one prompt, or a CLIP image embedding kept for image variation
and CLIP inversion: inputs of one picture, no adapter) and ``image_encoder`` (a CLIP vision tower, which IP-Adapters need beside them).
"""

from __future__ import annotations

KINDS = (
    "lora", "textual_inversion", "hypernetwork", "aesthetic_embedding", "custom_diffusion", "null_text", "checkpoint",
    "diffusers_pipeline", "vae", "controlnet", "t2i_adapter", "ip_adapter", "text_encoder", "upscaler", "unknown",
    "conditioning", "image_encoder",
)  # fmt: skip
