"""``sync``: pull what is newer on the hub, publish what changed here, and follow files that moved. The plan comes first, always.

A side that changed is brought to the other only where the other has not changed too: everything else is left alone, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.outdated import EDITED, MISSING, Clients, Comparison, client_for
from hubtool.errors import HubtoolError, PartialFailure
from hubtool.hub.comparing import CHANGED, CURRENT, MOVED
from hubtool.registry import browse
from hubtool.registry.hub_facts import Origin

if TYPE_CHECKING:
    from hubtool.hub.client import Entry
    from hubtool.registry.records import Place
    from hubtool.registry.store import Store

COLUMNS = ("action", "state", "ref", "path", "reason")
PULL, PUBLISH, RECORD, KEEP = "pull", "publish", "record", "keep"


@dataclass(slots=True)
class Step:
    """What is to be done about one file. ``state``: planned, done, failed; ``reason``: why nothing is done, or what went wrong."""

    comparison: Comparison
    action: str
    reason: str = ""
    state: str = "planned"
    error: HubtoolError | None = None

    def to_json(self) -> dict[str, Any]:
        said = self.comparison.to_json()
        failure = {"error": self.error.to_json()} if self.error else {}
        return {"action": self.action, "state": self.state, "reason": self.reason, **said, **failure}


def plan(found: Sequence[Comparison]) -> list[Step]:
    """A step for every comparison that is not simply up to date."""
    steps = [Step(one, *_action(one)) for one in found]
    return [step for step in steps if step.action != KEEP or step.reason]


def _action(one: Comparison) -> tuple[str, str]:
    """(action, reason) by what happened on the hub, what happened here, and whose file it is."""
    status, local, origin = one.verdict.status, one.tie.local, one.tie.origin
    if status == MOVED:
        return RECORD, "the hub has it under another name"
    if status not in (CURRENT, CHANGED):
        return KEEP, one.verdict.reason or f"{status} on the hub"
    if local == MISSING:
        return KEEP, "missing here: hubtool pull brings it back"
    if status == CHANGED and local == EDITED:
        return KEEP, "changed on the hub and edited here: compare them yourself"
    if status == CHANGED:
        if origin.how == "published":
            return KEEP, "somebody changed what was published: hubtool pull it into another folder and look"
        return PULL, ""
    if local == EDITED:
        return (PUBLISH, "") if origin.how == "published" else (KEEP, "edited here; it is not published from here")
    return (RECORD, "a newer commit has the same bytes") if one.verdict.commit != origin.commit else (KEEP, "")


def carry_out(
    store: Store, steps: Sequence[Step], *, pull: bool = False, publish: bool = False, clients: Clients = client_for,
    library: str | None = None, progress: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Do the steps: bookkeeping always, ``pull`` and ``publish`` only as allowed. One that fails says so and stops no other."""
    _publish_once(steps)
    for step in steps:
        if step.action == KEEP or not {PULL: pull, PUBLISH: publish, RECORD: True}[step.action]:
            continue
        try:
            _DO[step.action](store, step.comparison, clients, library)
            step.state = "done"
        except HubtoolError as error:
            step.state, step.reason, step.error = "failed", error.message, error
        if progress is not None:
            progress()


def _publish_once(steps: Sequence[Step]) -> None:
    """A publication carries every file of its repository: the other edited files of one need no step of their own."""
    seen: set[tuple[str, str, str]] = set()
    for step in steps:
        origin = step.comparison.tie.origin
        key = (origin.endpoint, origin.repo, origin.revision)
        if step.action == PUBLISH and key in seen:
            step.action, step.reason = KEEP, "published together with the other files of its repository"
        seen |= {key} if step.action == PUBLISH else set()


def raise_failures(steps: Sequence[Step]) -> None:
    """Raise the one failure, or PartialFailure where something else was done or failed too."""
    failed = [step for step in steps if step.error is not None]
    if not failed or failed[0].error is None:
        return
    if len(failed) == 1 and not any(step.state == "done" for step in steps):
        raise failed[0].error
    said = "; ".join(f"{step.comparison.tie.origin.ref}: {step.reason}" for step in failed[:5])
    raise PartialFailure(f"{len(failed)} of {len(steps)} steps failed: {said}")


def _record(store: Store, one: Comparison, _clients: Clients, _library: str | None) -> None:
    """The same bytes, found elsewhere or at a newer commit."""
    from hubtool.registry.hub_store import replace_origin

    old, verdict = one.tie.origin, one.verdict
    path = verdict.entry.path if verdict.entry else old.path
    replace_origin(store, old, replace(old, repo=verdict.repo, commit=verdict.commit or old.commit, path=path, at=0))


def _pull(store: Store, one: Comparison, clients: Clients, _library: str | None) -> None:
    """The hub's file takes the place of ours, wherever ours is still what was once pulled; then it is indexed with its origin."""
    from hubtool.hub.pulling import fetch

    origin, entry, commit = one.tie.origin, one.verdict.entry, one.verdict.commit
    if entry is None or commit is None:
        raise HubtoolError("the hub does not list the file any more", hint="hubtool outdated")
    targets = _targets(one)
    for target in targets:
        _require_ours(target, origin)
    client, ref = clients(origin.endpoint), replace(one.tie.ref, revision=commit, path=entry.path)
    for target in targets:
        fetch(client, ref, entry, target, copies=[done for done in targets if done != target], force=True)
    _index(store, one, replace(origin, commit=commit, how="pulled", at=0), entry)


def _targets(one: Comparison) -> list[Path]:
    """Where the file lies on this machine: every copy of it, or the member of a folder that is one artifact."""
    places = [place for place in one.tie.row.places if place.state == "present"]
    found = [target for place in places if (target := _target(place, one.tie.origin.path)) is not None]
    if not found:
        raise HubtoolError(
            "no plain file here to replace", path=places[0].path if places else None, hint="hubtool pull -o DIR"
        )
    return found


def _target(place: Place, path: str) -> Path | None:
    own = Path(place.path)
    if place.link == "symlink":
        return None
    if place.link == "file" and not own.name.endswith(".index.json"):
        return own
    parts, folder = path.split("/"), own if place.link == "folder" else own.parent
    tails = (folder.joinpath(*parts[at:]) for at in range(len(parts)))
    return next((tail for tail in tails if tail.is_file()), None)


def _require_ours(target: Path, origin: Origin) -> None:
    """Refuse to replace a file that is not the one on record: somebody edited it after the last scan."""
    from hubtool.hub.client import Entry
    from hubtool.hub.pulling import is_file_of

    size = origin.size if origin.size is not None else (target.stat().st_size if target.is_file() else 0)
    if not is_file_of(target, Entry(origin.path, size, origin.etag or "", origin.sha256)):
        raise HubtoolError("the file here was edited after the last scan", path=target, hint=f"hubtool scan {target}")


def _index(store: Store, one: Comparison, origin: Origin, entry: Entry) -> None:
    from hubtool.actions.scan import scan
    from hubtool.registry.hub_store import record_origin
    from hubtool.registry.text import raw_path

    paths = [place.path for place in one.tie.row.places if place.state == "present" and place.link != "symlink"]
    scan(store, paths)
    found = browse.at_path(store, raw_path(os.path.abspath(paths[0])))
    if found is not None:
        etag = None if entry.sha256 else entry.oid
        record_origin(store, found.artifact_id, replace(origin, sha256=entry.sha256, etag=etag, size=entry.size))


def _publish(store: Store, one: Comparison, clients: Clients, library: str | None) -> None:
    """Publish the repository again, with all the artifacts and layouts that the last publication had, as they are now."""
    from hubtool.actions.publish import publish
    from hubtool.actions.publish_again import again
    from hubtool.hub.publishing import Repository

    origin = one.tie.origin
    client = clients(origin.endpoint)
    index = Repository(client, replace(one.tie.ref, path=None)).remote().index
    asked = again(store, origin, index)
    publish(asked.refs, origin.repo, asked.said, replace(asked.options, library=library), client)


_DO = {PULL: _pull, PUBLISH: _publish, RECORD: _record}
