"""Content decides what a file is, its name never; and what cannot be opened is called by its right name."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hubtool import formats
from hubtool.errors import CorruptFile, FileError, FileMissing, UnsafeFile, UnsupportedFile
from hubtool.formats import open_file
from tests.support.files import floats, write_safetensors
from tests.support.torch_files import legacy_bytes, mapping, tensor, write, zip_bytes


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def old_tar_bytes() -> bytes:
    """A tar header as it was before the ``ustar`` mark, with its checksum."""
    header = bytearray(tar_bytes()[:512])
    header[257:] = bytes(255)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


NPZ = (
    zip_bytes(b"N", {})
    .replace(b"archive/data.pkl", b"archive/data.npy")
    .replace(b"archive/version", b"archive/ver.npy")
)
BUNDLE = NPZ.replace(b"archive/ver.npy", b"preview/ver.png")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 151112198\n"
PROTOCOL_0 = b"ctorch._utils\n_rebuild_tensor_v2\n."


@pytest.mark.parametrize(
    ("data", "problem", "word"),
    [
        (b"", CorruptFile, "empty"),
        (b"\0" * 100_000, CorruptFile, "zeros"),
        (POINTER, CorruptFile, "git-lfs pointer instead of the file of 151112198 bytes"),
        (b"<!DOCTYPE html><title>Login</title>", CorruptFile, "web page"),
        (b"\xef\xbb\xbf\n <HTML><body>502", CorruptFile, "web page"),
        (b'{"error":"Repository not found"}', CorruptFile, "error message"),
        (b'{\n "message": "rate limited"}', CorruptFile, "error message"),
        (b'{"r": 8, "lora_alpha": 16}', UnsupportedFile, "JSON"),
        (tar_bytes(), UnsupportedFile, "tar"),
        (old_tar_bytes(), UnsupportedFile, "tar"),
        (b"7z\xbc\xaf\x27\x1c\0\4", UnsupportedFile, "7z"),
        (gzip.compress(b"x"), UnsupportedFile, "gzip"),
        (b"\x93NUMPY\x01\0v\0{'descr'", UnsupportedFile, "npy"),
        (NPZ, UnsupportedFile, "npz"),
        (BUNDLE, UnsupportedFile, "no data.pkl"),
        (b"GGUF\3\0\0\0", UnsupportedFile, "GGUF"),
        (b"\x89HDF\r\n\x1a\n\0\0", UnsupportedFile, "HDF5"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", UnsupportedFile, "JPEG"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", UnsupportedFile, "WebP"),
        (b"SQLite format 3\0" + bytes(99), UnsupportedFile, "SQLite"),
        (b"\x7fELF\2\1\1", UnsupportedFile, "program"),
        (pickle.dumps({"a": 1}), UnsupportedFile, "bare pickle"),
        (b"a trigger word\n", UnsupportedFile, "text"),
        (bytes(range(128, 256)) * 9, UnsupportedFile, "no known kind"),
        (b"PK\x03\x04" + bytes(99), CorruptFile, "truncated"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", CorruptFile, "broken"),
        (PROTOCOL_0, UnsafeFile, "text form"),
        (pickle.dumps(os.getcwd), UnsafeFile, "posix.getcwd"),
    ],
    ids=lambda value: "data" if isinstance(value, bytes) else None,  # archives hold the time of day
)  # fmt: skip
@pytest.mark.parametrize("name", ["file.pt", "file.safetensors", "file"])
def test_what_cannot_be_opened_is_called_by_its_name(
    tmp_path: Path, data: bytes, problem: type[FileError], word: str, name: str
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(problem, match=word) as caught:
        open_file(path)
    assert (caught.value.path, caught.value.exit_code) == (str(path), 7)


def test_content_wins_over_the_name_and_the_lie_is_reported(tmp_path: Path) -> None:
    torch_file = write(tmp_path / "a.safetensors", zip_bytes(mapping({"w": tensor()})))
    legacy = write(tmp_path / "b.SafeTensors", legacy_bytes(mapping({"w": tensor()})))
    safe = write_safetensors(tmp_path / "c.ckpt", {"w": floats(2, 2)})
    for path, kind in ((torch_file, "torch-zip"), (legacy, "torch-legacy"), (safe, "safetensors")):
        file = open_file(path)
        assert file.format == kind
        assert [finding.code for finding in file.findings] == ["wrong-extension"]
        assert file.findings[0].severity == "warning"


def test_names_that_promise_nothing_are_no_lie(tmp_path: Path) -> None:
    for name in ("embeddings.pti", "file", "x.bin"):
        assert not open_file(write(tmp_path / name, zip_bytes(mapping({"w": tensor()})))).findings
    assert not open_file(write_safetensors(tmp_path / "a.pti", {"w": floats(2, 2)})).findings


@pytest.mark.parametrize("size", [0x2123, 0x5A4D, 0x7B, 0x8B1F, 0x80])
def test_a_safetensors_whose_length_looks_like_another_format_is_safetensors(tmp_path: Path, size: int) -> None:
    start = b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    path = write(tmp_path / "a.safetensors", size.to_bytes(8, "little") + start.ljust(size))
    assert open_file(path).format == "safetensors"


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    for name in ("none.pt", "none/none.pt", "a\0b"):
        with pytest.raises(FileMissing):
            open_file(tmp_path / name)


def test_strings_are_accepted_as_paths(tmp_path: Path) -> None:
    assert open_file(str(write(tmp_path / "a.pt", zip_bytes(mapping({"w": tensor()}))))).path == tmp_path / "a.pt"


def test_pipes_sockets_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket must be short
        server.bind("socket.pt")
        os.chdir(here)
        for path in (tmp_path / "pipe.pt", tmp_path / "socket.pt", Path("/dev/null")):
            with pytest.raises(UnsupportedFile, match="not a regular file"):
                open_file(path)


def test_a_link_that_leads_to_itself_is_an_error_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    with pytest.raises(FileError):
        open_file(tmp_path / "loop.pt")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.pt", zip_bytes(mapping({"w": tensor()})))
    read = formats._read

    def slow(target: Path, fd: int, size: int) -> formats.TensorFile:
        file = read(target, fd, size)
        with path.open("ab") as stream:
            stream.write(b"more")
        return file

    monkeypatch.setattr(formats, "_read", slow)
    with pytest.raises(CorruptFile, match="changing"):
        open_file(path)


def test_descriptors_are_closed_whatever_happens(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.pt", zip_bytes(mapping({"w": tensor()}))), write(tmp_path / "b.pt", b"x")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        open_file(good)
        with pytest.raises(UnsupportedFile):
            open_file(bad)
    assert not before or len(os.listdir("/proc/self/fd")) == before


WITHOUT = """
import sys
for name in ("torch", "numpy", "safetensors", "pickle", "zipfile", "PIL"):
    sys.modules[name] = None
from hubtool.formats import open_file
print(*open_file(sys.argv[1]).tensors)
"""


@pytest.mark.parametrize("build", [zip_bytes, legacy_bytes], ids=["zip", "legacy"])
def test_opening_needs_neither_torch_nor_numpy_nor_pickle(tmp_path: Path, build: object) -> None:
    assert callable(build)
    path = write(tmp_path / "a.pt", build(mapping({"weight": tensor()})))
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("weight", "")
