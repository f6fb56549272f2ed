"""What importing costs: the light paths load none of the heavy packages, measured by module names, not by a clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hubtool
from tests.support.files import write_safetensors

HEAVY = {
    "torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "sqlalchemy", "alembic", "huggingface_hub",
    "rich", "PIL", "blake3", "safetensors", "jsonschema",
}  # fmt: skip
_PROBE = """
import sys
from hubtool.cli.main import cli
try:
    cli.main({args!r}, prog_name="hubtool")
except SystemExit as end:
    sys.stderr.write("exit %s\\n" % end.code)
sys.stderr.write("LOADED " + " ".join(sorted({{name.split(".")[0] for name in sys.modules}})))
"""


def loaded_after(*args: str) -> set[str]:
    code = _PROBE.format(args=list(args))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "exit 0" in ended.stderr, ended.stderr
    return set(ended.stderr.rpartition("LOADED ")[2].split())


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["version"], ["config", "path"], ["completion", "bash"]])
def test_start_up_loads_nothing_heavy(args: list[str]) -> None:
    assert not loaded_after(*args) & HEAVY


@pytest.mark.parametrize("command", ["inspect", "explain"])
def test_looking_at_a_file_needs_no_torch_and_no_numpy(command: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": ("F32", (2,), bytes(8))})
    assert not loaded_after(command, str(path)) & (
        HEAVY - {"blake3"}
    )  # blake3 is one of the hashes, where it is installed


def test_import_hubtool_loads_nothing_heavy() -> None:
    code = "import sys, hubtool; print(' '.join(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in ended.stdout.split()} & (HEAVY | {"click"})


def test_every_public_name_can_be_loaded() -> None:
    for name in hubtool.__all__:
        assert getattr(hubtool, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hubtool.nonsense  # noqa: B018


def test_dir_lists_the_public_names() -> None:
    assert dir(hubtool) == sorted(hubtool.__all__)
