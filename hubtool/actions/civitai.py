"""What Civitai knows about the files of the library: asked by hash, in batches, kept raw, and only when asked for.

An answer is kept for a month, "not known" for a week; a failure is neither, and never takes away what was known before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hubtool.errors import HubError, HubtoolError, PartialFailure
from hubtool.hub.civitai_text import EMPTY, Facts, claimed, facts, find_file
from hubtool.registry import browse, hub_facts
from hubtool.registry.columns import batches
from hubtool.registry.hub_facts import Answer, Claims
from hubtool.registry.query import parse
from hubtool.registry.records import Reader, Row

if TYPE_CHECKING:
    from hubtool.hub.civitai import Civitai, Version
    from hubtool.registry.store import Store

DAY = 86_400
KNOWN_FOR = 30 * DAY
UNKNOWN_FOR = 7 * DAY
SOURCE = "civitai"
_AUTOV3 = "autov3:"  # key of the answer to a look-up by the hash of the tensors
COLUMNS = ("id", "status", "name", "version", "base_model", "path")
Asked = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Found:
    """One artifact: ``status`` is known, unknown, unhashed (scan it first) or failed."""

    row: Row
    status: str
    facts: Facts | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of a listing."""
        path = self.row.places[0].path if self.row.places else ""
        said = self.facts.to_json() if self.facts else {}
        short = {name: said.get(name) for name in ("name", "version", "base_model")}
        return {
            "id": self.row.id,
            "status": self.status,
            **short,
            "path": path,
            "sha256": self.row.sha256,
            SOURCE: said or None,
        }


@dataclass(slots=True)
class Lookup:
    """What became of a look-up. ``asked``: hashes that were sent; ``failure``: why it stopped early, if it did."""

    found: list[Found] = field(default_factory=list)
    asked: int = 0
    failure: HubtoolError | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many artifacts have which status."""
        names = ("known", "unknown", "unhashed", "failed")
        return {name: sum(found.status == name for found in self.found) for name in names}

    def to_json(self) -> dict[str, Any]:
        failure = self.failure.to_json() if self.failure else None
        return {
            "asked": self.asked,
            **self.counts,
            "failure": failure,
            "artifacts": [found.to_json() for found in self.found],
        }

    def raise_failure(self) -> None:
        """Raise the failure: as PartialFailure where some hashes were answered, as it is where none was."""
        if self.failure is None:
            return
        failed = self.counts["failed"]
        if failed < len(self.found):
            raise PartialFailure(
                f"{failed} artifacts were not looked up: {self.failure.message}", hint=self.failure.hint
            )
        raise self.failure


def chosen(reader: Reader, refs: Sequence[str]) -> list[Row]:
    """The artifacts that ``refs`` name, or every present one."""
    if refs:
        return list({row.key: row for row in (browse.find(reader, ref) for ref in refs)}.values())
    found = browse.select(reader, parse("-is:corrupt"))
    return [row for row in found if any(place.link != "folder" for place in row.places)]  # Civitai knows files only


def look_up(
    store: Store, refs: Sequence[str] = (), *, client: Civitai | None = None, refresh: bool = False, edited: bool = False,
    progress: Asked | None = None, clock: Callable[[], float] = time.time,
) -> Lookup:  # fmt: skip
    """Ask Civitai about artifacts whose SHA256 is known and whose last answer is not fresh (all of them with ``refresh``).

    ``edited`` also asks for the unknown ones by the hash of their tensors (AutoV3), one request each: it finds files whose header was
    edited. ``progress`` is called after each request. Every answer is stored before the next request goes out; what was learnt before a
    failure stays, and ``Lookup.failure`` says why the rest is missing.
    """
    from hubtool.hub.civitai import Civitai

    rows = chosen(store, refs)
    client = client or Civitai()
    asked = _unanswered(store, rows, refresh, clock())
    by_digest = {row.sha256: row for row in rows if row.sha256}
    answered = set(by_digest) - asked
    result = Lookup(asked=len(asked))
    try:
        for digests, versions in client.versions(sorted(asked)):
            _keep(store, client, digests, versions, clock)
            _claim(store, [by_digest[digest] for digest in digests])
            answered.update(digests)
            _tick(progress)
        if edited:
            _look_up_edited(store, client, rows, refresh, progress, clock)
    except HubError as error:
        result.failure = error
    for some in batches(rows):
        known = hub_facts.answers(store, (row.sha256 for row in some if row.sha256))
        result.found += [_found(store, row, known, answered) for row in some]
    return result


def plan(reader: Reader, refs: Sequence[str] = (), *, refresh: bool = False) -> set[str]:
    """The hashes that ``look_up`` would send now."""
    return _unanswered(reader, chosen(reader, refs), refresh, time.time())


def _unanswered(reader: Reader, rows: Sequence[Row], refresh: bool, now: float) -> set[str]:
    digests = {row.sha256 for row in rows if row.sha256}
    before = {} if refresh else hub_facts.answered(reader, digests)
    return {digest for digest in digests if digest not in before or before[digest][1] <= now}


def _tick(progress: Asked | None) -> None:
    if progress is not None:
        progress()


def _keep(
    store: Store, client: Civitai, digests: Sequence[str], versions: Sequence[Version], clock: Callable[[], float]
) -> None:
    from hubtool.registry.hub_store import record_answers

    raw = {digest: version.raw for version in versions for digest in _digests(version.document)}
    record_answers(store, [_answer(client.base, digest, raw.get(digest), clock()) for digest in digests])


def _digests(document: Mapping[str, Any]) -> Iterator[str]:
    """SHA256 of every file of a version."""
    files = document.get("files")
    for file in files if isinstance(files, list) else ():
        digest = claimed(file).get("sha256") if isinstance(file, dict) else None
        if digest:
            yield digest


def _answer(source: str, digest: str, raw: bytes | None, now: float) -> Answer:
    status, keep = (200, KNOWN_FOR) if raw is not None else (404, UNKNOWN_FOR)
    return Answer(digest, source, status, raw, int(now), int(now) + keep)


def _look_up_edited(
    store: Store, client: Civitai, rows: Sequence[Row], refresh: bool, progress: Asked | None, clock: Callable[[], float]
) -> None:  # fmt: skip
    """Ask by AutoV3 for those that no SHA256 found. An answer counts only if it names that very hash; "not known" is kept too."""
    from hubtool.registry.hub_store import record_answers

    for row, short in _edited_candidates(store, rows, refresh, clock()):
        version = client.version(short.upper())
        _tick(progress)
        digest = row.sha256
        if version is None or digest is None or find_file(version.document, _computed(store, row))[1] is None:
            record_answers(store, [_answer(client.base, _AUTOV3 + short, None, clock())])
        else:
            record_answers(store, [_answer(client.base, digest, version.raw, clock())])
            _claim(store, [row])


def _edited_candidates(reader: Reader, rows: Sequence[Row], refresh: bool, now: float) -> list[tuple[Row, str]]:
    """(artifact, AutoV3) of those that are not known by their SHA256, and were not asked for by AutoV3 lately."""
    known = hub_facts.answered(reader, (row.sha256 for row in rows if row.sha256))
    unknown = [row for row in rows if row.sha256 in known and known[row.sha256][0] != 200]
    pairs = [(row, _computed(reader, row).get("payload_sha256", EMPTY)[:12]) for row in unknown]
    tried = {} if refresh else hub_facts.answered(reader, (_AUTOV3 + short for _, short in pairs))
    return [(row, short) for row, short in pairs if short != EMPTY and tried.get(_AUTOV3 + short, (0, 0))[1] <= now]


def _computed(reader: Reader, row: Row) -> dict[str, str]:
    return {**browse.hashes(reader, row.key).get("computed", {}), **({"sha256": row.sha256} if row.sha256 else {})}


def _found(reader: Reader, row: Row, answers: Mapping[str, Answer], answered: Iterable[str]) -> Found:
    if row.sha256 is None:
        return Found(row, "unhashed")
    answer = answers.get(row.sha256)
    document = answer.document if answer else None
    said = facts(document, _computed(reader, row)) if document else None
    if answer is None or row.sha256 not in answered:
        return Found(row, "failed", said)
    if said is None or answer.status != 200:
        return Found(row, "unknown", said)
    return Found(row, "known", said)


def _claim(store: Store, rows: Sequence[Row]) -> None:
    """Trigger words and hashes of the answers that prove to be about these very files go into the library as claims of Civitai."""
    from hubtool.registry.hub_store import record_claims

    pairs = [(row, said) for row in rows if (said := known(store, row)) is not None and said.match is not None]
    record_claims(
        store,
        [
            Claims(row.key, SOURCE, said.trigger_words, said.hashes if said.match == "sha256" else {})
            for row, said in pairs
        ],
    )


def known(reader: Reader, row: Row) -> Facts | None:
    """What Civitai said about an artifact when it was last asked; None where it never said anything. No network."""
    if row.sha256 is None:
        return None
    answer = hub_facts.answers(reader, [row.sha256]).get(row.sha256)
    document = answer.document if answer else None
    return facts(document, _computed(reader, row)) if document else None
