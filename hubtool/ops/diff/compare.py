"""Chooses how two files are compared: adapters by what they change, checkpoints by canonical names, anything else by its keys."""

from __future__ import annotations

from collections.abc import Callable

from hubtool.adapters.ir import Adapter
from hubtool.errors import ConversionError, UnknownFamily, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.parse import Parsed, recognise
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.diff import adapters, tensors
from hubtool.ops.diff.report import Difference
from hubtool.ops.sides import side, sides
from hubtool.tensors.expr import Expr, Read

Progress = Callable[[int], None]


def compare(
    first: TensorFile,
    second: TensorFile,
    family: str | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Difference:
    """What differs between two files. Raises ``UsageProblem`` for an adapter against a checkpoint, ``ConversionError`` for two families."""
    one, other = recognise(first, family), recognise(second, family)
    mine, theirs = (parsed is not None and bool(parsed.adapter.patches) for parsed in (one, other))
    if one is not None and other is not None and mine and theirs:
        return adapters.compare(*_of_one_family(first, second, one, other), workers, progress)
    checkpoints = (_is_checkpoint(first, family), _is_checkpoint(second, family))
    if (mine and checkpoints[1]) or (theirs and checkpoints[0]):
        text = "an adapter and a checkpoint have nothing in common to compare"
        hint = "collapse the adapter into its base first, or extract one from the checkpoint"
        raise UsageProblem(text, path=(first if mine else second).path, hint=hint)
    if all(checkpoints):
        ours, others = sides((first, second), family)
        return tensors.checkpoints(ours, others, workers, progress)
    return tensors.compare("tensors", None, _tensors(first), _tensors(second), workers, progress)


def _is_checkpoint(file: TensorFile, family: str | None) -> bool:
    try:
        return side(file, family) is not None
    except UnknownFamily:
        return True
    except ConversionError:
        return False  # a family without a table: by its own keys


def _of_one_family(first: TensorFile, second: TensorFile, one: Parsed, other: Parsed) -> tuple[Adapter, Adapter]:
    """A file that fits several families is read as the other's."""
    families = [parsed.adapter.family for parsed in (one, other)]
    if None not in families and families[0] != families[1]:
        text = f"{first.path} is an adapter of {families[0]}, {second.path} one of {families[1]}"
        raise ConversionError(text, path=second.path, hint="compare adapters of one family, or name it with --family")
    known = next((name for name in families if name is not None), None)
    pairs = ((first, one), (second, other))
    found = [p if p.adapter.family == known else recognise(file, known) or p for file, p in pairs]
    return found[0].adapter, found[1].adapter


def _tensors(file: TensorFile) -> dict[tuple[str, str], Expr]:
    return {("", name): Read(ref) for name, ref in unwrapped(file)[0].items()}
