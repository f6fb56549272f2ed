"""Outputs appear whole or not at all, byte for byte what was asked for."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubtool.errors import ConversionError, CorruptFile, FileError, FileMissing, ShapeMismatch, WouldOverwrite
from hubtool.formats.safetensors import read_header
from hubtool.tensors import atomic
from hubtool.tensors.expr import Cast, Compute, Concat, Expr, Literal, Read, Rows
from hubtool.tensors.writer import (
    atomic_file,
    atomic_folder,
    is_part,
    rewrite_header_in_place,
    same_file,
    sweep_parts,
    write_safetensors,
)
from tests.support import files
from tests.support.files import floats, framed, scalar

SMALL: dict[str, Expr] = {"w": Literal(bytes(8), "F32", (2,))}


def reads(path: Path) -> dict[str, Expr]:
    return {name: Read(ref) for name, ref in read_header(path).tensors.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return files.write_safetensors(
        tmp_path / "in" / "a.safetensors", {"b": floats(6, 4), "a": floats(3), "s": scalar(2.0)}, {"k": "v"}
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.safetensors"


def test_the_library_reads_what_we_write(source: Path, out: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    tensors = reads(source)
    written = write_safetensors(
        out, {"y": tensors["a"], "x": Rows(tensors["b"], 1, 3), "h": Cast(tensors["b"], "F16")}, {"é": "ü"}
    )
    theirs, original = library.load_file(out), library.load_file(source)
    assert written == out.stat().st_size
    assert theirs["y"].equal(original["a"])
    assert theirs["x"].equal(original["b"][1:3])
    assert theirs["h"].equal(original["b"].half())
    assert read_header(out).metadata == {"é": "ü"}
    assert list(read_header(out).tensors) == ["y", "x", "h"]


def test_header_is_compact_with_metadata_first_and_padded_to_eight(out: Path) -> None:
    write_safetensors(out, SMALL, {"a": "b"})
    start = b'{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert out.read_bytes() == framed(start + b" " * (-len(start) % 8), bytes(8))


@pytest.mark.parametrize("align", [1, 8])
def test_a_reused_header_restores_the_file_byte_for_byte(tmp_path: Path, out: Path, align: int) -> None:
    source = tmp_path / "a.safetensors"
    source.write_bytes(files.safetensors_bytes({"b": floats(6, 4), "é": floats(3)}, {"k": "v"}, align=align))
    shuffled = dict(reversed(reads(source).items()))
    write_safetensors(out, shuffled, header=read_header(source).header_bytes)
    assert out.read_bytes() == source.read_bytes()


def test_a_reused_header_must_describe_the_tensors(source: Path, out: Path) -> None:
    header = read_header(source).header_bytes
    with pytest.raises(ConversionError):
        write_safetensors(
            out, {"other" if name == "a" else name: expr for name, expr in reads(source).items()}, header=header
        )
    turned = {**reads(source), "b": Literal(floats(4, 6)[2], "F32", (4, 6))}
    with pytest.raises(ShapeMismatch):
        write_safetensors(out, turned, header=header)
    assert not list(out.parent.iterdir())


TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(["U8", "F16", "F32", "I64"]), st.lists(st.integers(0, 3), max_size=3)),
    max_size=6,
)


@given(
    TENSORS,
    st.none()
    | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.text(st.characters(codec="utf-8"))),
)
@settings(max_examples=60, deadline=None)
def test_write_and_read_are_inverse(
    tmp_path_factory: pytest.TempPathFactory, spec: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    raw = {
        name: (dtype, shape, os.urandom(len(files.zeros(dtype, *shape)[2]))) for name, (dtype, shape) in spec.items()
    }
    write_safetensors(
        path, {name: Literal(data, dtype, tuple(shape)) for name, (dtype, shape, data) in raw.items()}, metadata
    )
    file = read_header(path)
    content = path.read_bytes()
    assert {r.name: (r.dtype, list(r.shape), content[r.start : r.end]) for r in file.tensors.values()} == raw
    assert file.metadata == (metadata or {})


def test_large_copies_keep_their_place_in_the_page(tmp_path: Path, out: Path) -> None:
    body = os.urandom(3 << 20)
    source = files.write_safetensors(tmp_path / "a.safetensors", {"w": ("U8", (len(body),), body)}, {"k": "v" * 1000})
    write_safetensors(out, {"renamed": reads(source)["w"]})
    ref = read_header(out).tensors["renamed"]
    assert ref.start % 4096 == read_header(source).tensors["w"].start % 4096
    assert out.read_bytes()[ref.start :] == body


@pytest.mark.parametrize("failing", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_copies_without_help_of_the_kernel_are_the_same(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, failing: int | None
) -> None:
    def refuse(*_: Any) -> int:
        if failing is None:
            return 0  # some file systems copy nothing and call it a success
        raise OSError(failing, "no")

    body = os.urandom(3 << 20)
    source = files.write_safetensors(tmp_path / "a.safetensors", {"w": ("U8", (len(body),), body)})
    monkeypatch.setattr(os, "copy_file_range", refuse)
    write_safetensors(out, reads(source))
    assert out.read_bytes().endswith(body)


def test_an_existing_output_is_kept_unless_forced(out: Path) -> None:
    out.write_bytes(b"old")
    with pytest.raises(WouldOverwrite):
        write_safetensors(out, SMALL)
    assert out.read_bytes() == b"old"
    write_safetensors(out, SMALL, force=True)
    assert list(read_header(out).tensors) == ["w"]
    assert os.listdir(out.parent) == [out.name]


def test_a_file_may_be_rewritten_onto_itself(source: Path) -> None:
    before = source.read_bytes()
    write_safetensors(source, reads(source), {"new": "metadata"}, force=True)
    assert read_header(source).metadata == {"new": "metadata"}
    assert source.read_bytes()[-112:] == before[-112:]


def test_an_output_that_appears_meanwhile_is_not_replaced(out: Path) -> None:
    def late(*_: Any) -> Any:
        out.write_bytes(b"theirs")
        return pytest.importorskip("torch").zeros(2)

    with pytest.raises(WouldOverwrite):
        write_safetensors(out, {"w": Compute(late, (), (2,), "F32")})
    assert out.read_bytes() == b"theirs"
    assert os.listdir(out.parent) == [out.name]


def test_replacing_through_a_link_replaces_what_it_leads_to(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"old")
    out.symlink_to(target)
    with pytest.raises(WouldOverwrite):
        write_safetensors(out, SMALL)
    write_safetensors(out, SMALL, force=True)
    assert out.is_symlink()
    assert list(read_header(target).tensors) == ["w"]


def test_a_missing_folder_and_a_folder_as_output_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        write_safetensors(tmp_path / "none" / "x.safetensors", SMALL)
    with pytest.raises(WouldOverwrite):
        write_safetensors(tmp_path, SMALL, force=True)


def test_new_files_have_the_mode_of_the_umask(out: Path) -> None:
    before = os.umask(0o027)
    try:
        write_safetensors(out, SMALL)
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["posix_fallocate", "write", "fsync", "link"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_at_any_step_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(FileError) as error:
        write_safetensors(out, SMALL)
    assert error.value.path == str(out)
    assert ("full" in error.value.message) == (code != errno.EIO)
    assert not list(out.parent.iterdir())


def test_a_full_disk_is_known_before_anything_is_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda fd: SimpleNamespace(f_bavail=0, f_frsize=4096))
    with pytest.raises(FileError, match="bytes are needed, 0 are free"):
        write_safetensors(out, SMALL)
    assert not list(out.parent.iterdir())


def test_short_writes_are_continued(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: max(1, len(data) // 2)]))
    write_safetensors(out, {"w": Literal(bytes(range(100)), "U8", (100,))})
    assert out.read_bytes().endswith(bytes(range(100)))


def test_a_wrong_number_of_bytes_is_never_published(out: Path) -> None:
    with pytest.raises(FileError, match="planned"), atomic_file(out, 5) as output:
        output.write(b"1234")
    with pytest.raises(ShapeMismatch):
        write_safetensors(out, {"w": Literal(bytes(4), "F32", (2,)), "v": Literal(bytes(12), "F32", (2,))})
    assert not list(out.parent.iterdir())


def test_a_source_that_shrinks_or_changes_spoils_the_output(source: Path, out: Path) -> None:
    tensors = reads(source)
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 8)
    with pytest.raises(CorruptFile):
        write_safetensors(out, tensors)
    assert not list(out.parent.iterdir())


def test_an_interrupt_leaves_nothing(out: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(out, {**SMALL, "v": Compute(interrupt, (), (2,), "F32")})
    assert not list(out.parent.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from hubtool.tensors import writer
from hubtool.tensors.expr import Literal
calls = 0
def counted(real):
    def call(*args, **kw):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kw)
    return call
for name in ("open", "posix_fallocate", "write", "fsync", "link", "replace", "unlink", "close"):
    setattr(os, name, counted(getattr(os, name)))
data = {str(i): Literal(bytes([i]) * 9, "U8", (9,)) for i in range(3)}
writer.write_safetensors(Path(sys.argv[1]), data, force=sys.argv[3] == "force")
"""


@pytest.mark.parametrize("force", ["force", "new"])
def test_killed_at_any_step_there_is_the_old_file_or_the_new_one(out: Path, force: str) -> None:
    ended = []
    for at in range(1, 20):
        out.unlink(missing_ok=True)
        if force == "force":
            out.write_bytes(b"old")
        command = [sys.executable, "-c", KILLED, str(out), str(at), force]
        ended.append(subprocess.run(command, check=False, timeout=60).returncode)
        if out.exists() and out.read_bytes() != b"old":
            assert len(read_header(out).tensors) == 3
        else:
            assert out.exists() == (force == "force")
        sweep_parts(out.parent)
        assert os.listdir(out.parent) in ([], [out.name])
        if ended[-1] == 0:
            break
    assert set(ended) == {-signal.SIGKILL, 0}


@pytest.fixture
def living(out: Path) -> Iterator[Path]:
    with atomic_file(out, None) as output:
        output.write(b"half")
        yield output.part


def test_parts_of_the_dead_are_swept_and_of_the_living_are_not(out: Path, living: Path) -> None:
    dead = out.parent / ".y.safetensors.1.ab.hubtool-part"
    dead.write_bytes(b"half")
    folder = out.parent / ".z.1.ab.hubtool-part"
    (folder / "unet").mkdir(parents=True)
    keep = out.parent / "y.hubtool-part.txt"
    keep.write_bytes(b"")
    assert sweep_parts(out.parent) == [dead, folder]
    assert sorted(out.parent.iterdir()) == sorted([living, keep])
    assert is_part(living.name)
    assert not is_part(keep.name)


def test_a_part_taken_for_litter_is_made_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, swept = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not swept:
            swept.extend(out.parent.iterdir())
            os.unlink(swept[0])
        lock(fd, how)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    write_safetensors(out, SMALL)
    assert os.listdir(out.parent) == [out.name]


def test_long_names_get_a_part_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120 + ".safetensors")
    write_safetensors(path, SMALL)
    assert path.exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "pipeline"
    with pytest.raises(FileNotFoundError), atomic_folder(final) as folder:
        (folder / "a" / "b").write_bytes(b"1")
    assert not list(tmp_path.iterdir())
    with atomic_folder(final) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text("{}")
        assert not final.exists()
        assert not sweep_parts(tmp_path)
    assert (final / "unet" / "config.json").read_text() == "{}"
    assert os.listdir(tmp_path) == ["pipeline"]
    with pytest.raises(WouldOverwrite), atomic_folder(final):
        pass


def test_same_file_sees_through_names(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    assert same_file(tmp_path / "link", source)
    assert not same_file(tmp_path / "none", source)


def renamed(path: Path, name: str) -> bytes:
    return (read_header(path).header_bytes or b"").rstrip(b" ").replace(b'"b"', f'"{name}"'.encode())


def test_a_header_that_fits_is_rewritten_in_place(source: Path) -> None:
    before, inode = source.read_bytes(), source.stat().st_ino
    assert rewrite_header_in_place(source, renamed(source, "c"))
    after = read_header(source)
    assert list(after.tensors) == ["c", "a", "s"]
    assert (source.stat().st_ino, source.stat().st_size) == (inode, len(before))
    assert source.read_bytes()[after.tensors["c"].start :] == before[after.tensors["c"].start :]


def test_a_header_that_does_not_fit_or_is_wrong_changes_nothing(source: Path) -> None:
    before = source.read_bytes()
    assert not rewrite_header_in_place(source, renamed(source, "a_much_longer_name_than_before"))
    with pytest.raises(CorruptFile):
        rewrite_header_in_place(source, renamed(source, "a"))
    with pytest.raises(CorruptFile):
        rewrite_header_in_place(source, b"{}")
    other = b'{"x":{"dtype":"U8","shape":[112],"data_offsets":[0,112]}}'
    with pytest.raises(ConversionError):
        rewrite_header_in_place(source, other)
    with pytest.raises(FileMissing):
        rewrite_header_in_place(source.with_name("none"), b"{}")
    assert source.read_bytes() == before


def test_progress_is_the_bytes_of_the_tensors(source: Path, out: Path) -> None:
    steps: list[int] = []
    write_safetensors(out, {"twice": Concat((reads(source)["b"],) * 2), **SMALL}, progress=steps.append)
    assert sum(steps) == 2 * 96 + 8


def test_names_and_metadata_that_are_no_text_are_refused(out: Path) -> None:
    with pytest.raises(FileError):
        write_safetensors(out, SMALL, {"a": "\ud800"})
    with pytest.raises(CorruptFile):
        write_safetensors(out, {"__metadata__": SMALL["w"]})
    assert not list(out.parent.iterdir())
