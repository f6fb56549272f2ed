"""The words of a pipeline's tokenizers, read from their JSON documents without running any tokenizer.

Facts: ``vocab.json`` (CLIP), ``tokenizer.json`` (tokenizers: ``model.vocab`` and ``added_tokens``), ``added_tokens.json`` and
``added_tokens_decoder`` of ``tokenizer_config.json`` (transformers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hubtool.errors import FileError
from hubtool.formats.documents import read_json

Pairs = Iterator[tuple[int, str]]
Reader = Callable[[Mapping[str, Any]], Pairs]


def words(root: Path, component: str) -> dict[int, str]:
    """id -> word of the tokenizer beside a text encoder; empty for a single file, and where no document can be read.

    ``root``: a diffusers folder; ``component``: ``text_encoder``, ``text_encoder_2`` ...
    """
    return _read(root, component, _READERS)


def added(root: Path, component: str) -> dict[int, str]:
    """As ``words``, only those that were added to the tokenizer after it was made: special words and new tokens."""
    return _read(root, component, _ADDED)


def _read(root: Path, component: str, readers: Mapping[str, Reader]) -> dict[int, str]:
    folder = root / component.replace("text_encoder", "tokenizer")
    found: dict[int, str] = {}
    for name, reader in readers.items():
        document = _document(folder / name)
        if isinstance(document, Mapping):
            found.update(reader(document))
    return found


def _document(path: Path) -> Any:
    try:
        return read_json(path) if path.is_file() else None
    except FileError:  # names are a convenience: vectors without them are still told apart by their numbers
        return None


def _by_word(document: Mapping[str, Any]) -> Pairs:
    yield from ((number, word) for word, number in document.items() if type(number) is int)


def _tokenizers(document: Mapping[str, Any]) -> Pairs:
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        yield from _by_word(vocabulary)
    elif isinstance(vocabulary, list):  # unigram: [word, score] by id
        yield from ((at, row[0]) for at, row in enumerate(vocabulary) if isinstance(row, list) and _word(row[:1]))
    yield from _added(document)


def _added(document: Mapping[str, Any]) -> Pairs:
    rows = document.get("added_tokens")
    for one in rows if isinstance(rows, list) else ():
        if isinstance(one, Mapping) and type(one.get("id")) is int and _word([one.get("content")]):
            yield one["id"], one["content"]


def _word(values: Iterable[Any]) -> bool:
    found = list(values)
    return bool(found) and all(isinstance(value, str) for value in found)


def _config(document: Mapping[str, Any]) -> Pairs:
    rows = document.get("added_tokens_decoder")
    for number, one in rows.items() if isinstance(rows, Mapping) else ():
        if number.isdecimal() and isinstance(one, Mapping) and _word([one.get("content")]):
            yield int(number), one["content"]


_ADDED: Mapping[str, Reader] = {
    "tokenizer.json": _added,
    "added_tokens.json": _by_word,
    "tokenizer_config.json": _config,
}
_READERS: Mapping[str, Reader] = {"vocab.json": _by_word, **_ADDED, "tokenizer.json": _tokenizers}
