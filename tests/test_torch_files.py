"""Torch zips and legacy streams: what is read, what is reported, what is refused. torch.load is the oracle where it can be."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.errors import CorruptFile, FileError, UnsafeFile, UnsupportedFile
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.tensors import evaluate
from hubtool.tensors.expr import Read
from hubtool.tensors.ref import TensorRef
from tests.support.torch_files import floats, legacy_bytes, mapping, number, storage, tensor, text, write, zip_bytes

ZIP_AND_LEGACY = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def saved(tmp_path: Path, value: Any, *, new: bool = True) -> TensorFile:
    path = tmp_path / "a.pt"
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return open_file(path)


def opened(tmp_path: Path, data: bytes) -> TensorFile:
    return open_file(write(tmp_path / "a.pt", data))


def codes(file: TensorFile) -> list[str]:
    return [finding.code for finding in file.findings]


def values(ref: TensorRef) -> tuple[float, ...]:
    return evaluate.scalars(ref)


# What torch writes


@ZIP_AND_LEGACY
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
     torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64],
)  # fmt: skip
def test_tensors_of_every_dtype_equal_those_of_torch(tmp_path: Path, dtype: torch.dtype, new: bool) -> None:
    want = torch.ones(3, 2, dtype=torch.float32).to(dtype)
    file = saved(tmp_path, {"w": want}, new=new)
    assert file.format == ("torch-zip" if new else "torch-legacy")
    assert torch.equal(evaluate.load(file.tensors["w"]).view(torch.uint8), want.view(torch.uint8))
    assert codes(file) == []


@ZIP_AND_LEGACY
def test_modules_parameters_and_ordered_dicts_are_flattened(tmp_path: Path, new: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    tree = {
        "state_dict": module.state_dict(),
        "list": [torch.nn.Parameter(torch.ones(1))],
        "epoch": 3,
        768: (torch.zeros(2), "x"),
    }
    file = saved(tmp_path, tree, new=new)
    assert list(file.tensors) == [
        "state_dict.0.weight", "state_dict.0.bias", "state_dict.1.weight", "state_dict.1.bias", "list.0", "768.0",
    ]  # fmt: skip
    assert torch.equal(evaluate.load(file.tensors["state_dict.0.weight"]), module[0].weight.detach())
    assert dict(file.metadata) == {"epoch": "3", "768.1": '"x"'}
    assert (file.structure["epoch"], file.structure[768][1]) == (3, "x")
    assert file.structure["list"][0] == file.tensors["list.0"]


@ZIP_AND_LEGACY
def test_views_keep_their_window_and_report_the_rest(tmp_path: Path, new: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "slice": base[1:3],
        "columns": base[:, ::2],
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.arange(5)[2],
    }
    file = saved(tmp_path, tree, new=new)
    for name, want in tree.items():
        assert torch.equal(evaluate.load(file.tensors[name]), want)
    assert file.tensors["slice"].contiguous
    assert not file.tensors["columns"].contiguous
    assert {"hidden-bytes", "non-contiguous", "overlapping-tensors"} <= set(codes(file))


def test_a_slice_of_a_larger_storage_says_how_many_bytes_hide(tmp_path: Path) -> None:
    file = saved(tmp_path, {"w": torch.zeros(100)[:10]})
    assert [finding.message.split()[0] for finding in file.findings] == ["360"]


def test_tied_tensors_are_reported_once_each(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    file = saved(tmp_path, {"a": weight, "b": weight})
    assert codes(file) == ["tied-tensors"]
    assert file.tensors["a"].start == file.tensors["b"].start


@ZIP_AND_LEGACY
def test_a_bare_tensor_has_the_name_root(tmp_path: Path, new: bool) -> None:
    file = saved(tmp_path, torch.arange(768.0), new=new)
    assert list(file.tensors) == ["(root)"]
    assert isinstance(file.structure, TensorRef)


def test_numbers_that_json_cannot_say_are_text_in_the_metadata(tmp_path: Path) -> None:
    file = saved(tmp_path, {"w": torch.ones(9), "loss": float("nan"), "none": None, "flag": True})
    assert dict(file.metadata) == {"loss": '"nan"', "none": "null", "flag": "true"}


@ZIP_AND_LEGACY
def test_device_and_size_objects_are_plain_values(tmp_path: Path, new: bool) -> None:
    file = saved(
        tmp_path,
        {"device": torch.device("cuda:1"), "size": torch.Size([1, 2]), "dtype": torch.float16, "w": torch.ones(9)},
        new=new,
    )
    assert file.structure["device"] == "cuda:1"
    assert file.structure["size"] == (1, 2)
    assert file.structure["dtype"] == "torch.float16"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_torch_can_be_asked_for_is_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(9)}, path, pickle_protocol=protocol)
    assert values(open_file(path).tensors["w"]) == (1.0,) * 9


def test_numpy_arrays_are_tensors_with_their_bytes_inside(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    tree = {
        "c": numpy.arange(6.0).reshape(2, 3),
        "f": numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
        "b": numpy.arange(3, dtype=">i4"),
    }
    file = saved(tmp_path, {**tree, "w": torch.ones(9)})
    for name, want in tree.items():
        assert file.tensors[name].inline is not None
        assert numpy.array_equal(evaluate.load(file.tensors[name]).numpy(), want)
    assert "inert-global" in codes(file)


def test_a_parameter_dict_shows_its_parameters(tmp_path: Path) -> None:
    file = saved(tmp_path, {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 8))})})
    assert {name: ref.shape for name, ref in file.tensors.items()} == {"string_to_param.*": (2, 8)}
    assert "inert-global" in codes(file)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"), (lambda: torch.ones(2, dtype=torch.complex128), "complex128"),
        (lambda: torch.ones(2, device="meta"), "without data"),
    ],
    ids=["sparse", "complex128", "meta"],
)  # fmt: skip
def test_tensors_that_are_not_plain_are_refused_with_the_right_word(
    tmp_path: Path, value: Callable[[], torch.Tensor], word: str
) -> None:
    with pytest.raises(UnsupportedFile, match=word):
        saved(tmp_path, {"w": value()})


def test_quantized_tensors_are_refused_by_name(tmp_path: Path) -> None:
    inner = (
        storage(kind="QUInt8Storage")
        + number(0)
        + b"))ctorch\nper_tensor_affine\nG"
        + struct.pack(">d", 1)
        + number(0)
        + b"\x87"
    )
    with pytest.raises(UnsupportedFile, match="quantized"):
        opened(tmp_path, zip_bytes(mapping({"w": b"ctorch._utils\n_rebuild_qtensor\n(" + inner + b"\x89NtR"})))


def test_a_torchscript_archive_is_refused_by_name(tmp_path: Path) -> None:
    data = zip_bytes(tensor(), {"data/0": floats(1, 2, 3, 4), "constants.pkl": b"\x80\x02)."})
    with pytest.raises(UnsupportedFile, match="TorchScript"):
        opened(tmp_path, data)


def test_a_whole_pickled_module_is_refused_naming_its_class(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match=r"torch\.nn\.modules\.linear\.Linear"):
        saved(tmp_path, torch.nn.Linear(2, 2))


def test_a_large_legacy_pickle_is_read_beyond_the_first_window(tmp_path: Path) -> None:
    file = saved(tmp_path, {"note": "x" * (2 << 20), "w": torch.arange(10.0)}, new=False)
    assert values(file.tensors["w"]) == tuple(range(10))


# Files built by hand


def test_the_handmade_files_of_these_tests_are_healthy(tmp_path: Path) -> None:
    old = tensor(inner=storage(view=b"N"))
    for data in (zip_bytes(mapping({"w": tensor()})), legacy_bytes(mapping({"w": old}))):
        file = opened(tmp_path, data)
        assert values(file.tensors["w"]) == (1, 2, 3, 4)
        assert codes(file) == []
        assert torch.load(tmp_path / "a.pt", weights_only=True)["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("view", "problem"),
    [
        (tensor(offset=1), CorruptFile), (tensor(shape=(3, 2)), CorruptFile), (tensor(stride=(1 << 60, 1)), CorruptFile),
        (tensor(offset=-1), CorruptFile), (tensor(shape=(-1, 2)), CorruptFile), (tensor(shape=(2,)), CorruptFile),
        (tensor(shape=[1] * 40, stride=[1] * 40), CorruptFile), (tensor(shape=(1 << 40,), stride=(0,)), UnsafeFile),
    ],
    ids=["offset", "shape", "stride", "negative-offset", "negative-size", "ranks-differ", "rank", "repeated"],
)  # fmt: skip
@pytest.mark.parametrize("build", [zip_bytes, legacy_bytes], ids=["zip", "legacy"])
def test_views_that_leave_their_storage_are_refused(
    tmp_path: Path, view: bytes, problem: type[FileError], build: Any
) -> None:
    with pytest.raises(problem) as caught:
        opened(tmp_path, build(mapping({"w": view})))
    assert caught.value.path == str(tmp_path / "a.pt")


def test_many_views_of_one_small_storage_are_refused(tmp_path: Path) -> None:
    view = tensor(shape=(1000,), stride=(0,))
    with pytest.raises(UnsafeFile, match="larger than the file"):
        opened(tmp_path, zip_bytes(mapping({f"w{i}": view for i in range(1000)})))


def laughs(levels: int) -> bytes:
    """A list of ten references to a list of ten references ... built with the memo only."""
    body = b"]N" + b"aq\x00"
    for i in range(levels):
        body += b"0](" + b"".join(b"h" + bytes([i]) for _ in range(10)) + b"eq" + bytes([i + 1])
    return body


def test_shared_containers_that_multiply_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match="repeats itself"):
        opened(tmp_path, zip_bytes(laughs(30)))


def test_long_names_shared_by_many_values_are_refused(tmp_path: Path) -> None:
    body = b"}" + text("k" * 100_000) + b"](" + b"N" * 2000 + b"es"
    with pytest.raises(UnsafeFile):
        opened(tmp_path, zip_bytes(body))


@pytest.mark.parametrize("body", [b"}q\x00" + text("me") + b"h\x00s", b"]q\x00h\x00a"], ids=["dict", "list"])
def test_an_object_that_contains_itself_is_refused(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(UnsafeFile, match="itself"):
        opened(tmp_path, zip_bytes(body))


def test_deep_nesting_is_refused_without_recursion(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match="nested"):
        opened(tmp_path, zip_bytes(b"]" * 200_000 + b"a" * 199_999))


@pytest.mark.parametrize(
    "key", [b"C\x01w", b"N", b"K\x01K\x02\x86", b"K\x01", b"\x88"], ids=["bytes", "none", "tuple", "int", "bool"]
)
def test_tensors_under_keys_that_are_no_names_are_refused(tmp_path: Path, key: bytes) -> None:
    with pytest.raises(UnsupportedFile):
        opened(tmp_path, zip_bytes(b"}" + key + tensor() + b"s"))


def test_integer_keys_below_the_top_are_positions(tmp_path: Path) -> None:
    file = saved(tmp_path, {"state": {0: {"exp_avg": torch.ones(9)}}, 768: ({"linear.0.weight": torch.ones(9)},)})
    assert list(file.tensors) == ["state.0.exp_avg", "768.0.linear.0.weight"]


@pytest.mark.parametrize(
    "body", [tensor(), b"](" + tensor() * 2 + b"e", b"(" + tensor() + b"t"], ids=["bare", "list", "tuple"]
)
def test_a_few_numbers_without_any_name_are_refused(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(UnsupportedFile, match="without names"):
        opened(tmp_path, zip_bytes(body))


@pytest.mark.parametrize("name", ["__metadata__", "a\udc80"])
def test_names_that_safetensors_cannot_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError):
        opened(tmp_path, zip_bytes(mapping({name: tensor()})))


def test_two_paths_with_one_flat_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFile, match=r"a\.b"):
        saved(tmp_path, {"a": {"b": torch.ones(9)}, "a.b": torch.ones(9)})


def test_a_storage_of_another_size_than_its_record_is_refused(tmp_path: Path) -> None:
    for record in (floats(1, 2, 3), floats(1, 2, 3, 4, 5)):
        with pytest.raises(CorruptFile, match="instead of"):
            opened(tmp_path, zip_bytes(mapping({"w": tensor()}), {"data/0": record}))
    with pytest.raises(CorruptFile, match="missing"):
        opened(tmp_path, zip_bytes(mapping({"w": tensor()}), {}))


def test_a_storage_used_as_two_types_is_refused(tmp_path: Path) -> None:
    other = tensor(inner=storage(kind="HalfStorage"))
    with pytest.raises(CorruptFile, match="F16"):
        opened(tmp_path, zip_bytes(mapping({"a": tensor(), "b": other})))


def test_records_that_no_tensor_uses_and_foreign_members_are_reported(tmp_path: Path) -> None:
    records = {"data/0": floats(1, 2, 3, 4), "data/1": bytes(99), "notes.txt": b"cos\nsystem\n"}
    file = opened(tmp_path, zip_bytes(mapping({"w": tensor()}), records))
    assert [(finding.code, finding.severity) for finding in file.findings] == [
        ("unexpected-member", "warning"),
        ("hidden-bytes", "warning"),
    ]


def test_compressed_members_are_inflated_and_reported(tmp_path: Path) -> None:
    records = {"data/0": floats(*range(64))}
    body = mapping({"w": tensor(shape=(64,), stride=(1,), inner=storage(numel=64))})
    file = opened(tmp_path, zip_bytes(body, records, method=zipfile.ZIP_DEFLATED))
    assert values(file.tensors["w"]) == tuple(range(64))
    assert codes(file) == ["deflated"]


def test_compression_bombs_are_refused_before_inflating(tmp_path: Path) -> None:
    body = mapping({"w": tensor(shape=(1 << 20,), stride=(1,), inner=storage(numel=1 << 20))})
    with pytest.raises(UnsafeFile, match="compressed"):
        opened(tmp_path, zip_bytes(body, {"data/0": bytes(4 << 20)}, method=zipfile.ZIP_DEFLATED))


def test_big_endian_numbers_are_swapped(tmp_path: Path) -> None:
    records = {"data/0": struct.pack(">4f", 1, 2, 3, 4), "byteorder": b"big"}
    file = opened(tmp_path, zip_bytes(mapping({"w": tensor()}), records))
    assert values(file.tensors["w"]) == (1, 2, 3, 4)
    assert codes(file) == ["big-endian"]


def test_a_damaged_pickle_fails_its_checksum(tmp_path: Path) -> None:
    data = zip_bytes(mapping({"weight": tensor()}))
    with pytest.raises(CorruptFile, match="checksum"):
        opened(tmp_path, data.replace(b"weight", b"height", 1))


def test_a_torch_zip_with_a_comment_or_a_tail_is_refused(tmp_path: Path) -> None:
    data = zip_bytes(mapping({"w": tensor()}))
    with pytest.raises(FileError):
        opened(tmp_path, data + b"tail")
    with pytest.raises(CorruptFile, match="truncated"):
        opened(tmp_path, data[:-30])
    with pytest.raises(UnsafeFile):
        opened(tmp_path, data + data)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for data in (zip_bytes(mapping({"w": tensor()})), legacy_bytes(mapping({"w": tensor()}))):
        for length in range(len(data)):
            with pytest.raises(FileError) as caught:
                opened(tmp_path, data[:length])
            assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("records", "tail", "problem"),
    [
        ({"0": (3, floats(1, 2, 3))}, b"", CorruptFile), ({"0": (-1, b"")}, b"", CorruptFile), ({"0": (4, floats(1, 2))}, b"", CorruptFile),
        ({"1": (4, floats(1, 2, 3, 4))}, b"", CorruptFile), ({"0": (4, floats(1, 2, 3, 4)), "1": (0, b"")}, b"", CorruptFile),
    ],
)  # fmt: skip
def test_legacy_storages_must_be_what_the_pickle_says(
    tmp_path: Path, records: Any, tail: bytes, problem: type[FileError]
) -> None:
    with pytest.raises(problem):
        opened(tmp_path, legacy_bytes(mapping({"w": tensor()}), records, tail=tail))


def test_bytes_after_the_last_legacy_storage_are_reported(tmp_path: Path) -> None:
    assert codes(opened(tmp_path, legacy_bytes(mapping({"w": tensor()}), tail=b"x" * 9))) == ["trailing-bytes"]


def test_views_of_very_old_legacy_files_are_placed_in_their_root(tmp_path: Path) -> None:
    view = b"(" + text("1") + number(1) + number(3) + b"t"
    body = mapping({"w": tensor(shape=(2,), stride=(1,), offset=1, inner=storage(view=view))})
    assert values(opened(tmp_path, legacy_bytes(body)).tensors["w"]) == (3, 4)
    outside = mapping({"w": tensor(shape=(3,), stride=(1,), offset=1, inner=storage(view=view))})
    with pytest.raises(CorruptFile):
        opened(tmp_path, legacy_bytes(outside))


def test_zip_members_may_be_large_and_many(tmp_path: Path) -> None:
    tree = OrderedDict((f"layer.{i}.weight", torch.full((40, 40), float(i))) for i in range(200))
    file = saved(tmp_path, tree)
    assert values(file.tensors["layer.150.weight"])[:2] == (150.0, 150.0)
    assert list(file.tensors) == list(tree)


# Mutations


def _seeds() -> Iterator[bytes]:
    yield zip_bytes(mapping({"w": tensor(), "n": number(3)}))
    yield legacy_bytes(mapping({"w": tensor(), "n": number(3)}))
    yield zip_bytes(mapping({"w": tensor()}), method=zipfile.ZIP_DEFLATED)
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(
            {"a": torch.nn.Linear(2, 2).state_dict(), "l": [1, "x", None]}, buffer, _use_new_zipfile_serialization=new
        )
        yield buffer.getvalue()


def mutated(data: bytes, choose: random.Random) -> bytes:
    """One to four changes: a flipped bit, a byte, a cut, a repeated or a moved stretch, an opcode or an extreme number."""
    result = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at, length = choose.randrange(len(result)), choose.randint(1, 40)
        stretch = bytes(result[at : at + length])
        match choose.randrange(6):
            case 0:
                result[at] ^= 1 << choose.randrange(8)
            case 1:
                result[at] = choose.randrange(256)
            case 2:
                del result[at : at + length]
            case 3:
                result[at:at] = stretch
            case 4:
                result[at : at + 4] = choose.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"PK\x05\x06"]
                )
            case 5:
                result[at : at + 1] = choose.choice(
                    [b"(", b".", b"R", b"b", b"h\x00", b"\x93", b"c", b"u", b"\x81", b"Q", b"t"]
                )
    return bytes(result) or b"\0"


@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_never_raise_anything_but_our_errors(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    originals = list(_seeds())
    for _ in range(60):
        path = write(tmp_path / "a.pt", mutated(choose.choice(originals), choose))
        try:
            file = open_file(path)
        except (CorruptFile, UnsafeFile, UnsupportedFile):
            continue
        for ref in file.tensors.values():
            assert len(evaluate.to_bytes(Read(ref))) == ref.nbytes


# Real files

TORCH_LESS = {"Birch-san__embeddings_mps.pt", "Marcus-Arcadius__anya.pt", "Elendil-Q__last.ckpt"}
HOSTILE = {
    "Tashu014__training_args.bin": "TrainingArguments",
    "mmaitre314__pytorch_magic_bypass.pt": r"__builtin__\.eval",
}
FOLDERS = ("ti", "aesthetic", "vae", "text_encoder", "conditioning", "container", "lora")


def real_files(shared: Path) -> list[Path]:
    files = [path for folder in FOLDERS for path in sorted((shared / "real" / folder).iterdir())]
    return [path for path in files if path.suffix in {".pt", ".bin", ".ckpt", ".pth"}]


def flat(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name or "(root)", value.detach()
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{name}.{key}" if name else str(key))


def test_real_files_equal_what_torch_loads(shared: Path) -> None:
    compared = 0
    for path in real_files(shared):
        if path.name in TORCH_LESS or path.name in HOSTILE:
            continue
        want = dict(flat(torch.load(path, weights_only=True, map_location="cpu")))
        got = {name: evaluate.load(ref) for name, ref in open_file(path).tensors.items()}
        assert list(got) == list(want)
        assert all(got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in want)
        compared += 1
    assert compared > 20


def test_real_files_that_torch_refuses_are_read_as_data(shared: Path) -> None:
    names = {path.name: path for path in real_files(shared)}
    mps = open_file(names["Birch-san__embeddings_mps.pt"])
    assert mps.tensors["string_to_param.*"].shape == (1, 768)
    assert mps.tensors["string_to_param.*"].inline is not None
    assert open_file(names["Marcus-Arcadius__anya.pt"]).tensors["string_to_param.*"].dtype == "F32"
    lightning = open_file(names["Elendil-Q__last.ckpt"])
    assert lightning.tensors["state_dict.model.conv1.weight"].shape == (8, 1, 8)
    assert all("inert-global" in codes(open_file(names[name])) for name in TORCH_LESS)


def test_real_hostile_files_are_refused_naming_what_they_call(shared: Path) -> None:
    for name, word in HOSTILE.items():
        with pytest.raises(UnsafeFile, match=word):
            open_file(shared / "real" / "container" / name)


# Hostile corpus

CLASSES = {"pickle-exec", "pickle-opcode", "container", "weights-only"}


def verdict(path: Path) -> str:
    try:
        severities = {finding.severity for finding in open_file(path).findings}
    except (CorruptFile, UnsafeFile, UnsupportedFile):
        return "reject"
    return "error" if "error" in severities else "warn" if "warning" in severities else "accept"


ALLOWED = {"reject": {"reject"}, "warn": {"reject", "error", "warn"}, "accept": {"accept", "warn"}}


def test_the_hostile_corpus_is_judged_as_its_manifest_says(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    monkeypatch.setenv("CANARY", str(canary))
    with tarfile.open(shared / "bad.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    cases = [
        case
        for case in json.loads((tmp_path / "bad" / "MANIFEST.json").read_text())["cases"]
        if case["class"] in CLASSES
    ]
    wrong = [case["file"] for case in cases if verdict(tmp_path / "bad" / case["file"]) not in ALLOWED[case["expect"]]]
    assert not wrong
    assert len(cases) > 150
    assert not list(canary.iterdir())
