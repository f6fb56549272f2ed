"""What an adapter has to be set beside its strength: asked by the adapter's name, checked against its kind, kept in the picture's recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.actions.recipe import RunOptions, fingerprint, resolve
from hubtool.actions.refs import locate
from hubtool.errors import BadValues, UsageProblem
from hubtool.ops.recipe import Input
from hubtool.pipelines import kinds
from hubtool.pipelines.kinds.aesthetic_embedding import projection_beside
from hubtool.pipelines.pictures import Part

Settings = Mapping[Any, Mapping[str, Any]]
ALONE: Mapping[str, Any] = MappingProxyType({"pair": False})
TOKENS = "textual_inversion"  # its halves are parts of their own in a recipe, so that nothing else is to be kept of it
_BESIDE: Mapping[str, Callable[[Path], Path | None]] = {"projection": projection_beside}
_WORDS = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def asked(settings: Settings, ref: str | Path, name: str) -> dict[str, Any]:
    """What is asked for an adapter, by the reference it was given as, or by the ``name`` of its file with or without suffix."""
    called = (os.fspath(ref), name, Path(name).stem)
    return {word: value for key, own in settings.items() if os.fspath(key) in called for word, value in own.items()}


def check_named(settings: Settings, called: Iterable[tuple[str | Path, str]]) -> None:
    """``called``: (reference, file name) of every adapter. Raises ``UsageProblem`` for settings of an adapter that is not there."""
    known = list(called)
    for key in settings:
        if not any(os.fspath(key) in (os.fspath(ref), name, Path(name).stem) for ref, name in known):
            raise UsageProblem(f"no adapter is called {os.fspath(key)!r}", hint=f"{[name for _, name in known]}")


def settled(kind: str, path: Path, wanted: Mapping[str, Any], library: str | None = None) -> dict[str, Any]:
    """Every setting of the adapter at ``path``, as ``hubtool.load`` takes them: what is wanted, else what lies beside it, else the default.

    A text is read by the type of the default: a number, on or off, or a file (path or REF; nothing: none). Raises ``UsageProblem`` for
    words that the kind does not have and for texts that cannot be read, ``BadValues`` for values of another type, and what finding a
    file raises.
    """
    found = kinds.check(kind, wanted)
    usual = {word: _BESIDE[word](path) if word in _BESIDE else value for word, value in found.SETTINGS.items()}
    given = {word: _value(word, value, found.SETTINGS[word], library) for word, value in wanted.items()}
    return {**usual, **given}


def _value(word: str, value: Any, usual: Any, library: str | None) -> Any:
    if usual is None:
        return _file(word, value, library)
    read = _read(value, type(usual)) if isinstance(value, str) else value
    if type(usual) is float and type(read) is int:
        read = float(read)
    if type(read) is not type(usual) or (isinstance(read, float) and not math.isfinite(read)):
        problem = UsageProblem if isinstance(value, str) else BadValues
        raise problem(f"{word} = {value!r}: {_CALLED[type(usual)]} expected", hint=f"{word}={_written(usual)}")
    return read


def _file(word: str, value: Any, library: str | None) -> Path | None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise BadValues(f"{word} = {value!r}: a file expected")
    return locate(value, library) if value else None


_CALLED = {bool: "on or off", int: "a whole number", float: "a number"}


def _read(text: str, kind: type) -> Any:
    """None for a text that is no such value."""
    if kind is bool:
        return _WORDS.get(text.lower())
    try:
        return kind(text)
    except ValueError:
        return None


def _written(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else f"{value}"


def kept(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a recipe keeps them: files by name and SHA-256."""
    if kind == TOKENS:
        return {}
    return {
        word: {"name": value.resolve().name, "sha256": fingerprint(value)} if isinstance(value, Path) else value
        for word, value in settings.items()
    }


def of_part(part: Part, options: RunOptions) -> Mapping[str, Any]:
    """The settings that a recipe keeps, with their files found. Raises ``NotFound``. Half a pair stays alone: the recipe names the other."""
    if part.kind == TOKENS:
        return ALONE
    return {
        word: resolve(Input(name=value["name"], sha256=value["sha256"]), options)
        if isinstance(value, Mapping)
        else value
        for word, value in part.settings.items()
    }


def described(settings: Mapping[str, Any]) -> str:
    """``steps 5, slerp off, projection text_projection.pt``; what is not set is left out."""
    texts = {word: value["name"] if isinstance(value, Mapping) else value for word, value in settings.items()}
    return ", ".join(f"{word} {_written(value)}" for word, value in texts.items() if value is not None)
