"""Where a recipe's inputs are found, and what intermediate results are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner  # noqa: E402

from hubtool.cli.main import cli  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from tests.support import adapters  # noqa: E402

_YAML = """
version: 1
operation: merge
inputs:
  - {path: x.safetensors, strength: 0.8}
  - {strength: 0.5, recipe: {version: 1, operation: resize, inputs: [{path: y.safetensors}], parameters: {rank: 2}}}
  - {strength: 0.5, recipe: {version: 1, operation: resize, inputs: [{path: y.safetensors}], parameters: {rank: 1}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two adapters and a recipe of them."""
    monkeypatch.setenv("HUBTOOL_LIBRARY", str(tmp_path / "none.sqlite3"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("xy"):
        adapters.write(adapters.make("sd1", ranks=(4,), seed=9 * seed), tmp_path / f"{name}.safetensors", "kohya")
    (tmp_path / "mix.yaml").write_text(_YAML)
    return tmp_path


def ask(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


def test_inputs_in_the_current_folder_are_found_for_an_output_in_another(folder: Path) -> None:
    done = ask("merge", "x.safetensors", "y.safetensors", "-o", "out/mixed.safetensors")
    assert done.exit_code == 0, done.output
    again = ask("recipe", "check", "out/mixed.safetensors")
    assert again.exit_code == 0, again.output
    assert "the same bytes" in again.output


def test_a_file_of_the_name_with_other_bytes_is_not_taken_for_the_input(folder: Path) -> None:
    assert ask("merge", "x.safetensors", "y.safetensors", "-o", "out/mixed.safetensors").exit_code == 0
    (folder / "x.safetensors").write_bytes((folder / "y.safetensors").read_bytes())
    found = ask("recipe", "run", "out/mixed.safetensors", "-o", "again.safetensors")
    assert found.exit_code == 1
    assert "x.safetensors" in found.stderr
    assert "--search FOLDER" in found.stderr
    assert not (folder / "again.safetensors").exists()


def test_intermediate_results_are_called_by_what_they_were_made_of(folder: Path) -> None:
    done = ask("merge", "--recipe", "mix.yaml", "-o", "mixed.safetensors")
    assert done.exit_code == 0, done.output
    assert "resize-of-y.safetensors" in done.output
    assert ".hubtool-steps-" not in done.output
    metadata = open_file(folder / "mixed.safetensors").metadata
    assert metadata["modelspec.merged_from"].startswith("x.safetensors, resize-of-y.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == [
        "mix.yaml",
        "mixed.safetensors",
        "x.safetensors",
        "y.safetensors",
    ]


def test_a_recipe_with_steps_repeats_to_the_byte(folder: Path) -> None:
    assert ask("merge", "--recipe", "mix.yaml", "-o", "mixed.safetensors").exit_code == 0
    assert ask("recipe", "check", "mixed.safetensors").exit_code == 0
