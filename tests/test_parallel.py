"""The parallel writer gives the same bytes for any number of workers, computes in tiles and jointly, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")


torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from hubtool.errors import BadValues, CorruptFile, FileError, ShapeMismatch, WouldOverwrite  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.tensors import parallel, tiles  # noqa: E402
from hubtool.tensors.evaluate import compute  # noqa: E402
from hubtool.tensors.expr import Compute, Concat, Expr, Item, Joint, Literal, Permute, Read, Reshape, Rows  # noqa: E402
from hubtool.tensors.parallel import write_safetensors_parallel  # noqa: E402
from hubtool.tensors.writer import sweep_parts, write_safetensors  # noqa: E402


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def tiled_sum(first: torch.Tensor, second: torch.Tensor, *, factor: float) -> torch.Tensor:
    SEEN.append(tuple(first.shape))
    return first + factor * second


tiled_sum.elementwise = True  # type: ignore[attr-defined]
tiled_sum.finite = True  # type: ignore[attr-defined]
SEEN: list[tuple[int, ...]] = []


def centred(tensor: torch.Tensor, *, start: int) -> torch.Tensor:
    return tensor - tensor.mean(dim=1, keepdim=True) + start


centred.rowwise = True  # type: ignore[attr-defined]
centred.positional = True  # type: ignore[attr-defined]


def scaled_to_one(tensor: torch.Tensor, *, state: float) -> torch.Tensor:
    return tensor / state


def total(tiles: Callable[[], Iterator[tuple[torch.Tensor, ...]]]) -> float:
    return sum(float(tile.double().sum()) for (tile,) in tiles()) + 0 * sum(1 for _ in tiles())


scaled_to_one.elementwise = True  # type: ignore[attr-defined]
scaled_to_one.survey = total  # type: ignore[attr-defined]


class Halves:
    """Two outputs of one computation, counting how often it runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.runs += 1
        half = tensor.shape[0] // 2
        return tensor[:half], tensor[half:]


@pytest.fixture
def source(tmp_path: Path) -> Mapping[str, Read]:
    torch.manual_seed(1)
    sizes = {"a": (40, 30), "b": (40, 30), "c": (7,), "d": (64, 3, 3, 3), "e": (1,)}
    tensors = {key: torch.randn(shape).half() for key, shape in sizes.items()}
    save_file(tensors | {"n": torch.tensor([[1, 2], [3, 4]])}, tmp_path / "in.safetensors")
    return {key: Read(ref) for key, ref in open_file(tmp_path / "in.safetensors").tensors.items()}


def mixed(source: Mapping[str, Read]) -> dict[str, Expr]:
    """Copies, tiles, whole tensors, joint results and shapes made of them, in a mixed order."""
    a, b, d = source["a"], source["b"], source["d"]
    joint = Joint(Halves(), (a,), (((20, 30), "F16"), ((20, 30), "F32")))
    return {
        "copy.n": source["n"],
        "sum": Compute(tiled_sum, (a, b), a.shape, "F16", (("factor", 0.3),)),
        "copy.c": source["c"],
        "lower": Item(joint, 1),
        "copy.d": d,
        "double": Compute(double, (d,), d.shape, "BF16"),
        "turned": Permute(a, (1, 0)),
        "upper": Reshape(Item(joint, 0), (600,)),
        "rows": Compute(centred, (b,), b.shape, "F32"),
        "norm": Compute(scaled_to_one, (d,), d.shape, "F32"),
        "turned sum": Compute(tiled_sum, (Permute(a, (1, 0)), Permute(b, (1, 0))), (30, 40), "F16", (("factor", 2.0),)),
        "few": Rows(Concat((a, b)), 30, 50),
        "literal": Literal(b"\0\1\2\3", "U8", (4,)),
        "copy.e": source["e"],
        "empty": Compute(double, (Rows(a, 3, 3),), (0, 30), "F32"),
    }


def written(path: Path, tensors: Mapping[str, Expr], **options: Any) -> bytes:
    write_safetensors_parallel(path, tensors, {"format": "pt"}, force=True, **options)
    return path.read_bytes()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 100)


@pytest.mark.usefixtures("small_tiles")
def test_the_bytes_are_those_of_the_sequential_writer_for_any_number_of_workers(
    source: Mapping[str, Read], tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "one", mixed(source), {"format": "pt"})
    expected = load_file(tmp_path / "one")
    files = {workers: written(tmp_path / "many", mixed(source), workers=workers) for workers in (1, 2, 5, 64)}
    assert len(set(files.values())) == 1
    found = load_file(tmp_path / "many")
    assert list(found) == list(expected)
    for key, tensor in found.items():
        if key not in ("norm", "rows"):  # the sum of one is added up tile by tile, the other says where its tiles begin
            assert torch.equal(tensor, expected[key]), key
    assert torch.allclose(found["norm"], expected["norm"], rtol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_an_elementwise_function_never_sees_a_whole_tensor(source: Mapping[str, Read], tmp_path: Path) -> None:
    SEEN.clear()
    expr = Compute(tiled_sum, (source["a"], source["b"]), (40, 30), "F32", (("factor", 0.5),))
    written(tmp_path / "out", {"x": expr}, workers=1)
    assert set(SEEN) == {(100,)}
    assert len(SEEN) == 12


@pytest.mark.usefixtures("small_tiles")
def test_a_rowwise_function_gets_whole_rows_and_where_they_begin(source: Mapping[str, Read], tmp_path: Path) -> None:
    written(tmp_path / "out", {"x": Compute(centred, (source["b"],), (40, 30), "F32")})
    b = compute(source["b"]).float()
    starts = torch.arange(40).div(3, rounding_mode="floor")[:, None] * 90
    assert torch.allclose(load_file(tmp_path / "out")["x"], b - b.mean(dim=1, keepdim=True) + starts)


def test_a_joint_computation_runs_once_however_its_results_are_used(source: Mapping[str, Read], tmp_path: Path) -> None:
    halves, other = Halves(), Halves()
    joint = Joint(halves, (source["a"],), (((20, 30), "F16"), ((20, 30), "F16")))
    second = Joint(other, (source["b"],), (((20, 30), "F16"), ((20, 30), "F16")))
    both = Concat((Item(joint, 1), Item(second, 0)))
    written(tmp_path / "out", {"x": Item(joint, 0), "other": Item(second, 1), "y": both, "z": Item(joint, 0)})
    assert (halves.runs, other.runs) == (1, 1)
    assert torch.equal(load_file(tmp_path / "out")["y"][:20], compute(source["a"])[20:])


def test_a_joint_that_returns_too_few_tensors_is_named(source: Mapping[str, Read]) -> None:
    joint = Joint(Halves(), (source["a"],), (((20, 30), "F16"),) * 3)
    with pytest.raises(ShapeMismatch, match="promised 3 tensors and returned 2"):
        compute(Item(joint, 2))


def test_bad_values_name_the_output_the_input_and_its_file(tmp_path: Path) -> None:
    good, bad = torch.zeros(20, 20), torch.zeros(20, 20)
    bad[3, 4] = float("nan")
    save_file({"good": good, "bad": bad}, tmp_path / "in.safetensors")
    refs = open_file(tmp_path / "in.safetensors").tensors
    expr = Compute(tiled_sum, (Read(refs["good"]), Read(refs["bad"])), (20, 20), "F32", (("factor", 1.0),))
    with pytest.raises(BadValues, match=r"out\.weight: bad holds NaN or infinity") as caught:
        written(tmp_path / "out", {"out.weight": expr})
    assert caught.value.path == str(tmp_path / "in.safetensors")
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_an_overflow_in_the_dtype_of_the_output_is_refused(source: Mapping[str, Read], tmp_path: Path) -> None:
    expr = Compute(tiled_sum, (source["a"], source["b"]), (40, 30), "F16", (("factor", 1e6),))
    with pytest.raises(BadValues, match="overflow F16"):
        written(tmp_path / "out", {"x": expr})


def test_one_failure_stops_every_worker_and_leaves_nothing(source: Mapping[str, Read], tmp_path: Path) -> None:
    def fails(tensor: torch.Tensor) -> torch.Tensor:
        raise ShapeMismatch("on purpose")

    tensors = mixed(source) | {"bad": Compute(fails, (source["d"],), source["d"].shape, "F32")}
    with pytest.raises(ShapeMismatch, match="on purpose"):
        written(tmp_path / "out", tensors, workers=3)
    assert os.listdir(tmp_path) == ["in.safetensors"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hubtool")]


def test_a_full_disk_is_a_clear_error(
    source: Mapping[str, Read], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FileError, match="disk is full"):
        write_safetensors_parallel(tmp_path / "out", mixed(source))
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_an_existing_output_is_kept_without_force(source: Mapping[str, Read], tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        write_safetensors_parallel(tmp_path / "out", mixed(source))
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_an_input_that_changes_meanwhile_is_noticed(source: Mapping[str, Read], tmp_path: Path) -> None:
    def touches(tensor: torch.Tensor) -> torch.Tensor:
        os.utime(tmp_path / "in.safetensors", (1, 1))
        return tensor

    with pytest.raises(CorruptFile, match="changed"):
        written(tmp_path / "out", {"x": Compute(touches, (source["a"],), (40, 30), "F32")})
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_progress_counts_every_byte_of_the_data(source: Mapping[str, Read], tmp_path: Path) -> None:
    counted: list[int] = []
    data = written(tmp_path / "out", mixed(source), workers=3, progress=counted.append)
    assert sum(counted) == len(data) - 8 - int.from_bytes(data[:8], "little")


def test_large_computations_do_not_run_beside_each_other(
    source: Mapping[str, Read], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_MEMORY", 1)
    running: list[int] = []
    most: list[int] = []

    def slow(tensor: torch.Tensor) -> torch.Tensor:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        return tensor

    written(tmp_path / "out", {str(i): Compute(slow, (source["a"],), (40, 30), "F32") for i in range(6)}, workers=4)
    assert set(most) == {1}


def test_torch_has_as_many_threads_afterwards_as_before(source: Mapping[str, Read], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        written(tmp_path / "out", mixed(source))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_header_may_be_completed_when_the_tensors_are_written(source: Mapping[str, Read], tmp_path: Path) -> None:
    tensors = mixed(source)
    write_safetensors_parallel(
        tmp_path / "out", tensors, {"hash": "?" * 8}, late=lambda header: header.replace(b"????????", b"12345678")
    )
    write_safetensors_parallel(tmp_path / "known", tensors, {"hash": "12345678"})
    assert (tmp_path / "out").read_bytes() == (tmp_path / "known").read_bytes()


def test_a_completed_header_keeps_its_length(source: Mapping[str, Read], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="could not be completed"):
        write_safetensors_parallel(tmp_path / "out", mixed(source), late=lambda header: header + b" ")
    assert os.listdir(tmp_path) == ["in.safetensors"]


SLEEPER = """
import sys, time
from pathlib import Path
from hubtool.formats import open_file
from hubtool.tensors.expr import Compute, Read
from hubtool.tensors.parallel import write_safetensors_parallel
def slow(tensor):
    print("computing", flush=True)
    time.sleep(60)
    return tensor
folder = Path(sys.argv[1])
refs = open_file(folder / "in.safetensors").tensors
write_safetensors_parallel(folder / "out", {k: Compute(slow, (Read(r),), r.shape, "F32") for k, r in refs.items() if k != "n"})
"""


def test_a_killed_writer_leaves_only_a_part_that_is_swept(source: Mapping[str, Read], tmp_path: Path) -> None:
    assert source
    with subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert len(sweep_parts(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["in.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("small_tiles")
def test_every_float_dtype_goes_in_and_out_of_tiles(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(31, 9).to(dtype), "b": torch.randn(31, 9).to(dtype)}
    save_file(tensors, tmp_path / "in.safetensors")
    refs = open_file(tmp_path / "in.safetensors").tensors
    expr = Compute(tiled_sum, (Read(refs["a"]), Read(refs["b"])), (31, 9), refs["a"].dtype, (("factor", 0.5),))
    written(tmp_path / "out", {"x": expr})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (tensors["a"].to(wide) + 0.5 * tensors["b"].to(wide)).to(dtype)
    found = load_file(tmp_path / "out")["x"]
    assert found.dtype == dtype
    assert torch.equal(found.double(), expected.double())
