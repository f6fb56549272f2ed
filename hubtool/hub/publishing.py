"""One commit (or pull request) that carries a whole publication, made sure of: nothing lost, nothing doubled, every hash read back.

huggingface_hub sends the commit once and gives up at the first trouble; its own retrying upload has made the same commit twice when only
the answer was lost (spec/hub.md 3.2, 3.7). Here every try begins with looking: what the repository holds now decides what is still to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hubtool.errors import CorruptFile, HubError, HubtoolError
from hubtool.hub.client import Client, Entry
from hubtool.hub.errors import explain, failures, names_of, status_of, wait_of
from hubtool.hub.layout import CARD, INDEX
from hubtool.hub.refs import HubRef
from hubtool.hub.retrying import is_passing
from hubtool.hub.uploads import Change, Held, Remote, Upload, changes, read_index
from hubtool.types import Finding

TRIES = 6
_PAUSE = 0.4  # seconds, doubled with every try
_LONGEST = 90.0
_MAX_DOCUMENT = 8 << 20
_PULL_REQUESTS = 20  # the newest open ones that may be ours


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


class Repository:
    """The calls that a publication makes to one repository."""

    def __init__(self, client: Client, ref: HubRef) -> None:
        self.client = client
        self.ref = ref

    def remote(self, revision: str | None = None) -> Remote:
        """What the repository holds at a revision; a ``Remote`` without head where there is no repository."""
        info = self.client.ask(self.ref, lambda: self._info(revision or self.ref.branch))
        if info is None:
            return Remote()
        head = str(info.sha)
        listed = {entry.path: entry for entry in self.client.tree(self.ref.at(head))}
        card, index = (self._document(listed.get(path), head) for path in (CARD, INDEX))
        text = None if card is None else card.decode("utf-8", "replace")
        return Remote(head, _held(listed), text, read_index(index) if index else {}, bool(info.private))

    def start(self) -> Remote:
        """What a publication begins with: its branch, or main (``unborn``) where the branch is yet to be made."""
        try:
            return self.remote()
        except HubError as error:
            cause = error.__cause__
            can_be_made = not self.ref.pinned and not self.ref.branch.startswith("refs/") and self.ref.branch != "main"
            if cause is None or "RevisionNotFoundError" not in names_of(cause) or not can_be_made:
                raise
        return replace(self.remote("main"), unborn=True)

    def _info(self, revision: str) -> Any:
        try:
            return self.client.api.model_info(self.ref.repo, revision=revision)
        except failures() as error:
            if "RepositoryNotFoundError" in names_of(error) and "GatedRepoError" not in names_of(error):
                return None
            raise

    def _document(self, entry: Entry | None, head: str) -> bytes | None:
        """A small file; one that arrives damaged is asked for again."""
        if entry is None:
            return None
        for _ in range(TRIES - 1):
            try:
                return self.client.read(self.ref.at(head), entry, _MAX_DOCUMENT)
            except HubError as error:
                if error.__cause__ is not None or entry.size > _MAX_DOCUMENT:
                    raise  # a failure of the hub, which the client has been patient with
        return self.client.read(self.ref.at(head), entry, _MAX_DOCUMENT)

    def tree(self, commit: str) -> Mapping[str, Held]:
        """Every file at a commit with size and hash."""
        return _held({entry.path: entry for entry in self.client.tree(self.ref.at(commit))})

    def create(self, private: bool) -> None:
        """Make the repository; one that appeared meanwhile is as good."""
        self.client.ask(self.ref, lambda: self.client.api.create_repo(self.ref.repo, private=private, exist_ok=True))

    def make_branch(self, head: str) -> None:
        """Let the branch begin at ``head``; one that appeared meanwhile is as good."""
        api, branch = self.client.api, self.ref.branch
        self.client.ask(self.ref, lambda: api.create_branch(self.ref.repo, branch=branch, revision=head, exist_ok=True))

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
        return self.client.api.create_commit(
            self.ref.repo, operations, commit_message=request.message, commit_description=request.description,
            revision=None if request.pull_request else self.ref.branch, parent_commit=head, create_pr=request.pull_request,
        )  # fmt: skip

    def pull_requests(self, title: str) -> list[tuple[int, str]]:
        """Open pull requests of this title, newest first: (number, address)."""
        wanted = {"discussion_type": "pull_request", "discussion_status": "open"}
        found = self.client.ask(self.ref, lambda: list(self.client.api.get_repo_discussions(self.ref.repo, **wanted)))
        same = sorted((one for one in found if one.title == title), key=lambda one: -int(one.num))
        return [(int(one.num), str(one.url)) for one in same[:_PULL_REQUESTS]]


def _held(listed: Mapping[str, Entry]) -> dict[str, Held]:
    return {path: Held(one.size, one.sha256, None if one.sha256 else one.oid) for path, one in listed.items()}


def is_transient(error: BaseException, endpoint: str) -> bool:
    """Whether sending a commit again may succeed: besides what passes for a reading call, failed uploads to the storage."""
    if status_of(error) == 412 or is_passing(error, endpoint):
        return True
    # a failed LFS upload is a plain RuntimeError; what xet raises is a ConnectionError, and also that of a hub without xet
    return type(error) is RuntimeError or ("ConnectionError" in names_of(error) and "xet-write-token" not in str(error))


@contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub draws bars of its own, also where nobody looks."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def publish(repository: Repository, request: Request) -> Published:
    """Bring the repository to what ``request.prepare`` wants, in one commit or pull request. Nothing to do: no commit.

    Raises ``HubError`` (and what ``prepare`` raises); then either nothing or the whole commit is there.
    """
    remote = _opened(repository, request)
    for attempt in range(TRIES):
        desired = request.prepare(remote)
        done = _already(repository, request, remote, desired)
        if done is not None:
            return _checked(repository, replace(done, tries=attempt + 1))
        rows = changes(desired.uploads, remote, desired.deleted)
        try:
            with _quiet():
                info = repository.commit(request, rows, desired, str(remote.head))
        except failures() as error:
            _wait(repository, error, attempt)
            remote = repository.remote()
            continue
        address = str(info.pr_url) if info.pr_url else None
        revision = str(info.pr_revision) if info.pr_revision else repository.ref.branch
        made = Published(
            str(info.oid), remote.head, True, desired, rows, {}, address, revision, attempt + 1, remote.private
        )
        return _checked(repository, made)
    raise AssertionError("the last try returns or raises")


def _wait(repository: Repository, error: BaseException, attempt: int) -> None:
    """Wait for the next try. Raises ``HubError`` when there is no point in one."""
    client = repository.client
    if attempt == TRIES - 1 or not is_transient(error, client.endpoint):
        raise _refused(explain(error, repository.ref, client.endpoint), error) from error
    response = getattr(error, "response", None)
    asked = wait_of(response.headers) if response is not None else None
    if status_of(error) != 412:  # somebody else was faster: nothing to wait for
        client.sleep(min(_LONGEST, asked if asked is not None else _PAUSE * 2**attempt))


def _refused(said: HubtoolError, error: BaseException) -> HubtoolError:
    if status_of(error) == 403:
        said.hint = f"{said.hint}; or open a pull request with --pr"
    return said


def _opened(repository: Repository, request: Request) -> Remote:
    """The branch to publish to, made together with its repository where they are missing."""
    remote = repository.start()
    if remote.head is None:
        if request.pull_request:
            raise HubError(
                f"{repository.ref.repo} does not exist, or is private and closed to this account",
                hint="a pull request needs a repository that this account can read; leave --pr out to create one",
            )
        repository.create(request.private)
        remote = repository.start()
    if remote.head is None:
        raise HubError(f"{repository.ref.repo} was created and cannot be read", hint="hf auth login")
    if remote.unborn:
        repository.make_branch(remote.head)
        remote = repository.remote()
    return remote


def _already(repository: Repository, request: Request, remote: Remote, desired: Desired) -> Published | None:
    """The publication as it is there already: in the branch, or in a pull request of ours that is open."""
    rows = changes(desired.uploads, remote, desired.deleted)
    if all(row.action == "keep" for row in rows):
        return Published(
            str(remote.head), None, False, desired, rows, private=remote.private, revision=repository.ref.branch
        )
    if not request.pull_request:
        return None
    for number, address in repository.pull_requests(request.message):
        revision = f"refs/pr/{number}"
        theirs = repository.remote(revision)
        if theirs.head and all(row.action == "keep" for row in changes(desired.uploads, theirs, desired.deleted)):
            return Published(
                theirs.head, remote.head, False, desired, rows, {}, address, revision, private=remote.private
            )
    return None


def _checked(repository: Repository, made: Published) -> Published:
    """Read every hash back. Raises ``CorruptFile`` where the hub holds other bytes than were sent."""
    files = repository.tree(made.commit)
    for one in made.desired.uploads:
        held = files.get(one.path)
        if held is None:
            hint = "a .gitignore in the repository may name it"
            raise CorruptFile(
                f"{one.path} is not in the commit {made.commit[:12]}", path=str(repository.ref), hint=hint
            )
        if not held.same(one) or held.size != one.size:
            said = f"{one.path} has another hash on the hub ({held.digest}) than here ({one.sha256})"
            raise CorruptFile(said, path=str(repository.ref), hint="run the same command again: it sends what differs")
    left = [path for path in made.desired.deleted if path in files]
    if left:
        raise CorruptFile(f"{left[0]} is still in the commit {made.commit[:12]}", path=str(repository.ref))
    return replace(made, files=files)
