"""The wheel works on its own: built, installed into a bare environment, used far from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from hubtool import __version__
from tests.support.files import floats, write_safetensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHECKOUT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # The checkout must not help: no PYTHONPATH, and another working directory.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, CHECKOUT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The ``hubtool`` script of a bare environment that holds only the core dependencies."""
    environment = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    constraints = CHECKOUT / "constraints.txt"
    got = run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=wheel.parent)
    if got.returncode != 0 and "No matching distribution" in got.stderr:
        pytest.skip("no package index can be reached")
    assert got.returncode == 0, got.stderr
    return environment / "bin" / "hubtool"


def test_the_wheel_holds_tables_schemas_and_migrations(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("schemas", "_schemas"), ("migrations", "_migrations")):
        files = {
            f"hubtool/{inside}/{path.relative_to(CHECKOUT / folder).as_posix()}"
            for path in (CHECKOUT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert files
        assert files <= names
    assert "hubtool/py.typed" in names
    assert not [name for name in names if name.startswith(("schemas/", "migrations/", "tests/"))]


def test_the_versions_agree() -> None:
    assert tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]["version"] == __version__


def test_scan_list_and_inspect_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    library = str(tmp_path / "library.sqlite3")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{key}.lora_down.weight": floats(4, 320),
        f"{key}.lora_up.weight": floats(320, 4),
        f"{key}.alpha": floats(),
    }
    path = write_safetensors(tmp_path / "files" / "a.safetensors", tensors)

    def hubtool(*args: str | Path) -> str:
        ended = run(installed, *args, cwd=tmp_path, HUBTOOL_LIBRARY=library)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    hubtool("db", "upgrade")
    hubtool("scan", path.parent)
    (row,) = json.loads(hubtool("ls", "--json"))
    assert row["kind"] == "lora"
    assert json.loads(hubtool("inspect", path, "--json"))["ranks"] == [4]
    assert json.loads(hubtool("version", "--json"))["packages"]["torch"] is None
