"""Autoencoders in files of their own that no table can name: known by their kind, and never cut in part."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hubtool.actions.convert import convert
from hubtool.errors import ConversionError
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.ops.target import Target
from tests.support.files import write_safetensors

WAN22 = {
    "encoder.conv1.weight": (2, 12, 3, 3, 3),
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": (2, 1, 1, 1),
    "encoder.downsamples.0.downsamples.2.resample.1.weight": (2, 2, 3, 3),
    "conv2.weight": (1, 1, 1, 1, 1),
    "decoder.conv1.weight": (2, 1, 3, 3, 3),
    "decoder.upsamples.0.upsamples.0.residual.0.gamma": (2, 1, 1, 1),
}  # names of Wan2.2_VAE.pth


def test_the_vae_of_wan_22_is_refused_rather_than_cut_in_part(tmp_path: Path) -> None:
    """Its decoder's stages have the canonical names of Wan 2.1's, which lie under other numbers outside."""
    path = tmp_path / "wan22.safetensors"
    write_safetensors(path, {name: ("F32", shape, bytes(4 * math.prod(shape))) for name, shape in WAN22.items()})
    found = identify(open_file(path))
    assert (found.kind, found.variant, found.family) == ("vae", "autoencoder-wan22", "wan")
    with pytest.raises(ConversionError, match="vae has no layout 'diffusers'"):
        convert(path, tmp_path / "out", Target(layout="diffusers", family="wan"))
    assert not (tmp_path / "out").exists()
