"""prepare: look at everything, decide, then write a new folder whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubtool.errors import FileMissing, MissingExtra, UsageProblem
from hubtool.tensors.atomic import atomic_folder
from hubtool.training.data import images
from hubtool.training.data.items import Item, pillow
from hubtool.training.data.items import images as paths_in
from hubtool.training.prepare.duplicates import doubles
from hubtool.training.prepare.examine import Look, look
from hubtool.training.prepare.models import Captioner, Masker
from hubtool.training.prepare.options import Options
from hubtool.training.prepare.report import Card, page, thumbnail
from hubtool.training.prepare.shaping import shapes
from hubtool.training.prepare.words import words

REPORT, METADATA = "report.html", "metadata.jsonl"
_SAVED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "webp": ("WEBP", {"lossless": True}),
}


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture that was written: its file, what it was made of, and what goes with it."""

    name: str
    source: str
    size: tuple[int, int]
    caption: str
    mask: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """``dropped``: path below the source folder -> reason. ``output`` is None for a dry run."""

    output: Path | None
    kept: tuple[Kept, ...]
    dropped: dict[str, str]

    @property
    def sizes(self) -> Counter[str]:
        return Counter(f"{one.size[0]}x{one.size[1]}" for one in self.kept)

    def to_json(self) -> dict[str, Any]:
        return {
            "output": None if self.output is None else str(self.output),
            "kept": [{"file": one.name, "source": one.source, "size": list(one.size), "caption": one.caption, "mask": one.mask} for one in self.kept],
            "dropped": [{"source": source, "reason": reason} for source, reason in self.dropped.items()],
            "sizes": dict(sorted(self.sizes.items())),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Models:
    captioner: Captioner | None
    masker: Masker | None


def _ignore(count: int = 1) -> None:
    """Nobody counts."""


def prepare(
    folder: str | Path, output: str | Path | None, options: Options, *, dry_run: bool = False, advance: Callable[[int], None] = _ignore
) -> Prepared:  # fmt: skip
    """Make ``output`` of the pictures below ``folder``, which is not changed; ``report.html`` in it shows what was done.

    Raises ``FileMissing`` for a folder that is not there, ``UsageProblem`` when no picture is left, ``WouldOverwrite`` for an output
    that exists, and what opening the user's models raises.
    """
    _need_packages()
    root = Path(folder)
    if not root.is_dir():
        raise FileMissing("there is no such folder of images", path=root)
    _check(options)
    looks = []
    for path in paths_in(root):
        looks.append(look(path, options))
        advance(1)
    good, dropped = _sorted_out(looks, root, options)
    if not good:
        raise UsageProblem(f"none of {len(looks)} pictures can be used", hint=next(iter(dropped.values()), None))
    if dry_run:
        return Prepared(None, tuple(_planned(one, root, options) for one in good), dropped)
    if output is None:
        raise UsageProblem("no output folder is named", hint="-o DIR")
    return _written(root, Path(output), good, looks, dropped, options)


def _need_packages() -> None:
    from importlib.util import find_spec

    if not find_spec("PIL") or not find_spec("numpy"):
        raise MissingExtra("preparing pictures", "train")


def _check(options: Options) -> None:
    if options.captions == "model" and options.caption_model is None:
        raise UsageProblem("no captioning model is named", hint="--caption-model FOLDER (BLIP, GIT ...)")
    if options.crop == "mask" and not options.masks and options.mask_model is None:
        raise UsageProblem("cropping around a mask needs masks", hint="--masks or --mask-model FOLDER")


def _sorted_out(looks: list[Look], root: Path, options: Options) -> tuple[list[Look], dict[str, str]]:
    usable = [one for one in looks if one.problem is None]
    twins = doubles(usable, options.duplicates, options.distance)
    dropped = {_below(one, root): str(one.problem) for one in looks if one.problem is not None}
    for at, twin in twins.items():
        dropped[_below(usable[at], root)] = f"a duplicate of {_below(usable[twin], root)}"
    return [one for at, one in enumerate(usable) if at not in twins], dropped


def _below(one: Look, root: Path) -> str:
    return one.item.path.relative_to(root).as_posix()


def _planned(one: Look, root: Path, options: Options) -> Kept:
    """What would become of a picture; models are not asked in a dry run."""
    plain = replace(options, captions="names" if options.captions == "model" else options.captions)
    shape = next(shapes(one.item, None, replace(options, crop="centre" if options.crop == "mask" else options.crop)))
    return Kept(one.item.path.name, _below(one, root), shape.size, words(one.item, None, plain, None), False)


def _written(
    root: Path, output: Path, good: list[Look], looks: list[Look], dropped: dict[str, str], options: Options
) -> Prepared:
    models = _Models(
        Captioner(options.caption_model) if options.captions == "model" and options.caption_model else None,
        Masker(options.mask_model, options.mask_text) if options.mask_model else None,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    kept: list[Kept] = []
    cards: list[Card] = []
    with atomic_folder(output) as part:
        names: set[str] = set()
        for one in good:
            for done, card in _write(one, root, part, names, options, models):
                kept.append(done)
                cards.append(card)
        found = Prepared(output, tuple(kept), dropped)
        rows = ({"file_name": one.name, "text": one.caption} for one in kept)
        (part / METADATA).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        left = [_dropped_card(one, root, dropped) for one in looks if _below(one, root) in dropped]
        (part / REPORT).write_text(page(f"Prepared from {root.name}", cards, left, found.sizes), encoding="utf-8")
    return found


def _write(
    one: Look, root: Path, part: Path, names: set[str], options: Options, models: _Models
) -> list[tuple[Kept, Card]]:
    """All windows of one picture with their captions and masks."""
    picture = images.opened(one.item.path)
    mask = _mask(one.item, picture, options, models)
    text = words(one.item, picture, options, models.captioner)
    done = []
    for shape in shapes(one.item, mask, options):
        stem = _free(one.item.path.stem, names)
        cut = shape.cut(picture)
        kind, settings = _SAVED[options.format]
        cut.save(part / f"{stem}.{options.format}", format=kind, **settings)
        (part / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")
        own = None if mask is None else shape.cut(mask)
        if own is not None:
            own.save(part / f"{stem}.mask.png")
        kept = Kept(f"{stem}.{options.format}", _below(one, root), shape.size, text, own is not None)
        lines = (f"{one.item.size[0]}x{one.item.size[1]} to {shape.size[0]}x{shape.size[1]}", text)
        small = tuple(thumbnail(each) for each in (cut, own) if each is not None)
        done.append((kept, Card(kept.name, lines, small)))
    return done


def _mask(item: Item, picture: Any, options: Options, models: _Models) -> Any | None:
    """The mask beside the picture, its alpha channel, or what the model makes; grey, of the picture's size."""
    if not options.masks and models.masker is None:
        return None
    found = images.loaded(item.mask).convert("L") if item.mask else images.alpha(images.loaded(item.path))
    if found is None and models.masker is not None:
        found = models.masker(picture)
    if found is not None and found.size != picture.size:
        found = found.resize(picture.size, pillow().Resampling.BILINEAR)
    return found


def _free(stem: str, names: set[str]) -> str:
    """A name that no other picture of the output has: folders are flattened."""
    name, turn = stem, 1
    while name.lower() in names:
        turn += 1
        name = f"{stem}-{turn}"
    names.add(name.lower())
    return name


def _dropped_card(one: Look, root: Path, dropped: dict[str, str]) -> Card:
    name = _below(one, root)
    shown = (thumbnail(images.opened(one.item.path)),) if one.item.size[0] else ()
    return Card(name, (dropped[name],), shown)
