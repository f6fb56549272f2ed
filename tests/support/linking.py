"""A small LoRA by number, the repository it goes to, and the library brought up to date: for the tests of ``outdated`` and ``sync``."""

from __future__ import annotations

from pathlib import Path

from hubtool.actions.library import open_store
from hubtool.actions.link import link
from hubtool.actions.scan import scan
from tests.support.files import floats, safetensors_bytes

REPO = "tester/style"
FILE = "style.safetensors"
DOWN = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
UP = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"


def lora(number: int) -> bytes:
    return safetensors_bytes({DOWN: floats(2, 4, start=number), UP: floats(4, 2, start=number)})


def rescan(folder: Path) -> None:
    with open_store() as store:
        scan(store, [str(folder)])


def tie(ref: str | Path, target: str) -> None:
    with open_store() as store:
        link(store, str(ref), target)
