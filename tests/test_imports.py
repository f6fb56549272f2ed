"""What importing costs: the light paths load none of the heavy packages, measured by module names, not by a clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hubtool
from tests.support.adapters import attention, make, write
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
sys.stderr.write("LOADED " + " ".join(sorted(sys.modules)))
"""


def loaded_after(*args: str) -> set[str]:
    """Packages that a command line has loaded when it is done."""
    return {name.split(".")[0] for name in modules_after(*args)}


def modules_after(*args: str) -> set[str]:
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


@pytest.mark.parametrize("layout", ["diffusers", "kohya/diffusers"])
def test_a_conversion_that_only_renames_needs_its_own_modules_alone(layout: str, tmp_path: Path) -> None:
    """What other conversions need (repair, promotion, fusing, positions, tokens, folders, torch files) and the parsers of tables stay away."""
    source = write(
        make("sdxl", attention("sdxl"), ranks=(1,), alphas=(2.0,), dtype="F16"), tmp_path / "a.safetensors", "kohya"
    )
    args = ["--library", str(tmp_path / "none.sqlite3"), "convert", str(source), "-o", str(tmp_path / "b.safetensors")]
    loaded = modules_after(*args, "--layout", layout)
    assert not {name.split(".")[0] for name in loaded} & (HEAVY | {"tomllib", "gzip"})
    unneeded = (
        "adapters.fusing", "adapters.promote", "adapters.token_embeddings", "formats.torch_zip", "layouts.identify", "layouts.placing",
        "layouts.positional", "layouts.repair", "ops.artefacts", "ops.checkpoints", "ops.promotion", "ops.repairing", "tensors.parallel",
    )  # fmt: skip
    assert not loaded & {f"hubtool.{name}" for name in unneeded}


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
