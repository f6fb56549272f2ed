"""convert takes what the library knows: an artifact's id, the start of its hash, or a path, alone or mixed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hubtool.actions.convert import Options, convert, plan
from hubtool.cli.main import cli
from hubtool.errors import FileMissing, NotFound
from hubtool.formats import open_file
from hubtool.layouts.parse import parse_file
from hubtool.ops.target import Target
from tests.support import adapters


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An own library that knows ``styles/a.safetensors``."""
    path = tmp_path / "library.sqlite3"
    monkeypatch.setenv("HUBTOOL_LIBRARY", str(path))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        made = adapters.make("sd1", ranks=(2,), dtype="F16", seed=100 * seed)
        adapters.write(made, tmp_path / name / f"{name}.safetensors", "kohya")
    assert CliRunner().invoke(cli, ["scan", str(tmp_path / "a")]).exit_code == 0
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(cli, ["convert", *map(str, words)])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_reference_gives_what_its_path_gives(tmp_path: Path) -> None:
    source = tmp_path / "a" / "a.safetensors"
    ref = sha256(source)[:12]
    done = run(ref, "-o", "ref.safetensors", "--layout", "diffusers", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["source"] == str(source)
    assert run(source, "-o", "path.safetensors", "--layout", "diffusers").exit_code == 0
    assert (tmp_path / "ref.safetensors").read_bytes() == (tmp_path / "path.safetensors").read_bytes()
    target = Target(layout="diffusers")
    assert list(plan(ref, target).tensors) == list(plan(source, target).tensors)
    shown = CliRunner().invoke(cli, ["show", "ref.safetensors", "--json"])
    assert '"convert"' in shown.stdout


def test_outputs_in_a_folder_are_called_as_the_files_that_references_name(tmp_path: Path) -> None:
    ref = sha256(tmp_path / "a" / "a.safetensors")
    done = run(ref, "b/b.safetensors", "--out-dir", "out", "--layout", "diffusers")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.safetensors", "b.safetensors"}


def test_a_reference_that_nobody_knows_fails_alone(tmp_path: Path) -> None:
    done = run("ffffffffffff", "b/b.safetensors", "--out-dir", "out", "--layout", "diffusers", "--json")
    assert done.exit_code == 3, done.output
    document = json.loads(done.stdout)
    assert [one["source"] for one in document["failed"]] == ["ffffffffffff"]
    assert [Path(one["source"]).name for one in document["converted"]] == ["b.safetensors"]


def test_a_path_that_is_there_goes_before_a_reference(tmp_path: Path) -> None:
    """A file may be called like the start of a hash."""
    ref = sha256(tmp_path / "a" / "a.safetensors")[:12]
    (tmp_path / "b" / "b.safetensors").rename(tmp_path / ref)
    assert plan(ref).source == Path(ref)


def test_a_path_that_is_not_there_is_told_as_before(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        convert(tmp_path / "none.safetensors", None, options=Options(dry_run=True))
    with pytest.raises((FileMissing, NotFound)):
        convert("none.safetensors", None, options=Options(dry_run=True))


def test_in_place_rewrites_the_file_that_a_reference_names(tmp_path: Path) -> None:
    """kohya's outside names are shorter in SGM's form, so that the header has room."""
    source = tmp_path / "c" / "c.safetensors"
    source.parent.mkdir()
    made = adapters.make("sdxl", [one for one in adapters.attention("sdxl") if one[0] == "unet"][:12], alphas=(1.0,))
    adapters.write(made, source, "kohya/diffusers")
    assert CliRunner().invoke(cli, ["scan", str(source.parent)]).exit_code == 0
    done = run(sha256(source)[:12], "--layout", "kohya/sgm", "--in-place")
    assert done.exit_code == 0, done.output
    assert str(parse_file(open_file(source)).layout) == "kohya/sgm"
