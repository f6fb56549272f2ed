"""What huggingface_hub's cache on this machine holds: commits, listings and bytes, read without a request.

Layout (its documentation): ``models--owner--name/refs/<revision>`` names a commit, ``snapshots/<commit>/<path>`` links to
``blobs/<sha256 or git sha1>``, ``trees/<commit>.json`` is a listing. Its bytes are never trusted: they are hashed when they are copied.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hubtool.hub.client import Entry, Resolved
from hubtool.hub.refs import HubRef, is_safe

_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_LISTING = 64 << 20


def folder(ref: HubRef) -> Path:
    """Where the cache keeps a repository; it need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{ref.owner}--{ref.name}"


def resolve(ref: HubRef) -> Resolved | None:
    """The commit that a revision was when the cache last heard of it; None where it holds no file of it."""
    commit = ref.revision if ref.pinned else _read_ref(ref)
    if commit is None or not (folder(ref) / "snapshots" / commit).is_dir():
        return None
    return Resolved(ref.at(commit), ref.branch, local=True)


def _read_ref(ref: HubRef) -> str | None:
    try:
        text = (folder(ref) / "refs" / ref.branch).read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def tree(ref: HubRef) -> list[Entry]:
    """The files of a commit that the cache holds and whose hash it knows. Others cannot be trusted, and are left out."""
    listed = _listing(ref)
    found = [_entry(path, name, listed.get(name)) for name, path in _files(ref)]
    return [entry for entry in found if entry is not None]


def _listing(ref: HubRef) -> dict[str, dict[str, Any]]:
    path = folder(ref) / "trees" / f"{ref.branch}.json"
    try:
        if path.stat().st_size > _MAX_LISTING:
            return {}
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    files = document.get("files") if isinstance(document, dict) else None
    return {name: item for name, item in files.items() if isinstance(item, dict)} if isinstance(files, dict) else {}


def _files(ref: HubRef) -> Iterator[tuple[str, Path]]:
    root = folder(ref) / "snapshots" / ref.branch
    for parent, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            relative = path.relative_to(root).as_posix()
            if is_safe(relative):
                yield relative, path


def _entry(path: Path, name: str, listed: dict[str, Any] | None) -> Entry | None:
    try:
        size = path.stat().st_size
        etag = Path(os.readlink(path)).name if path.is_symlink() else ""
    except OSError:
        return None
    if listed is not None:
        oid, sha256 = str(listed.get("blob_id", "")), listed.get("lfs_sha256")
        etag = sha256 if isinstance(sha256, str) else oid
    if not _DIGEST.fullmatch(etag):
        return None
    return Entry(name, size, sha256=etag) if len(etag) == 64 else Entry(name, size, oid=etag)


def copies(ref: HubRef, entry: Entry) -> list[Path]:
    """Files of the cache that should be this entry."""
    candidates = (folder(ref) / "blobs" / entry.digest, folder(ref) / "snapshots" / ref.branch / entry.path)
    return [path for path in candidates if path.is_file()]
