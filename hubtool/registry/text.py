"""Text that a database can hold: no lone surrogates, no NUL; folded keys for searching; file names as bytes with a readable twin."""

from __future__ import annotations

import os
import unicodedata

_FIRST = "ghjkmnpqrstvwxyz"  # no hex digit: an id can never be taken for the prefix of a hash
_REST = "0123456789abcdefghjkmnpqrstvwxyz"


def clean(text: str) -> str:
    """``text`` without what SQLite or PostgreSQL refuse to store: lone surrogates become ``?``, NUL becomes a space."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


def fold(text: str) -> str:
    """The key under which ``text`` is searched: NFC and casefolded, so that A equals a on every database."""
    if text.isascii():  # nearly every name; normalising is the slow part
        return text.lower().replace("\0", " ")
    return unicodedata.normalize("NFC", clean(text).casefold())


def display(raw: bytes) -> str:
    """A file name for people. Undecodable bytes are replaced: only the bytes themselves open the file."""
    return clean(raw.decode("utf-8", "replace"))


def raw_path(path: str | os.PathLike[str]) -> bytes:
    """The exact bytes of a path, as ``os.fsencode`` gives them."""
    return os.fsencode(path)


def like(needle: str) -> str:
    """``needle`` with the wildcards of LIKE escaped by ``!``."""
    return needle.replace("!", "!!").replace("%", "!%").replace("_", "!_")


def signed64(number: int | None) -> int | None:
    """An inode or device number as a signed 64-bit integer; some file systems use all 64 bits."""
    return number if number is None or number < 2**63 else number - 2**64


def new_uid() -> str:
    """A fresh 12-character id: random, lower case, never the beginning of a hex digest."""
    import secrets  # only writers need it, and it costs readers 7 ms

    return secrets.choice(_FIRST) + "".join(secrets.choice(_REST) for _ in range(11))
