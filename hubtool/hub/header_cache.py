"""Headers that were read from afar, kept by the hash of their file: what a file is made of never changes, so nobody asks twice.

A folder of this user alone (headers of private repositories are private), bounded, and never needed: whatever is missing, damaged or
cannot be written is simply read again.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MAX_BYTES = 64 << 20  # of the folder; the least recently used go first
MAX_ONE = 4 << 20  # of one entry, unpacked
_LENGTH = 4
_SUFFIX = ".header"


def cache_folder() -> Path:
    """HUBTOOL_CACHE, else the user's cache folder."""
    if named := os.environ.get("HUBTOOL_CACHE"):
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("hubtool")


class HeaderCache:
    """What is kept of files by digest: the bytes at their beginning, and a second piece of a header too long to be read whole.

    ``refresh``: forget what is kept, write what is read now.
    """

    def __init__(self, folder: Path | None = None, *, refresh: bool = False) -> None:
        self.folder = (folder or cache_folder()) / "headers"
        self._refresh = refresh
        self._written = False

    def get(self, digest: str) -> tuple[bytes, bytes] | None:
        """(beginning, second piece), or None where the cache does not have them."""
        path = self._path(digest)
        if self._refresh or path is None:
            return None
        try:
            unpacked = zlib.decompressobj().decompress(path.read_bytes(), MAX_ONE)
            os.utime(path)
        except (OSError, zlib.error):
            return None
        length = int.from_bytes(unpacked[:_LENGTH], "little")
        found = unpacked[_LENGTH : _LENGTH + length], unpacked[_LENGTH + length :]
        return found if length and len(found[0]) == length else None

    def put(self, digest: str, head: bytes, tail: bytes = b"") -> None:
        """Keep it, if it can be kept."""
        path = self._path(digest)
        if path is None or not head or len(head) + len(tail) + _LENGTH > MAX_ONE:
            return
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd, draft = tempfile.mkstemp(dir=path.parent, prefix=".draft-")  # nobody else can read it
            with open(fd, "wb") as file:
                file.write(zlib.compress(len(head).to_bytes(_LENGTH, "little") + head + tail, 6))
            os.replace(draft, path)
            self._written = True

    def _path(self, digest: str) -> Path | None:
        known = len(digest) in (40, 64) and all(letter in "0123456789abcdef" for letter in digest)
        return self.folder / f"{digest}{_SUFFIX}" if known else None

    def trim(self, limit: int = MAX_BYTES) -> None:
        """Remove the least recently used entries beyond ``limit`` bytes, if something was written."""
        if not self._written:
            return
        with suppress(OSError):
            kept = 0
            for _, size, path in sorted(self._entries(), reverse=True):
                kept += size
                if kept > limit:
                    Path(path).unlink(missing_ok=True)

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        with os.scandir(self.folder) as found:
            for entry in found:
                with suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    yield stat.st_mtime_ns, stat.st_size, entry.path
