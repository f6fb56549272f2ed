"""The base of a training: its family must fit the method, before weights are downloaded or loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hubtool.errors import UsageProblem
from hubtool.pipelines import base_families, opening


def need_packages() -> None:
    """Raise ``MissingExtra`` unless everything that training imports is installed."""
    opening.need_packages("training", "train")


def check(base: str, families: Collection[str], method: str) -> str | None:
    """The family of ``base``, None where several are possible.

    Raises ``LoadMismatch`` for a base that ``method`` does not fit, ``UsageProblem`` without one, and what telling its family raises.
    """
    if not base:
        raise UsageProblem("no base is named", hint="--base FOLDER, REPOSITORY or FILE")
    found = base_families.check(base, families, method)
    return found[0] if len(found) == 1 else None


def opened(base: str, families: Collection[str], method: str, dtype: Any, config_from: str = "") -> Any:
    """The pipeline of ``base`` with its weights in ``dtype``. Raises what ``check`` and ``pipelines.opening.opened`` raise."""
    check(base, families, method)
    return opening.opened(base, dtype, config_from=config_from or None)
