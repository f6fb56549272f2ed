"""What a model card is made of: plain facts about one publication, gathered by ``actions`` from file, library and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from hubtool.hub.licences import Licence
from hubtool.hub.refs import HUGGING_FACE

_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the gallery: its path in the repository and the prompt that made it."""

    path: str
    prompt: str = ""
    negative: str = ""


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of the repository as the card lists it."""

    path: str
    size: int
    sha256: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """``card``: adapter, embedding, merge or finetune. ``loads``: the name of a snippet of ``hub.snippets``. ``main``: the canonical file.

    ``details``: rows of the table of provenance. ``recipe``: text of the recipe that made it. ``tags``: those of the family.
    """

    repo: str
    title: str
    card: str
    loads: str
    main: str
    family: str | None = None
    family_title: str | None = None
    algorithm: str | None = None
    base_models: tuple[str, ...] = ()
    relation: str = "adapter"
    licence: Licence | None = None
    words: tuple[str, ...] = ()
    strength: float | None = None
    pipeline: str | None = None
    task: str | None = None
    tags: tuple[str, ...] = ()
    extra_tags: tuple[str, ...] = ()
    files: tuple[Listed, ...] = ()
    pictures: tuple[Picture, ...] = ()
    details: Mapping[str, str] = field(default_factory=lambda: _NONE)
    recipe: str | None = None
    components: tuple[str, ...] = ()
    nsfw: bool = False
    claimed_licence: str | None = None  # what the header of the file says
    endpoint: str = HUGGING_FACE

    @property
    def prompt(self) -> str:
        """A prompt for the snippet: that of the first picture, else the trigger words."""
        own = next((picture.prompt for picture in self.pictures if picture.prompt), "")
        return own or ", ".join(self.words) or "a photo of a cat"
