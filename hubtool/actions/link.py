"""Recording that a file of the library is a file of a repository: proven by its hash, or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from hubtool.actions.outdated import ref_of
from hubtool.actions.pull_record import card_facts
from hubtool.errors import FileMissing, HubtoolError, NotFound
from hubtool.hub.comparing import same
from hubtool.registry import browse, hub_facts
from hubtool.registry.hub_facts import Origin

if TYPE_CHECKING:
    from hubtool.hub.client import Client, Entry
    from hubtool.registry.records import Row
    from hubtool.registry.store import Store

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Linked:
    """The artifact and the file of a repository that it proved to be. ``recorded``: False for a dry run."""

    row: Row
    origin: Origin
    recorded: bool

    def to_json(self) -> dict[str, Any]:
        origin = self.origin
        facts = {
            "id": self.row.id,
            "ref": origin.ref,
            "endpoint": origin.endpoint,
            "repo": origin.repo,
            "file": origin.path,
        }
        return {**facts, "commit": origin.commit, "sha256": self.row.sha256, "recorded": self.recorded}


def link(store: Store, ref: str, target: str, *, client: Client | None = None, dry_run: bool = False) -> Linked:
    """Tie the artifact ``ref`` to ``target`` (a repository, a folder or a file of one), if a file there has its very bytes.

    Nothing is downloaded: the hub's listing gives the hashes. Raises NotFound, HubError, HubtoolError where the bytes differ.
    """
    from hubtool.hub.client import Client
    from hubtool.registry.hub_store import record_card, record_origin

    row = browse.find(store, ref)
    place = ref_of(target)
    client = client or Client()
    resolved = client.resolve(place)
    entries = _below(client.tree(resolved.ref), place.path)
    if not entries:
        raise NotFound(f"{place} is no file or folder of the repository", hint=f"hubtool scan hf://{place.repo}")
    mine = Origin(client.endpoint, place.repo, "", resolved.commit, "linked", place.branch, _sha256(row), _blob_id(row))
    entry = next((entry for entry in entries if same(mine, entry)), None)
    if entry is None:
        raise _differs(row, entries, str(place))
    origin = replace(
        mine, path=entry.path, sha256=entry.sha256, etag=None if entry.sha256 else entry.oid, size=entry.size
    )
    if not dry_run:
        record_origin(store, row.key, origin)
        if resolved.card and hub_facts.card(store, client.endpoint, place.repo) is None:
            record_card(store, card_facts(client.endpoint, place.repo, resolved.commit, resolved.card, None), [row.key])
    return Linked(row, origin, not dry_run)


def _below(entries: Sequence[Entry], path: str | None) -> list[Entry]:
    """The file at ``path``, or the files below it; the shortest names first, so that a root file is preferred to a copy of it."""
    found = [entry for entry in entries if path is None or entry.path == path or entry.path.startswith(f"{path}/")]
    return sorted(found, key=lambda entry: (entry.path.count("/"), entry.path))


def _sha256(row: Row) -> str:
    if row.sha256 is None:
        place = row.places[0].path if row.places else row.id
        raise HubtoolError("the file has not been hashed yet", path=place, hint=f"hubtool scan {place}")
    return row.sha256


def _blob_id(row: Row) -> str | None:
    """Git's id of the content: what a hub knows of a small file that is not in LFS. None where the file is not at hand."""
    place = next((place for place in row.places if place.state == "present" and place.link != "folder"), None)
    if place is None or place.size > 16 * _CHUNK:
        return None
    digest = hashlib.sha1(b"blob %d\0" % place.size, usedforsecurity=False)
    try:
        with open(place.path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise FileMissing("the file is gone", path=place.path, hint="hubtool scan") from error
    return digest.hexdigest()


def _differs(row: Row, entries: Sequence[Entry], where: str) -> HubtoolError:
    name = os.path.basename(row.places[0].path) if row.places else ""
    names = [entry.path for entry in entries]
    near = get_close_matches(name, names, n=1, cutoff=0.4) or (names if len(names) == 1 else [])
    held = next((entry for entry in entries if near and entry.path == near[0]), None)
    told = f"; {held.path} has {held.sha256 or held.oid}" if held else ""
    return HubtoolError(
        f"no file of {where} has the bytes of {name or row.id} (sha256 {row.sha256}){told}",
        hint="another version of it may be an older commit: name it as owner/name@commit",
    )
