"""JSON from strangers: depth counted before parsing, and nothing accepted that another parser would read otherwise."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any, NoReturn

_ROUND = bytes.maketrans(b"[]{}", b"()()")
_OPEN = ord("(")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """Why a document is refused."""


class TooDeepError(JsonError):
    """Nesting that is an attack on the parser rather than a mistake."""


def loads(raw: bytes, *, max_depth: int) -> Any:
    """Parse UTF-8 JSON. Raises ``JsonError`` for depth, duplicate keys, NaN, Infinity, huge integers (4,300 digits), lone surrogates."""
    _check_depth(raw, max_depth)
    text = _text(raw)
    try:
        document = STRICT.decode(text)
    except ValueError as error:
        raise JsonError(f"not JSON: {error}") from None
    if SURROGATE_ESCAPE.search(text):
        _check_surrogates(document)
    return document


def loads_config(raw: bytes, *, max_depth: int) -> Any:
    """Parse JSON as ``json.load`` would (NaN and repeated keys occur in real configs), within ``max_depth``. Raises ``JsonError``."""
    _check_depth(raw, max_depth)
    try:
        return json.loads(_text(raw).removeprefix("\ufeff"))
    except ValueError as error:
        raise JsonError(f"not JSON: {error}") from None


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from None


def _check_depth(raw: bytes, limit: int) -> None:
    """Count nesting outside strings at C speed: each round of removing innermost pairs takes one level off."""
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = rest = b"".join(unescaped.split(b'"')[::2]).translate(_ROUND, _NO_BRACKETS)
    for _ in range(limit):
        rest = rest.replace(b"()", b"")
    if rest and max(accumulate(1 if byte == _OPEN else -1 for byte in brackets)) > limit:
        raise TooDeepError(f"nested deeper than {limit}")


def _check_surrogates(document: Any) -> None:
    """A lone surrogate parses here, and cannot be stored or printed anywhere."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise JsonError("a string holds a lone surrogate") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise JsonError("a key occurs twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
