"""Image and video autoencoders: AutoencoderKL (LDM, BFL and diffusers names), Wan's, TAESD, VAE-approx. Sentinels in ``schemas/components.toml``.

SD1, SD2 and SDXL VAEs have the same shapes, so the file alone names candidates; a diffusers ``config.json`` tells them apart by its
scaling factor (spec/artefacts.md H).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import by_table

ORDER = 60
_BY_SCALING = {0.18215: ("sd1", "sd2"), 0.13025: ("sdxl",), 1.5305: ("sd3",), 0.3611: ("flux1",)}


def recognise(file: TensorFile) -> Identity | None:
    """Identity by the table's first fitting row, narrowed by the config's scaling factor."""
    identity = by_table(file, "vae")
    config = file.config.get("config.json")
    if identity is None or not isinstance(config, Mapping):
        return identity
    scaling = config.get("scaling_factor")
    named = _BY_SCALING.get(round(scaling, 5), ()) if isinstance(scaling, float) else ()
    families = tuple(family for family in identity.family_candidates if family in named)
    if not families:
        return identity
    single = families[0] if len(families) == 1 else None
    evidence = (*identity.evidence, f"config.json: scaling_factor {scaling}")
    return replace(identity, family=single, family_candidates=() if single else families, evidence=evidence)
