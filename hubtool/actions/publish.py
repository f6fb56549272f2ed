"""publish: artifacts of this machine -> one commit or pull request on a hub, with a card, an index, and a receipt in the library."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions import publish_library as shelf
from hubtool.actions.publish_facts import Known, Said, facts, listed, tool
from hubtool.actions.publish_items import Cleaner, Item, gather, previews
from hubtool.actions.publish_result import Options, Result
from hubtool.actions.publish_stage import Stage, Wanted, based, stage
from hubtool.errors import HubtoolError, UnsafeFile, UsageProblem
from hubtool.hub import card_text, cards, civitai_licence, validation
from hubtool.hub.facts import Facts, Picture
from hubtool.hub.layout import CARD, INDEX
from hubtool.hub.pictures import Shown
from hubtool.hub.privacy import Cleaning
from hubtool.hub.uploads import Remote, Upload, changes, upload, write_index
from hubtool.types import Finding, Severity

if TYPE_CHECKING:
    from hubtool.hub.client import Client
    from hubtool.hub.publishing import Desired, Published, Repository

# A later publication takes the place of these; everything else that an earlier one put there stays unless ``prune`` is asked for.
_REPLACED = frozenset({"canonical", "peft", "part"})


@dataclass(slots=True)
class Draft:
    """Everything that is known before the hub is asked."""

    made: Stage
    describe: Callable[[Said], Facts]
    said: Said
    options: Options
    cleaner: Cleaner
    offline_base: cards.Record | None = field(default=None)

    def desired(self, remote: Remote) -> Desired:
        """What the repository shall hold, given what it holds: the card is merged with the one there, our old files go or stay."""
        from hubtool.hub.publishing import Desired

        card_of = remote.index.get("card")
        said = self.said.over(card_of.get("said") if isinstance(card_of, Mapping) else None)
        facts = self.describe(said)
        deleted, kept = self._earlier(remote)
        there = None if remote.card is None else cards.parse(remote.card)
        base = self.offline_base or cards.read_record(card_of)
        pictures = facts.pictures or tuple(_pictures(base, kept))
        ours = card_text.card(replace(facts, files=listed(self.made.uploads, kept), pictures=pictures))
        merged = cards.merge(there, ours, base, self.said.forced)
        text = str(merged.card)
        files = [*based(self.made.uploads, facts.base_models), upload(CARD, text.encode(), "card")]
        index = write_index(files, kept, {**cards.record(ours).to_json(), "said": said.to_json()}, tool())
        files.append(upload(INDEX, index, "index"))
        findings = self._findings(merged.card, text, files, remote)
        return Desired(tuple(files), deleted, cards.difference(remote.card, text), findings, merged.kept)

    @property
    def facts(self) -> Facts:
        """What the card says as far as this machine knows."""
        return self.describe(self.said)

    def _earlier(self, remote: Remote) -> tuple[tuple[str, ...], list[Mapping[str, Any]]]:
        """Files of an earlier publication: (to delete, to keep in the index)."""
        sent = {one.path for one in self.made.uploads}
        left = {path: row for path, row in remote.ours.items() if path in remote.files and path not in sent}
        gone = _REPLACED | ({"preview"} if self.facts.pictures else set())
        deleted = [path for path, row in left.items() if self.options.prune or row.get("role") in gone]
        return tuple(sorted(deleted)), [row for path, row in left.items() if path not in deleted]

    def _findings(self, card: cards.Card, text: str, files: Sequence[Upload], remote: Remote) -> tuple[Finding, ...]:
        self.cleaner.cleaning.text(text, CARD)
        paths = {one.path for one in files} | set(remote.files)
        sizes = [
            validation.check_path(one.path, one.size, lfs=one.path.endswith(".safetensors") or _binary(one))
            for one in files
        ]
        found = [
            *self.cleaner.cleaning.findings(),
            *self.cleaner.findings,
            *validation.check_front(card.front),
            *validation.check_files(card.front, paths),
            *validation.check_body(card.body, paths),
            *(finding for finding in sizes if finding),
            *_ambiguous(self.made, remote),
            *self._disagreement(card.front),
        ]
        return tuple(dict.fromkeys(found))

    def _disagreement(self, front: Mapping[str, Any]) -> Iterator[Finding]:
        """Card and header say the same, or somebody is told: the file travels without its card."""
        claimed, stated = self.facts.claimed_licence, front.get("license")
        if (
            claimed
            and isinstance(stated, str)
            and claimed.lower() not in (stated.lower(), str(front.get("license_name")).lower())
        ):
            yield Finding(
                "card-disagrees", "warning", f"the card says license {stated}, the header of the file {claimed[:80]!a}"
            )


def _pictures(base: cards.Record | None, kept: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """The gallery of an earlier publication, as far as its pictures are still there."""
    paths = {row["path"] for row in kept if row.get("role") == "preview"}
    for row in validation.examples(base.front if base else {}):
        if row[0] in paths:
            yield Picture(*row)


def _binary(one: Upload) -> bool:
    """Whether the Hub stores it in LFS whatever its size: pictures, and anything above its limit that is no text."""
    return one.role == "preview" or one.path.endswith((".model", ".bin"))


def _ambiguous(made: Stage, remote: Remote) -> Iterator[Finding]:
    """diffusers takes the first .safetensors at the root when there is no canonical name (spec/hub.md 2)."""
    if made.loads != "none" or not made.main.endswith(".safetensors"):
        return
    others = [path for path in remote.files if path.endswith(".safetensors") and "/" not in path and path != made.main]
    if others:
        yield Finding("ambiguous", "warning", f"{others[0]} lies beside {made.main}: name the file with weight_name=")


@contextmanager
def drafted(
    refs: Sequence[str], repo: str, endpoint: str, said: Said, options: Options, token: str = ""
) -> Iterator[Draft]:
    """Open, clean, convert and describe; the converted files live as long as the block. Raises what reading and converting raise."""
    cleaner = Cleaner(
        Cleaning(keep=options.keep_metadata, tokens=(token,) if token else ()), frozenset(options.drop_metadata)
    )
    items = gather(refs, cleaner, options.library)
    known = shelf.known(items[0].path, options.library)
    shown = previews(items[0], options.previews, cleaner)
    family = said.family or items[0].report.identity.family
    base = next(iter(_facts(items[0], said, known, repo, endpoint).base_models), None)
    wanted = Wanted(family, options.layouts, options.keep_original, base)
    with tempfile.TemporaryDirectory(prefix="hubtool-publish-") as folder:
        made = stage(items, shown, Path(folder), cleaner, wanted)
        _permissions(made, known, said, options)
        pictures = _gallery(made, shown)

        def describe(asked: Said) -> Facts:
            return _facts(items[0], asked, known, repo, endpoint, pictures, made)

        if options.try_base is not None:
            from hubtool.actions.publish_try import try_snippet

            cleaner.findings.append(try_snippet(describe(said), made.uploads, options.try_base))
        yield Draft(made, describe, said, options, cleaner)


def _facts(
    item: Item, said: Said, known: Known, repo: str, endpoint: str, pictures: Sequence[Picture] = (), made: Stage | None = None
) -> Facts:  # fmt: skip
    """The facts of the card; before the files are made without what depends on them."""
    names = (made.main, made.loads, made.converted) if made else ("", "none", None)
    found = facts(repo, endpoint, item, said, known, pictures, *names)
    if made is None:
        return found
    clean = made.cleaner.cleaning.line
    return replace(found, title=clean(found.title), words=tuple(map(clean, found.words)))


def _gallery(made: Stage, shown: Sequence[Shown]) -> list[Picture]:
    paths = [one.path for one in made.uploads if one.role == "preview"]
    clean = made.cleaner.cleaning.line
    return [Picture(path, clean(one.prompt), clean(one.negative)) for path, one in zip(paths, shown, strict=True)]


def _permissions(made: Stage, known: Known, said: Said, options: Options) -> None:
    """Civitai's permissions travel as a licence text; what they forbid is not done without a word of the user."""
    if known.civitai is None or not known.civitai.permissions:
        return
    for words in civitai_licence.forbidden(known.civitai.permissions):
        severity: Severity = "warning" if options.permitted else "error"
        message = f"its author says on Civitai that it must not be {words}; --permitted if you may"
        made.cleaner.findings.append(Finding("not-permitted", severity, message))
    if not said.licence:
        text = civitai_licence.text(known.civitai.permissions, known.civitai.creator, known.civitai.page)
        made.add(civitai_licence.FILE, text.encode(), "licence")


def publish(
    refs: Sequence[str], repo: str, said: Said | None = None, options: Options | None = None, client: Client | None = None
) -> Result:  # fmt: skip
    """Publish ``refs`` to ``repo``; the first REF is what loads without arguments.

    Raises ``UnsafeFile`` for secrets, ``HubtoolError`` for what the Hub would refuse, ``HubError`` for failures of the hub; then nothing
    was committed. A second call with the same input makes no commit.
    """
    from hubtool.hub.client import endpoint_of

    said, options = said or Said(), options or Options()
    repo = validation.check_repo(repo)
    if options.offline and not options.dry_run:
        raise UsageProblem("publishing needs the hub", hint="--offline goes with --dry-run")
    if options.pull_request and options.revision != "main":
        raise UsageProblem("a pull request is made for main", hint="leave --revision out, or --pr")
    if re.fullmatch(r"[0-9a-f]{40}", options.revision):
        raise UsageProblem("a commit is never changed", hint="name a branch with --revision")
    endpoint = client.endpoint if client else endpoint_of()
    token = _token(client)
    with drafted(refs, repo, endpoint, said, options, token) as draft:
        if options.dry_run:
            return _dry_run(draft, repo, endpoint, options, client)
        return _publish(draft, repo, options, client)


def _token(client: Client | None) -> str:
    """The token in use, only to find it in what would be published."""
    found = getattr(client, "_token", None)
    if not isinstance(found, str):
        try:
            from huggingface_hub import get_token
        except ImportError:
            return ""
        found = get_token()
    return found or ""


def _dry_run(draft: Draft, repo: str, endpoint: str, options: Options, client: Client | None) -> Result:
    if options.offline:
        remote, draft.offline_base = shelf.last_state(endpoint, repo, options, card_text.card(draft.facts))
        basis = "receipt" if remote.head else "nothing"
    else:
        remote, basis = _repository(repo, options, client).start(), "hub"
    desired = draft.desired(remote)
    rows = changes(desired.uploads, remote, desired.deleted)
    visibility = _visibility(remote.private if remote.head else not options.public)
    return Result(
        repo, endpoint, rows, desired.findings, desired.card_diff, desired.kept,
        pull_request=None, visibility=visibility, basis=basis,
        warnings=(f"there is no branch {options.revision} yet: it will be made from main",) if remote.unborn else (),
    )  # fmt: skip


def _visibility(private: bool | None) -> str | None:
    return None if private is None else "private" if private else "public"


def _repository(repo: str, options: Options, client: Client | None) -> Repository:
    from hubtool.hub.client import Client as Made
    from hubtool.hub.publishing import Repository as Opened
    from hubtool.hub.refs import parse_ref

    ref = parse_ref(repo)
    return Opened(client or Made(), ref if options.revision == "main" else parse_ref(str(ref.at(options.revision))))


def _publish(draft: Draft, repo: str, options: Options, client: Client | None) -> Result:
    from hubtool.hub import publishing

    repository = _repository(repo, options, client)

    def prepare(remote: Remote) -> Desired:
        desired = draft.desired(remote)
        _refuse(desired.findings)
        return desired

    _refuse(draft.desired(Remote()).findings)  # before a repository is made
    request = publishing.Request(
        repository.ref,
        prepare,
        options.message or f"Publish {draft.facts.title}",
        not options.public,
        options.pull_request,
    )
    done = publishing.publish(repository, request)
    warnings = [*shelf.keep_receipt(repository.client.endpoint, repo, done, options), *_notes(done, options)]
    return Result(
        repo, repository.client.endpoint, done.changes, done.desired.findings, done.desired.card_diff, done.desired.kept,
        done.commit, done.created, done.pull_request, _visibility(done.private), "hub", tuple(warnings),
    )  # fmt: skip


def _notes(done: Published, options: Options) -> Iterator[str]:
    if options.public and done.private:
        yield "the repository was there already and is private: make it public in its settings"


def _refuse(findings: Sequence[Finding]) -> None:
    """Raises for findings of severity error: secrets first."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    secrets = [finding for finding in errors if finding.code == "secret"]
    message = "; ".join(finding.message for finding in secrets or errors)
    if secrets:
        raise UnsafeFile(f"not published: {message}", hint="revoke the secret; --drop-metadata KEY leaves a key out")
    raise HubtoolError(f"not published: {message}", hint="hubtool publish --dry-run shows the whole plan")
