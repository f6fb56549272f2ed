"""``hubtool compare``: the same sheets as generate's grids, asked for by their own word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hubtool.cli.main import cli
from hubtool.pipelines import pictures
from tests.support import adapters, checkpoints, tiny

ASKED = ("-p", "a cat", "--steps", "2", "--size", "64x64", "--device", "cpu", "--seed", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.saved("sd1", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.make(tiny.build("sd1"), ["unet"], only="attn", family="sd1")
    return adapters.write(made.adapter, tmp_path_factory.mktemp("style") / "style.safetensors", "kohya/diffusers")


def run(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.mark.parametrize(
    ("more", "grid"),
    [(("--strengths", "0,1"), "strengths=0,1"), ((), "adapters")],
    ids=["strengths", "adapters"],
)
def test_a_comparison_is_the_grid_that_generate_makes(
    base: Path, style: Path, tmp_path: Path, more: tuple[str, ...], grid: str
) -> None:
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    assert run("compare", base, style, *ASKED, *more, "-o", one).exit_code == 0
    assert run("generate", base, style, *ASKED, "--grid", grid, "-o", other).exit_code == 0
    assert one.read_bytes() == other.read_bytes()
    assert pictures.read(one).grid == pictures.read(other).grid


def test_without_an_adapter_there_is_nothing_to_compare(base: Path, tmp_path: Path) -> None:
    found = run("compare", base, *ASKED, "-o", tmp_path / "out.png")
    assert found.exit_code == 2
    assert "nothing to compare" in found.stderr
    assert list(tmp_path.iterdir()) == []
