"""One commit (or pull request) that carries a whole publication, made sure of: nothing lost, nothing doubled, every hash read back.

huggingface_hub sends the commit once and gives up at the first trouble; its own retrying upload has made the same commit twice when only
the answer was lost (spec/hub.md 3.2, 3.7). Here every try begins with looking: what the repository holds now decides what is still to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hubtool.errors import CorruptFile, HubError, HubtoolError
from hubtool.hub.errors import explain, failures, names_of, status_of, wait_of
from hubtool.hub.layout import CARD, INDEX
from hubtool.hub.refs import HubRef, safe_path
from hubtool.hub.uploads import Change, Held, Remote, Upload, changes, read_index, upload
from hubtool.types import Finding

TRIES = 6
_PAUSE = 0.4  # seconds, doubled with every try
_LONGEST = 90.0
_MAX_DOCUMENT = 8 << 20
_PULL_REQUESTS = 20  # the newest open ones that may be ours
_TRANSIENT = frozenset(
    {"TransportError", "ConnectionError", "TimeoutError", "LocalEntryNotFoundError", "XetDownloadError"}
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Desired:
    """What the repository shall hold. ``deleted``: files of an earlier publication that are to go. ``card_diff``: README.md as a diff."""

    uploads: tuple[Upload, ...]
    deleted: tuple[str, ...] = ()
    card_diff: str = ""
    findings: tuple[Finding, ...] = ()
    kept: tuple[str, ...] = ()  # what a person wrote into the card and hubtool left alone


@dataclass(frozen=True, slots=True)
class Request:
    """Where and how. ``prepare`` says what shall be there, given what is there; it is asked again when somebody else commits."""

    ref: HubRef
    prepare: Callable[[Remote], Desired]
    message: str
    private: bool = True
    pull_request: bool = False
    description: str = ""


@dataclass(frozen=True, slots=True)
class Published:
    """What came of it. ``created``: whether a commit was made (False: everything was there already). ``files``: read back from the hub."""

    commit: str
    parent: str | None
    created: bool
    desired: Desired
    changes: tuple[Change, ...]
    files: Mapping[str, Held] = field(default_factory=dict)
    pull_request: str | None = None
    revision: str = "main"
    tries: int = 1
    private: bool | None = None


@dataclass(frozen=True, slots=True)
class Hub:
    """The calls of huggingface_hub that a publication needs, each tried again while the trouble is passing."""

    api: Any
    ref: HubRef
    sleep: Callable[[float], None] = time.sleep

    @property
    def endpoint(self) -> str:
        return str(self.api.endpoint).rstrip("/")

    def call(self, work: Callable[[], T]) -> T:
        """``work()``, repeated while the hub fails in passing. Raises what ``explain`` makes of the last failure."""
        for attempt in range(TRIES):
            try:
                return work()
            except HubtoolError:
                raise
            except failures() as error:
                if not is_transient(error) or attempt == TRIES - 1:
                    raise explain(error, self.ref, self.endpoint) from error
                self.sleep(pause(error, attempt))
        raise AssertionError("the last try returns or raises")

    def remote(self, revision: str | None = None) -> Remote:
        """What the repository holds at a revision; a ``Remote`` without head where there is no repository."""
        info = self.call(lambda: self._info(revision or self.ref.branch))
        if info is None:
            return Remote()
        head = str(info.sha)
        files = self.tree(head)
        card = self._document(CARD, head, files)
        index = self._document(INDEX, head, files)
        text = None if card is None else card.decode("utf-8", "replace")
        return Remote(head, files, text, read_index(index) if index else {}, getattr(info, "private", None))

    def _info(self, revision: str) -> Any:
        try:
            return self.api.model_info(self.ref.repo, revision=revision)
        except failures() as error:
            if "RepositoryNotFoundError" in names_of(error) and "GatedRepoError" not in names_of(error):
                return None
            raise

    def tree(self, commit: str) -> dict[str, Held]:
        """Every file at a commit with size and hash."""
        return self.call(lambda: dict(self._tree(commit)))

    def _tree(self, commit: str) -> Iterator[tuple[str, Held]]:
        for entry in self.api.list_repo_tree(self.ref.repo, recursive=True, revision=commit):
            if not hasattr(entry, "blob_id"):
                continue  # a folder
            lfs = getattr(entry, "lfs", None)
            sha256 = getattr(lfs, "sha256", None)
            size = getattr(lfs, "size", None) or entry.size
            yield safe_path(entry.path, self.ref), Held(int(size), sha256, None if sha256 else entry.blob_id)

    def _document(self, path: str, commit: str, files: Mapping[str, Held]) -> bytes | None:
        held = files.get(path)
        if held is None or held.size > _MAX_DOCUMENT:
            return None
        return self.call(lambda: self._checked(path, commit, held))

    def _checked(self, path: str, commit: str, held: Held) -> bytes:
        """The bytes of a small file, hashed: huggingface_hub compares sizes only."""
        data = Path(self.api.hf_hub_download(self.ref.repo, path, revision=commit)).read_bytes()
        if held.same(upload(path, data)):
            return data
        self.api.hf_hub_download(self.ref.repo, path, revision=commit, force_download=True)
        raise ConnectionError(f"{path} arrived damaged")

    def create(self, private: bool) -> None:
        """Make the repository; one that appeared meanwhile is as good."""
        self.call(lambda: self.api.create_repo(self.ref.repo, private=private, exist_ok=True))

    def commit(self, request: Request, rows: tuple[Change, ...], desired: Desired, head: str) -> Any:
        """Send the commit once; failures are the caller's, who looks before trying again."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        sent = {one.path: one for one in desired.uploads}
        operations: list[Any] = [
            CommitOperationAdd(row.path, source if isinstance(source := sent[row.path].source, bytes) else str(source))
            for row in rows
            if row.action in ("add", "change")
        ]
        operations += [CommitOperationDelete(row.path, is_folder=False) for row in rows if row.action == "delete"]
        return self.api.create_commit(
            self.ref.repo, operations, commit_message=request.message, commit_description=request.description,
            revision=None if request.pull_request else self.ref.branch, parent_commit=head, create_pr=request.pull_request,
        )  # fmt: skip

    def pull_requests(self, title: str) -> Iterator[tuple[int, str]]:
        """Open pull requests of this title, newest first: (number, address)."""
        found = self.call(
            lambda: list(
                self.api.get_repo_discussions(self.ref.repo, discussion_type="pull_request", discussion_status="open")
            )
        )
        same = sorted((one for one in found if one.title == title), key=lambda one: -one.num)
        for one in same[:_PULL_REQUESTS]:
            yield one.num, str(one.url)


def pause(error: BaseException, attempt: int) -> float:
    """Seconds to wait before the next try: what the server asks for, else twice as long each time."""
    response = getattr(error, "response", None)
    asked = wait_of(response.headers) if response is not None else None
    return min(_LONGEST, asked if asked is not None else _PAUSE * 2**attempt)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 425, 429)
    names = names_of(error)
    if "OfflineModeIsEnabled" in names:
        return False
    # a failed LFS upload is a RuntimeError, a failed xet upload often too
    return bool(names & _TRANSIENT) or (type(error) is RuntimeError)


def publish(hub: Hub, request: Request) -> Published:
    """Bring the repository to what ``request.prepare`` wants, in one commit or pull request. Nothing to do: no commit.

    Raises ``HubError`` (and what ``prepare`` raises); then either nothing or the whole commit is there.
    """
    remote = hub.remote()
    if remote.head is None:
        remote = _created(hub, request)
    for attempt in range(TRIES):
        desired = request.prepare(remote)
        done = _already(hub, request, remote, desired)
        if done is not None:
            return _checked(hub, done, attempt)
        rows = changes(desired.uploads, remote, desired.deleted)
        try:
            info = hub.commit(request, rows, desired, str(remote.head))
        except failures() as error:
            if attempt == TRIES - 1 or not (is_transient(error) or status_of(error) == 412):
                raise explain(error, hub.ref, hub.endpoint) from error
            hub.sleep(0.0 if status_of(error) == 412 else pause(error, attempt))
            remote = hub.remote()
            continue
        address = str(info.pr_url) if info.pr_url else None
        revision = str(info.pr_revision) if info.pr_revision else hub.ref.branch
        made = Published(str(info.oid), remote.head, True, desired, rows, {}, address, revision, private=remote.private)
        return _checked(hub, made, attempt)
    raise AssertionError("the last try returns or raises")


def _created(hub: Hub, request: Request) -> Remote:
    if request.pull_request:
        raise HubError(
            f"{hub.ref.repo} does not exist, or is private and closed to this account",
            hint="a pull request needs a repository that this account can read; leave --pr out to create one",
        )
    hub.create(request.private)
    made = hub.remote()
    if made.head is None:
        raise HubError(f"{hub.ref.repo} was created and cannot be read", hint="hf auth login")
    return made


def _already(hub: Hub, request: Request, remote: Remote, desired: Desired) -> Published | None:
    """The publication as it is there already: in the branch, or in a pull request of ours that is open."""
    rows = changes(desired.uploads, remote, desired.deleted)
    if all(row.action == "keep" for row in rows):
        return Published(str(remote.head), None, False, desired, rows, private=remote.private, revision=hub.ref.branch)
    if not request.pull_request:
        return None
    for number, address in hub.pull_requests(request.message):
        revision = f"refs/pr/{number}"
        theirs = hub.remote(revision)
        if theirs.head and all(row.action == "keep" for row in changes(desired.uploads, theirs, desired.deleted)):
            return Published(
                theirs.head, remote.head, False, desired, rows, {}, address, revision, private=remote.private
            )
    return None


def _checked(hub: Hub, made: Published, attempt: int) -> Published:
    """Read every hash back. Raises ``CorruptFile`` where the hub holds other bytes than were sent."""
    files = hub.tree(made.commit)
    for one in made.desired.uploads:
        held = files.get(one.path)
        if held is None:
            hint = "a .gitignore in the repository may name it"
            raise CorruptFile(f"{one.path} is not in the commit {made.commit[:12]}", path=str(hub.ref), hint=hint)
        if not held.same(one) or held.size != one.size:
            said = f"{one.path} has another hash on the hub ({held.digest}) than here ({one.sha256})"
            raise CorruptFile(said, path=str(hub.ref), hint="run the same command again: it sends what differs")
    left = [path for path in made.desired.deleted if path in files]
    if left:
        raise CorruptFile(f"{left[0]} is still in the commit {made.commit[:12]}", path=str(hub.ref))
    return Published(
        made.commit, made.parent, made.created, made.desired, made.changes, files, made.pull_request, made.revision,
        attempt + 1, made.private,
    )  # fmt: skip
