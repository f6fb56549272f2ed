"""One file from a hub to a path, whole or not at all: from a copy on this machine where there is one, else over Xet or HTTP.

Whatever the way, the content is hashed while it arrives and gets its name only when it hashes to what the hub lists. A broken transfer
goes on where it stopped, in this run or the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileError, HubError, WouldOverwrite
from hubtool.hub import xet
from hubtool.hub.checking import Checker
from hubtool.hub.client import Client, Entry
from hubtool.hub.errors import explain, failures, is_unreachable
from hubtool.hub.partial import Partial, partial
from hubtool.hub.refs import HubRef
from hubtool.hub.retrying import BrokenAnswer, Tries

Advance = Callable[[int], None]
_BLOCK = 1 << 20
_WRONG_TWICE = 2  # a whole file of wrong content: once may be the line, twice is the source
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Fetched:
    """How a file came: ``present`` (it was there), ``copied`` (from this machine), ``http`` or ``xet``; ``resumed``: bytes of an earlier run.

    ``received`` counts the bytes that came over the network.
    """

    path: Path
    how: str
    received: int = 0
    resumed: int = 0


def fetch(
    client: Client | None, ref: HubRef, entry: Entry, target: Path, *, copies: Sequence[Path] = (), force: bool = False,
    advance: Advance = lambda _: None,
) -> Fetched:  # fmt: skip
    """Bring ``entry`` of the pinned ``ref`` to ``target``, whose folder exists.

    ``copies``: files of this machine that should be the same; they are hashed. ``client`` None: the network is not used. Raises
    ``WouldOverwrite`` where another file lies at ``target``, ``FileError`` for the disk, ``CorruptFile`` when the hub sends wrong content
    twice, ``HubError`` for everything else.
    """
    if os.path.lexists(target):
        if is_file_of(target, entry, advance):
            return Fetched(target, "present")
        if not force:
            raise WouldOverwrite("another file lies here", path=target, hint="choose another folder, or add --force")
    with partial(target, entry) as part:
        resumed = part.done
        advance(resumed)
        if not part.is_right() and _copied(part, copies, advance):
            resumed, how, received = 0, "copied", 0
        else:
            how, received = _received(client, ref, part, advance)
            resumed = min(resumed, max(0, entry.size - received))  # less where the hub would not continue it
        part.publish(force)
    return Fetched(target, how, received, resumed)


def is_file_of(path: Path, entry: Entry, advance: Advance = lambda _: None) -> bool:
    """Whether the file at ``path`` is the listed one, by size and hash."""
    try:
        if not path.is_file() or path.stat().st_size != entry.size:
            return False
        check = Checker(entry)
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                check.update(block)
    except OSError as error:
        raise FileError(f"cannot read: {error.strerror or error}", path=path) from error
    if check.hexdigest() != entry.digest:
        return False
    advance(entry.size)
    return True


def _copied(part: Partial, copies: Iterable[Path], advance: Advance) -> bool:
    """Fill the part from a copy that proves right. A wrong or unreadable copy is passed over."""
    for path in copies:
        advance(-part.reset())
        try:
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    part.write(block)
                    advance(len(block))
        except OSError:
            continue
        if part.is_right():
            return True
    if copies:
        advance(-part.reset())
    return False


def _received(client: Client | None, ref: HubRef, part: Partial, advance: Advance) -> tuple[str, int]:
    """(way, bytes received) once the part is whole and right."""
    if part.is_right():
        return "http", 0
    if client is None:
        raise HubError(f"HF_HUB_OFFLINE is set, and nothing here holds {ref}", hint="unset HF_HUB_OFFLINE")
    line = _Line(client, ref, part, advance)
    wrong = 0
    while not part.is_right():
        if part.whole:
            wrong += 1
            advance(-part.reset())
        if wrong >= _WRONG_TWICE:
            raise _refused(ref, part)
        line.go_on()
    return line.way, line.received


def _refused(ref: HubRef, part: Partial) -> CorruptFile:
    part.discard()
    message = f"{part.entry.path} came twice with other content than {ref.repo} lists; nothing was kept"
    return CorruptFile(message, path=part.target, hint="try another network, or tell the owner of the repository")


class _Line:
    """The network side of one transfer: Xet while it works, HTTP after that; counts tries and bytes."""

    def __init__(self, client: Client, ref: HubRef, part: Partial, advance: Advance) -> None:
        self._client = client
        self._ref = ref
        self._part = part
        self._advance = advance
        self._tries = Tries(client.endpoint, client.sleep)
        self._last = part.done
        self.way = "xet" if xet.is_possible(part.entry) else "http"
        self.received = 0

    def go_on(self) -> None:
        """Receive until the part is whole or the connection breaks; wait then. Raises ``HubError`` when it breaks too often."""
        try:
            self._over_xet() if self.way == "xet" else self._over_http()
        except failures() as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None and not _is_network(error):
            raise error  # this machine's disk: the partial file puts it into words
        if self._part.done > self._last + _BLOCK:
            self._tries.progressed()
        self._last = self._part.done
        if self.way == "xet":
            self.way = "http"  # Xet has tried long enough by itself
            return
        try:
            self._tries.again(error)
        except failures() as final:
            raise explain(final, self._ref, self._client.endpoint) from final

    def _take(self, chunk: bytes) -> None:
        self._part.write(chunk)
        self.received += len(chunk)
        self._advance(len(chunk))
        if self._part.done > self._part.entry.size:
            raise BrokenAnswer("more bytes than listed")

    def _over_xet(self) -> None:
        for chunk in xet.stream(self._client, self._ref, self._part.entry, self._part.done):
            self._take(chunk)

    def _over_http(self) -> None:
        part = self._part
        with self._client.stream(self._ref, part.entry.path, start=part.done, etag=part.etag) as response:
            self._align(response)
            part.remember(response.headers.get("etag"))
            for chunk in response.iter_bytes(_BLOCK):
                self._take(chunk)
        if not part.whole:
            raise BrokenAnswer("fewer bytes than listed")

    def _align(self, response: Any) -> None:
        """Make the part end where the answer begins. Raises for an answer that cannot be a piece of the file."""
        kind = response.headers.get("content-type", "")
        if kind.startswith("text/html") and not self._part.entry.path.endswith((".html", ".htm")):
            raise _portal(self._client.endpoint)
        encoded = response.headers.get("content-encoding", "identity") != "identity"
        if response.status_code == 206 and not encoded:
            self._check_range(response.headers.get("content-range", ""))
        elif self._part.done:
            self._advance(-self._part.reset())  # the whole file comes again: Range was ignored, or the ETag is another
            if response.status_code == 206:
                raise BrokenAnswer("a compressed piece")

    def _check_range(self, text: str) -> None:
        match = _CONTENT_RANGE.fullmatch(text.strip())
        size = str(self._part.entry.size)
        if match is None or int(match[1]) != self._part.done or match[3] not in (size, "*"):
            self._advance(-self._part.reset())
            raise BrokenAnswer(f"another range than asked for: {text[:80]}")


def _is_network(error: OSError) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or is_unreachable(error)


def _portal(endpoint: str) -> HubError:
    return HubError(
        f"a web page came instead of the file: something else than the hub at {endpoint} answered",
        hint="sign in to the network in a browser, then run the same command again: it goes on where it stopped",
    )
