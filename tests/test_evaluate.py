"""Expressions become the same bytes with and without torch, small numbers are decoded alike, and bad values are found."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubtool.errors import CorruptFile, ShapeMismatch
from hubtool.formats.safetensors import read_header
from hubtool.tensors.dtypes import BITS, FLOATS, TORCH_NAME, nbytes
from hubtool.tensors.evaluate import Range, chunks, coalesce, compute, is_bytes, load, pieces, scalars, to_bytes
from hubtool.tensors.expr import Cast, Cols, Compute, Concat, Expr, Literal, Permute, Read, Reshape, Rows
from hubtool.tensors.reading import Sources
from hubtool.tensors.ref import TensorRef
from hubtool.tensors.values import ValueReport, scan_values
from tests.support.files import floats, scalar, write_safetensors


@pytest.fixture
def refs(tmp_path: Path) -> dict[str, TensorRef]:
    return dict(
        read_header(
            write_safetensors(tmp_path / "a.safetensors", {"x": floats(6, 4), "y": floats(2, 4, start=9.0)})
        ).tensors
    )


def values(expr: Expr) -> list[float]:
    return list(struct.unpack(f"<{len(to_bytes(expr)) // 4}f", to_bytes(expr)))


def counting(*shape: int) -> Literal:
    dtype, dims, data = floats(*shape)
    return Literal(data, dtype, tuple(dims))


def test_byte_path_takes_rows_of_concatenations_of_files(refs: dict[str, TensorRef]) -> None:
    both = Concat((Read(refs["x"]), Read(refs["y"])))
    assert is_bytes(Rows(both, 5, 7))
    assert values(Rows(both, 5, 7)) == [5.0, 5.25, 5.5, 5.75, 9.0, 9.25, 9.5, 9.75]


def test_adjacent_tensors_of_a_file_become_one_copy(refs: dict[str, TensorRef]) -> None:
    x, y = refs["x"], refs["y"]
    with Sources() as sources:
        parts = [
            *pieces(Rows(Read(x), 0, 2), sources),
            *pieces(Rows(Read(x), 2, 6), sources),
            *pieces(Read(y), sources),
        ]
        assert list(coalesce(iter(parts))) == [Range(x.path, x.start, y.end)]


def test_a_large_tensor_streams_in_pieces(tmp_path: Path) -> None:
    data = bytes(range(256)) * (40 << 10)
    ref = read_header(write_safetensors(tmp_path / "b.safetensors", {"w": ("U8", (len(data),), data)})).tensors["w"]
    parts = [bytes(chunk) for chunk in chunks(Read(ref))]
    assert len(parts) == 3
    assert b"".join(parts) == data


@pytest.mark.parametrize("strides", [(1, 2), (8, 2), (0, 1), (4, 0), (5, 1)])
def test_strided_views_are_gathered_as_torch_does(tmp_path: Path, strides: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "raw"
    path.write_bytes(struct.pack("<3x40f", *range(40)))
    ref = TensorRef("v", "F32", (3, 4), path, 3, 163, strides)
    assert torch.equal(load(ref), torch.arange(40.0).as_strided((3, 4), strides))


def test_a_view_outside_its_storage_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(40))
    with pytest.raises(CorruptFile, match="outside"):
        to_bytes(Read(TensorRef("v", "F32", (3, 4), path, 0, 40, (4, 1))))


def test_a_file_that_shrank_is_corrupt_and_not_a_crash(refs: dict[str, TensorRef]) -> None:
    os.truncate(refs["x"].path, refs["x"].end - 4)
    with pytest.raises(CorruptFile):
        to_bytes(Read(refs["x"]))


def test_inline_values_need_no_file() -> None:
    ref = TensorRef("t", "I64", (2,), Path("nowhere"), 0, 16, inline=struct.pack("<2q", 7, -1))
    assert scalars(ref) == (7.0, -1.0)
    strided = TensorRef("t", "I64", (2,), Path("nowhere"), 0, 24, (2,), struct.pack("<3q", 7, 8, 9))
    assert scalars(strided) == (7.0, 9.0)


def expressions() -> st.SearchStrategy[Expr]:
    leaf = st.sampled_from([counting(4, 6), counting(2, 6), counting(3, 6)])

    def wider(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        return st.one_of(
            st.builds(lambda e: Rows(e, e.shape[0] // 2, e.shape[0]), inner),
            st.builds(lambda a, b: Concat((a, b)), inner, inner),
            st.builds(lambda e: Reshape(Reshape(e, (e.shape[0] * 2, 3)), e.shape), inner),
            st.builds(lambda e: Concat((Cols(e, 3, 6), Cols(e, 0, 3)), 1), inner),
            st.builds(lambda e: Permute(Permute(e, (1, 0)), (1, 0)), inner),
            st.builds(lambda e: Cast(Cast(e, "F64"), "F32"), inner),
        )

    return st.recursive(leaf, wider, max_leaves=4)


def reference(expr: Any, torch: Any) -> Any:
    match expr:
        case Literal():
            return torch.tensor(struct.unpack(f"<{len(expr.data) // 4}f", expr.data)).reshape(expr.shape)
        case Rows():
            return reference(expr.source, torch)[expr.start : expr.stop]
        case Cols():
            return reference(expr.source, torch)[:, expr.start : expr.stop]
        case Concat():
            return torch.cat([reference(part, torch) for part in expr.parts], expr.axis)
        case Reshape():
            return reference(expr.source, torch).reshape(expr.shape)
        case Permute():
            return reference(expr.source, torch).permute(expr.order)
    return reference(expr.source, torch)


@given(expressions())
@settings(max_examples=150, deadline=None)
def test_every_expression_is_what_torch_says(expr: Expr) -> None:
    torch = pytest.importorskip("torch")
    expected = reference(expr, torch)
    assert tuple(expected.shape) == expr.shape
    assert torch.equal(compute(expr), expected)
    assert torch.tensor(values(expr)).reshape(expr.shape).equal(expected)


def test_functions_get_fp32_and_their_result_is_rounded_once() -> None:
    torch = pytest.importorskip("torch")
    half = Cast(counting(2, 3), "BF16")
    seen: list[Any] = []

    def double(tensor: Any, factor: float) -> Any:
        seen.append(tensor.dtype)
        return tensor * factor

    result = compute(Compute(double, (half,), (2, 3), "F16", (("factor", 2.0),)))
    assert seen == [torch.float32]
    assert result.dtype == torch.float16
    assert result.flatten().tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_a_function_that_breaks_its_promise_is_refused() -> None:
    pytest.importorskip("torch")
    with pytest.raises(ShapeMismatch):
        compute(Compute(lambda tensor: tensor[:1], (counting(2, 3),), (2, 3), "F32"))


@pytest.mark.parametrize("dtype", sorted(set(TORCH_NAME) - {"F4"}))
def test_every_dtype_of_torch_is_loaded_and_written_back(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    data = bytes([0, 1] * (nbytes(dtype, (4, 2)) // 2))
    ref = read_header(write_safetensors(tmp_path / "d.safetensors", {"w": (dtype, (4, 2), data)})).tensors["w"]
    tensor = load(ref)
    assert tensor.dtype == getattr(torch, TORCH_NAME[dtype])
    assert to_bytes(Permute(Permute(Read(ref), (1, 0)), (1, 0))) == data


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_small_floats_are_decoded_as_torch_decodes_them(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    width = BITS[dtype] // 8
    data = bytes(byte for high in range(256) for byte in [*([37] * (width - 1)), high])
    ours = scalars(Literal(data, dtype, (256,)))
    theirs = torch.frombuffer(bytearray(data), dtype=getattr(torch, TORCH_NAME[dtype])).to(torch.float64).tolist()
    assert [None if math.isnan(value) else value for value in ours] == [
        None if math.isnan(value) else value for value in theirs
    ]


def test_alphas_are_read_without_torch(tmp_path: Path) -> None:
    path = write_safetensors(
        tmp_path / "a.safetensors", {"a": scalar(4.0), "b": scalar(-2.0, "F16"), "c": scalar(8, "I64")}
    )
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from pathlib import Path; from hubtool.formats import open_file; from hubtool.tensors.evaluate import scalars\n"
        f"print([scalars(ref)[0] for ref in open_file(Path({str(path)!r})).tensors.values()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[4.0, -2.0, 8.0]"


def test_scalars_refuses_large_and_complex_tensors() -> None:
    with pytest.raises(ValueError, match="small"):
        scalars(TensorRef("w", "F32", (70_000,), Path("x"), 0, 280_000))
    with pytest.raises(ValueError, match="C64"):
        scalars(Literal(bytes(8), "C64", ()))


PACK = {"F64": "d", "F32": "f", "F16": "e"}


def inline(dtype: str, data: bytes) -> TensorRef:
    count = len(data) * 8 // BITS[dtype]
    return TensorRef("w", dtype, (count,), Path("x"), 0, len(data), inline=data)


@pytest.mark.parametrize("dtype", sorted(PACK))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_value_that_is_not_finite_is_found(dtype: str, bad: float) -> None:
    data = struct.pack(f"<9{PACK[dtype]}", 0.0, -1.5, 3e4, 6e-5, -0.0, 1e-7, bad, bad, 2.0)
    assert scan_values(inline(dtype, data)).nonfinite_at == 6


@pytest.mark.parametrize("dtype", sorted(PACK))
def test_finite_values_are_fine_and_large_ones_are_told(dtype: str) -> None:
    assert scan_values(inline(dtype, struct.pack(f"<3{PACK[dtype]}", 1.0, -32000.0, 0.1))) == ValueReport()
    large = 60000.0 if dtype == "F16" else 3e38
    assert scan_values(inline(dtype, struct.pack(f"<2{PACK[dtype]}", 1.0, -large))) == ValueReport(None, True)


@given(st.binary(max_size=64), st.sampled_from(sorted(FLOATS)))
@settings(max_examples=300)
def test_the_scan_agrees_with_decoding(data: bytes, dtype: str) -> None:
    data = data[: len(data) // (BITS[dtype] // 8) * (BITS[dtype] // 8)]
    decoded = scalars(Literal(data, dtype, (len(data) * 8 // BITS[dtype],)))
    first = next((i for i, value in enumerate(decoded) if not math.isfinite(value)), None)
    report = scan_values(inline(dtype, data))
    assert report.nonfinite_at == first
    if first is None and dtype in {"F16", "BF16", "F32"}:
        assert report.near_overflow == any(abs(value) >= 32768 for value in decoded)


def test_positions_count_across_chunks(tmp_path: Path) -> None:
    data = bytearray(10 << 20)
    data[9_000_000:9_000_002] = struct.pack("<e", math.nan)
    ref = read_header(write_safetensors(tmp_path / "a.safetensors", {"w": ("F16", (5 << 20,), bytes(data))})).tensors[
        "w"
    ]
    assert scan_values(ref) == ValueReport(4_500_000)


def test_integers_have_nothing_to_find() -> None:
    assert scan_values(inline("I64", b"\xff" * 16)) == ValueReport()
