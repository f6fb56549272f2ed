"""The image of origin: what of a torch file is no tensor, kept in the metadata of its safetensors form, so that the way back gives
the very bytes of the file, whichever program wrote it.

``hubtool.image`` = JSON {version, name, origin, asked, sha256, cuts, rest}. A cut [start, length, key, offset] is a stretch of the file
that lies in tensor ``key`` from byte ``offset`` on; ``rest`` is everything between the cuts, deflated, base64.

An image comes from a file and is never trusted: the restored bytes must have the hash, open as a healthy torch file (nothing in it is
executed), and convert to exactly the safetensors file they came from, metadata included. Otherwise the artefact is written anew.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hubtool.errors import CorruptFile, HubtoolError
from hubtool.formats.base import TensorFile
from hubtool.ops.plan import Plan
from hubtool.tensors import expr as e
from hubtool.tensors.atomic import atomic_file
from hubtool.tensors.evaluate import Range, chunks, is_bytes, pieces, to_bytes
from hubtool.tensors.expr import Expr, Literal, Read
from hubtool.tensors.hashing import hash_file
from hubtool.tensors.reading import Sources, pread_exact
from hubtool.tensors.ref import TensorRef

KEY = "hubtool.image"
_VERSION = 1
_MOST_REST = 1 << 20  # a pickle and a directory are kilobytes; hidden or strided storages may be gigabytes
_MOST_CUTS = 1 << 16
_TORCH = ("torch-zip", "torch-legacy")
Cut = tuple[int, int, str, int]
Forward = Callable[[TensorFile, str | None], Plan | None]


@dataclass(frozen=True, slots=True)
class Restored(Plan):
    """A plan whose output is the origin's file, byte for byte: ``image``. ``tree`` and ``tensors`` say the same thing anew."""

    image: Expr | None = None

    @property
    def fidelity(self) -> str:
        return "identical"

    def write(self, output: Path, *, force: bool = False) -> int:
        """Write the image; returns its bytes. Raises ``WouldOverwrite``, ``FileError``."""
        assert self.image is not None
        total = e.size(self.image)
        with atomic_file(output, total, force=force) as out:
            for chunk in chunks(self.image):
                out.write(chunk)
        return total


@dataclass(frozen=True, slots=True)
class Image:
    """The parsed entry. ``origin``: the form of the source; ``asked``: the form that was asked for when it became safetensors."""

    name: str
    origin: str | None
    asked: str | None
    sha256: str
    cuts: tuple[Cut, ...]
    rest: bytes

    def dump(self) -> str:
        packed = base64.b64encode(zlib.compress(self.rest, 9)).decode()
        facts = {
            "version": _VERSION,
            "name": self.name,
            "origin": self.origin,
            "asked": self.asked,
            "sha256": self.sha256,
        }
        return json.dumps({**facts, "cuts": self.cuts, "rest": packed}, ensure_ascii=False, separators=(",", ":"))


def remember(made: Plan, file: TensorFile, origin: str | None, asked: str | None) -> Plan:
    """``made`` with the image of its source in the metadata, where the source is a torch file with little beside its tensors."""
    if file.format not in _TORCH or not file.path.is_file():
        return made
    cuts = tuple(_cuts(file.path, made.tensors))
    total = file.path.stat().st_size
    if total - sum(length for _, length, _, _ in cuts) > _MOST_REST or len(cuts) > _MOST_CUTS:
        return made
    digest = hash_file(file.path, ["sha256"])["sha256"]
    image = Image(file.path.name, origin, asked, digest, cuts, _rest(file.path, cuts, total))
    return replace(made, metadata={**made.metadata, KEY: image.dump()})


def restore(made: Plan, file: TensorFile, layout: str | None, forward: Forward) -> Restored | None:
    """``made`` (a torch file) as the origin's very bytes; None when there is no image, or anything has changed since."""
    image = _load(file.metadata)
    if image is None or not (layout == image.origin or (layout is None and image.asked is None)):
        return None
    whole = _assembled(image, file.tensors)
    if whole is None or not _proved(image, whole, file, forward):
        return None
    given = {field.name: getattr(made, field.name) for field in fields_of(Plan)}
    notes = (*made.notes, "restored byte for byte from the image of its origin")
    return Restored(**{**given, "notes": notes, "losses": ()}, image=whole)


def _cuts(path: Path, tensors: Mapping[str, Expr]) -> Iterator[Cut]:
    """Stretches of the file that are bytes of an output tensor, ascending, without overlap (a tied tensor is cut once)."""
    found: list[Cut] = []
    with Sources() as sources:
        for key, tensor in tensors.items():
            if is_bytes(tensor) and all(ref.contiguous for ref in e.sources(tensor)):
                found += _stretches(path, key, tensor, sources)
    at = 0
    for cut in sorted(found):
        if cut[0] >= at:
            yield cut
            at = cut[0] + cut[1]


def _stretches(path: Path, key: str, tensor: Expr, sources: Sources) -> Iterator[Cut]:
    offset = 0
    for piece in pieces(tensor, sources):
        if isinstance(piece, Range) and piece.path == path and len(piece):
            yield piece.start, len(piece), key, offset
        offset += len(piece)


def _rest(path: Path, cuts: tuple[Cut, ...], total: int) -> bytes:
    parts, at = [], 0
    with Sources() as sources:
        fd = sources.fd(path)
        for start, length in (*((cut[0], cut[1]) for cut in cuts), (total, 0)):
            parts.append(pread_exact(fd, start - at, at, path))
            at = start + length
    return b"".join(parts)


def _load(metadata: Mapping[str, str]) -> Image | None:
    try:
        document = json.loads(metadata.get(KEY, ""))
        return _image(document) if document["version"] == _VERSION else None
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error, zlib.error):
        return None


def _image(document: Mapping[str, Any]) -> Image | None:
    from hubtool.formats.documents import is_plain_name

    name, rest = str(document["name"]), zlib.decompressobj()
    data = rest.decompress(base64.b64decode(document["rest"], validate=True), _MOST_REST)
    cuts = tuple((int(start), int(length), str(key), int(offset)) for start, length, key, offset in document["cuts"])
    if rest.unconsumed_tail or not is_plain_name(name) or len(cuts) > _MOST_CUTS:
        return None
    return Image(name, document["origin"], document["asked"], str(document["sha256"]), cuts, data)


def _assembled(image: Image, tensors: Mapping[str, TensorRef]) -> Expr | None:
    """The whole file as bytes: stretches of tensors, and the rest between them. None when a cut leaves its tensor."""
    parts: list[Expr] = []
    at = used = 0
    for start, length, key, offset in image.cuts:
        ref = tensors.get(key)
        if ref is None or start < at or min(offset, length) < 0 or offset + length > ref.nbytes or not ref.contiguous:
            return None
        parts += [_bytes(image.rest[used : used + start - at]), _stretch(ref, offset, length)]
        used, at = used + start - at, start + length
    if used > len(image.rest):
        return None
    return e.concat((*parts, _bytes(image.rest[used:])))


def _bytes(data: bytes) -> Expr:
    return Literal(data, "U8", (len(data),))


def _stretch(ref: TensorRef, offset: int, length: int) -> Expr:
    inline = None if ref.inline is None else ref.inline[offset : offset + length]
    start = 0 if inline is not None else ref.start + offset
    return Read(TensorRef(ref.name, "U8", (length,), ref.path, start, start + length, inline=inline))


def _proved(image: Image, whole: Expr, file: TensorFile, forward: Forward) -> bool:
    """Whether the restored file is healthy and is what this safetensors file was made of."""
    from hubtool.formats import open_file

    with suppress(HubtoolError, OSError), TemporaryDirectory(prefix="hubtool-") as folder:
        path = Path(folder) / image.name
        _copy(whole, path, image.sha256)
        again = forward(open_file(path), image.asked)
        return again is not None and _same(again, file, {key for _, _, key, _ in image.cuts})
    return False


def _copy(whole: Expr, path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for chunk in chunks(whole):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != sha256:
        raise CorruptFile("the tensors are no longer those of the image", path=path)


def _same(again: Plan, file: TensorFile, cut: set[str]) -> bool:
    """Equal metadata means equal cuts, so tensors that were cut are equal byte for byte; the others are compared."""
    if dict(again.metadata) != dict(file.metadata) or list(again.tensors) != list(file.tensors):
        return False
    pairs = ((key, again.tensors[key], ref) for key, ref in file.tensors.items())
    return all(
        (new.dtype, new.shape) == (ref.dtype, ref.shape) and (key in cut or to_bytes(new) == to_bytes(Read(ref)))
        for key, new, ref in pairs
    )
