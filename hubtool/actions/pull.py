"""``pull``: files of a repository to a folder, verified and whole, and into the library with what the hub says about them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from hubtool.actions.library import reading
from hubtool.actions.pull_record import MAX_CARD, record
from hubtool.actions.pull_result import Item, Options, Pulled
from hubtool.actions.scan import silent
from hubtool.actions.where import library_exists
from hubtool.errors import FileError, HubError, HubtoolError, NotFound, PartialFailure, UsageProblem

if TYPE_CHECKING:
    from hubtool.hub.client import Client, Entry, Resolved
    from hubtool.hub.refs import HubRef

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
_CARD = "README.md"
_SAFE, _PICKLED = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
_TEXTS = (".md", ".txt", "")
_AS_USUAL = Options()
_INDEXED = ("model_index.json", "adapter_config.json")


def pull(
    texts: Sequence[str], options: Options = _AS_USUAL, *, client: Client | None = None, progress: Progress = silent
) -> list[Pulled]:
    """Fetch every reference: a file, a folder of a repository, or all of it that is of use.

    Every repository is read at one commit. A file that fails does not stop the others; it is reported in its place (``raise_failed`` makes it an exception). Raises
    ``UsageProblem`` for a reference that is none, ``HubError`` when nothing is known about a repository here or there.
    """
    from hubtool.hub.client import Client
    from hubtool.hub.refs import parse_ref

    client = client or Client()
    refs = [parse_ref(text, client.endpoint) for text in texts]
    base = options.output or (_library_root(options.library) if refs else None)
    looked: dict[tuple[str, str], tuple[Resolved, list[Entry]]] = {}
    results = []
    for ref in refs:
        key = (ref.repo, ref.branch)
        looked[key] = looked.get(key) or _look(client, ref)
        results.append(_plan(ref, *looked[key], client, options, base or Path()))
    _refuse_collisions(results)
    if not options.dry_run:
        for result in results:
            _transfer(client, result, options, progress)
            if options.index:
                record(client, result, options.library)
    return results


def raise_failed(results: Sequence[Pulled]) -> None:
    """Raise what kept the only file from coming, or ``PartialFailure`` where some of several did not come."""
    items = [item for result in results for item in result.items]
    errors = [item.error for item in items if item.error is not None]
    if len(items) == 1 and errors:
        raise errors[0]
    if errors:
        raise PartialFailure(f"{len(errors)} of {len(items)} files did not come", hint="run the same command again")


def _library_root(library: str | None) -> Path:
    """The one scanned folder of the library. Raises ``UsageProblem`` where there is none, or more than one."""
    from hubtool.registry import browse

    roots: list[str] = []
    if library_exists(library):
        with reading(library) as reader:
            walked = {bytes(row[0]) for row in reader.rows("SELECT path FROM root WHERE walked = 1")}
            roots = [str(root["path"]) for root in browse.roots(reader) if os.fsencode(root["path"]) in walked]
    if len(roots) == 1:
        return Path(roots[0])
    have = f"the library has {len(roots)} folders: {', '.join(roots[:5])}" if roots else "the library has no folder yet"
    raise UsageProblem(f"it is not clear where the files should go: {have}", hint="name a folder with -o DIR")


def _look(client: Client, ref: HubRef) -> tuple[Resolved, list[Entry]]:
    """The commit and the listing: from the hub, else from the local cache. Raises ``HubError``."""
    from hubtool.hub import local_cache
    from hubtool.hub.errors import is_unreachable

    try:
        resolved = client.resolve(ref)
        return resolved, client.tree(resolved.ref)
    except HubError as error:
        cached = local_cache.resolve(ref)
        if cached is None or error.__cause__ is None or not is_unreachable(error.__cause__):
            raise
    return cached, local_cache.tree(cached.ref)


def _plan(
    ref: HubRef, resolved: Resolved, listed: Sequence[Entry], client: Client, options: Options, base: Path
) -> Pulled:
    wanted, left_out = _wanted(ref, listed, options)
    result = Pulled(
        ref, resolved.commit, resolved.revision, client.endpoint, [], resolved.local, left_out, card=resolved.card
    )
    result.card_entry = next((entry for entry in listed if entry.path == _CARD and entry.size <= MAX_CARD), None)
    if resolved.local:
        result.warnings.append(f"the hub did not answer; commit {resolved.commit[:12]} comes from the local cache")
    bundle = any(entry.path.rpartition("/")[2] in _INDEXED or entry.path.endswith(".index.json") for entry in wanted)
    known = _in_library(wanted, options.library)
    for entry in wanted:
        item = Item(entry, _target(ref, entry, options.output, base))
        if _gives_way(item, ref, options):
            left_out[entry.path] = "another file of this name lies there"
            continue
        item.id, places = known.get(entry.path, (None, ()))
        item.copies = (*places, *_cached(resolved.ref, entry))
        if os.path.lexists(item.target):
            item.how = "present"
        elif item.id and places and options.output is None and not bundle:
            item.how, item.target = "library", places[0]
        elif item.copies:
            item.how = "copy"
        result.items.append(item)
    return result


def _gives_way(item: Item, ref: HubRef, options: Options) -> bool:
    """Whether a text that only accompanies the weights would take the place of another one: several repositories share a folder."""
    from hubtool.hub.pulling import is_file_of

    text = item.target.suffix.lower() in _TEXTS and item.entry.path != ref.path
    return text and not options.force and item.target.exists() and not is_file_of(item.target, item.entry)


def _wanted(ref: HubRef, listed: Sequence[Entry], options: Options) -> tuple[list[Entry], dict[str, str]]:
    """(files to bring, why the others stay): a named file always, of a folder or repository what is of use."""
    below = [
        entry for entry in listed if ref.path is None or entry.path == ref.path or entry.path.startswith(ref.path + "/")
    ]
    if not below:
        near = ", ".join(entry.path for entry in listed if entry.path.endswith(_SAFE))
        raise NotFound(
            f"{ref.repo} has no file {ref.path} at {ref.branch}", hint=f"it has: {near[:300] or 'no weights'}"
        )
    if ref.path is not None and below[0].path == ref.path:
        return below[:1], {}
    names = {entry.path for entry in below}
    reasons = {entry.path: _why_not(entry.path, names, options) for entry in below}
    left_out = {path: reason for path, reason in reasons.items() if reason}
    wanted = [entry for entry in below if entry.path not in left_out]
    if not wanted:
        raise NotFound(f"nothing in {ref} is wanted", hint="look at --include and --exclude")
    return wanted, left_out


def _why_not(path: str, names: set[str], options: Options) -> str | None:
    if options.include:
        if not any(fnmatch(path, pattern) for pattern in options.include):
            return "not included"
    elif any(part.startswith(".") for part in path.split("/")):
        return "hidden"
    elif path.endswith(_PICKLED) and os.path.splitext(path)[0] + _SAFE in names:
        return "there as safetensors"
    return "excluded" if any(fnmatch(path, pattern) for pattern in options.exclude) else None


def _target(ref: HubRef, entry: Entry, output: Path | None, base: Path) -> Path:
    """Where a file goes: below ``-o`` as it lies below what was named; in a root below ``owner/name``."""
    if output is None:
        return base / ref.owner / ref.name / entry.path
    if ref.path == entry.path:
        return output / entry.path.rpartition("/")[2]
    return output / (entry.path.removeprefix(ref.path + "/") if ref.path else entry.path)


def _refuse_collisions(results: Sequence[Pulled]) -> None:
    seen: dict[Path, str] = {}
    for result, item in [(one, item) for one in results for item in one.items if item.how != "library"]:
        before = seen.setdefault(item.target, item.entry.digest)
        if before == item.entry.digest:
            continue
        if item.target.suffix.lower() in _TEXTS and item.entry.path != result.ref.path:
            result.items.remove(item)
            result.left_out[item.entry.path] = "another file of this name lies there"
        else:
            raise UsageProblem(
                f"two different files would become {item.target}", hint="pull them into folders of their own"
            )


def _in_library(entries: Sequence[Entry], library: str | None) -> dict[str, tuple[str, tuple[Path, ...]]]:
    """(id, places on disk) of the files whose bytes the library has, by path in the repository."""
    from hubtool.registry import browse, hub_facts

    if not library_exists(library):
        return {}
    found = {}
    with reading(library) as reader:
        keys = hub_facts.artifacts_by_sha256(reader, [entry.sha256 for entry in entries if entry.sha256])
        for entry in entries:
            if entry.sha256 in keys:
                row = browse.by_key(reader, keys[entry.sha256])
                there = [
                    Path(place.path) for place in row.places if place.state == "present" and place.link != "folder"
                ]
                found[entry.path] = (row.id, tuple(path for path in there if path.is_file()))
    return found


def _cached(ref: HubRef, entry: Entry) -> tuple[Path, ...]:
    from hubtool.hub import local_cache

    return tuple(local_cache.copies(ref, entry))


def _transfer(client: Client, result: Pulled, options: Options, progress: Progress) -> None:
    """Bring every item; what goes wrong with one is kept with it."""
    from hubtool.hub.pulling import fetch

    total = sum(item.entry.size for item in result.items)
    pinned = result.ref.at(result.commit)
    with progress(f"pulling {result.ref.repo}", total) as advance:
        for item in result.items:
            if item.how == "library":
                advance(item.entry.size)
                continue
            try:
                _make_folder(item.target.parent)
                done = fetch(
                    None if result.local else client, pinned.at(result.commit, item.entry.path), item.entry, item.target,
                    copies=item.copies, force=options.force, advance=advance,
                )  # fmt: skip
            except HubtoolError as error:
                item.error, item.how = error, "failed"
                continue
            item.how, item.received, item.resumed = done.how, done.received, done.resumed


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder: {error.strerror or error}", path=path) from error
