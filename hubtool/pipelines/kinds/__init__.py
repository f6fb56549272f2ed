"""What a pipeline can take. One module per kind of file, called like the kind; helpers begin with an underscore. A module has

``STRENGTH``: whether a strength means anything. ``SETTINGS``: what may be set beside it, with the defaults (None: a file).
``read(file, identity, ask) -> Content``: what is in the file, in memory, not yet checked against a pipeline.

Nothing here imports torch before a file of that kind is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any, Protocol, cast

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, Unsupported, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.types import Finding

_NOTHING: Mapping[str, Any] = MappingProxyType({})
Strengths = Callable[[str, str], tuple[float, ...]]  # (component, path) -> strength by step


@dataclass(frozen=True, slots=True)
class Ask:
    """How a file shall be read. ``family``: the pipeline's, which settles a file that fits several. ``token``: what prompts shall call it."""

    family: str | None = None
    components: Collection[str] | None = None
    token: str | Sequence[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)


class Effect(Protocol):
    """What acts on a pipeline from outside its weights. It holds no pipeline and no part of one: pipelines are remembered weakly."""

    @property
    def components(self) -> tuple[str, ...]:
        """The pipeline's components that it acts on."""

    def check(self, pipe: Any, strength: float) -> None:
        """Refuse what cannot be, before anything changes."""

    def attach(self, pipe: Any, name: str, strength: float) -> Mapping[str, tuple[str, ...]]:
        """Begin to act as ``name``; component -> live modules whose computation changes."""

    def detach(self, pipe: Any, name: str) -> None:
        """Leave no trace; harmless where it does not act."""

    def findings(self, pipe: Any) -> Iterable[Finding]:
        """What the user should know."""

    def slots(self, pipe: Any, name: str, strengths: Strengths) -> Iterable[Any]:
        """``composition.Slot`` for each part that follows a schedule. Raises ``UsageProblem`` where the strength cannot change by step."""


@dataclass(frozen=True, slots=True)
class Content:
    """``adapter``: changes of weights, and tokens. ``effect``: what acts otherwise. ``token``: what prompts shall call the adapter's tokens.

    ``negatives``: those of the adapter's own tokens that belong in the negative prompt. ``findings``: what the user should know.
    """

    adapter: Adapter
    kind: str = "lora"
    effect: Effect | None = None
    token: str | Sequence[str] | None = None
    negatives: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


class Kind(Protocol):
    """A module of this package."""

    STRENGTH: bool
    SETTINGS: Mapping[str, Any]

    def read(self, file: TensorFile, identity: Identity, ask: Ask) -> Content:
        """The content of a file of this kind."""


@cache
def names() -> tuple[str, ...]:
    """The kinds that a pipeline can take."""
    return tuple(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def find(kind: str) -> Kind | None:
    """The module of a kind; None for one that no pipeline takes."""
    return cast("Kind", import_module(f"{__name__}.{kind}")) if kind in names() else None


def read(file: TensorFile, identity: Identity, ask: Ask) -> Content:
    """What is in ``file``. Raises ``Unsupported`` for a kind that no pipeline takes, ``UsageProblem`` for unknown settings."""
    if find(identity.kind) is None:
        hint = f"hubtool inspect {file.path}"
        raise Unsupported(f"{_called(identity)} cannot be loaded into a pipeline", path=file.path, hint=hint)
    return check(identity.kind, ask.settings).read(file, identity, ask)


def check(name: str, settings: Iterable[str]) -> Kind:
    """The module of a kind. Raises ``UsageProblem`` for settings that it does not have, ``Unsupported`` for no such kind."""
    kind = find(name)
    if kind is None:
        raise Unsupported(f"no pipeline takes the kind {name}")
    unknown = sorted({*settings} - {*kind.SETTINGS})
    if unknown:
        known = ", ".join(kind.SETTINGS) or "nothing"
        raise UsageProblem(f"{name} has no setting {', '.join(unknown)}", hint=f"there can be set: {known}")
    return kind


def setting(ask: Ask, known: Mapping[str, Any], name: str) -> Any:
    """The value of a setting, asked for or the default. Raises ``BadValues`` where a number has another type than the default."""
    value, usual = ask.settings.get(name, known[name]), known[name]
    fits = value is None or usual is None or type(value) is type(usual) or (type(usual) is float and type(value) is int)
    if not fits:
        raise BadValues(f"{name} = {value!r}: {type(usual).__name__} expected")
    return value


def _called(identity: Identity) -> str:
    if identity.kind == "unknown":
        return "what this is could not be told, and it"
    return f"this is of kind {identity.kind}, which"
