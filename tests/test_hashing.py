"""Hashes agree with the hubs' own definitions, in one pass; the content hash sees tensors and nothing else."""

from __future__ import annotations

import hashlib
import random
import struct
import sys
import zlib
from pathlib import Path

import pytest

from hubtool.errors import CorruptFile, FileMissing
from hubtool.formats.safetensors import read_header
from hubtool.tensors.expr import Concat, Literal, Read, Rows
from hubtool.tensors.hashing import ALL, content_id, hash_file
from tests.support.files import floats, safetensors_bytes, write_safetensors

HELLO = {
    "sha256": "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9",
    "autov2": "b94d27b993",
    "crc32": "85114a0d",
    "blake3": "d74981efa70a0c880b8d8c1985d075dbcbf679b99a5f9914e5aaf96b831a9e24",
}


@pytest.fixture
def big(tmp_path: Path) -> Path:
    body = random.Random(1).randbytes(9_000_003)
    return write_safetensors(tmp_path / "big.safetensors", {"w": ("U8", (len(body),), body)}, {"k": "v"})


def test_the_vector_of_civitai(tmp_path: Path) -> None:
    pytest.importorskip("blake3")
    path = tmp_path / "hello"
    path.write_bytes(b"hello world")
    assert hash_file(path) == HELLO


def test_a_large_file_hashed_on_threads_gives_what_each_definition_gives(big: Path) -> None:
    data = big.read_bytes()
    payload = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    found = hash_file(big, [name for name in ALL if name != "blake3"])
    assert found == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "payload_sha256": payload,
        "autov1": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "autov2": hashlib.sha256(data).hexdigest()[:10],
        "autov3": payload[:12],
        "crc32": struct.pack("<I", zlib.crc32(data)).hex(),
    }


def test_only_what_is_asked_for_comes_back(big: Path) -> None:
    assert list(hash_file(big, ["autov3"])) == ["autov3"]
    assert list(hash_file(big, ["autov1"])) == ["autov1"]


def test_editing_metadata_leaves_the_payload_hash(tmp_path: Path) -> None:
    names = ("payload_sha256", "sha256")
    a = hash_file(write_safetensors(tmp_path / "a", {"w": floats(5)}, {"title": "x"}), names)
    b = hash_file(write_safetensors(tmp_path / "b", {"w": floats(5)}, {"title": "quite another"}), names)
    assert a["payload_sha256"] == b["payload_sha256"] == hashlib.sha256(floats(5)[2]).hexdigest()
    assert a["sha256"] != b["sha256"]


def test_what_does_not_apply_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    assert not {"payload_sha256", "autov3", "autov1"} & hash_file(path).keys()
    (tmp_path / "empty").write_bytes(b"")
    assert hash_file(tmp_path / "empty")["sha256"] == hashlib.sha256().hexdigest()


def test_blake3_is_left_out_when_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    path = tmp_path / "hello"
    path.write_bytes(b"hello world")
    assert hash_file(path) == {name: value for name, value in HELLO.items() if name != "blake3"}


def test_progress_counts_every_byte_once(big: Path) -> None:
    steps: list[int] = []
    hash_file(big, progress=steps.append)
    assert sum(steps) == big.stat().st_size


def test_a_file_that_changes_meanwhile_has_no_hash(big: Path) -> None:
    def grow(_: int) -> None:
        with big.open("ab") as file:
            file.write(b"x")

    with pytest.raises(CorruptFile, match="changed"):
        hash_file(big, progress=grow)


def test_unknown_names_and_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="md5"):
        hash_file(tmp_path / "x", ["md5"])
    with pytest.raises(FileMissing):
        hash_file(tmp_path / "x")


def test_content_id_is_what_its_definition_says() -> None:
    item = struct.pack("<I", 1) + b"p" + struct.pack("<I", 2) + b"up" + struct.pack("<I", 3) + b"F32"
    item += struct.pack("<IQQ", 2, 1, 2) + struct.pack("<Q", 8) + bytes(range(8))
    expected = hashlib.sha256(b"hubtool content_id 1\n" + hashlib.sha256(item).digest()).hexdigest()
    assert content_id([("p", "up", Literal(bytes(range(8)), "F32", (1, 2)))]) == expected


def test_content_id_ignores_order_and_container_and_sees_the_rest(tmp_path: Path) -> None:
    refs = read_header(write_safetensors(tmp_path / "a", {"x": floats(4, 2), "y": floats(3)})).tensors
    x, y = Read(refs["x"]), Read(refs["y"])
    same = content_id([("a", "up", x), ("b", "up", y)])
    halves = Concat((Rows(x, 0, 1), Rows(x, 1, 4)))
    assert content_id([("b", "up", y), ("a", "up", halves)]) == same
    assert content_id([("b", "up", y), ("a", "up", Literal(floats(4, 2)[2], "F32", (4, 2)))]) == same
    others = [
        [("a", "up", y), ("b", "up", x)],
        [("a", "down", x), ("b", "up", y)],
        [("aup", "", x), ("b", "up", y)],
        [("a", "up", Literal(floats(4, 2)[2], "F32", (2, 4))), ("b", "up", y)],
        [("a", "up", Literal(floats(4, 2)[2], "I32", (4, 2))), ("b", "up", y)],
        [("a", "up", x)],
        [("a", "up", x), ("a", "up", x), ("b", "up", y)],
    ]
    assert len({same, *map(content_id, others)}) == len(others) + 1  # type: ignore[arg-type]


def test_a_lying_header_length_gives_no_payload_hash(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes((1 << 40).to_bytes(8, "little") + safetensors_bytes({})[8:])
    assert "payload_sha256" not in hash_file(path)
