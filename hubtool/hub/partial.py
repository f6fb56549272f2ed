"""A file that is being fetched: its bytes so far lie beside the target, hashed as they come, and outlive the process.

``.NAME.DIGEST.hubtool-pull`` holds the bytes, ``... .json`` beside it the ETag they came with. The name carries the digest of the whole,
so bytes of another version are never continued. Scans pass over both: their names begin with a dot.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from hubtool.errors import FileError, FileMissing, HubError
from hubtool.hub.checking import Checker
from hubtool.hub.client import Entry
from hubtool.tensors.atomic import publish

SUFFIX = ".hubtool-pull"
_READ = 4 << 20
_MARGIN = 16 << 20
_MAX_STATE = 4096
_NAME = 60  # characters of the target's name; four bytes each still leave room for the rest


class Partial:
    """The beginning of one listed file. ``done`` bytes are on disk and in the hash."""

    def __init__(self, fd: int, path: Path, target: Path, entry: Entry) -> None:
        self.path = path
        self.target = target
        self.entry = entry
        self.done = 0
        self.etag: str | None = None
        self._fd = fd
        self._check = Checker(entry)

    @property
    def state(self) -> Path:
        """The file beside it that says where the bytes came from."""
        return self.path.with_name(self.path.name + ".json")

    def write(self, data: bytes | memoryview) -> None:
        """Append. More than the listed size is counted and not kept: it is the wrong file."""
        view = memoryview(data)
        self._check.update(view)
        if self.done + len(view) <= self.entry.size:
            offset = self.done
            while offset < self.done + len(view):
                offset += os.pwrite(self._fd, view[offset - self.done :], offset)
        self.done += len(view)

    @property
    def whole(self) -> bool:
        """Whether as many bytes are there as were listed; they may still be wrong."""
        return self.done >= self.entry.size

    def is_right(self) -> bool:
        """Whether size and hash are those listed."""
        return self.done == self.entry.size and self._check.hexdigest() == self.entry.digest

    def remember(self, etag: str | None) -> None:
        """Note the ETag of the answer that the bytes come from. A weak one cannot join two parts."""
        strong = etag if etag and etag.startswith('"') else None
        if strong == self.etag:
            return
        self.etag = strong
        draft = self.state.with_name(self.state.name + ".new")
        draft.write_text(json.dumps({"etag": strong, "size": self.entry.size, "path": self.entry.path}), "utf-8")
        os.replace(draft, self.state)

    def reset(self) -> int:
        """Forget everything; how many bytes that were."""
        os.ftruncate(self._fd, 0)
        lost, self.done, self.etag = self.done, 0, None
        self._check = Checker(self.entry)
        self.state.unlink(missing_ok=True)
        return lost

    def resume(self) -> None:
        """Take up what an earlier run left: hash it again, read its ETag."""
        size = os.fstat(self._fd).st_size
        if size > self.entry.size:
            self.reset()
            return
        while self.done < size:
            block = os.pread(self._fd, _READ, self.done)
            if not block:
                break
            self._check.update(block)
            self.done += len(block)
        self.etag = _etag_in(self.state) if self.done else None

    def publish(self, force: bool) -> None:
        """Give the finished file its name. Raises ``WouldOverwrite`` when it has been taken meanwhile."""
        os.fsync(self._fd)
        publish(self.path, self.target, force)
        self.discard()
        self._sweep()

    def _sweep(self) -> None:
        """Remove what was left of other versions of the same file, unless somebody is at it."""
        for other in self.target.parent.glob(f".{escape(self.target.name[:_NAME])}.*{SUFFIX}"):
            with suppress(OSError):
                fd = os.open(other, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    other.unlink()
                    other.with_name(other.name + ".json").unlink(missing_ok=True)
                finally:
                    os.close(fd)

    def discard(self) -> None:
        """Remove what lies beside the target."""
        self.path.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def _etag_in(state: Path) -> str | None:
    try:
        with open(state, "rb") as file:
            document: Any = json.loads(file.read(_MAX_STATE))
    except (OSError, ValueError):
        return None
    etag = document.get("etag") if isinstance(document, dict) else None
    return etag if isinstance(etag, str) and etag.isprintable() else None


@contextmanager
def partial(target: Path, entry: Entry) -> Iterator[Partial]:
    """The partial file of ``target``, locked against other processes; it stays on disk unless it was published or discarded.

    Raises ``FileMissing`` and ``FileError`` for the folder, ``HubError`` while another process fetches the same file.
    """
    path = target.with_name(f".{target.name[:_NAME]}.{entry.digest[:12]}{SUFFIX}")
    fd = _open_locked(path)
    try:
        found = Partial(fd, path, target, entry)
        found.resume()
        _check_space(target, entry.size - found.done)
        yield found
    except OSError as error:
        if error.errno is None:  # a hub's, not this disk's
            raise
        raise FileError(f"cannot write: {error.strerror or error}", path=target) from error
    finally:
        with suppress(OSError):
            if not os.fstat(fd).st_size:
                path.unlink(missing_ok=True)
        os.close(fd)


def _open_locked(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise FileMissing("the folder for the output does not exist", path=path.parent) from None
        except OSError as error:
            raise FileError(f"cannot write: {error.strerror or error}", path=path.parent) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise HubError(
                "another hubtool is fetching this file", path=path, hint="wait until it has finished"
            ) from None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # published by another process between the two calls


def _check_space(target: Path, missing: int) -> None:
    disk = os.statvfs(target.parent)
    free = disk.f_bavail * disk.f_frsize
    if missing > 0 and free < missing + min(missing, _MARGIN):
        raise FileError(f"not enough space: {missing} bytes are to come, {free} are free", path=target)
