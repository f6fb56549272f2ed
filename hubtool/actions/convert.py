"""convert: one file into another container, layout, algorithm, encoding or dtype; lineage goes into the library when the source is in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hubtool.actions.outcome import recorded
from hubtool.actions.refs import locate
from hubtool.actions.where import library_exists
from hubtool.errors import LossyConversion, UsageProblem
from hubtool.formats import TensorFile, open_file
from hubtool.ops import convert as ops
from hubtool.ops.execute import execute, execute_in_place
from hubtool.ops.plan import Plan
from hubtool.ops.target import SUFFIXES, Target

if TYPE_CHECKING:
    from hubtool.ops.verify import Verdict

Progress = Callable[[int], None]


class Options(NamedTuple):
    """How a conversion is carried out. ``library``: where lineage is recorded (a path or URL, None for the default)."""

    allow_loss: bool = False
    force: bool = False
    dry_run: bool = False
    in_place: bool = False
    verify: bool = False
    library: str | None = None


class Converted(NamedTuple):
    """What was done. ``output`` is None for a dry run; ``verdict`` is None unless ``verify`` was asked; ``warning``: lineage that failed."""

    plan: Plan
    output: Path | None
    size: int
    verdict: Verdict | None = None
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {
            **self.plan.to_json(),
            "output": None if self.output is None else str(self.output),
            "size": self.size,
        }
        document |= {"warning": self.warning} if self.warning else {}
        return document if self.verdict is None else {**document, "verify": self.verdict.to_json()}


def plan(source: str | Path, target: Target | None = None, *, library: str | None = None) -> Plan:
    """What ``convert`` would write, without writing it."""
    return ops.plan(open_file(locate(source, library)), target or Target())


def convert(
    source: str | Path,
    output: str | Path | None,
    target: Target | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert ``source`` (a path, or a REF of the library) to ``output`` (or in place, where only names change).

    The container follows ``target.format``, else the output's suffix. Raises ``LossyConversion`` unless losses are allowed, and what
    planning and writing raise; the output appears whole or not at all.
    """
    target, options = target or Target(), options or Options()
    path = locate(source, options.library)
    file = open_file(path)
    made = ops.plan(file, _with_format(target, output, options))
    if made.losses and not options.allow_loss:
        raise LossyConversion(_told(made), path=path, hint="choose another layout, or accept it with --allow-loss")
    if options.dry_run:
        return Converted(made, None, made.bytes_out)
    if options.in_place:
        return Converted(made, path, execute_in_place(made, file))
    if output is None:
        raise UsageProblem("no output is named", hint="give -o OUT or --out-dir DIR")
    size = execute(made, Path(output), force=options.force, progress=progress)
    verdict = _verdict(file, made, Path(output), target.family) if options.verify else None
    return Converted(made, Path(output), size, verdict, _record(made, Path(output), options.library))


def _verdict(file: TensorFile, made: Plan, output: Path, family: str | None) -> Verdict:
    """A mended file is compared as what its keys were meant to say."""
    from hubtool.layouts.repair import apply
    from hubtool.ops.verify import compare

    before = file if made.repair is None else apply(file, made.repair)
    return compare(before, open_file(output), family)


def _with_format(target: Target, output: str | Path | None, options: Options) -> Target:
    if target.format is not None or output is None or options.in_place:
        return target
    suffix = Path(output).suffix.lower()
    return replace(target, format=SUFFIXES.get(suffix))


def _told(made: Plan) -> str:
    first = made.losses[0]
    more = f" (and {len(made.losses) - 1} more)" if len(made.losses) > 1 else ""
    return f"this conversion would lose {first.what}: {first.reason}{more}"


def _record(made: Plan, output: Path, library: str | None) -> str | None:
    """Record lineage when the source is in the library; the output stands whatever happens here, so a busy library is only told."""
    if not library_exists(library):
        return None
    params: dict[str, Any] = {"layout": made.layout, "format": made.format, "fidelity": made.fidelity}
    params |= {"promoted": len(made.promotions)} if made.promotions else {}
    params |= {"repaired": [name for name, _ in made.repair.rules]} if made.repair else {}
    return recorded(library, output, [made.source], "convert", params)
