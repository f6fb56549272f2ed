"""Plans what stays of a file. Tensors that stay are copied as bytes; only a cast computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.checkpoints import Checkpoint, homes
from hubtool.layouts.parse import Parsed, recognise
from hubtool.ops import checkpoint_folder
from hubtool.ops.containers import container
from hubtool.ops.folder_plan import FORMAT, FolderPlan
from hubtool.ops.plan import Plan
from hubtool.ops.sides import Side, side
from hubtool.ops.strip.casting import DTYPES, Caster
from hubtool.tensors import expr as e
from hubtool.tensors.expr import Expr

EMA = ("drop", "keep", "use")
_EMA = "model_ema."
_TRAINING = "of the training state"
_OTHER = "(no component)"


@dataclass(frozen=True, slots=True)
class Request:
    """``keep`` or ``drop``: components; ``ema``: EMA copies go, stay, or take the place of the weights; ``dtype``: of floating weights;
    ``saturate``: numbers beyond its range become its largest; ``format``: container, by default the file's own."""

    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    ema: str = "drop"
    dtype: str | None = None
    saturate: bool = False
    family: str | None = None
    format: str | None = None

    def check(self) -> None:
        """Raise ``UsageProblem`` for what cannot be meant."""
        if self.keep and self.drop:
            raise UsageProblem("components are either kept or dropped", hint="--keep or --drop")
        if self.ema not in EMA:
            raise UsageProblem(f"EMA copies cannot be asked to {self.ema}", hint=f"one of {', '.join(EMA)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageProblem(f"no such dtype: {self.dtype}", hint=f"one of {', '.join(DTYPES)}")

    @classmethod
    def of(cls, parameters: Mapping[str, Any], **fields: str | None) -> Request:
        """The request whose ``parameters()`` a recipe keeps. Raises ``UsageProblem`` for others."""
        unknown = parameters.keys() - {"keep", "drop", "ema", "saturate"}
        if unknown:
            raise UsageProblem(f"a strip has no parameter {', '.join(sorted(unknown))}")
        values = {name: tuple(value) if name in ("keep", "drop") else value for name, value in parameters.items()}
        return cls(**values, **fields)  # type: ignore[arg-type]

    def parameters(self) -> dict[str, Any]:
        """What of this decides the output's numbers, for a recipe."""
        asked = {"keep": list(self.keep), "drop": list(self.drop), "ema": self.ema, "saturate": self.saturate}
        return {name: value for name, value in asked.items() if value not in ([], False, "drop")}


@dataclass(frozen=True, slots=True)
class Amount:
    """Tensors and their bytes."""

    tensors: int
    bytes: int

    @classmethod
    def of(cls, tensors: Iterable[Expr]) -> Amount:
        sizes = [e.size(tensor) for tensor in tensors]
        return cls(len(sizes), sum(sizes))

    def to_json(self) -> dict[str, int]:
        return {"tensors": self.tensors, "bytes": self.bytes}


@dataclass(frozen=True, slots=True)
class Report:
    """``removed`` and ``kept``: what -> how much. ``caster``: what the cast lost, complete once the plan was executed."""

    removed: Mapping[str, Amount]
    kept: Mapping[str, Amount]
    cast: int
    caster: Caster | None

    def to_json(self) -> dict[str, Any]:
        lost = {} if self.caster is None else {name: one.to_json() for name, one in self.caster.lost.items()}
        return {
            "removed": {name: amount.to_json() for name, amount in self.removed.items()},
            "kept": {name: amount.to_json() for name, amount in self.kept.items()},
            "cast": {"dtype": None if self.caster is None else self.caster.dtype, "tensors": self.cast, "lost": lost},
        }


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor and what it belongs to. ``weight``: whether it is a weight, which a cast concerns."""

    owner: str
    tensor: Expr
    weight: bool = True


def plan(file: TensorFile, request: Request) -> tuple[Plan, Report]:
    """What stripping ``file`` will write. Raises ``UsageProblem`` for components it does not have, ``ConversionError`` when nothing would go."""
    request.check()
    found = side(file, request.family)
    if file.format == FORMAT and found is not None:
        return _folder(file, found, request)
    parsed = None if found is not None else recognise(file, request.family)
    made = container(file, request.format or _own(file), parsed)
    parts = dict(_parts(file, found, parsed, made.tensors))
    if request.ema == "use":
        parts = dict(_averaged(file, parts))
    return _selected(file, made, parts, request)


def _own(file: TensorFile) -> str:
    """The file's own container where hubtool writes it."""
    return {"torch-zip": "torch-zip", "torch-legacy": "torch-zip", "peft-folder": "peft-folder"}.get(
        file.format, "safetensors"
    )


def _parts(
    file: TensorFile, found: Side | None, parsed: Parsed | None, tensors: Mapping[str, Expr]
) -> Iterator[tuple[str, Part]]:
    """Every tensor with its component; what belongs to none is never a weight."""
    owners: dict[str, str] = {}
    if found is not None:
        places = homes(found.source.tensors, found.source.pipeline, found.source.slots)
        owners = {key: home.component for key, home in places.items()}
    elif parsed is not None:
        owners = {key: component for (component, _, _), key in parsed.keys.items()}
    for name, tensor in tensors.items():
        if name.startswith(_EMA) and name not in owners:
            yield name, Part("ema", tensor)
        else:
            yield name, Part(owners.get(name, _OTHER), tensor, name in owners or not owners)


def _averaged(file: TensorFile, parts: Mapping[str, Part]) -> Iterator[tuple[str, Part]]:
    """The weights with their EMA copies in their place. Names: ``model.a.b.weight`` -> ``model_ema.abweight`` (CompVis LitEma)."""
    copies = {name: part for name, part in parts.items() if part.owner == "ema"}
    if not copies:
        raise ConversionError("this file has no EMA copies", path=file.path)
    for name, part in parts.items():
        copy = copies.get(_EMA + name.removeprefix("model.").replace(".", "")) if name.startswith("model.") else None
        if copy is not None and copy.tensor.shape == part.tensor.shape:
            yield name, replace(part, tensor=copy.tensor)
        else:
            yield name, part


def _selected(file: TensorFile, made: Plan, parts: Mapping[str, Part], request: Request) -> tuple[Plan, Report]:
    owners = dict.fromkeys(part.owner for part in parts.values())
    gone = _gone(list(owners), request, file)
    stays = {name: part for name, part in parts.items() if part.owner not in gone}
    caster = None if request.dtype is None else Caster(DTYPES[request.dtype], request.saturate)
    tensors = {name: _cast(caster, name, part) for name, part in stays.items()}
    changed = sum(tensors[name] is not part.tensor for name, part in stays.items())
    removed = _amounts(part for part in parts.values() if part.owner in gone) | _training(file, parts)
    if not removed and not changed and request.ema != "use":
        raise _nothing(file)
    losses = tuple(loss for loss in made.losses if not loss.what.endswith(_TRAINING))
    plan = replace(made, tensors=tensors, header=None, tree=None, losses=losses)
    return plan, Report(removed, _amounts(stays.values()), changed, caster)


def _cast(caster: Caster | None, name: str, part: Part) -> Expr:
    return part.tensor if caster is None or not part.weight else caster.cast(name, part.tensor)


def _gone(owners: list[str], request: Request, file: TensorFile) -> set[str]:
    """The owners whose tensors leave."""
    components = [owner for owner in owners if owner not in (_OTHER, "ema")]
    unknown = [name for name in (*request.keep, *request.drop) if name not in components]
    if unknown:
        has = ", ".join(components) or "none that is known"
        raise UsageProblem(f"the file has no component {unknown[0]!r}", path=file.path, hint=f"it has {has}")
    gone = {name for name in components if name in request.drop or (request.keep and name not in request.keep)}
    if components and gone == set(components):
        raise UsageProblem("nothing would be left", path=file.path)
    return gone | ({"ema"} if request.ema != "keep" and "ema" in owners else set())


def _amounts(parts: Iterable[Part]) -> dict[str, Amount]:
    by_owner: dict[str, list[Expr]] = {}
    for part in parts:
        by_owner.setdefault(part.owner, []).append(part.tensor)
    return {owner: Amount.of(own) for owner, own in by_owner.items()}


def _training(file: TensorFile, parts: Mapping[str, Part]) -> dict[str, Amount]:
    """What a trainer keeps beside the weights of a pickle; opening has left it behind."""
    refs = {(ref.start, ref.end, ref.path) for part in parts.values() for ref in e.sources(part.tensor)}
    rest = [ref for ref in file.tensors.values() if (ref.start, ref.end, ref.path) not in refs]
    count = len(file.tensors) - len(parts)
    return {"training state": Amount(count, sum(ref.nbytes for ref in rest))} if count > 0 else {}


def _nothing(file: TensorFile) -> ConversionError:
    hint = "name a component with --drop or --keep, or a --dtype"
    return ConversionError("there is nothing to remove", path=file.path, hint=hint)


def _folder(file: TensorFile, found: Side, request: Request) -> tuple[Plan, Report]:
    """A diffusers folder without some components, configurations taken along."""
    if request.ema == "use":
        raise UsageProblem(
            "a diffusers folder keeps its EMA copies apart: name the folder that holds them", path=file.path
        )
    strays: dict[str, list[str]] = {}
    for key in found.checkpoint.strays:
        strays.setdefault(key.partition("/")[0], []).append(key)
    owners = [*found.checkpoint.weights, *strays]
    gone = _gone(owners, request, file)
    lost = [name for name in strays if name not in gone]
    if lost:
        text = f"{', '.join(lost)}: no known part of a {found.family} pipeline, so it cannot be written again"
        raise ConversionError(text, path=file.path, hint=f"drop it as well: --drop {lost[0]}")
    weights = {name: own for name, own in found.checkpoint.weights.items() if name not in gone}
    made = checkpoint_folder.plan(file, found.source, Checkpoint(found.family, weights, found.checkpoint.extras), None)
    caster = None if request.dtype is None else Caster(DTYPES[request.dtype], request.saturate)
    tensors = {name: t if caster is None else caster.cast(name, t) for name, t in made.tensors.items()}
    changed = sum(tensors[name] is not tensor for name, tensor in made.tensors.items())
    if not gone and not changed:
        raise _nothing(file)
    return _written(made, tensors), Report(_left(found, strays, gone), _kept(weights), changed, caster)


def _written(made: FolderPlan, tensors: Mapping[str, Expr]) -> FolderPlan:
    files = tuple(replace(one, header=None) for one in made.files)
    return replace(made, tensors=tensors, header=None, files=files, losses=())


def _left(found: Side, strays: Mapping[str, list[str]], gone: set[str]) -> dict[str, Amount]:
    own = {name: Amount.of(tensors.values()) for name, tensors in found.checkpoint.weights.items() if name in gone}
    rest = found.checkpoint.strays
    return own | {name: Amount.of(rest[key] for key in keys) for name, keys in strays.items() if name in gone}


def _kept(weights: Mapping[str, Mapping[str, Expr]]) -> dict[str, Amount]:
    return {name: Amount.of(tensors.values()) for name, tensors in weights.items()}
