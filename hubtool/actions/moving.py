"""Moving single files and folders: never over anything, to the trash and back, and whole or not at all between file systems."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from hubtool.errors import FileError, FileMissing, MissingExtra, WouldOverwrite

_CHUNK = 1 << 20


def move(source: Path, target: Path) -> None:
    """Rename, or copy, compare and delete where the target is on another file system. Folders above it are made.

    Raises WouldOverwrite, FileMissing, FileError; then the source is as it was.
    """
    if not os.path.lexists(source):
        raise FileMissing("the file is gone", path=source, hint="hubtool scan")
    if os.path.lexists(target):
        raise WouldOverwrite("something lies there already", path=target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _rename(source, target)
    except OSError as error:
        raise FileError(f"cannot be moved to {target}: {error.strerror or error}", path=source) from error


def _rename(source: Path, target: Path) -> None:
    try:
        if source.is_dir() and not source.is_symlink():
            os.rename(source, target)
        else:
            os.link(
                source, target, follow_symlinks=False
            )  # unlike rename, it fails where something has appeared meanwhile
            os.unlink(source)
    except OSError as error:
        if error.errno == errno.EXDEV:
            _copy(source, target)
        elif error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            os.rename(source, target)  # a file system without hard links
        else:
            raise


def _copy(source: Path, target: Path) -> None:
    if source.is_symlink() or not source.is_file():
        raise FileError(
            "only plain files can be moved to another file system", path=source, hint="copy it yourself; then scan"
        )
    part = target.with_name(f".{target.name}.part")
    try:
        before = source.stat()
        digest = _copied(source, part)
        os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
        if _digest(part) != digest or source.stat().st_mtime_ns != before.st_mtime_ns:
            raise FileError("the copy differs from the file", path=source, hint="nothing was moved; try again")
        os.link(part, target)
        os.unlink(source)
    finally:
        part.unlink(missing_ok=True)


def _copied(source: Path, part: Path) -> str:
    digest = hashlib.sha256()
    with open(source, "rb") as reading, open(part, "xb") as writing:
        while chunk := reading.read(_CHUNK):
            digest.update(chunk)
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def trash(path: Path) -> str | None:
    """Put a file or folder into the system's trash; where it lies there, on systems that tell. Raises FileError, MissingExtra."""
    try:
        from send2trash import send2trash
    except ImportError as error:
        raise MissingExtra("the trash", "trash") from error
    before = set(trashed(path))
    try:
        send2trash(str(path))
    except OSError as error:
        hint = "--permanent deletes without a trash"
        raise FileError(f"cannot be put into the trash: {error.strerror or error}", path=path, hint=hint) from error
    return next((str(found) for found in trashed(path) if found not in before), None)


def trashed(original: Path) -> Iterator[Path]:
    """What lies in the trash folders of the freedesktop.org specification and came from this path."""
    for folder, top in _trash_folders(original):
        for info in sorted(folder.glob("info/*.trashinfo")):
            lines = info.read_text("utf-8", "surrogateescape").splitlines()
            came = next((unquote(line[5:], errors="surrogateescape") for line in lines if line.startswith("Path=")), "")
            held = folder / "files" / info.name.removesuffix(".trashinfo")
            if came and os.path.join(top, came) == str(original) and os.path.lexists(held):
                yield held


def _trash_folders(path: Path) -> Iterator[tuple[Path, str]]:
    """(trash folder, what relative paths in it are relative to): the person's own, and that of the disk ``path`` is on."""
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    yield home / "Trash", str(home)
    top = path.parent.resolve()
    while not os.path.ismount(top) and top != top.parent:
        top = top.parent
    if hasattr(os, "getuid"):
        yield top / ".Trash" / str(os.getuid()), str(top)
        yield top / f".Trash-{os.getuid()}", str(top)


def restore(held: Path, original: Path) -> None:
    """Bring something back out of the trash. Raises WouldOverwrite, FileMissing, FileError."""
    if not os.path.lexists(held):
        raise FileMissing("it is no longer in the trash", path=held)
    move(held, original)
    (held.parent.parent / "info" / f"{held.name}.trashinfo").unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Delete for good. Raises FileError."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise FileError(f"cannot be deleted: {error.strerror or error}", path=path) from error
