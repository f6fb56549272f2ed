"""What the library knows of hubs: plain records, and the SELECTs that read them with any ``Reader`` (no SQLAlchemy)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hubtool.registry.records import Reader

MANY = 400  # values named in one statement
MAX_ANSWER = 64 << 20  # bytes of an inflated answer


@dataclass(frozen=True, slots=True)
class Origin:
    """An artifact is this file of this repository at this commit. ``how``: pulled, published or linked.

    ``sha256`` and ``etag`` (git blob sha1) are what the hub says about the file; ``revision`` is what was asked for.
    """

    endpoint: str
    repo: str
    path: str
    commit: str
    how: str
    revision: str = "main"
    sha256: str | None = None
    etag: str | None = None
    size: int | None = None
    at: int = 0
    artifact: int = 0  # key of the artifact; filled in when read

    @property
    def ref(self) -> str:
        """``hf://owner/name[@rev]/path``."""
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf://{self.repo}{at}/{self.path}"


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card says. ``raw`` is the text it was read from."""

    endpoint: str
    repo: str
    commit: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_models: tuple[str, ...] = ()
    relation: str | None = None
    trigger_words: tuple[str, ...] = ()
    raw: str | None = None
    at: int = 0


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file of a commit of ours, as read back from the hub. ``artifact``: key, where it is one of the library's."""

    path: str
    sha256: str
    size: int
    etag: str | None = None
    artifact: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """One publication: the commit and every file the repository held after it."""

    endpoint: str
    repo: str
    commit: str
    files: tuple[PublishedFile, ...]
    revision: str = "main"
    parent_commit: str | None = None
    pull_request: str | None = None
    card: str | None = None
    card_sha256: str | None = None
    at: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """Civitai's answer to a SHA256. ``status`` 404: asked and not known; ``body`` then is an earlier answer, if there was one."""

    sha256: str
    source: str
    status: int
    body: bytes | None
    fetched_at: int
    expires_at: int

    @property
    def document(self) -> dict[str, Any] | None:
        """The model version as Civitai describes it; None where it never did."""
        if self.body is None:
            return None
        found = json.loads(self.body)
        return found if isinstance(found, dict) else None


@dataclass(frozen=True, slots=True)
class Claims:
    """What a hub (``source``: hub, civitai) says about an artifact that is proven to be its file. They replace what it said before."""

    artifact: int
    source: str
    trigger_words: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)


_ORIGIN = "endpoint, repo, path, commit_id, how, revision, sha256, etag, size, at, artifact_id"
_CARD = "endpoint, repo, commit_id, license, license_name, license_link, base_models, relation, trigger_words, raw, at"
_RECEIPT = "id, endpoint, repo, commit_id, NULL, revision, parent_commit, pull_request, card, card_sha256, at"


def origins(reader: Reader, *, artifact: int | None = None, repo: str | None = None) -> list[Origin]:
    """The origins of an artifact, of a repository, or all; the newest last."""
    sql = f"SELECT {_ORIGIN} FROM hub_origin WHERE 1 = 1"
    given: dict[str, Any] = {}
    for column, value in (("artifact_id", artifact), ("repo", repo)):
        if value is not None:
            sql, given = f"{sql} AND {column} = :{column}", {**given, column: value}
    return [Origin(*row) for row in reader.rows(f"{sql} ORDER BY at, id", given)]


def successors(reader: Reader) -> dict[int, int]:
    """Artifacts that lie nowhere any more because their file was rewritten in place, and the artifact that lies there now."""
    rows = reader.rows(
        "SELECT old.artifact_id, new.artifact_id FROM location old JOIN location new ON new.root_id = old.root_id "
        "AND new.relpath = old.relpath AND new.artifact_id <> old.artifact_id AND new.state IN ('present', 'offline') "
        "WHERE old.state = 'superseded' AND NOT EXISTS (SELECT 1 FROM location l WHERE l.artifact_id = old.artifact_id "
        "AND l.state <> 'superseded') ORDER BY old.id"
    )
    return {int(old): int(new) for old, new in rows}


def card(reader: Reader, endpoint: str, repo: str) -> Card | None:
    """What the card of a repository said when it was last read."""
    sql = f"SELECT {_CARD} FROM hub_card WHERE endpoint = :endpoint AND repo = :repo"
    rows = reader.rows(sql, {"endpoint": endpoint, "repo": repo})
    return _card(*rows[0]) if rows else None


def _card(*values: Any) -> Card:
    found = Card(*values)
    return replace(found, base_models=_words(found.base_models), trigger_words=_words(found.trigger_words))


def _words(text: Any) -> tuple[str, ...]:
    return tuple(json.loads(text))


def receipts(reader: Reader, *, repo: str | None = None) -> list[Receipt]:
    """Our publications, of one repository or all; the oldest first."""
    only = "WHERE repo = :repo" if repo else ""
    rows = reader.rows(f"SELECT {_RECEIPT} FROM publication {only} ORDER BY at, id", {"repo": repo} if repo else {})
    return [_receipt(reader, row) for row in rows]


def last_receipt(reader: Reader, endpoint: str, repo: str, revision: str | None = None) -> Receipt | None:
    """The newest publication to a repository (to one revision of it, where given)."""
    sql = f"SELECT {_RECEIPT} FROM publication WHERE endpoint = :endpoint AND repo = :repo"
    given = {"endpoint": endpoint, "repo": repo}
    if revision is not None:
        sql, given = f"{sql} AND revision = :revision", {**given, "revision": revision}
    rows = reader.rows(f"{sql} ORDER BY at DESC, id DESC LIMIT 1", given)
    return _receipt(reader, rows[0]) if rows else None


def _receipt(reader: Reader, row: tuple[Any, ...]) -> Receipt:
    sql = "SELECT path, sha256, size, etag, artifact_id FROM publication_file WHERE publication_id = :id ORDER BY path"
    files = tuple(PublishedFile(*found) for found in reader.rows(sql, {"id": row[0]}))
    return replace(Receipt(*row[1:]), files=files)


def artifacts_by_sha256(reader: Reader, digests: Iterable[str]) -> dict[str, int]:
    """Keys of the artifacts whose computed SHA256 is among ``digests``: what need not be downloaded."""
    sql = "SELECT sha256, id FROM artifact WHERE sha256 IN"
    return {row[0]: int(row[1]) for row in _named(reader, sql, [digest.lower() for digest in digests])}


def answered(reader: Reader, digests: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(status, time of expiry) of what Civitai answered to these SHA256 digests, without the answers themselves."""
    sql = "SELECT sha256, status, expires_at FROM civitai_answer WHERE sha256 IN"
    return {row[0]: (int(row[1]), int(row[2])) for row in _named(reader, sql, list(digests))}


def answers(reader: Reader, digests: Iterable[str]) -> dict[str, Answer]:
    """What Civitai answered to these SHA256 digests, expired answers included. An answer may be 100 KB: name hundreds, not thousands."""
    sql = "SELECT sha256, source, status, body, fetched_at, expires_at FROM civitai_answer WHERE sha256 IN"
    found = (Answer(*row) for row in _named(reader, sql, list(digests)))
    return {answer.sha256: replace(answer, body=_inflated(answer.body)) for answer in found}


def _inflated(body: bytes | None) -> bytes | None:
    return None if body is None else zlib.decompressobj().decompress(bytes(body), MAX_ANSWER)


def _named(reader: Reader, sql: str, values: Sequence[str]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    unique = sorted(set(values))
    for at in range(0, len(unique), MANY):
        names = {f"v{number}": value for number, value in enumerate(unique[at : at + MANY])}
        rows += reader.rows(f"{sql} ({', '.join(f':{name}' for name in names)})", names)
    return rows
