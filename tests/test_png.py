"""Embeddings in pictures: the text chunk, the bars beside the picture, and pictures that are nothing but pictures."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from hubtool.errors import CorruptFile, UnsafeFile
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.layouts.identify import identify
from tests.support.png import barred, chunk, png, text_of

VALUES = [[round(0.001 * (row + 1) * ((i * 7919) % 997 - 500), 4) for i in range(768)] for row in range(2)]
PAYLOAD: dict[str, Any] = {
    "string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": VALUES}}, "name": "cat eyes", "step": 100,
    "sd_checkpoint": None, "sd_checkpoint_name": None,
}  # fmt: skip
PHOTO = [[((x * 7) % 256, (x + y) % 256, 255) for x in range(60)] for y in range(40)]


def opened(tmp_path: Path, data: bytes) -> TensorFile:
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    return open_file(path)


def numbers(file: TensorFile) -> list[float]:
    ref = file.tensors["string_to_param.*"]
    assert ref.inline is not None
    return list(struct.unpack(f"<{len(ref.inline) // 4}f", ref.inline))


def expected() -> list[float]:
    flat = [value for row in VALUES for value in row]
    return list(struct.unpack(f"<{len(flat)}f", struct.pack(f"<{len(flat)}f", *flat)))


def codes(file: TensorFile) -> list[str]:
    return [finding.code for finding in file.findings]


def test_the_text_chunk_is_an_embedding(tmp_path: Path) -> None:
    file = opened(tmp_path, png(PHOTO, text=text_of(PAYLOAD)))
    assert (file.format, list(file.tensors), codes(file)) == ("png", ["string_to_param.*"], [])
    assert numbers(file) == expected()
    assert file.metadata["name"] == '"cat eyes"'
    found = identify(file)
    assert (found.kind, found.variant, found.embeddings[0].token) == ("textual_inversion", "a1111", "cat eyes")


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (4, 1, 3, 2, 0)], ids=str)
def test_the_bars_hold_the_same_under_every_png_filter(tmp_path: Path, filters: tuple[int, ...]) -> None:
    file = opened(tmp_path, png(barred(PAYLOAD), filters=filters))
    assert codes(file) == ["png-bars-only"]
    assert numbers(file) == expected()


def test_bars_survive_a_black_border_and_an_alpha_channel(tmp_path: Path) -> None:
    file = opened(tmp_path, png(barred(PAYLOAD, border=3), alpha=True, filters=(4,)))
    assert numbers(file) == expected()


def test_both_copies_are_compared(tmp_path: Path) -> None:
    rows = barred(PAYLOAD)
    assert codes(opened(tmp_path, png(rows, text=text_of(PAYLOAD)))) == []
    other = opened(tmp_path, png(rows, text=text_of({**PAYLOAD, "name": "dog"})))
    assert codes(other) == ["png-payload-mismatch"]
    assert other.metadata["name"] == '"dog"'


def test_an_ordinary_picture_is_healthy_and_empty(tmp_path: Path) -> None:
    file = opened(tmp_path, png(PHOTO))
    assert (codes(file), dict(file.tensors)) == (["just-a-picture"], {})
    assert identify(file).kind == "unknown"


def test_an_all_black_picture_hides_nothing(tmp_path: Path) -> None:
    assert codes(opened(tmp_path, png([[(0, 0, 0)] * 30] * 30))) == ["just-a-picture"]


def test_damaged_bars_are_only_a_picture(tmp_path: Path) -> None:
    rows = barred(PAYLOAD)
    rows[5] = [(red ^ 3, green, blue) for red, green, blue in rows[5]]
    assert codes(opened(tmp_path, png(rows))) == ["just-a-picture"]


@pytest.mark.parametrize(
    "payload",
    [
        [1, 2],
        {"name": "x"},
        {"string_to_param": {"*": {"TORCHTENSOR": [[1.0, 2.0], [3.0]]}}},
        {"string_to_param": {"*": {"TORCHTENSOR": [["a"]]}}},
        {"string_to_param": {"*": {"TORCHTENSOR": [[1e300]]}}},
        {"string_to_param": json.loads('{"a":' * 30 + "1" + "}" * 30)},
    ],
    ids=["list", "no tensors", "ragged", "text", "overflow", "deep"],
)
def test_nonsense_in_the_text_chunk_is_corrupt(tmp_path: Path, payload: Any) -> None:
    with pytest.raises(CorruptFile):
        opened(tmp_path, png(PHOTO, text=text_of(payload)))


@pytest.mark.parametrize("text", [b"not base64!", b"AAAA", b""])
def test_a_text_chunk_that_is_no_json_is_corrupt(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CorruptFile):
        opened(tmp_path, png(PHOTO, text=text))


def test_a_flipped_bit_in_the_text_chunk_is_noticed(tmp_path: Path) -> None:
    data = bytearray(png(PHOTO, text=text_of(PAYLOAD)))
    data[data.index(b"sd-ti-embedding") + 40] ^= 1
    with pytest.raises(CorruptFile, match="CRC"):
        opened(tmp_path, bytes(data))


def test_every_truncation_is_corrupt_and_says_where(tmp_path: Path) -> None:
    data = png(PHOTO, text=text_of(PAYLOAD))
    for end in [9, 20, 33, 60, len(data) // 2, len(data) - 1]:
        with pytest.raises(CorruptFile) as caught:
            opened(tmp_path, data[:end])
        assert caught.value.offset is not None


def test_a_picture_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(UnsafeFile, match="60000 x 60000"):
        opened(tmp_path, data)


def test_both_copies_of_a_real_embedding_picture_agree(shared: Path) -> None:
    file = open_file(shared / "real/ti-png/Ljzd-PRO__gasai_yuno-1000.png")
    assert codes(file) == []
    assert file.tensors["string_to_param.*"].shape == (8, 768)


def test_the_bars_of_a_real_embedding_picture_are_enough(shared: Path, tmp_path: Path) -> None:
    data = (shared / "real/ti-png/Ljzd-PRO__gasai_yuno-1000.png").read_bytes()
    at = data.index(b"tEXtsd-ti-embedding") - 4
    [length] = struct.unpack(">I", data[at : at + 4])
    stripped = opened(tmp_path, data[:at] + data[at + length + 12 :])
    assert codes(stripped) == ["png-bars-only"]
    whole = open_file(shared / "real/ti-png/Ljzd-PRO__gasai_yuno-1000.png")
    assert numbers(stripped) == numbers(whole)
