"""Which files that came from a hub, or went there, are no longer what the hub has. Reads only: the hub and the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubtool.actions.library import reading
from hubtool.errors import HubError, HubtoolError, PartialFailure
from hubtool.hub.comparing import CURRENT, UNKNOWN, Remote, Verdict, compare, look
from hubtool.hub.refs import HubRef, parse_ref
from hubtool.registry import browse, hub_facts
from hubtool.registry.hub_facts import Origin
from hubtool.registry.records import Reader, Row

if TYPE_CHECKING:
    from hubtool.hub.client import Client

COLUMNS = ("id", "status", "local", "how", "ref", "path")
Clients = Callable[[str], "Client"]
SAME, EDITED, MISSING = "same", "edited", "missing"


@dataclass(frozen=True, slots=True)
class Tie:
    """A file of the library and the file of a repository it belongs to. ``row``: what lies there now, perhaps edited since."""

    row: Row
    origin: Origin

    @property
    def local(self) -> str:
        """``same`` bytes as those on record, ``edited`` since, or ``missing``."""
        if self.row.key != self.origin.artifact:
            return EDITED
        return SAME if self.row.state in ("present", "offline") else MISSING

    @property
    def ref(self) -> HubRef:
        """The repository at the revision on record."""
        owner, _, name = self.origin.repo.partition("/")
        return HubRef(owner, name, self.origin.revision, self.origin.path)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A tie and what the hub says about it now."""

    tie: Tie
    verdict: Verdict

    @property
    def outdated(self) -> bool:
        """Whether hub and library differ, either way."""
        return self.verdict.status != CURRENT or self.tie.local == EDITED

    def to_json(self) -> dict[str, Any]:
        """A row of a listing."""
        origin, verdict, entry = self.tie.origin, self.verdict, self.verdict.entry
        now = {"repo": verdict.repo, "commit": verdict.commit}
        there = {name: getattr(entry, name, None) for name in ("path", "size", "sha256")}
        return {
            "id": self.tie.row.id,
            "path": self.tie.row.places[0].path if self.tie.row.places else "",
            "status": verdict.status,
            "local": self.tie.local,
            "how": origin.how,
            "ref": origin.ref,
            "endpoint": origin.endpoint,
            "commit": origin.commit,
            "now": {**now, **there},
            "reason": verdict.reason,
        }


def ties(reader: Reader, refs: Sequence[str] = ()) -> list[Tie]:
    """What ties the library to hubs: the newest record of every file of a repository, of the artifacts that ``refs`` name or of all."""
    wanted = {browse.find(reader, ref).key for ref in refs}
    follow = hub_facts.successors(reader)
    newest: dict[tuple[Any, ...], tuple[int, Origin]] = {}
    for origin in hub_facts.origins(reader):
        key = _end(follow, origin.artifact)
        newest[key, origin.endpoint, origin.repo, origin.path, origin.revision] = key, origin
    chosen = [(key, origin) for key, origin in newest.values() if not refs or {key, origin.artifact} & wanted]
    return [Tie(browse.by_key(reader, key), origin) for key, origin in chosen]


def _end(follow: Mapping[int, int], key: int) -> int:
    """The artifact at the end of a chain of rewritten files."""
    seen = {key}
    while (after := follow.get(key)) is not None and after not in seen:
        seen.add(after)
        key = after
    return key


def client_for(endpoint: str) -> Client:
    """A client of a hub on record. The token in use belongs to the hub in use, and goes to no other."""
    from hubtool.hub.client import Client, endpoint_of

    return Client(endpoint, None if endpoint == endpoint_of() else False)


def outdated(
    library: str | None = None, refs: Sequence[str] = (), *, clients: Clients = client_for, progress: Callable[[], None] | None = None,
) -> list[Comparison]:  # fmt: skip
    """Compare what ``refs`` name, or every tie, with its hub. The library is closed again before the first request goes out.

    A hub that does not answer gives ``unknown`` for its files; ``raise_failures`` says so. Raises NotFound, MissingExtra.
    """
    with reading(library) as reader:
        found = ties(reader, refs)
    return compare_all(found, clients=clients, progress=progress)


def compare_all(
    found: Sequence[Tie], *, clients: Clients = client_for, progress: Callable[[], None] | None = None
) -> list[Comparison]:
    """``found`` compared: one request a repository, and a listing where something was committed since."""
    groups: dict[tuple[str, str, str], list[Tie]] = {}
    for tie in found:
        groups.setdefault((tie.origin.endpoint, tie.origin.repo, tie.origin.revision), []).append(tie)
    made: dict[str, Client] = {}
    compared: list[Comparison] = []
    for (endpoint, _, _), group in sorted(groups.items(), key=lambda item: item[0]):
        if endpoint not in made:
            made[endpoint] = clients(endpoint)
        seen = look(made[endpoint], group[0].ref, [tie.origin.commit for tie in group])
        compared += [Comparison(tie, _verdict(tie, seen)) for tie in group]
        if progress is not None:
            progress()
    return compared


def _verdict(tie: Tie, seen: Remote | Verdict) -> Verdict:
    return compare(tie.origin, seen) if isinstance(seen, Remote) else seen


def raise_failures(found: Sequence[Comparison]) -> None:
    """Raise HubError if no hub answered at all, PartialFailure if some did."""
    failed = [one for one in found if one.verdict.status == UNKNOWN]
    if not failed:
        return
    said = f"{len(failed)} of {len(found)} files could not be compared: {failed[0].verdict.reason}"
    kind: type[HubtoolError] = HubError if len(failed) == len(found) else PartialFailure
    raise kind(
        said,
        hint="the rest is right; try again later" if kind is PartialFailure else "check the network and HF_ENDPOINT",
    )


def ref_of(text: str) -> HubRef:
    """A reference as a person writes it (``owner/name``, ``hf://owner/name@rev/file``, an address of the hub in use)."""
    from hubtool.hub.client import endpoint_of

    return parse_ref(text, endpoint_of())
