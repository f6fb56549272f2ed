"""Finding what can be an artifact below a folder. Only names and stats are read; nothing is opened."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from hubtool.registry.records import FileStat

EXTENSIONS = frozenset({b".safetensors", b".ckpt", b".pt", b".pth", b".bin", b".pti", b".png", b".gguf"})
_INDEX = b".safetensors.index.json"
_SHARD = re.compile(rb"(.*)-\d{5}-of-\d{5}\.safetensors")
_PEFT = {b"adapter_model.safetensors", b"adapter_model.bin"}
_MAX_FOLDER_FILES = 10_000  # of one pipeline; a real one has fewer than fifty

Inode = tuple[int, int]  # (st_dev, st_ino)


class Candidate(NamedTuple):
    """A file or folder to index. ``link``: file, symlink or folder. ``form``: file, folder or sharded."""

    relpath: bytes
    path: bytes
    stat: FileStat
    link: str = "file"
    form: str = "file"


@dataclass(slots=True)
class Walk:
    """What a walk found. ``failed``: folders below the root that could not be listed, so nothing is known about what is in them."""

    found: list[Candidate] = field(default_factory=list)
    failed: list[bytes] = field(default_factory=list)


def walk(root: bytes, below: bytes = b"", *, prune: Collection[bytes] = (), forbidden: Collection[Inode] = ()) -> Walk:
    """Index candidates below ``root``/``below``.

    ``prune``: absolute folders to leave out (roots of their own). ``forbidden``: files never to touch, by inode (the library itself).
    Links to files are followed; links to folders too, after all real folders, each folder once.
    """
    result, seen = Walk(), set[Inode]()
    pending, links = [below], list[bytes]()
    while pending or links:
        relpath = pending.pop() if pending else links.pop()
        path = os.path.join(root, relpath) if relpath else root
        if path in prune or not _first_visit(path, seen):
            continue
        try:
            with os.scandir(path) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(b".")]
        except FileNotFoundError:
            continue  # its parent was listed: it is gone, and so is what was in it
        except OSError:
            result.failed.append(relpath)
            continue
        _sort_out(listed, relpath, result, pending, links, forbidden)
    result.found.sort()
    return result


def _first_visit(path: bytes, seen: set[Inode]) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return True  # listing it fails as well, and says so
    inode = (status.st_dev, status.st_ino)
    return inode not in seen and not seen.add(inode)  # type: ignore[func-returns-value]


def _sort_out(
    listed: list[os.DirEntry[bytes]], relpath: bytes, result: Walk, pending: list[bytes], links: list[bytes],
    forbidden: Collection[Inode],
) -> None:  # fmt: skip
    prefix = relpath + b"/" if relpath else b""
    names = {entry.name for entry in listed}
    indices = {name.removesuffix(_INDEX) for name in names if name.endswith(_INDEX)}
    for entry in listed:
        inner = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            folder = _folder(inner, entry.path)
            result.found.append(folder) if folder else pending.append(inner)
        elif entry.is_symlink() and entry.is_dir():
            links.append(inner)
        elif entry.name.endswith(_INDEX):
            result.found.extend(_sharded(inner, entry.path, listed))
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not _is_shard(entry.name, indices):
            result.found.extend(_file(inner, entry, forbidden))


def _is_shard(name: bytes, indices: set[bytes]) -> bool:
    match = _SHARD.fullmatch(name) if indices else None
    return match is not None and match[1] in indices


def _file(relpath: bytes, entry: os.DirEntry[bytes], forbidden: Collection[Inode]) -> Iterable[Candidate]:
    try:
        status = entry.stat()
    except OSError:
        return
    if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in forbidden:
        yield Candidate(relpath, entry.path, file_stat(status), "symlink" if entry.is_symlink() else "file")


def file_stat(status: os.stat_result) -> FileStat:
    """The part of a stat that tells whether a file was touched."""
    return FileStat(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev, status.st_nlink)


def is_bundle(path: bytes) -> bool:
    """Whether a folder is one artifact: a diffusers pipeline (``model_index.json``), or a PEFT adapter with its config and weights."""
    try:
        names = set(os.listdir(path))
    except OSError:
        return False
    return b"model_index.json" in names or (b"adapter_config.json" in names and not names.isdisjoint(_PEFT))


def _folder(relpath: bytes, path: bytes) -> Candidate | None:
    if not is_bundle(path):
        return None
    total = folder_stat(path)
    return Candidate(relpath, path, total, "folder", "folder") if total else None


def folder_stat(path: bytes) -> FileStat | None:
    """A folder as one thing: bytes of all its files, time of the newest, inode of the folder itself. None when it is gone."""
    size, newest, pending, count = 0, 0, [path], 0
    while pending and count < _MAX_FOLDER_FILES:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    count += 1
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_file():
                        status = entry.stat()
                        size, newest = size + status.st_size, max(newest, status.st_mtime_ns)
        except OSError:
            return None
    try:
        own = os.stat(path)
    except OSError:
        return None
    return FileStat(size, newest, own.st_ino, own.st_dev)


def _sharded(relpath: bytes, path: bytes, listed: Iterable[os.DirEntry[bytes]]) -> Iterable[Candidate]:
    stem = os.path.basename(path).removesuffix(_INDEX)
    shards = [entry.path for entry in listed if _is_shard(entry.name, {stem})]
    if shards and (total := _total([path, *shards])):
        yield Candidate(relpath, path, total, "file", "sharded")


def _total(paths: Iterable[bytes]) -> FileStat | None:
    try:
        found = [os.stat(path) for path in paths]
    except OSError:
        return None
    newest = max(status.st_mtime_ns for status in found)
    return FileStat(sum(status.st_size for status in found), newest, found[0].st_ino, found[0].st_dev)


def candidate(root: bytes, relpath: bytes) -> Candidate | None:
    """The file or folder at a path, whatever its name; None when nothing is there."""
    path = os.path.join(root, relpath)
    try:
        status = os.stat(path)
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode):
        return _folder(relpath, path)
    if path.endswith(_INDEX):
        with os.scandir(os.path.dirname(path)) as entries:
            return next(iter(_sharded(relpath, path, list(entries))), None)
    if not stat.S_ISREG(status.st_mode):
        return None
    return Candidate(relpath, path, file_stat(status), "symlink" if os.path.islink(path) else "file")
