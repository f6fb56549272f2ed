"""The safetensors reader: strict about the format, tolerant of what honest writers do, and honest about what is odd."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubtool.errors import CorruptFile, FileMissing, HubtoolError, UnsafeFile, UnsupportedFile
from hubtool.formats import open_file
from hubtool.formats.safetensors import read_header
from hubtool.tensors import header as headers
from hubtool.tensors.columns import parse_columns
from hubtool.tensors.dtypes import BITS
from tests.support.files import floats, framed, safetensors_bytes, scalar, write_safetensors, zeros

ENTRY = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def made(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return path


def codes(path: Path) -> set[str]:
    return {finding.code for finding in read_header(path).findings}


def test_names_types_and_places_come_in_header_order(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"z": floats(2, 3), "a.alpha": scalar(4.0)}, {"k": "v"})
    file = read_header(path)
    assert [(ref.name, ref.dtype, ref.shape) for ref in file.tensors.values()] == [
        ("z", "F32", (2, 3)),
        ("a.alpha", "F32", ()),
    ]
    data = path.read_bytes()
    assert data[file.tensors["z"].start : file.tensors["z"].end] == floats(2, 3)[2]
    assert file.tensors["a.alpha"].end == file.size == len(data)
    assert (file.format, file.metadata, file.findings, file.files) == ("safetensors", {"k": "v"}, (), (path,))
    assert framed(file.header_bytes or b"", data[file.tensors["z"].start :]) == data


def test_header_order_is_kept_when_it_is_not_the_order_of_the_data(tmp_path: Path) -> None:
    header = (
        b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    )
    assert list(read_header(made(tmp_path, framed(header, b"xyz"))).tensors) == ["b", "a"]


@pytest.mark.parametrize(
    "header",
    [
        "{" + ENTRY + "," + ENTRY + "}",
        '{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\\u0077":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}',
        '{"w":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        '{"w":{"dtype":"f32","shape":[2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[2]}}',
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}',
        '{"__metadata__":{"a":1},' + ENTRY + "}",
        '{"__metadata__":{"a":"1","a":"2"},' + ENTRY + "}",
        '{"__metadata__":{"a":"\\ud800"},' + ENTRY + "}",
        '{"__metadata__":null,' + ENTRY + "}",
        '{"__metadata__":{},"__metadata__":{},' + ENTRY + "}",
        '{"__metadata__":{"a":NaN},' + ENTRY + "}",
        '{"w\x01":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[' + "1," * 40 + '2],"data_offsets":[0,8]}}',
        "[]",
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}\0',
    ],
)
def test_a_header_that_breaks_a_rule_is_corrupt(tmp_path: Path, header: str) -> None:
    with pytest.raises(CorruptFile) as error:
        read_header(made(tmp_path, framed(header.encode(), bytes(8))))
    assert error.value.path == str(tmp_path / "x.safetensors")


@pytest.mark.parametrize("depth", [5, 100_000])
def test_nesting_is_counted_before_parsing(tmp_path: Path, depth: int) -> None:
    header = '{"__metadata__":{"a":' + "[" * depth + "]" * depth + "}," + ENTRY + "}"
    with pytest.raises(UnsafeFile):
        read_header(made(tmp_path, framed(header.encode(), bytes(8))))


def test_brackets_inside_strings_are_not_nesting(tmp_path: Path) -> None:
    value = '[[[[[[[["\\\\"{{{{'
    path = write_safetensors(tmp_path / "a.safetensors", {"ä": floats(1)}, {"k": value})
    assert read_header(path).metadata == {"k": value}


@pytest.mark.parametrize("size", [0, 1, 8, 9, 30])
def test_a_truncated_file_is_corrupt(tmp_path: Path, size: int) -> None:
    with pytest.raises(CorruptFile):
        read_header(made(tmp_path, framed(("{" + ENTRY + "}").encode(), bytes(8))[:size]))


def test_a_header_length_is_checked_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="claims"):
        read_header(made(tmp_path, (1 << 62).to_bytes(8, "little") + b"{}" * 10))


def test_a_header_larger_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    tensors = {f"module.{i}.weight": floats(2) for i in range(2000)}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    assert len(read_header(path).header_bytes or b"") > 64 << 10
    assert list(read_header(path).tensors) == list(tensors)


def test_old_files_without_padding_are_fine(tmp_path: Path) -> None:
    path = made(tmp_path, safetensors_bytes({"w": floats(2)}, align=1))
    assert read_header(path).tensors["w"].start % 8 != 0
    assert not read_header(path).findings


def test_a_file_without_tensors_is_fine(tmp_path: Path) -> None:
    assert not read_header(made(tmp_path, framed(b"{}"))).tensors


def test_a_missing_file_and_a_pipe_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        read_header(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedFile):
        read_header(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ({"a": "<img src=x onerror=alert(1)>"}, "metadata-html"),
        ({"a": "{{ config }}"}, "metadata-template"),
        ({"a": "=HYPERLINK(1)"}, "metadata-formula"),
        ({"a": "hf_" + "A" * 30}, "metadata-secret"),
        ({"a": "\x1b[2J"}, "metadata-control"),
        ({"a": "\u202egnp"}, "metadata-control"),
        ({"a": "1" * 30}, "metadata-number"),
        ({"ss_tag_frequency": '{"a": {'}, "metadata-json"),
        ({"modelspec.thumbnail": "http://example.com/x.png"}, "metadata-thumbnail"),
        ({"sshs_model_hash": "0" * 64}, "claimed-hash"),
        ({"ss_network_module": "networks.lora", "ss_network_dim": "128"}, "claimed-rank"),
    ],
)
def test_deceptive_metadata_is_a_warning(tmp_path: Path, metadata: dict[str, str], code: str) -> None:
    assert code in codes(write_safetensors(tmp_path / "a.safetensors", {"w": floats(2, 2)}, metadata))


@pytest.mark.parametrize(
    "metadata",
    [
        {"trigger": "<s0><s1>, <cat-toy>, <style>", "<s1>": "<embed>"},
        {
            "ss_tag_frequency": '{"1_cat": {"a": 1}}',
            "ss_network_args": "None",
            "lr": "1e-4",
            "offset": "-0.5",
            "who": "@me",
        },
        {
            "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "2",
        },
    ],
)
def test_usual_metadata_is_no_warning(tmp_path: Path, metadata: dict[str, str]) -> None:
    assert not codes(write_safetensors(tmp_path / "a.safetensors", {"w": floats(2, 2)}, metadata))


@pytest.mark.parametrize(
    "name", ["", "a\nb", "w\u202e", "__class__", "a..b", "n" * 2000, "<script>alert(1)</script>", "a\x7f"]
)
def test_an_odd_name_is_a_warning(tmp_path: Path, name: str) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"w": floats(2), name: floats(2)})
    assert codes(path) == {"odd-name"}
    assert name in read_header(path).tensors


def test_unknown_fields_blanks_and_absurd_empty_shapes_are_warnings(tmp_path: Path) -> None:
    field = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"extra":[1.5]}}'
    assert codes(made(tmp_path, framed(field, bytes(8)))) == {"unknown-field"}
    assert codes(made(tmp_path, framed(b" {" + ENTRY.encode() + b"}", bytes(8)))) == {"leading-whitespace"}
    absurd = b'{"w":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'
    assert codes(made(tmp_path, framed(absurd))) == {"absurd-shape"}


NAMES = st.text(st.characters(codec="utf-8"), max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=4)
SIZED = sorted(dtype for dtype, bits in BITS.items() if bits >= 8)


@given(
    st.dictionaries(NAMES.filter(lambda n: n != "__metadata__"), st.tuples(st.sampled_from(SIZED), SHAPES), max_size=6),
    st.none() | st.dictionaries(NAMES, NAMES, max_size=3),
)
@settings(max_examples=150)
def test_both_ways_through_a_header_read_it_alike(spec: dict[str, Any], metadata: dict[str, str] | None) -> None:
    entries = [
        (name, dtype, tuple(shape), headers.numel(shape) * BITS[dtype] // 8) for name, (dtype, shape) in spec.items()
    ]
    body = sum(size for *_, size in entries)
    raw = headers.serialise(entries, metadata)
    slow = headers.parse(b" " + raw, body, Path("x"))
    fast = parse_columns(raw, body, Path("x"))
    assert list(slow.tensors) == list(spec)
    assert slow.metadata == (metadata or {})
    if fast is not None:
        assert [(r.name, r.dtype, r.shape, r.start + 1, r.end + 1) for r in fast[0].values()] == [
            (r.name, r.dtype, r.shape, r.start, r.end) for r in slow.tensors.values()
        ]
        assert fast[1] == slow.metadata


PLAIN = (b'{"__metadata__":{"k":"v"},"a":{"dtype":"F16","shape":[3,4],"data_offsets":[0,24]},'
         b'"b":{"dtype":"F32","shape":[],"data_offsets":[24,28]}}   ')  # fmt: skip


BARE = b"{" + PLAIN[PLAIN.index(b'"a"') :]


@given(
    st.sampled_from([PLAIN, BARE]),
    st.integers(0, len(BARE) - 1),
    st.sampled_from(list(b'"{}[],:0123489. \\ab_-eF\x00\x7f\xff')),
    st.booleans(),
)
@settings(max_examples=600)
def test_a_damaged_header_is_never_read_faster_than_right(whole: bytes, at: int, byte: int, insert: bool) -> None:
    raw = whole[:at] + bytes([byte]) + whole[at + (not insert) :]
    fast = parse_columns(raw, 28, Path("x"))
    if fast is not None:
        slow = headers.parse(b" " + raw, 28, Path("x"))  # a leading blank: the long way
        assert (list(fast[0]), fast[1]) == (list(slow.tensors), slow.metadata)
        assert [r.shape for r in fast[0].values()] == [r.shape for r in slow.tensors.values()]


def test_a_compact_header_takes_the_fast_way_and_others_the_long_one() -> None:
    assert parse_columns(PLAIN, 28, Path("x")) is not None
    assert parse_columns(BARE, 28, Path("x")) is not None
    assert parse_columns(b"[" + BARE[1:], 28, Path("x")) is None
    assert parse_columns(PLAIN, 29, Path("x")) is None
    assert parse_columns(PLAIN.replace(b":{", b": {"), 28, Path("x")) is None


def test_the_library_agrees_about_what_we_accept(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors")
    path = write_safetensors(
        tmp_path / "a.safetensors", {"é": floats(2, 3), "b": zeros("BF16", 5), "c": scalar(1.0)}, {"k": "v"}
    )
    file = read_header(path)
    with library.safe_open(path, framework="pt") as theirs:
        names = list(theirs.keys())
        assert set(names) == set(file.tensors)
        assert theirs.metadata() == dict(file.metadata)
        assert {key: tuple(theirs.get_slice(key).get_shape()) for key in names} == {
            key: ref.shape for key, ref in file.tensors.items()
        }


def outcome(path: Path, read: Any) -> str:
    try:
        file = read(path)
    except HubtoolError as error:
        return "reject" if error.exit_code == 7 else f"exit code {error.exit_code}"
    return "warn" if any(finding.severity == "warning" for finding in file.findings) else "accept"


ALLOWED = {"reject": {"reject"}, "warn": {"warn", "reject"}, "accept": {"accept"}}


def test_every_hostile_header_of_the_corpus_is_judged_as_its_manifest_says(shared: Path, tmp_path: Path) -> None:
    with tarfile.open(shared / "bad.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "bad"
    cases = json.loads((root / "MANIFEST.json").read_text())["cases"]
    wrong = [
        (case["file"], read.__name__)
        for case in cases
        for read in ([open_file, read_header] if case["class"] == "safetensors" else [open_file])
        if case["class"] in {"safetensors", "index"}
        and outcome(root / case["file"], read) not in ALLOWED[case["expect"]]
    ]
    assert not wrong
    assert len(cases) > 300


def test_real_files_are_read_without_a_warning_but_the_known_one(shared: Path) -> None:
    seen = 0
    for path in sorted((shared / "real").rglob("*.safetensors")):
        if "lfs-pointer" not in path.name:
            seen += 1
            assert codes(path) <= ({"claimed-hash"} if "ai-toolkit" in path.name else set()), path.name
    assert seen > 5
