"""What lies in a folder of images: each with its caption, its mask and its size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileMissing, MissingExtra, UsageProblem

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CAPTIONS = (".txt", ".caption")
_MASK = ".mask"
_REPEATED = re.compile(r"(\d{1,4})_")  # sd-scripts' folders: 10_name
_METADATA = "metadata.jsonl"
_LONGEST = 1 << 20  # bytes of a caption file


@dataclass(frozen=True, slots=True)
class Item:
    """One image. ``size``: (width, height) as shown, after EXIF rotation. ``caption``: None where no file tells."""

    path: Path
    size: tuple[int, int]
    caption: str | None = None
    mask: Path | None = None
    repeats: int = 1

    @property
    def name(self) -> str:
        """The file's name as words: ``a_black-cat (3).png`` says ``a black cat``."""
        return re.sub(r"[_\-]+|\s*\(\d+\)|\s+\d+$", " ", self.path.stem).strip()


def collect(folder: str | Path, *, files: bool = True) -> list[Item]:
    """Every image below ``folder``, sorted by path. ``files``: read captions beside the images.

    Raises ``FileMissing`` for a folder that is not there, ``UsageProblem`` for one without images, ``CorruptFile`` for an image that
    cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileMissing("there is no such folder of images", path=root)
    told = _metadata(root) if files else {}
    items = [_item(path, root, told, files) for path in images(root)]
    if not items:
        raise UsageProblem("there is no image in this folder", hint=f"known: {' '.join(sorted(SUFFIXES))}")
    return items


def images(root: Path) -> Iterator[Path]:
    """Paths of the images below ``root``, without masks and hidden files, in an order that no file system decides."""
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.suffix.lower() in SUFFIXES and not path.stem.endswith(_MASK) and not hidden and path.is_file():
            yield path


def mask_of(path: Path) -> Path | None:
    """``NAME.mask.png`` beside the image."""
    beside = path.with_name(f"{path.stem}{_MASK}.png")
    return beside if beside.is_file() else None


def caption_of(path: Path) -> str | None:
    """What ``NAME.txt`` or ``NAME.caption`` says. Raises ``CorruptFile`` for one that is no text."""
    for suffix in CAPTIONS:
        beside = path.with_suffix(suffix)
        if beside.is_file():
            return _text(beside).strip()
    return None


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) from the header, as shown. Raises ``CorruptFile``."""
    image = pillow()
    try:
        with image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation: rotated by a quarter
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise CorruptFile(f"this is no readable image: {error}", path=path) from error
    return (height, width) if turned else (width, height)


def pillow() -> Any:
    """PIL's ``Image``. Raises ``MissingExtra``."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("reading images", "train") from None
    return Image


def _item(path: Path, root: Path, told: Mapping[str, str], files: bool) -> Item:
    caption = told.get(path.relative_to(root).as_posix()) if files else None
    repeated = _REPEATED.match(path.parent.name) if path.parent != root else None
    return Item(
        path=path,
        size=size_of(path),
        caption=caption if caption is not None or not files else caption_of(path),
        mask=mask_of(path),
        repeats=max(1, int(repeated[1])) if repeated else 1,
    )


def _metadata(root: Path) -> dict[str, str]:
    """File name -> caption, from metadata.jsonl as the Hub's image folders have it."""
    path = root / _METADATA
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise CorruptFile(f"line {number} is no JSON: {error}", path=path) from error
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if isinstance(name, str) and isinstance(text, str):
            found[name] = text
    return found


def _text(path: Path) -> str:
    if path.stat().st_size > _LONGEST:
        raise CorruptFile("a caption of more than a megabyte", path=path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFile(f"this caption is no UTF-8: {error}", path=path) from error
