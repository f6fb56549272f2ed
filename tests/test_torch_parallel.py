"""Torch files whose tensors are computed: several threads write them, and nobody can tell how many."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hubtool.errors import BadValues  # noqa: E402
from hubtool.formats.torch_writer import write_torch_zip  # noqa: E402
from hubtool.ops.methods import find  # noqa: E402
from hubtool.tensors.expr import Compute, Expr, Item, Joint, Literal  # noqa: E402


def literal(tensor: Any) -> Literal:
    return Literal(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()), "F32", tuple(tensor.shape))


def halved(tensor: Any) -> Any:
    return tensor / 2


def poisoned(tensor: Any) -> Any:
    return tensor * float("nan")


poisoned.finite = True  # type: ignore[attr-defined]


def sample(count: int) -> tuple[dict[str, Any], dict[str, Expr]]:
    """Values, and expressions that half of them are computed by."""
    torch.manual_seed(count)
    values = {f"w{i}": torch.randn(3 + i % 5, 7) for i in range(count)}
    tensors: dict[str, Expr] = {}
    for i, (key, value) in enumerate(values.items()):
        own = literal(value)
        tensors[key] = own if i % 2 else Compute(halved, (own,), own.shape, "F32")
    return {key: value if i % 2 else value / 2 for i, (key, value) in enumerate(values.items())}, tensors


def test_torch_reads_computed_and_copied_tensors_side_by_side(tmp_path: Path) -> None:
    values, tensors = sample(40)
    path = tmp_path / "a.ckpt"
    assert write_torch_zip(path, {"state_dict": tensors, "step": 3}) == path.stat().st_size
    loaded = torch.load(path, weights_only=True)
    assert loaded["step"] == 3
    assert list(loaded["state_dict"]) == list(values)
    assert all(torch.equal(loaded["state_dict"][key], value) for key, value in values.items())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_bytes_depend_on_no_number_of_workers(tmp_path: Path, workers: int) -> None:
    _, tensors = sample(31)
    write_torch_zip(tmp_path / "one.pt", tensors, workers=3)
    write_torch_zip(tmp_path / "other.pt", tensors, workers=workers)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


def test_computed_tensors_give_the_file_that_their_values_give(tmp_path: Path) -> None:
    """One way of writing takes the checksums on the way, the other afterwards: the archive is the same."""
    values, tensors = sample(9)
    write_torch_zip(tmp_path / "computed.pt", tensors)
    write_torch_zip(tmp_path / "copied.pt", {key: literal(value) for key, value in values.items()})
    assert (tmp_path / "computed.pt").read_bytes() == (tmp_path / "copied.pt").read_bytes()


def test_a_computation_that_two_tensors_share_is_done_once(tmp_path: Path) -> None:
    calls = []

    def both(tensor: Any) -> tuple[Any, Any]:
        calls.append(1)
        return tensor + 1, tensor - 1

    joint = Joint(both, (literal(torch.ones(2, 3)),), (((2, 3), "F32"), ((2, 3), "F32")))
    write_torch_zip(tmp_path / "a.pt", {"up": Item(joint, 0), "down": Item(joint, 1)})
    assert len(calls) == 1
    assert torch.load(tmp_path / "a.pt", weights_only=True)["down"].abs().max() == 0


def test_a_bad_number_names_the_tensors_key_and_leaves_nothing(tmp_path: Path) -> None:
    bad = Compute(poisoned, (literal(torch.ones(4)),), (4,), "F32")
    with pytest.raises(BadValues, match=r"block\.weight"):
        write_torch_zip(tmp_path / "a.pt", {"fine": literal(torch.ones(2)), "block.weight": bad})
    assert list(tmp_path.iterdir()) == []


def test_every_byte_of_the_tensors_is_reported(tmp_path: Path) -> None:
    values, tensors = sample(12)
    for name, tree in (("computed", tensors), ("copied", {key: literal(value) for key, value in values.items()})):
        told: list[int] = []
        write_torch_zip(tmp_path / f"{name}.pt", tree, progress=told.append)
        assert sum(told) >= sum(value.numel() * 4 for value in values.values())


def test_a_tensor_larger_than_a_tile_is_never_held_whole(tmp_path: Path) -> None:
    """Tiles of 256k elements; what a worker holds does not grow with the tensor."""
    largest = []

    def counted(*tensors: Any, **given: Any) -> Any:
        largest.append(max(tensor.numel() for tensor in tensors))
        return kernel(*tensors, **given)

    method = find("weighted_sum")
    kernel: Any = method.kernel
    for name in ("elementwise", "rowwise", "survey", "positional", "finite"):
        setattr(counted, name, getattr(kernel, name, None))
    whole = torch.randn(700, 1024)
    made = method.expr([literal(whole), literal(-whole)], weights=(0.5, 0.5), dtype="F32")
    assert isinstance(made, Compute)
    write_torch_zip(tmp_path / "a.pt", {"w": Compute(counted, made.sources, made.shape, made.dtype, made.params)})
    assert largest
    assert max(largest) <= 1 << 18
    assert torch.load(tmp_path / "a.pt", weights_only=True)["w"].abs().max() == 0
