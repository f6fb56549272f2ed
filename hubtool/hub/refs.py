"""``HubRef``: a repository on a hub, at a revision, and a file or folder in it, as a person writes it.

``hf://owner/name[@revision][/path]``, plain ``owner/name[@revision][/path]``, and the addresses a browser shows. Names that come from a
server are as untrusted as those in an archive: ``safe_path`` lets none of them leave the folder it is meant for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from hubtool.errors import UnsafeFile, UsageProblem

SCHEME = "hf://"
HUGGING_FACE = "https://huggingface.co"
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPECIAL = re.compile(r"(refs/(?:pr|heads|tags|convert)/[^/]+)(?:/(.*))?")
_REVISION = re.compile(r"[^\s\x00-\x1f\x7f~^:?*\[\\]{1,255}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_SITE = re.compile(r"/(?P<repo>[^/]+/[^/]+)(?:/(?:blob|resolve|raw|tree)/(?P<rest>.+))?")
_FORM = "hf://owner/name, hf://owner/name@revision or hf://owner/name/file"


@dataclass(frozen=True, slots=True)
class HubRef:
    """A place on a hub. ``revision`` None: the main branch. ``path`` None: the whole repository; else a file or a folder in it."""

    owner: str
    name: str
    revision: str | None = None
    path: str | None = None

    @property
    def repo(self) -> str:
        """``owner/name``, the id of the repository."""
        return f"{self.owner}/{self.name}"

    @property
    def branch(self) -> str:
        """The revision asked for; ``main`` where none was."""
        return self.revision or "main"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a whole commit id, which never means anything else."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str, path: str | None = None) -> HubRef:
        """The same repository at ``revision``, at ``path`` where one is given."""
        return replace(self, revision=revision, path=self.path if path is None else path)

    def __str__(self) -> str:
        revision = self.revision or ""
        shown = revision if _SPECIAL.fullmatch(revision) else quote(revision, safe="")
        at = f"@{shown}" if revision else ""
        return f"{SCHEME}{self.repo}{at}" + (f"/{self.path}" if self.path else "")


def is_hub_ref(text: str, endpoint: str = HUGGING_FACE) -> bool:
    """Whether ``text`` can only mean a place on a hub: an ``hf://`` reference, or an address of ``endpoint``."""
    return text.startswith(SCHEME) or _site_path(text, endpoint) is not None


def parse_ref(text: str, endpoint: str = HUGGING_FACE) -> HubRef:
    """Read a reference in any of its spellings. Raises ``UsageProblem``, which says what is wrong with it."""
    site = _site_path(text, endpoint)
    if site is not None:
        return _from_site(text, site)
    body = text.removeprefix(SCHEME).removeprefix("models/").strip("/")
    owner, _, rest = body.partition("/")
    name, slash, tail = rest.partition("/")
    name, at, revision = name.partition("@")
    if not at:
        return _checked(text, owner, name, None, tail)
    return _checked(text, owner, name, *_split_revision(revision + slash + tail))


def _split_revision(text: str) -> tuple[str, str]:
    """(revision, path). Only ``refs/...`` may hold a slash; any other revision writes it ``%2F``."""
    special = _SPECIAL.fullmatch(text)
    if special:
        return special[1], special[2] or ""
    revision, _, path = text.partition("/")
    return unquote(revision), path


def _site_path(text: str, endpoint: str) -> str | None:
    """The path of an address on a hub's web site; None for anything else."""
    for site in (endpoint, HUGGING_FACE, "https://hf.co"):
        if text.startswith(site.rstrip("/") + "/"):
            return urlsplit(text[len(site.rstrip("/")) :]).path
    return None


def _from_site(text: str, site: str) -> HubRef:
    match = _SITE.fullmatch(site.rstrip("/"))
    if match is None:
        raise UsageProblem(f"{text} is not the address of a model or of a file in one", hint=_FORM)
    owner, _, name = match["repo"].partition("/")
    revision, path = _split_revision(match["rest"] or "")
    return _checked(text, owner, name, revision or None, unquote(path))


def _checked(text: str, owner: str, name: str, revision: str | None, path: str) -> HubRef:
    if owner in ("datasets", "spaces", "buckets", "kernels"):
        raise UsageProblem(f"{text} is not a model repository: hubtool reads models only", hint=_FORM)
    if not (is_name(owner) and is_name(name)):
        raise UsageProblem(f"{text} does not name a repository", hint=_FORM)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UsageProblem(f"{text} has an impossible revision", hint=_FORM)
    path = path.rstrip("/")
    if path and not is_safe(path):
        raise UsageProblem(f"{text} has an impossible path", hint=_FORM)
    return HubRef(owner, name, revision, path or None)


def is_name(text: str) -> bool:
    """Whether ``text`` may be the name of an owner or of a repository."""
    return bool(_NAME.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith(".git")


def is_safe(path: str) -> bool:
    """Whether a path in a repository stays below the folder it is joined to, on every system."""
    parts = PurePosixPath(path).parts
    spelled = "/".join(parts) == path and not path.startswith(
        "/"
    )  # no empty part, no ".", not absolute (not even "/" itself)
    return bool(parts) and spelled and ".." not in parts and ":" not in parts[0] and not _CONTROL.search(path)


def safe_path(path: str, ref: HubRef) -> str:
    """``path`` as the hub listed it. Raises ``UnsafeFile`` for one that would be written elsewhere."""
    if not is_safe(path):
        raise UnsafeFile(f"the hub lists a file whose name leaves its folder: {path[:120]!a}", path=str(ref))
    return path
