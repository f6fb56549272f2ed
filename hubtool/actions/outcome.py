"""How verbs that write one file of another begin and end: one set of options, one wording for losses, lineage recorded in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.actions.where import library_exists
from hubtool.errors import LossyConversion, RegistryError, UsageProblem, WouldOverwrite
from hubtool.ops.plan import Plan
from hubtool.tensors.writer import same_file


@dataclass(frozen=True, slots=True)
class Options:
    """How an output is written. ``allow_loss``: even what its layout cannot hold in full; ``library``: where lineage is recorded (a path or
    URL, None for the default); ``device``, ``workers``: where and by how many threads tensors are computed."""

    allow_loss: bool = False
    force: bool = False
    dry_run: bool = False
    library: str | None = None
    device: str = "cpu"
    workers: int | None = None


def check_output(output: Path, inputs: Iterable[Path], *, replace: bool) -> None:
    """What can be known before a minute of work: raise ``UsageProblem`` for an output that is an input, ``WouldOverwrite`` for one that exists."""
    if any(same_file(output, path) for path in inputs):
        raise UsageProblem("the output is an input", path=output, hint="choose another name")
    if os.path.lexists(output) and not replace:
        raise WouldOverwrite("the output already exists", path=output, hint="choose another name, or add --force")


def lossy(plan: Plan, path: Path | None = None) -> LossyConversion:
    """The refusal of a plan whose layout cannot hold everything."""
    first = plan.losses[0]
    more = f" (and {len(plan.losses) - 1} more)" if len(plan.losses) > 1 else ""
    text = f"layout {plan.layout} has no place for {first.what}: {first.reason}{more}"
    return LossyConversion(text, path=path, hint="choose another --layout, or accept it with --allow-loss")


def recorded(
    library: str | None, output: Path, inputs: Sequence[Path], operation: str, parameters: Mapping[str, Any]
) -> str | None:
    """Record lineage when an input is in the library; a warning where that failed.

    The output stands whatever happens here, so a busy library is only told about.
    """
    if not library_exists(library):
        return None
    from hubtool.actions.lineage import record_conversion

    try:
        record_conversion(library, output, list(inputs), operation, dict(parameters))
    except RegistryError as error:
        return f"lineage was not recorded: {error.message}"
    return None
