"""Loads ``schemas/pipelines`` (families as whole checkpoints) and ``schemas/components`` (names of encoders) into read-only tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from hubtool import resources
from hubtool.errors import TableError
from hubtool.layouts import tables, vocabulary
from hubtool.layouts.checkpoint_weights import Sizes
from hubtool.layouts.naming import Row

DIFFUSERS = "diffusers"
DENOISERS = ("unet", "transformer", "prior", "decoder")
NATIVE = "native"  # a family's own naming, whatever it is called
_OPS = frozenset({"rename", "rows", "swap_halves", "transpose", "conv1x1"})


@dataclass(frozen=True, slots=True)
class Slot:
    """In a single file, the keys behind ``prefix`` are a component's, under ``naming``."""

    prefix: str
    component: str
    naming: str


@dataclass(frozen=True, slots=True)
class Form:
    """How one file holds a whole pipeline, or a part of one."""

    id: str
    slots: tuple[Slot, ...]
    claims: tuple[str, ...] = ()

    def components(self) -> frozenset[str]:
        return frozenset(slot.component for slot in self.slots)


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """A component of a pipeline. ``table``: its names in schemas/components; without one they are the family's own namings.

    ``cls``: its class, empty where no table says so; ``optional``: most pipelines of the family go without it.
    ``unlike``: beginnings of canonical names that say that the weights are another class's. ``identity``: weights that may be absent, and are
    the identity then.
    """

    name: str
    library: str
    cls: str
    table: str | None
    unused: tuple[str, ...]
    config: Mapping[str, Any]
    optional: bool = False
    unlike: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """File name of the weights, without suffix."""
        return "model" if self.library == "transformers" else "diffusion_pytorch_model"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A family as a whole. ``others``: entries of model_index.json that have no weights (empty where the pipeline goes without).

    ``variants``: variant -> class of its pipeline. ``flags``: what a mark of the file changes in which document (``unsure``: what to tell
    when the mark is absent and that proves nothing). ``repositories``: folders on the Hub that have what a single file lacks, every part
    under its name; ``alone``: part -> repositories that are that part.
    """

    family: str
    cls: str
    variants: Mapping[str, str]
    flags: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]
    others: Mapping[str, tuple[str, ...]]
    scheduler: str
    scheduler_config: Mapping[str, Any]
    forms: tuple[Form, ...]
    components: Mapping[str, Component]
    repositories: tuple[str, ...] = ()
    alone: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def class_for(self, variants: Iterable[str]) -> str:
        """The class of the pipeline for a file with these marks."""
        found = (self.variants[name] for name in sorted(variants) if name in self.variants)
        return next(found, self.cls)

    def naming(self, component: str) -> str:
        """The naming that single files of the family use for a component."""
        slots = (slot for form in self.forms for slot in form.slots if slot.component == component)
        return next((slot.naming for slot in slots), NATIVE)

    def adjusted(self, flags: Iterable[str], document: str) -> dict[str, Any]:
        """What the marks of a file change in the configuration of a component or of the scheduler."""
        return {key: value for flag in flags for key, value in self.flags.get(flag, {}).get(document, {}).items()}

    def form(self, name: str) -> Form | None:
        """The form of that name; ``single-file``, ``original`` and ``native`` mean the usual one."""
        if name in ("single-file", "original", "native"):
            named = (form for form in self.forms if name in (form.id, *form.claims))
            return next(named, self.forms[0])
        return next((form for form in self.forms if name in (form.id, *form.claims)), None)


def families() -> tuple[str, ...]:
    """Every family that has a table of its pipeline."""
    return tuple(sorted(path.stem for path in (resources.schemas() / "pipelines").glob("*.toml")))


@cache
def pipeline(family: str) -> Pipeline | None:
    """A family as a whole; one without a table is its denoiser alone, named by the family's rows. None for an unknown family."""
    if family not in families():
        return _denoiser_alone(family) if family in tables.family_ids() else None
    doc = resources.table(f"pipelines/{family}.toml")
    head, scheduler = doc["pipeline"], doc["scheduler"]
    return Pipeline(
        family,
        head["class"],
        MappingProxyType(head.get("variants", {})),
        MappingProxyType(doc.get("flags", {})),
        MappingProxyType(head.get("facts", {})),
        MappingProxyType({name: tuple(value) for name, value in head.get("others", {}).items()}),
        scheduler["class"],
        MappingProxyType(scheduler["config"]),
        tuple(map(_form, doc["form"])),
        MappingProxyType(
            {name: _component(name, _like(body, doc["component"])) for name, body in doc["component"].items()}
        ),
        tuple(head.get("repositories", ())),
        MappingProxyType({name: tuple(value) for name, value in head.get("alone", {}).items()}),
    )


def _denoiser_alone(family: str) -> Pipeline | None:
    table = tables.family(family)
    name = next((name for name in DENOISERS if name in table.components), None)
    if name is None:
        return None
    nothing: Mapping[str, Any] = MappingProxyType({})
    form = Form(tables.native(table), (Slot("", name, NATIVE),))
    alone = Component(name, "diffusers", "", None, (), nothing)
    return Pipeline(family, "", nothing, nothing, nothing, nothing, "", nothing, (form,), {name: alone})


def _form(body: Mapping[str, Any]) -> Form:
    slots = (Slot(slot["prefix"], slot["component"], slot["naming"]) for slot in body["slots"])
    return Form(body["id"], tuple(slots), tuple(body.get("claims", ())))


def _like(body: Mapping[str, Any], siblings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table with what it takes over: from a component beside it, or ``table/shared`` of schemas/components."""
    if "like" not in body:
        return body
    base = siblings[body["like"]] if body["like"] in siblings else _base(body["like"])
    return {**base, **body, "config": {**base.get("config", {}), **body.get("config", {})}}


def _component(name: str, body: Mapping[str, Any]) -> Component:
    library, cls = body["class"]
    config = MappingProxyType(dict(body.get("config", {})))
    return Component(
        name,
        library,
        cls,
        body.get("table"),
        tuple(body.get("unused", ())),
        config,
        body.get("optional", False),
        tuple(body.get("unlike", ())),
        tuple(body.get("identity", ())),
    )


@cache
def _base(name: str) -> Mapping[str, Any]:
    """A component that several pipelines share, ``[shared.<id>]`` of the component's own table."""
    table, _, shared = name.partition("/")
    doc = _component_doc(table)
    found = doc.get("shared", {}).get(shared)
    if found is None:
        raise TableError(f"schemas/components/{table}.toml has no [shared.{shared}]")
    config = {**doc.get("defaults", {}).get("config", {}), **found.get("config", {})}
    return {"table": table, **found, "config": config}


def rows(family: str, component: Component, naming: str, *, reading: bool) -> tuple[Row, ...]:
    """The rows of a naming; those under ``also`` only for reading."""
    if component.table is None:
        known = tables.family(family)
        table = known.namings.get(tables.native(known) if naming == NATIVE else naming)
        return table.rows if table is not None and table.component == component.name.removesuffix("_2") else ()
    namings = _component_doc(component.table).get("naming", {})
    body = namings.get(naming, {})
    common = namings[body["extends"]]["rows"] if "extends" in body else ()
    return _rows((*body.get("rows", ()), *common, *(body.get("also", ()) if reading else ())))


def _rows(rows_: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    return tuple(map(_row, rows_))


def _row(row: Mapping[str, Any]) -> Row:
    parts, op = row["canonical"], row.get("op", "rename")
    if op not in _OPS or (op == "rows") != (not isinstance(parts, str)):
        raise TableError(f"{row['outside']}: op {op!r} does not fit {parts!r}")
    paths = (parts,) if isinstance(parts, str) else tuple(parts)
    return Row(row["outside"], paths, op, MappingProxyType(row.get("parameters", {})))


@cache
def modules(component: Component) -> frozenset[str]:
    """Every module that a component of one depth has; empty where depths differ."""
    table = _component_doc(component.table)["component"].get("models", ()) if component.table else ()
    return frozenset(path for name in table for path in vocabulary.model(name))


@cache
def heads(family: str, component: Component) -> frozenset[str]:
    """What canonical names of a component may begin with; empty where nothing is known."""
    if component.table is not None:
        return frozenset(_component_doc(component.table)["component"]["heads"])
    known = (vocabulary.model(size) for size in vocabulary.models(family, component.name))
    return frozenset(name.partition(".")[0] for own in known for name in _names(own))


def _names(own: vocabulary.Modules) -> Iterable[str]:
    return (*(path for path in own if path), *own.get("", {}))


def sizes(family: str, component: str, parts: Iterable[str]) -> Sizes:
    """The weight shapes of canonical keys' modules, for every published size that has them all."""
    paths = [key.rpartition(".")[0] for key in parts]
    known = (vocabulary.model(size) for size in vocabulary.models(family, component))
    shapes = ([own.get(path, {}).get("weight", ()) for path in paths] for own in known)
    return [list(one) for one in shapes if all(one)]


@cache
def _component_doc(name: str) -> Mapping[str, Any]:
    return resources.table(f"components/{name}.toml")
