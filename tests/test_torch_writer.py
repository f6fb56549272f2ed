"""Torch files written without torch: torch reads them, python's zipfile reads them, and so do we."""

from __future__ import annotations

import math
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubtool.errors import ConversionError, HubtoolError, UsageProblem, WouldOverwrite
from hubtool.formats import open_file, torch_writer
from hubtool.formats.torch_writer import write_torch_zip
from hubtool.tensors import evaluate
from hubtool.tensors.dtypes import FROM_TORCH, TORCH_NAME
from hubtool.tensors.expr import Concat, Literal, Permute, Read

DTYPES = sorted(set(TORCH_NAME) - {"F4"})


def literal(tensor: torch.Tensor) -> Literal:
    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    return Literal(data, FROM_TORCH[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    weight = torch.randn(3, 5)
    path = tmp_path / "a.pt"
    size = write_torch_zip(path, {"state_dict": OrderedDict(w=literal(weight)), "step": 7, "name": "x"})
    loaded = load(path)
    assert size == path.stat().st_size
    assert isinstance(loaded["state_dict"], OrderedDict)
    assert torch.equal(loaded["state_dict"]["w"], weight)
    assert (loaded["step"], loaded["name"]) == (7, "x")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_torch_round_trips(tmp_path: Path, dtype: str) -> None:
    torch_dtype = getattr(torch, TORCH_NAME[dtype])
    raw = bytes(range(16)) if dtype != "BOOL" else bytes([0, 1] * 8)
    path = tmp_path / "a.pt"
    write_torch_zip(path, {"w": Literal(raw, dtype, (16 // torch_dtype.itemsize,))})
    loaded = load(path)["w"]
    assert loaded.dtype == torch_dtype
    assert bytes(loaded.view(torch.uint8).tolist()) == raw
    ref = open_file(path).tensors["w"]
    assert (ref.dtype, evaluate.to_bytes(Read(ref))) == (dtype, raw)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1, 1), (2, 3, 4)])
def test_every_shape_round_trips(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.pt"
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    write_torch_zip(path, {"w": literal(tensor)})
    assert torch.equal(load(path)["w"], tensor)
    assert open_file(path).tensors["w"].shape == shape


def test_payloads_are_aligned_stored_and_checksummed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_torch_zip(path, {f"t{i}": literal(torch.randn(i)) for i in range(1, 12)}, root="model")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert all(info.filename.startswith("model/") for info in archive.infolist())
    assert {ref.start % 64 for ref in open_file(path).tensors.values()} == {0}


def test_integer_keys_lists_and_tuples_keep_their_types(tmp_path: Path) -> None:
    one = literal(torch.ones(2))
    tree = {
        768: ({"linear.0.weight": one}, {"linear.0.weight": one}),
        "list": [1, [2.5, None], (True, False)],
        "empty": {},
    }
    path = tmp_path / "a.pt"
    write_torch_zip(path, tree)
    loaded = load(path)
    assert isinstance(loaded[768], tuple)
    assert (loaded["list"], loaded["empty"]) == ([1, [2.5, None], (True, False)], {})
    structure = open_file(path).structure
    assert (structure["list"], list(structure)) == (tree["list"], [768, "list", "empty"])


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 200), 1 << 200) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])) | st.integers(1 - (1 << 60), (1 << 60) - 1), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_plain_values_come_back_from_torch_and_from_our_reader(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.mktemp("law") / "a.pt"
    write_torch_zip(path, {"value": value})
    assert load(path) == {"value": value}
    assert open_file(path).structure == {"value": value}


def test_long_mappings_and_lists_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    tree = {"map": {f"key{i}": i for i in range(2500)}, "list": list(range(3001))}
    write_torch_zip(path, tree)
    assert load(path) == tree == open_file(path).structure


def test_the_same_bytes_stay_tied(tmp_path: Path) -> None:
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    write_torch_zip(first, {"w": literal(torch.randn(1000))})
    read = Read(open_file(first).tensors["w"])
    write_torch_zip(second, {"a": read, "b": Read(read.ref)})
    loaded = load(second)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert second.stat().st_size < 2 * first.stat().st_size - 1000
    assert [finding.code for finding in open_file(second).findings] == ["tied-tensors"]


def test_expressions_are_evaluated_while_writing(tmp_path: Path) -> None:
    tensor = torch.randn(4, 3)
    path = tmp_path / "a.pt"
    write_torch_zip(path, {"t": Permute(literal(tensor), (1, 0)), "c": Concat((literal(tensor), literal(tensor)))})
    loaded = load(path)
    assert torch.equal(loaded["t"], tensor.T)
    assert torch.equal(loaded["c"], torch.cat([tensor, tensor]))


def test_a_bare_tensor_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_torch_zip(path, literal(torch.arange(768.0)))
    assert torch.equal(load(path), torch.arange(768.0))


def test_numbers_beyond_32_bits_use_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_writer, "_LIMIT", 2000)
    tensors = {f"t{i}": torch.randn(100 * i) for i in range(1, 10)}
    path = tmp_path / "a.pt"
    write_torch_zip(path, {name: literal(tensor) for name, tensor in tensors.items()})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert all(torch.equal(load(path)[name], tensor) for name, tensor in tensors.items())
    opened = open_file(path)
    assert all(torch.equal(evaluate.load(opened.tensors[name]), tensor) for name, tensor in tensors.items())


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    tree = {"w": Literal(b"\1\2\3\4", "F32", (1,)), "n": 1}
    for name in ("a.pt", "b.pt"):
        write_torch_zip(tmp_path / name, tree)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"x": object()},
        {b"bytes": 1},
        {None: 1},
        {"a\udc80": 1},
        {"x": 1 << 9999},
        {1 << 60: 1},
        nested(80),
        {"w": Literal(b"\0", "F4", (2,))},
    ],
    ids=["object", "bytes-key", "none-key", "surrogate", "huge-int", "huge-key", "deep", "packed-dtype"],
)
def test_what_torch_cannot_hold_is_refused_and_nothing_appears(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(ConversionError) as caught:
        write_torch_zip(path, value)
    assert caught.value.path == str(path)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        write_torch_zip(path, {})
    assert path.read_bytes() == b"mine"
    write_torch_zip(path, {}, force=True)
    assert load(path) == {}


def test_a_source_that_vanishes_leaves_no_output(tmp_path: Path) -> None:
    source, path = tmp_path / "a.pt", tmp_path / "b.pt"
    write_torch_zip(source, {"w": literal(torch.randn(1000))})
    ref = open_file(source).tensors["w"]
    source.write_bytes(b"short")
    with pytest.raises(HubtoolError):
        write_torch_zip(path, {"w": Read(ref)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("root", ["", "..", "a/b", "a\\b", "a:b", "a\n"])
def test_a_root_that_no_reader_accepts_is_refused(tmp_path: Path, root: str) -> None:
    with pytest.raises(UsageProblem):
        write_torch_zip(tmp_path / "a.pt", {}, root=root)
