"""Loads ``schemas/families``, ``schemas/syntaxes`` and ``schemas/algorithms.toml`` into read-only tables, checking each as it is compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from hubtool import resources
from hubtool.errors import UnknownFamily, UnknownLayout
from hubtool.layouts.naming import PARTS, Naming
from hubtool.layouts.naming import naming as read_naming


class Family(NamedTuple):
    """A model family. ``descends_from``: the family whose modules it took over unchanged, which claims files that fit both. ``components``: component -> the models (sizes) it may be; ``usual``: syntax -> the naming it uses when none is asked for;
    ``namings``: the first table of each naming; ``naming_tables``: all, one per naming and component.
    """

    id: str
    title: str
    base_model: str
    claims: tuple[str, ...]
    descends_from: str | None
    components: Mapping[str, tuple[str, ...]]
    usual: Mapping[str, str]
    prefixes: Mapping[str, Mapping[str, str]]
    namings: Mapping[str, Naming]
    naming_tables: tuple[Naming, ...]

    def naming_of(self, component: str, naming: str) -> Naming | None:
        """The table of a naming for one component."""
        return next((one for one in self.naming_tables if (one.id, one.component) == (naming, component)), None)


class Walk(NamedTuple):
    """Positions of a positional syntax: ``paths[i]`` is the canonical module at index i."""

    component: str
    families: tuple[str, ...]
    paths: tuple[str, ...]
    classes: tuple[str, ...]


class Syntax(NamedTuple):
    """How a module path and a role become a key.

    ``prefixes``: component -> spellings, the written one first (``"*"`` stands for a single unnamed component).
    ``roles``: component or ``"*"`` -> role -> suffixes, the written one first; ``reads``: suffixes that are read and never written. ``tails``: (module tail, spelling) pairs for syntaxes whose
    suffix swallows the end of the module path. ``alpha``: where scales live: ``tensor``, ``metadata``, ``config`` or ``none``.
    ``ends``: (role, module tail, suffix) for tensors known by the end of their module's name. ``needs``: roles one of which must occur for the keys to be evidence;
    ``companions``: role -> the role without which it does not count in the same module.
    ``namings``: the usual one first (``native``: the family's own); ``order``: among syntaxes that explain a file equally well, the lowest wins.
    """

    id: str
    title: str
    short: tuple[str, ...]
    joiner: str
    alpha: str
    container: str
    namings: tuple[str, ...]
    prefixes: Mapping[str, tuple[str, ...]]
    roles: Mapping[str, Mapping[str, tuple[str, ...]]]
    reads: Mapping[str, tuple[str, ...]]
    tails: tuple[tuple[str, str], ...]
    ends: tuple[tuple[str, str, str], ...]
    needs: frozenset[str]
    companions: Mapping[str, str]
    walks: tuple[Walk, ...]
    positional: bool
    single_component: bool
    flat_magnitude: bool
    lycoris: bool
    order: int

    def roles_of(self, component: str) -> Mapping[str, tuple[str, ...]]:
        return self.roles.get(component, self.roles["*"])


class Algorithm(NamedTuple):
    """The complete sets of roles that make one algorithm, and the roles that may accompany them."""

    id: str
    title: str
    sets: tuple[frozenset[str], ...]
    optional: frozenset[str]


@cache
def family_ids() -> tuple[str, ...]:
    """Every family that has a table."""
    return tuple(sorted(path.stem for path in (resources.schemas() / "families").glob("*.toml")))


@cache
def family(name: str) -> Family:
    """The compiled family table. Raises ``UnknownFamily``."""
    if name not in family_ids():
        raise UnknownFamily(f"there is no family {name!r}", hint=f"known families: {', '.join(family_ids())}")
    doc = resources.table(f"families/{name}.toml")
    head = doc["family"]
    namings = [read_naming(key, body) for key, body in doc.get("naming", {}).items()]
    return Family(
        id=head["id"],
        title=head["title"],
        base_model=head["base_model"],
        claims=tuple(head["claims"]),
        descends_from=head.get("descends_from"),
        components=MappingProxyType({key: tuple(models) for key, models in doc["components"].items()}),
        usual=MappingProxyType(doc.get("usual", {})),
        prefixes=MappingProxyType({k: MappingProxyType(v) for k, v in doc.get("prefixes", {}).items()}),
        namings=MappingProxyType({one.id: one for one in reversed(namings)}),
        naming_tables=tuple(namings),
    )


@cache
def syntaxes() -> Mapping[str, Syntax]:
    """All syntaxes by id, in their ``order``, then by name."""
    names = sorted(path.name for path in (resources.schemas() / "syntaxes").glob("*.toml"))
    docs = {doc["syntax"]["id"]: doc for doc in (resources.table(f"syntaxes/{name}") for name in names)}
    found = sorted((_syntax(doc, docs) for doc in docs.values()), key=lambda one: (one.order, one.id))
    return MappingProxyType({one.id: one for one in found})


def _syntax(doc: Mapping[str, Any], docs: Mapping[str, Mapping[str, Any]]) -> Syntax:
    head = doc["syntax"]
    walks = docs[head["walks_of"]]["walks"] if "walks_of" in head else doc.get("walks", ())
    namings = head["namings"]
    return Syntax(
        id=head["id"],
        title=head["title"],
        short=tuple(head["short"]),
        joiner=head["joiner"],
        alpha=head["alpha"],
        container=head["container"],
        namings=(namings,) if isinstance(namings, str) else tuple(namings),
        prefixes=MappingProxyType({key: tuple(value) for key, value in doc["prefixes"].items()}),
        roles=_roles(doc, lycoris=head.get("lycoris", False)),
        reads=MappingProxyType({role: tuple(texts) for role, texts in doc.get("reads", {}).items()}),
        tails=tuple((row["module"], row["text"]) for row in doc.get("tails", ())),
        ends=tuple((row["role"], row["module"], row["text"]) for row in doc.get("ends", ())),
        needs=frozenset(head.get("needs", ())),
        companions=MappingProxyType(doc.get("companions", {})),
        walks=tuple(map(_walk, walks)),
        positional=head.get("positional", False),
        single_component=head.get("single_component", False),
        flat_magnitude=head.get("one_dimensional_magnitude", False),
        lycoris=head.get("lycoris", False),
        order=head.get("order", 50),
    )


def _roles(doc: Mapping[str, Any], *, lycoris: bool) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    common = {role: (text,) for role, text in _algorithm_file()["suffixes"].items()} if lycoris else {}
    tables = {"*": doc["roles"], **doc.get("roles_of", {})}
    return MappingProxyType(
        {
            who: MappingProxyType(common | {role: tuple(texts) for role, texts in roles.items()})
            for who, roles in tables.items()
        }
    )


def _walk(row: Mapping[str, Any]) -> Walk:
    paths = tuple(f"{block}.{leaf}" for text in row["blocks"] for block in _expand(text) for leaf in row["leaves"])
    return Walk(row["component"], tuple(row["families"]), paths, tuple(row["classes"]))


def _expand(text: str) -> Iterator[str]:
    """``a.{0..2}.b`` -> a.0.b, a.1.b, a.2.b."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not found:
        yield text
        return
    for i in range(int(found[1]), int(found[2]) + 1):
        yield text[: found.start()] + str(i) + text[found.end() :]


@cache
def _algorithm_file() -> dict[str, Any]:
    return resources.table("algorithms.toml")


@cache
def algorithms() -> tuple[Algorithm, ...]:
    """The algorithms of schemas/algorithms.toml, in the order in which a module is tried."""
    return tuple(
        Algorithm(row["id"], row["title"], tuple(map(frozenset, row["sets"])), frozenset(row["optional"]))
        for row in _algorithm_file()["algorithm"]
    )


@cache
def suffixes() -> Mapping[str, tuple[tuple[str, str, str, str], ...]]:
    """suffix text -> ((syntax id, component or ``"*"``, role, module tail), ...) over all named syntaxes."""
    table: dict[str, dict[tuple[str, str, str, str], None]] = {}
    for syntax in syntaxes().values():
        for text, row in _suffix_rows(syntax) if not syntax.positional else ():
            table.setdefault(text, {})[row] = None
    return MappingProxyType({text: tuple(rows) for text, rows in table.items()})


def _suffix_rows(syntax: Syntax) -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    for who, roles in syntax.roles.items():
        for role, texts in roles.items():
            for tail, stem in syntax.tails or (("", ""),):
                for text in texts:
                    yield (f"{stem}.{text}" if stem else text), (syntax.id, who, role, tail)
    for role, texts in syntax.reads.items():
        yield from ((text, (syntax.id, "*", role, "")) for text in texts)
    for role, module, text in syntax.ends:
        yield text, (syntax.id, "*", role, module)


class Layout(NamedTuple):
    """A syntax and a naming; ``str()`` is what ``inspect`` prints and ``convert --layout`` takes."""

    syntax: str
    naming: str

    def __str__(self) -> str:
        return f"{self.syntax}/{self.naming}"


def layout(name: str, family_id: str | None) -> Layout:
    """Resolve ``kohya/sgm``, ``kohya/native`` or a short name (then the family's usual naming). Raises ``UnknownLayout``."""
    head, _, tail = name.partition("/")
    # `peft/diffusers` names a syntax, `peft` alone is the short name of another: DESIGN 5
    shorts = {} if tail else {short: s for s in syntaxes().values() for short in s.short}
    syntax = shorts.get(head) or syntaxes().get(head)
    if syntax is None:
        known = sorted({short for s in syntaxes().values() for short in (s.short or (s.id,))})
        raise UnknownLayout(f"there is no layout {name!r}", hint=f"known layouts: {', '.join(known)}")
    table = family(family_id) if family_id else None
    naming = tail or _usual_naming(syntax, table)
    if naming.removesuffix(PARTS) == "native":
        naming = native(table) + naming.removeprefix("native")
    known_here = {"diffusers", "index", "raw", *(table.namings if table else ())}
    if naming.removesuffix(PARTS) not in known_here:
        raise UnknownLayout(
            f"layout {name!r}: {family_id or 'an unknown family'} has no naming {naming!r}",
            hint=f"its namings: {', '.join(sorted(known_here - {'index', 'raw'}))}",
        )
    return Layout(syntax.id, naming)


def native(table: Family | None) -> str:
    """The naming of the family's original checkpoint: its first whole one; ``diffusers`` where there is no other."""
    return next((one.id for one in table.namings.values() if not one.partial), "diffusers") if table else "diffusers"


def _usual_naming(syntax: Syntax, table: Family | None) -> str:
    if table and syntax.id in table.usual:
        return table.usual[syntax.id]
    first = syntax.namings[0]
    return "diffusers" if first == "*" else first
