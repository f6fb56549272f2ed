"""Files that appear whole or not at all, also when the process is killed or the disk is full.

A ``.NAME.PID.RANDOM.hubtool-part`` beside the target is filled, synced and then given its name. A lock on it says that its writer
lives: parts without one are litter of a killed process, which ``sweep_parts`` removes.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hubtool.errors import CorruptFile, FileError, FileMissing, WouldOverwrite

PART_SUFFIX = ".hubtool-part"
PAGE = 4096
_COPY = 2 << 20  # larger calls of copy_file_range were measured slower
_FLUSH = 32 << 20  # bytes written before a flush begins beside the copy
_MARGIN = 64 << 20
_NAME_MAX = 255
_NO_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF}
_NO_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_ALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


class _Flusher:
    """Sends written pages to the disk beside the copy, so that the fsync at the end finds little left to do.

    An error is kept: the kernel reports it once per descriptor, so it must not be lost in the background.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def kick(self) -> None:
        """Start a flush unless one is under way."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._flush, daemon=True)
            self._thread.start()

    def _flush(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._error = self._error or error

    def finish(self) -> None:
        """Wait for the last flush; raise what any of them met."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


class Output:
    """The part being written: sequential, and every byte counted."""

    def __init__(self, fd: int, part: Path) -> None:
        self.fd = fd
        self.part = part
        self._at = 0
        self._copies = True
        self._scratch = memoryview(b"")
        self._flusher = _Flusher(fd)
        self._flushed = 0

    def advance(self, count: int) -> None:
        """Count bytes that were written, by this object or at their place in ``fd`` (one caller at a time)."""
        self._at += count
        if self._at - self._flushed >= _FLUSH:
            self._flushed = self._at
            self._flusher.kick()

    def settle(self) -> None:
        """Wait until nothing is flushed in the background any more; raise what a flush met."""
        self._flusher.finish()

    def tell(self) -> int:
        """Bytes written so far."""
        return self._at

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of ``data``."""
        view = memoryview(data).cast("B")
        while view:
            count = os.write(self.fd, view)
            self.advance(count)
            view = view[count:]

    def copy_range(self, source: int, offset: int, length: int) -> None:
        """Append ``length`` bytes of the file ``source``, inside the kernel where both sides lie alike in their pages.

        Raises ``CorruptFile`` when the source ends early.
        """
        end = offset + length
        if self._copies and offset % PAGE == self._at % PAGE:
            offset = self._copy_in_kernel(source, offset, end)
        while offset < end:
            part = self._filled(source, offset, min(_COPY, end - offset))
            self.write(part)
            offset += len(part)

    def gather(self, source: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Append ascending ``(start, end)`` ranges of ``source`` that lie close together: one read over all, one gathered write.

        A LoRA that loses its alphas is a thousand ranges two bytes apart. Raises ``CorruptFile`` when the source ends early.
        """
        first, last = ranges[0][0], ranges[-1][1]
        window = self._filled(source, first, last - first)
        views = [window[start - first : end - first] for start, end in ranges]
        wanted = sum(map(len, views))
        count = os.writev(self.fd, views)
        self.advance(count)
        if count < wanted:  # a short write: the rest one by one
            for view in views:
                skipped = min(count, len(view))
                count -= skipped
                self.write(view[skipped:])

    def _filled(self, source: int, offset: int, length: int) -> memoryview:
        """``length`` bytes at ``offset`` in a buffer that is reused."""
        if len(self._scratch) < length:
            self._scratch = memoryview(bytearray(length))
        done = 0
        while done < length:
            count = os.preadv(source, [self._scratch[done:length]], offset + done)
            if count == 0:
                raise CorruptFile("the source ends early", offset=offset + done)
            done += count
        return self._scratch[:length]

    def _copy_in_kernel(self, source: int, offset: int, end: int) -> int:
        while offset < end:
            step = min(end - offset, _COPY - offset % PAGE)  # from the second step on, whole pages
            try:
                count = os.copy_file_range(source, self.fd, step, offset)
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
                self._copies = False
                return offset
            if count == 0:
                return offset
            offset += count
            self.advance(count)
        return offset


@contextmanager
def atomic_file(path: Path, size: int | None, *, force: bool = False) -> Iterator[Output]:
    """Write ``path`` through a part; it gets its name when the block ends well and vanishes otherwise.

    ``size``: bytes that will be written (checked, and reserved on disk at once), or None where unknown. A link is followed: its
    target is replaced, not the link. Raises ``WouldOverwrite`` (checked first, and again when publishing), ``FileMissing`` for a
    missing folder, ``FileError`` for a full disk or any other error of the system.
    """
    final = _target(path, force)
    sweep_parts(final.parent, final.name)
    try:
        output = _open_part(final)
    except OSError as error:
        raise _explained(error, final) from error
    try:
        if size is not None:
            _reserve(output.fd, size, final)
        yield output
        if size is not None and output.tell() != size:
            raise FileError(f"{output.tell()} bytes were written, {size} were planned", path=final)
        output.settle()
        os.fsync(output.fd)
        publish(output.part, final, force)
    except OSError as error:
        raise _explained(error, final) from error
    finally:
        with suppress(OSError):  # on the way out of an error: the descriptor may only be closed when no flush uses it
            output.settle()
        with suppress(FileNotFoundError):
            os.unlink(output.part)
        os.close(output.fd)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; it is synced and renamed to ``path`` when the block ends well, removed otherwise.

    Raises ``WouldOverwrite`` when ``path`` exists: folders are never replaced.
    """
    final = _target(path, False)
    sweep_parts(final.parent, final.name)
    part = final.parent / _part_name(final.name)
    try:
        os.mkdir(part)
    except OSError as error:
        raise _explained(error, final) from error
    try:
        with _locked(part):
            yield part
            _publish_folder(part, final)
    finally:
        _remove_tree(part)


def _publish_folder(part: Path, final: Path) -> None:
    _target(final, False)
    try:
        _sync_tree(part)
        os.rename(part, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise _explained(error, final) from error


def sweep_parts(folder: Path, name: str | None = None) -> list[Path]:
    """Remove parts in ``folder`` (those of one output where it is named) whose writer is gone, and return them.

    Nothing without the suffix is touched.
    """
    stem = "" if name is None else f"{glob.escape(name)}."
    parts = sorted(folder.glob(f".{stem}*{PART_SUFFIX}"))
    return [part for part in parts if not part.is_symlink() and _removed(part)]


def same_file(a: Path, b: Path) -> bool:
    """Whether both names lead to one existing file."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def is_part(name: str) -> bool:
    """Whether a file name is that of an unfinished output, which no scan may index."""
    return name.endswith(PART_SUFFIX)


def _target(path: Path, force: bool) -> Path:
    if os.path.lexists(path) and not force:
        raise WouldOverwrite("the output already exists", path=path, hint="choose another name, or add --force")
    final = Path(os.path.realpath(path))
    if not final.parent.is_dir():
        raise FileMissing("the folder for the output does not exist", path=final.parent)
    if force and final.exists() and not final.is_file():
        raise WouldOverwrite("only a regular file can be replaced", path=path)
    return final


def _part_name(name: str) -> str:
    tail = f".{os.getpid()}.{os.urandom(4).hex()}{PART_SUFFIX}"
    stem = os.fsencode(name)[: _NAME_MAX - len(tail) - 1]
    return "." + stem.decode("utf-8", "ignore") + tail


def _open_part(final: Path) -> Output:
    while True:
        part = final.parent / _part_name(final.name)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return Output(fd, part)
        os.close(fd)  # a sweep took it for litter between the two calls


def _reserve(fd: int, size: int, final: Path) -> None:
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    if free < size + min(size, _MARGIN):
        raise FileError(f"not enough space: {size} bytes are needed, {free} are free", path=final)
    if size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NO_ALLOCATE:
                raise


def publish(part: Path, final: Path, force: bool) -> None:
    """Give a synced part its name; with ``force`` it replaces what is there. Raises ``WouldOverwrite``."""
    if force:
        os.replace(part, final)
    else:
        _link(part, final)
    _sync_folder(final.parent)


def _link(part: Path, final: Path) -> None:
    """Give the part its name; unlike a rename this fails when the name has been taken meanwhile."""
    try:
        os.link(part, final)
    except FileExistsError:
        if not same_file(part, final):  # a network disk may report failure for a link it has made
            raise WouldOverwrite("the output appeared while it was being written", path=final) from None
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _target(final, False)  # a disk without links: the promise is weaker by one race
        os.rename(part, final)


def _explained(error: OSError, path: Path) -> FileError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FileError("the disk is full, nothing was written", path=path)
    return FileError(f"cannot write: {error.strerror or error}", path=path)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _removed(part: Path) -> bool:
    """Remove ``part`` unless another process holds its lock."""
    try:
        fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            _remove_tree(part, strict=True)
        else:
            os.unlink(part)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _remove_tree(path: Path, *, strict: bool = False) -> None:
    import shutil  # and with it every compression library: only outputs that are folders need it

    shutil.rmtree(path, ignore_errors=not strict)
