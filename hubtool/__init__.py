"""hubtool: knows what an adapter file is, converts it without losing a number, and hands it to diffusers or to the Hub.

The names below are the public Python API. They are loaded on first use (PEP 562): ``import hubtool`` imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hubtool.version import __version__

if TYPE_CHECKING:
    from hubtool.actions.convert import convert
    from hubtool.actions.distill import distill
    from hubtool.actions.generate import generate, pipeline
    from hubtool.actions.hub import Hub
    from hubtool.actions.inspect import inspect
    from hubtool.actions.load import load, save, unload
    from hubtool.actions.pipeline_export import export
    from hubtool.actions.scan import scan
    from hubtool.formats import open_file

__all__ = [
    "Hub",
    "__version__",
    "convert",
    "distill",
    "export",
    "generate",
    "inspect",
    "load",
    "open_file",
    "pipeline",
    "save",
    "scan",
    "unload",
]

_HOMES = {
    "Hub": "hubtool.actions.hub",
    "convert": "hubtool.actions.convert",
    "distill": "hubtool.actions.distill",
    "export": "hubtool.actions.pipeline_export",
    "generate": "hubtool.actions.generate",
    "inspect": "hubtool.actions.inspect",
    "load": "hubtool.actions.load",
    "open_file": "hubtool.formats",
    "pipeline": "hubtool.actions.generate",
    "save": "hubtool.actions.load",
    "scan": "hubtool.actions.scan",
    "unload": "hubtool.actions.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
