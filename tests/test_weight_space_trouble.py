"""What goes wrong with merge, extract, resize, collapse and strip: a clear error, and nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from hubtool.cli.main import cli  # noqa: E402
from tests.support import adapters  # noqa: E402
from tests.support.checkpoints import saved, single  # noqa: E402

# verb -> arguments; the output's name comes last
VERBS = {
    "merge checkpoints": ("merge", "a", "b", "--strength", "0.5"),
    "merge checkpoints, torch": ("merge", "a", "b", "--format", "torch-zip"),
    "merge folders": ("merge", "folder", "b", "--strength", "0.5"),
    "merge adapters": ("merge", "x", "y", "--rank", "3"),
    "merge adapters, torch": ("merge", "x", "y", "--format", "torch-zip"),
    "merge adapters by entries": ("merge", "x", "y", "--method", "dare-ties", "--rank", "3"),
    "extract": ("extract", "a", "b", "--rank", "2"),
    "resize": ("resize", "x", "--rank", "2"),
    "collapse": ("collapse", "a", "x"),
    "collapse, torch": ("collapse", "a", "x", "--format", "torch-zip"),
    "collapse into a folder": ("collapse", "folder", "x"),
    "strip": ("strip", "a", "--drop", "vae"),
    "strip and cast": ("strip", "a", "--dtype", "bf16"),
    "strip a folder": ("strip", "folder", "--drop", "vae"),
}


@pytest.fixture(autouse=True)
def own_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBTOOL_LIBRARY", str(tmp_path / "none.sqlite3"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints ``a`` and ``b``, the ``folder`` of a third, adapters ``x`` and ``y`` that fit them, all of a tiny SD1."""
    folder = tmp_path_factory.mktemp("models")
    start = load_file(single("sd1", folder))
    (folder / "sd1").rename(folder / "folder")
    torch.manual_seed(4)
    for name in "abc":
        other = {k: v + 0.05 * torch.randn(v.shape) if v.is_floating_point() else v for k, v in start.items()}
        save_file(other, folder / f"{name}.safetensors")
    for name, tuned in (("x", "b"), ("y", "c")):
        done = ask(folder, ("extract", "a", tuned, "--rank", "4", "--family", "sd1"), folder / f"{name}.safetensors")
        assert done.exit_code == 0, done.output
    return folder


def paths(folder: Path, arguments: tuple[str, ...]) -> list[str]:
    known = {"a", "b", "c", "x", "y", "bad", "other"}
    return [
        str(folder / (f"{one}.safetensors" if one in known else one)) if one in {*known, "folder"} else one
        for one in arguments
    ]


def ask(folder: Path, arguments: tuple[str, ...], out: Path) -> Any:
    return CliRunner().invoke(cli, [*paths(folder, arguments), "-o", str(out)])


def output_of(verb: str) -> str:
    if "folder" in verb:
        return "out"
    return "out.ckpt" if "torch" in verb else "out.safetensors"


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may become larger: to the writer this is a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failed(found: Any, *said: str, code: int = 1) -> None:
    assert isinstance(found.exception, SystemExit), repr(found.exception)
    assert found.exit_code == code, found.output
    assert found.stderr.count("error:") == 1
    assert "Traceback" not in found.output
    for text in said:
        assert text in found.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_said_and_leaves_nothing(models: Path, tmp_path: Path, verb: str) -> None:
    with small_files(20_000):
        found = ask(models, VERBS[verb], tmp_path / output_of(verb))
    failed(found, "cannot write")
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, signal, sys
from hubtool.tensors import atomic
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
atomic.publish = atomic._publish_folder = die
from hubtool.cli.main import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["merge folders", "merge adapters, torch", "extract", "resize", "collapse", "strip"])
def test_kill_9_leaves_no_output_and_the_next_run_clears_what_lies_there(
    models: Path, tmp_path: Path, verb: str
) -> None:
    """Killed at the last moment, when everything is written and nothing has its name."""
    out = tmp_path / output_of(verb)
    command = [sys.executable, "-c", _KILLED, *paths(models, VERBS[verb]), "-o", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert all(path.name.endswith(".hubtool-part") for path in tmp_path.iterdir())
    assert ask(models, VERBS[verb], out).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def poisoned(models: Path, folder: Path, name: str) -> Path:
    """The model with one NaN in the first weight of an attention."""
    tensors = load_file(models / f"{name}.safetensors")
    key = next(key for key in tensors if "attn1" in key and "to_q" in key and tensors[key].ndim == 2)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, folder / "bad.safetensors")
    return folder


def beside(models: Path, folder: Path) -> None:
    for path in models.iterdir():
        (folder / path.name).symlink_to(path)


def refused(
    models: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path, str], Path],
    bad: str,
    arguments: tuple[str, ...],
    *words: str,
) -> None:
    """What ``spoil`` did to the input ``bad`` is refused in these words, and nothing is written."""
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    outputs.mkdir()
    beside(models, spoil(models, inputs, bad))
    failed(ask(inputs, arguments, outputs / "out.safetensors"), *words)
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (("merge", "a", "bad"), "b"),
        (("merge", "a", "bad", "--format", "torch-zip"), "b"),
        (("merge", "x", "bad"), "y"),
        (("merge", "x", "bad", "--rank", "2"), "y"),
        (("extract", "a", "bad", "--rank", "2"), "b"),
        (("resize", "bad", "--rank", "2"), "x"),
        (("collapse", "a", "bad"), "x"),
        (("collapse", "bad", "x"), "a"),
    ],
    ids=" ".join,
)
def test_nan_is_refused_with_the_tensors_name_and_leaves_nothing(
    models: Path, tmp_path: Path, arguments: tuple[str, ...], bad: str
) -> None:
    refused(models, tmp_path, poisoned, bad, arguments, "to_q", "NaN")


def test_strip_counts_nan_and_keeps_it(models: Path, tmp_path: Path) -> None:
    """Stripping changes no number: what was broken is told, not hidden."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    found = ask(poisoned(models, inputs, "a"), ("strip", "bad", "--dtype", "bf16"), tmp_path / "out.safetensors")
    assert found.exit_code == 0, found.output
    assert "1 not finite before" in found.output


def narrower(models: Path, folder: Path, name: str) -> Path:
    tensors = load_file(models / f"{name}.safetensors")
    key = next(key for key in tensors if "attn1" in key and "to_q" in key and tensors[key].ndim == 2)
    rows = len(tensors[key]) - 1
    tensors[key] = tensors[key][:rows].clone()
    save_file(tensors, folder / "bad.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (("merge", "a", "bad"), "b"),
        (("extract", "a", "bad", "--rank", "2"), "b"),
        (("collapse", "bad", "x"), "a"),
    ],
    ids=" ".join,
)
def test_another_shape_names_the_module_and_both_shapes(
    models: Path, tmp_path: Path, arguments: tuple[str, ...], bad: str
) -> None:
    refused(models, tmp_path, narrower, bad, arguments, "to_q", "15")


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "x", "other"),
        ("collapse", "a", "other"),
        ("merge", "a", "folder"),
        ("extract", "a", "folder", "--rank", "2"),
        ("collapse", "folder", "x"),
    ],
    ids=" ".join,
)
def test_families_that_differ_are_refused_by_name(models: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    outputs.mkdir()
    saved("sdxl", inputs).rename(inputs / "folder")
    adapters.write(adapters.make("sdxl", ranks=(2,)), inputs / "other.safetensors", "kohya")
    adapters.write(adapters.make("sd1", ranks=(2,)), inputs / "x.safetensors", "kohya")
    (inputs / "a.safetensors").symlink_to(models / "a.safetensors")
    found = ask(inputs, arguments, outputs / "out.safetensors")
    failed(found, "sdxl", "sd1")
    assert list(outputs.iterdir()) == []
