"""Writing what hubs said and what was published. The records and the reading functions of ``hub_facts`` are importable from here too."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Table, and_, delete, insert, select, update

from hubtool.registry import hub_models
from hubtool.registry.columns import now
from hubtool.registry.hub_facts import (
    Answer,
    Card,
    Claims,
    Origin,
    PublishedFile,
    Receipt,
    answers,
    artifacts_by_sha256,
    card,
    last_receipt,
    origins,
    receipts,
)
from hubtool.registry.models import artifact as artifacts_table
from hubtool.registry.models import hash_, trigger_word
from hubtool.registry.store import Store
from hubtool.registry.text import clean, fold

__all__ = [
    "Answer", "Card", "Claims", "Origin", "PublishedFile", "Receipt", "answers", "artifacts_by_sha256", "card", "last_receipt", "origins", "receipts",
    "record_answers", "record_card", "record_claims", "record_origin", "record_receipt", "replace_origin",
]  # fmt: skip


def record_origin(store: Store, artifact: int, origin: Origin) -> None:
    """Say where an artifact came from or went to; an older statement about the same file and revision is replaced."""
    with store.transaction() as connection:
        _write_origin(connection, artifact, origin)


def replace_origin(store: Store, old: Origin, new: Origin) -> None:
    """The file of a repository that ``old`` named is now found as ``new`` says: another commit, path or name of the repository."""
    table = hub_models.hub_origin.c
    same = {
        "artifact_id": old.artifact,
        "endpoint": old.endpoint,
        "repo": old.repo,
        "path": old.path,
        "revision": old.revision,
    }
    with store.transaction() as connection:
        connection.execute(delete(hub_models.hub_origin).where(*(table[name] == value for name, value in same.items())))
        _write_origin(connection, old.artifact, new)


def _write_origin(connection: Connection, artifact: int, origin: Origin) -> None:
    same = {"endpoint": origin.endpoint, "repo": origin.repo, "path": clean(origin.path), "revision": origin.revision}
    facts = {"how": origin.how, "commit_id": origin.commit, "sha256": origin.sha256, "etag": origin.etag}
    row = {"artifact_id": artifact, **same, **facts, "size": origin.size, "at": origin.at or now()}
    _replace(connection, hub_models.hub_origin, {"artifact_id": artifact, **same}, row)
    if (
        origin.sha256 and origin.how != "published"
    ):  # what was published may be a cleaned or converted form of the artifact
        claim = {"algo": "sha256", "value": origin.sha256.lower(), "artifact_id": artifact, "origin": "hub"}
        _replace(connection, hash_, claim, {**claim, "at": now()})


def _replace(connection: Connection, table: Table, same: dict[str, Any], row: dict[str, Any]) -> None:
    connection.execute(delete(table).where(*(table.c[name] == value for name, value in same.items())))
    connection.execute(insert(table), row)


def record_card(store: Store, facts: Card, artifacts: Iterable[int] = ()) -> None:
    """Keep what a repository's card says, and for the artifacts that came from it its trigger words (source ``hub``) and base models."""
    same = {"endpoint": facts.endpoint, "repo": facts.repo}
    words = [clean(word) for word in facts.trigger_words]
    row = {
        **same,
        "commit_id": facts.commit,
        "license": facts.license,
        "license_name": facts.license_name,
        "license_link": facts.license_link,
        "base_models": json.dumps(facts.base_models),
        "relation": facts.relation,
        "trigger_words": json.dumps(words),
        "raw": None if facts.raw is None else clean(facts.raw),
        "at": facts.at or now(),
    }
    with store.transaction() as connection:
        _replace(connection, hub_models.hub_card, same, row)
        for artifact in artifacts:
            _write_words(connection, artifact, words, "hub")
            _write_base(connection, artifact, facts.base_models)


def record_claims(store: Store, claims: Iterable[Claims]) -> None:
    """Keep what hubs claim about files proven to be theirs: trigger words under their source, hashes with origin ``hub``."""
    with store.transaction() as connection:
        for said in claims:
            _write_words(connection, said.artifact, said.trigger_words, said.source)
            for algo, value in said.hashes.items():
                claim = {"algo": algo, "value": value, "artifact_id": said.artifact, "origin": "hub"}
                _replace(connection, hash_, claim, {**claim, "at": now()})


def _write_words(connection: Connection, artifact: int, words: Sequence[str], source: str) -> None:
    mine = trigger_word.c
    connection.execute(delete(trigger_word).where(mine.artifact_id == artifact, mine.source == source))
    rows = [
        {"artifact_id": artifact, "text": word, "text_key": fold(word), "source": source, "position": position}
        for position, word in enumerate(dict.fromkeys(clean(word) for word in words))
        if word
    ]
    if rows:
        connection.execute(insert(trigger_word), rows)


def _write_base(connection: Connection, artifact: int, bases: Sequence[str]) -> None:
    """What the card names as base, where the file itself names none."""
    text = clean(", ".join(bases))
    if text:
        unsaid = and_(artifacts_table.c.id == artifact, artifacts_table.c.base_model.is_(None))
        connection.execute(update(artifacts_table).where(unsaid).values(base_model=text, base_key=fold(text)))


def record_receipt(store: Store, receipt: Receipt) -> int:
    """Keep the receipt of a publication, and a ``published`` origin for each of its files that is an artifact; the key of the receipt."""
    at = receipt.at or now()
    head = {
        "endpoint": receipt.endpoint,
        "repo": receipt.repo,
        "revision": receipt.revision,
        "commit_id": receipt.commit,
    }
    more = {"parent_commit": receipt.parent_commit, "pull_request": receipt.pull_request, "card": receipt.card}
    table = hub_models.publication
    with store.transaction() as connection:
        values = {**head, **more, "card_sha256": receipt.card_sha256, "at": at}
        key = int(connection.execute(insert(table).returning(table.c.id), values).scalar_one())
        _write_files(connection, key, receipt.files)
        for file in receipt.files:
            if file.artifact is not None:
                _write_origin(connection, file.artifact, _origin(replace(receipt, at=at), file))
    return key


def _write_files(connection: Connection, key: int, files: Sequence[PublishedFile]) -> None:
    rows = [
        {
            "publication_id": key,
            "path": clean(file.path),
            "sha256": file.sha256,
            "etag": file.etag,
            "size": file.size,
            "artifact_id": file.artifact,
        }
        for file in files
    ]
    if rows:
        connection.execute(insert(hub_models.publication_file), rows)


def _origin(receipt: Receipt, file: PublishedFile) -> Origin:
    place = (receipt.endpoint, receipt.repo, file.path, receipt.commit)
    return Origin(*place, "published", receipt.revision, file.sha256, file.etag, file.size, receipt.at)


def record_answers(store: Store, found: Iterable[Answer]) -> None:
    """Keep Civitai's answers. "Not known" never deletes what an earlier answer said."""
    table = hub_models.civitai_answer
    with store.transaction() as connection:
        for answer in found:
            there = table.c.sha256 == answer.sha256
            head = {"source": answer.source, "status": answer.status, "fetched_at": answer.fetched_at}
            values: dict[str, Any] = {**head, "expires_at": answer.expires_at}
            if answer.body is not None:
                values["body"] = zlib.compress(answer.body)
            if connection.execute(select(table.c.sha256).where(there)).first() is None:
                connection.execute(insert(table), {"body": None, **values, "sha256": answer.sha256})
            else:
                connection.execute(update(table).where(there).values(**values))
