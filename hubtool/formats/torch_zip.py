"""Torch zip files (torch >= 1.6): ``{root}/data.pkl`` beside one stored record per storage. Layout: spec/artefacts C.1."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hubtool.errors import CorruptFile, FileError, UnsafeFile, UnsupportedFile
from hubtool.formats import pickle_machine, zip_reader
from hubtool.formats.base import TensorFile
from hubtool.formats.pickle_state import MAX_BYTES
from hubtool.formats.source import Source
from hubtool.formats.torch_objects import Storage
from hubtool.formats.torch_tree import Blob, Tree, pickle_findings, swapped
from hubtool.formats.zip_reader import DEFLATED, Member
from hubtool.types import Finding

# Bytes of storages that may be held in memory because no plain range of the file has them (deflated, big-endian).
MAX_INLINE = 64 << 20
_SMALL = 4096
_OWN = frozenset(
    {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
)


@dataclass(slots=True)
class _Archive:
    source: Source
    root: str
    members: dict[str, Member]
    big: bool = False
    inlined: int = 0
    used: set[str] = field(default_factory=set)

    def small(self, name: str) -> bytes | None:
        member = self.members.get(f"{self.root}/{name}")
        return None if member is None else zip_reader.content(self.source, member, _SMALL)

    def locate(self, storage: Storage) -> Blob:
        """Where the record of a storage lies. Its size must be what the pickle says, exactly."""
        name = f"{self.root}/data/{storage.key}"
        member = self.members.get(name)
        if member is None:
            raise CorruptFile(f"the record of storage {storage.key} is missing", path=self.source.path)
        if member.size != storage.numel * storage.itemsize:
            raise CorruptFile(
                f"storage {storage.key} has {member.size} bytes instead of {storage.numel * storage.itemsize}",
                path=self.source.path, offset=member.start,
            )  # fmt: skip
        self.used.add(name)
        if member.method == DEFLATED or self.big:
            return self.inline(storage, member)
        return Blob(member.start, member.size)

    def inline(self, storage: Storage, member: Member) -> Blob:
        self.inlined += member.size
        if self.inlined > MAX_INLINE:
            kind = "big-endian" if self.big else "compressed"
            raise UnsupportedFile(
                f"the archive is {kind} and too large to read that way",
                path=self.source.path,
                hint="save it again with torch",
            )
        data = zip_reader.content(self.source, member, MAX_INLINE)
        if self.big:
            if storage.untyped:
                raise UnsupportedFile("a big-endian storage does not say its type", path=self.source.path)
            data = swapped(data, storage.itemsize // 2 if storage.dtype[0].upper() == "C" else storage.itemsize)
        return Blob(0, len(data), data)


def read(path: Path, fd: int, size: int) -> TensorFile:
    """Open a torch zip. Executes nothing, reads no tensor data (but compressed or big-endian records).

    Raises ``CorruptFile``, ``UnsafeFile`` or ``UnsupportedFile`` (TorchScript, other archives).
    """
    source = Source.of(path, fd, size)
    archive = _open(source)
    findings = list(_member_findings(archive))
    pickle = archive.members[f"{archive.root}/data.pkl"]
    data = zip_reader.content(source, pickle, MAX_BYTES)
    try:
        parsed = pickle_machine.run(data, base=pickle.start)
        if parsed.end != len(data):
            raise CorruptFile("bytes follow the end of data.pkl", offset=pickle.start + parsed.end)
        tree = Tree(path, size, archive.locate)
        structure = tree.walk(parsed.value)
    except FileError as error:
        error.path = error.path or str(path)
        raise
    findings += [*pickle_findings(parsed), *tree.findings, *_unused(archive)]
    return TensorFile(path, "torch-zip", size, tree.tensors, tree.metadata, tuple(findings), structure, files=(path,))


def _open(source: Source) -> _Archive:
    members = zip_reader.members(source)
    if not members:
        raise CorruptFile("an empty archive", path=source.path)
    roots = {name.split("/", 1)[0] for name in members}
    root = next(iter(roots))
    _refuse_others(source, members, root)
    if not any(f"{name}/data.pkl" in members for name in roots):
        raise UnsupportedFile(
            "a zip archive, but not one that torch.save wrote (no data.pkl)", path=source.path, hint="extract it first"
        )
    if len(roots) > 1:
        raise UnsafeFile("the archive has more than one root folder", path=source.path)
    archive = _Archive(source, root, members)
    archive.big = _is_big(archive)
    return archive


def _refuse_others(source: Source, members: dict[str, Member], root: str) -> None:
    if f"{root}/constants.pkl" in members or any(name.startswith(f"{root}/code/") for name in members):
        raise UnsupportedFile(
            "a TorchScript archive: it holds a program, not only weights",
            path=source.path, hint="export its state_dict with torch.save in a sandbox you trust",
        )  # fmt: skip
    if all(name.endswith(".npy") for name in members):
        raise UnsupportedFile("a NumPy .npz archive", path=source.path)


def _is_big(archive: _Archive) -> bool:
    version = archive.small("version")
    if version is not None and not (version.strip().isdigit() and len(version) <= 3):
        raise CorruptFile(f"the version record says {version[:20]!r}", path=archive.source.path)
    order = archive.small("byteorder")
    if order not in {None, b"little", b"big"}:
        raise CorruptFile(f"the byteorder record says {order[:20]!r}", path=archive.source.path)
    return order == b"big"


def _member_findings(archive: _Archive) -> list[Finding]:
    found = []
    if f"{archive.root}/version" not in archive.members:
        found.append(
            Finding("no-version", "warning", "the archive has no version record: another program may have packed it")
        )
    if archive.big:
        found.append(Finding("big-endian", "warning", "the numbers are big-endian and were swapped"))
    if any(member.method == DEFLATED for member in archive.members.values()):
        found.append(Finding("deflated", "warning", "members are compressed: torch never does that"))
    extra = [name for name in archive.members if not _expected(archive.root, name)]
    for name in extra:
        _refuse_nested(archive, archive.members[name])
    if extra:
        names = ", ".join(ascii(name) for name in extra[:3])
        found.append(
            Finding("unexpected-member", "warning", f"{len(extra)} members that torch does not write: {names}")
        )
    return found


def _expected(root: str, name: str) -> bool:
    inner = name[len(root) + 1 :]
    return inner in _OWN or (inner.startswith("data/") and inner[5:].isdigit() and inner.isascii())


def _refuse_nested(archive: _Archive, member: Member) -> None:
    head = archive.source.read(member.start, min(4, member.stored))
    if head == b"PK\x03\x04":
        raise UnsafeFile(
            f"an archive inside the archive: {member.name[:80]!a}", path=archive.source.path, offset=member.start
        )


def _unused(archive: _Archive) -> list[Finding]:
    prefix = f"{archive.root}/data/"
    size = sum(m.size for name, m in archive.members.items() if name.startswith(prefix) and name not in archive.used)
    return [Finding("hidden-bytes", "warning", f"{size} bytes of records that no tensor uses")] if size else []
