"""``dups``: artifacts that are the same, by what was computed from their bytes; never by what somebody claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.errors import UsageProblem
from hubtool.registry import browse
from hubtool.registry.query import parse
from hubtool.registry.records import Place, Reader, Row

TIERS = ("exact", "payload", "content")
COLUMNS = ("group", "tier", "keep", "size", "id", "path")
_HASH = {"payload": "payload_sha256", "content": "content_id"}
_Order = Callable[[Row, Place], tuple[Any, ...]]
_RULES: dict[str, _Order] = {
    "oldest": lambda row, place: (row.added, place.mtime_ns, place.path),
    "newest": lambda row, place: (-row.added, -place.mtime_ns, place.path),
    "shortest": lambda row, place: (len(place.path), place.path),
    "tagged": lambda row, place: (not row.tags, row.added, place.path),
}
RULES = tuple(_RULES)


@dataclass(frozen=True, slots=True)
class Group:
    """Files that are the same: the first is the one to keep. ``tier``: exact (all bytes), payload (all tensors' bytes), content (weights)."""

    tier: str
    members: tuple[tuple[Row, Place], ...]

    @property
    def wasted(self) -> int:
        """Bytes that the others take."""
        return sum(place.size for _, place in self.members[1:])

    def rows(self, number: int) -> Iterator[dict[str, Any]]:
        """Rows of a listing."""
        for at, (row, place) in enumerate(self.members):
            head = {
                "group": number,
                "tier": self.tier,
                "keep": at == 0,
                "size": place.size,
                "id": row.id,
                "path": place.path,
            }
            yield {**head, "sha256": row.sha256, "layout": row.layout, "tags": list(row.tags)}


def duplicates(reader: Reader, words: Sequence[str] = (), *, tier: str = "exact", keep: str = "oldest") -> list[Group]:
    """Groups of the same files among those that a query finds, the greatest waste first.

    ``exact``: equal SHA256, on different inodes. ``payload``: equal but for the header. ``content``: the same weights in another layout or
    container. A wider tier leaves out groups that are wholly exact. Hard links waste nothing and are no duplicates.
    """
    if tier not in TIERS or keep not in RULES:
        raise UsageProblem(
            f"no such tier or rule: {tier}, {keep}", hint=f"tiers: {', '.join(TIERS)}; rules: {', '.join(RULES)}"
        )
    rows = browse.select(reader, parse(words))
    groups: dict[str, list[tuple[Row, Place]]] = {}
    inodes = _inodes(reader)
    for key, row in _keyed(reader, rows, tier):
        groups.setdefault(key, []).extend(_places(row, inodes))
    found = [
        Group(tier, tuple(sorted(members, key=lambda one: _RULES[keep](*one))))
        for members in groups.values()
        if len(members) > 1
    ]
    wide = [group for group in found if tier == "exact" or len({row.key for row, _ in group.members}) > 1]
    return sorted(wide, key=lambda group: (-group.wasted, group.members[0][1].path))


def _keyed(reader: Reader, rows: Sequence[Row], tier: str) -> Iterator[tuple[str, Row]]:
    if tier == "exact":
        yield from ((row.sha256, row) for row in rows if row.sha256)
        return
    column = _HASH[tier]
    known = dict(reader.rows(f"SELECT id, {column} FROM artifact WHERE {column} IS NOT NULL"))
    yield from ((known[row.key], row) for row in rows if row.key in known)


def _inodes(reader: Reader) -> dict[int, tuple[int, int]]:
    rows = reader.rows("SELECT id, device, inode FROM location WHERE state = 'present' AND link = 'file'")
    return {row[0]: (row[1], row[2]) for row in rows}


def _places(row: Row, inodes: dict[int, tuple[int, int]]) -> list[tuple[Row, Place]]:
    """The places of an artifact, one for each inode; folders and links are left out."""
    found = {inodes[place.id]: place for place in reversed(row.places) if place.id in inodes}
    return [(row, place) for place in found.values()]
