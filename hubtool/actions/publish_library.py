"""What the library adds to a publication, and what it keeps of one: facts about the artifact, the last receipt, the new receipt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hubtool.actions.publish_facts import Known
from hubtool.actions.publish_result import Options
from hubtool.actions.where import library_exists
from hubtool.errors import RegistryError
from hubtool.hub import cards
from hubtool.hub.layout import CARD
from hubtool.hub.uploads import Held, Remote, Upload

_NOT_MADE = frozenset({"preview", "card", "index"})  # roles of files that are no form of an artifact

if TYPE_CHECKING:
    from hubtool.hub.civitai_text import Facts
    from hubtool.hub.publishing import Published
    from hubtool.registry.hub_facts import Receipt
    from hubtool.registry.records import Reader, Row


def known(path: Path, library: str | None) -> Known:
    """What the library knows of the artifact at ``path``; nothing where there is no library or it is not in it."""
    if not library_exists(library):
        return Known()
    from hubtool.actions.library import reading
    from hubtool.registry import browse
    from hubtool.registry.text import raw_path

    with reading(library) as reader:
        place = browse.at_path(reader, raw_path(os.path.abspath(path)))
        if place is None:
            return Known()
        row = browse.by_key(reader, place.artifact_id)
        parents = browse.lineage(reader, place.artifact_id)["parents"]
        title = browse.notes(reader, place.artifact_id).get("title")
        merged = any(edge["op"] == "merge" for edge in parents)
        bases = _bases(reader, place.artifact_id) if merged else ()
        return Known(row.trigger_words, title, bases, merged, _civitai(reader, row))


def _civitai(reader: Reader, row: Row) -> Facts | None:
    """What Civitai said when it was last asked, where a hash proves that it is about this very file."""
    from hubtool.actions import civitai

    found = civitai.known(reader, row)
    return found if found and found.match else None


def _bases(reader: Reader, key: int) -> tuple[str, ...]:
    """Repositories that the parents of an artifact were pulled from or published to, in the order of the parents."""
    from hubtool.registry import hub_facts

    rows = reader.rows(
        "SELECT parent_id FROM lineage WHERE child_id = :key AND parent_id IS NOT NULL ORDER BY position", {"key": key}
    )
    found = [origin.repo for row in rows for origin in hub_facts.origins(reader, artifact=int(row[0]))]
    return tuple(dict.fromkeys(found))


def last_state(endpoint: str, repo: str, options: Options, ours: cards.Card) -> tuple[Remote, cards.Record | None]:
    """The repository as the last receipt knows it, and what of its card was ours: a plan without the hub."""
    if not library_exists(options.library):
        return Remote(), None
    from hubtool.actions.library import reading
    from hubtool.registry import hub_facts

    with reading(options.library) as reader:
        receipt = hub_facts.last_receipt(reader, endpoint, repo, options.revision)
    if receipt is None:
        return Remote(), None
    files = {one.path: Held(one.size, one.sha256 or None, one.etag) for one in receipt.files}
    remote = Remote(receipt.commit, files, receipt.card)
    if receipt.card is None:
        return remote, None
    written = cards.parse(receipt.card)
    mine = {key: value for key, value in written.front.items() if key in ours.front}
    return remote, cards.Record(mine, cards.record(written).blocks)


def keep_receipt(endpoint: str, repo: str, done: Published, options: Options) -> list[str]:
    """Write the receipt; the publication stands whatever happens here, so a busy library is only told."""
    from hubtool.actions.library import open_store
    from hubtool.registry import hub_store

    try:
        with open_store(options.library) as store:
            last = hub_store.last_receipt(store, endpoint, repo)
            if done.created or last is None or last.commit != done.commit:
                hub_store.record_receipt(store, _receipt(store, endpoint, repo, done))
    except RegistryError as error:
        return [f"the receipt was not kept: {error.message}"]
    return []


def _receipt(reader: Reader, endpoint: str, repo: str, done: Published) -> Receipt:
    from hubtool.registry.hub_facts import PublishedFile, Receipt, artifacts_by_sha256

    sent = {one.path: one for one in done.desired.uploads}
    digests = {path: sent[path].sha256 if path in sent else held.sha256 or "" for path, held in done.files.items()}
    known = artifacts_by_sha256(reader, [digest for digest in digests.values() if digest])
    rows = [
        PublishedFile(
            path, digests[path], held.size, held.git_sha1, known.get(digests[path]) or _source(reader, sent.get(path))
        )
        for path, held in sorted(done.files.items())
    ]
    card = sent.get(CARD)
    text = card.source.decode() if card and isinstance(card.source, bytes) else None
    return Receipt(
        endpoint, repo, done.commit, tuple(rows), done.revision, done.parent, done.pull_request, text, card.sha256 if card else None
    )  # fmt: skip


def _source(reader: Reader, sent: Upload | None) -> int | None:
    """The artifact that a published file was made from: cleaned or converted, it has bytes of its own."""
    from hubtool.registry import browse
    from hubtool.registry.text import raw_path

    if sent is None or sent.origin is None or sent.role in _NOT_MADE:
        return None
    place = browse.at_path(reader, raw_path(os.path.abspath(sent.origin)))
    return place.artifact_id if place else None
