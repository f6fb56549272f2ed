"""What the card says about a publication: asked for, else found in the file, else known to the library, else true of the family."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hubtool.actions.publish_items import Item, document
from hubtool.errors import UnknownFamily
from hubtool.hub import card_text, civitai_licence, licences
from hubtool.hub.civitai_text import Facts as Civitai
from hubtool.hub.facts import Facts, Listed, Picture
from hubtool.hub.layout import stem_of_run
from hubtool.hub.licences import Licence
from hubtool.hub.uploads import Upload
from hubtool.hub.validation import is_model_id
from hubtool.layouts import tables
from hubtool.layouts.claims import read_claims
from hubtool.resources import schemas

_RECIPE, _RECIPE_FILE = "hubtool.recipe", "hubtool.recipe.json"
_ADAPTERS = frozenset(
    {"lora", "custom_diffusion", "hypernetwork", "aesthetic_embedding", "controlnet", "t2i_adapter", "ip_adapter"}
)
_MODELS = frozenset({"checkpoint", "diffusers_pipeline"})
_TRAINING = (
    ("steps", "Training steps"), ("epoch", "Epochs"), ("images", "Training images"), ("resolution", "Resolution"),
    ("network_module", "Trained with"), ("base_model_sha256", "SHA-256 of the base"), ("date", "Date"), ("author", "Author"),
)  # fmt: skip
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Said:
    """What the user says about the publication; it overrules everything that was found."""

    title: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    base_models: tuple[str, ...] = ()
    relation: str | None = None
    words: tuple[str, ...] = ()
    strength: float | None = None
    tags: tuple[str, ...] = ()
    family: str | None = None
    nsfw: bool = False

    @property
    def forced(self) -> frozenset[str]:
        """Keys of the front matter that were asked for."""
        licence = ("license", "license_name", "license_link") if self.licence else ()
        given = (("base_model",) if self.base_models else ()) + (("instance_prompt",) if self.words else ())
        return frozenset((*licence, *given, *(("base_model_relation",) if self.relation else ())))

    def to_json(self) -> dict[str, Any]:
        """What was said, for the index of the publication."""
        said = {name: getattr(self, name) for name in _SAID}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in said.items()
            if value or value == 0.0
        }

    def over(self, earlier: Any) -> Said:
        """This, and where it says nothing what an earlier publication was told. ``earlier``: from an index, so anything at all."""
        rows = earlier if isinstance(earlier, Mapping) else {}
        licence = _LICENCE if self.licence else ()
        before = {name: _typed(kind, rows.get(name)) for name, kind in _SAID.items() if name not in licence}
        mine = self.to_json()
        return replace(
            self, **{name: value for name, value in before.items() if name not in mine and value is not None}
        )


_LICENCE = ("licence", "licence_name", "licence_link")
_SAID: Mapping[str, type] = {
    "title": str, "licence": str, "licence_name": str, "licence_link": str, "base_models": tuple, "relation": str, "words": tuple,
    "strength": float, "tags": tuple, "family": str, "nsfw": bool,
}  # fmt: skip


def _typed(kind: type, value: Any) -> Any:
    """``value`` if it is of this kind, else None. Lists are of short texts."""
    if kind is tuple:
        return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    if kind is float:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return value if isinstance(value, kind) else None


@dataclass(frozen=True, slots=True)
class Known:
    """What the library knows of the artifact. ``bases``: repositories that its parents came from. ``civitai``: what proves to be said about it."""

    words: tuple[str, ...] = ()
    title: str | None = None
    bases: tuple[str, ...] = ()
    merged: bool = False
    civitai: Civitai | None = None

    @property
    def nsfw(self) -> bool:
        """Civitai's levels are bits: 1 and 2 are for everybody (PG, PG-13)."""
        return bool(self.civitai and (self.civitai.nsfw_level or 0) >= 4)


def facts(
    repo: str, endpoint: str, item: Item, said: Said, known: Known, pictures: Iterable[Picture], main: str, loads: str, converted: str | None
) -> Facts:  # fmt: skip
    """Everything but the list of files, which depends on what the repository holds."""
    found = item.report.identity
    family = said.family or found.family
    claims = read_claims(item.file).values
    recipe = document(item.file, _RECIPE, _RECIPE_FILE)
    card = _card(item, known, recipe)
    bases = said.base_models or _bases(item, known, family)
    return Facts(
        repo=repo,
        title=said.title or known.title or _text(claims.get("title")) or stem_of_run(item.stem),
        card=card,
        loads=loads,
        main=main,
        family=family,
        algorithm=found.algorithm,
        base_models=bases,
        relation=said.relation or {"merge": "merge", "finetune": "finetune"}.get(card, "adapter"),
        licence=_licence(said, known, claims, bases, family),
        words=said.words or _words(item, known),
        strength=said.strength,
        pipeline=_pipeline(family),
        task=licences.task_of(family) if loads != "peft" else None,
        tags=licences.tags_of(family),
        extra_tags=(*said.tags, *(("merge",) if card == "adapter" and _merges(recipe) else ())),
        pictures=tuple(pictures),
        details=_details(item, known, family, claims, converted),
        recipe=card_text.recipe_text(recipe) if isinstance(recipe, Mapping) else None,
        nsfw=said.nsfw or known.nsfw,
        claimed_licence=_text(claims.get("license")),
        endpoint=endpoint,
    )


def listed(uploads: Sequence[Upload], kept: Iterable[Mapping[str, Any]]) -> tuple[Listed, ...]:
    """The files of the repository as the card lists them: the canonical one first."""
    rows = [
        Listed(one.path, one.size, one.sha256, _note(one.role, one.about)) for one in uploads if one.role != "preview"
    ]
    rows += [
        Listed(str(row["path"]), int(row.get("size", 0)), str(row.get("sha256", "")), _note(str(row.get("role")), row))
        for row in kept
    ]
    return tuple(sorted(rows, key=lambda row: (not row.note.startswith("canonical"), row.path)))


def _note(role: str, about: Mapping[str, Any]) -> str:
    layout = about.get("layout")
    return f"{role}, layout {layout}" if layout else role


def _text(value: Any) -> str | None:
    return card_text.plain(value)[:_LONGEST] or None if isinstance(value, str) else None


def _card(item: Item, known: Known, recipe: Any) -> str:
    if item.kind == "textual_inversion":
        return "embedding"
    if item.kind in _ADAPTERS:
        return "adapter"
    merged = known.merged or _merges(recipe) or "sd_merge_models" in item.file.metadata
    return "merge" if merged and item.kind in _MODELS else "finetune"


def _merges(recipe: Any) -> bool:
    return isinstance(recipe, Mapping) and recipe.get("operation") == "merge"


def _bases(item: Item, known: Known, family: str | None) -> tuple[str, ...]:
    """Ids of the Hub only: a trainer's path or file name would have the whole commit refused."""
    if known.bases:
        return known.bases
    named = item.report.identity.base_model
    if named and is_model_id(named, owned=item.file.format != "peft-folder"):
        return (named,)
    try:
        return (tables.family(family).base_model,) if family else ()
    except UnknownFamily:
        return ()


def _licence(
    said: Said, known: Known, claims: Mapping[str, Any], bases: Sequence[str], family: str | None
) -> Licence | None:
    if said.licence:
        return Licence(said.licence, said.licence_name, said.licence_link)
    if known.civitai and known.civitai.permissions:
        return civitai_licence.LICENCE
    claimed = str(claims.get("license", "")).strip().lower()
    if claimed in licences.licence_ids() - {"other", "unknown"}:
        return Licence(claimed)
    return licences.licence_of(bases, family)


def _words(item: Item, known: Known) -> tuple[str, ...]:
    found = item.report.identity
    tokens = [embedding.token for embedding in found.embeddings if embedding.token]
    return tuple(dict.fromkeys((*tokens, *found.trigger_words, *known.words)))


@cache
def _pipeline(family: str | None) -> str | None:
    path = schemas() / "pipelines" / f"{family}.toml"
    return str(tomllib.loads(path.read_text("utf-8"))["pipeline"]["class"]) if family and path.is_file() else None


def _details(
    item: Item, known: Known, family: str | None, claims: Mapping[str, Any], converted: str | None
) -> dict[str, str]:
    found = item.report.identity
    rows = {
        "Kind": found.kind.replace("_", " "),
        "Algorithm": found.algorithm or "",
        "Family": _family_title(family),
        "Rank": ", ".join(f"{rank}" for rank in sorted(set(found.ranks))[:8]),
        "Alpha": ", ".join(f"{alpha:g}" for alpha in sorted(set(found.alphas))[:8]),
        "Converted from layout": converted or "",
    }
    for key, label in _TRAINING:
        value = claims.get(key)
        if isinstance(value, str | int | float):
            rows[label] = str(value)[:_LONGEST]
    if known.civitai:
        rows |= {
            "On Civitai": known.civitai.page or "",
            "AIR": known.civitai.air or "",
            "Creator": known.civitai.creator or "",
        }
    return rows | {"Made with": tool()}


def _family_title(family: str | None) -> str:
    try:
        return tables.family(family).title if family else ""
    except UnknownFamily:
        return family or ""


def tool() -> str:
    """The name and version that goes into the index and the card."""
    from hubtool.version import __version__

    return f"hubtool {__version__}"
