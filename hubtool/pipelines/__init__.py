"""diffusers: load adapters into a live pipeline, take them out again, save what was trained."""

from __future__ import annotations

from hubtool.pipelines.loading import load, unload
from hubtool.pipelines.report import LoadReport
from hubtool.pipelines.saving import adapter_of, save

__all__ = ["LoadReport", "adapter_of", "load", "save", "unload"]
