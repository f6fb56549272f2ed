"""Show the versions of hubtool and of what it stands on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import click

from hubtool.cli.context import json_option
from hubtool.cli.output import print_json, show, table
from hubtool.version import __version__

PACKAGES = (
    "click", "sqlalchemy", "alembic", "rich", "torch", "numpy", "safetensors",
    "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "blake3",
)  # fmt: skip


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show the versions of hubtool, Python and the packages hubtool can use."""
    packages = {name: installed(name) for name in PACKAGES}
    if as_json:
        print_json({"hubtool": __version__, "python": platform.python_version(), "packages": packages})
        return
    rows = [("hubtool", __version__), ("python", platform.python_version())]
    show(table([*rows, *((name, found or "not installed") for name, found in packages.items())]))


def installed(package: str) -> str | None:
    """The installed version of ``package``, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
