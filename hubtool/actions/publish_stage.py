"""From items to files of a repository: the canonical file by conversion, other layouts, epochs and pictures in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hubtool.actions.publish_items import Cleaner, Item
from hubtool.errors import ConversionError, RecognitionError, UsageProblem
from hubtool.hub import layout
from hubtool.hub.pictures import Shown
from hubtool.hub.uploads import Upload, upload
from hubtool.ops import containers
from hubtool.ops import convert as ops
from hubtool.ops.execute import execute
from hubtool.ops.plan import Plan
from hubtool.ops.target import Target
from hubtool.types import Finding

_TORCH = ("torch-zip", "torch-legacy", "png")
_WEIGHTS = (".safetensors",)
_DOCUMENTS = (".json", ".txt", ".model", ".jinja", ".md")
_NOT_OURS = frozenset({layout.CARD, layout.INDEX})
_EMBEDDING_PAIR = frozenset({"clip_l", "clip_g"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of the files. ``layouts``: further layouts of the first item; ``base_model``: goes into adapter_config.json."""

    family: str | None = None
    layouts: tuple[str, ...] = ()
    keep_original: bool = False
    base_model: str | None = None


@dataclass(slots=True)
class Stage:
    """A folder of files made for a publication. ``main``: the path of the canonical file; ``loads``: how libraries load it."""

    folder: Path
    cleaner: Cleaner
    wanted: Wanted
    uploads: list[Upload] = field(default_factory=list)
    main: str = ""
    loads: str = "none"
    converted: str | None = None  # the layout that the canonical file was converted from

    def tell(self, code: str, message: str) -> None:
        self.cleaner.findings.append(Finding(code, "warning", message))

    def add(self, path: str, source: Path | bytes, role: str, item: Item | None = None, **about: Any) -> Upload:
        """One more file; a second one of the same path gets a number."""
        free = layout.unique(path, {one.path for one in self.uploads})
        made = upload(free, source, role, origin=item.path if item else None, **about)
        self.uploads.append(made)
        return made

    def write(self, made: Plan, item: Item | None = None) -> Path:
        """Carry out a plan inside the folder. The header of a cleaned file is laid out anew."""
        if item is not None and item.dirty:
            made = replace(made, header=None)
        target = (
            self.folder
            / f"{len(list(self.folder.iterdir())):03d}{'' if made.format == 'peft-folder' else '.safetensors'}"
        )
        execute(made, target)
        return target


def stage(items: Sequence[Item], shown: Sequence[Shown], folder: Path, cleaner: Cleaner, wanted: Wanted) -> Stage:
    """Make every file of the publication. Raises what conversions raise for a layout that was asked for."""
    made = Stage(folder, cleaner, wanted)
    _MAIN.get(items[0].kind, _other)(made, items[0])
    for name in wanted.layouts:
        _layout(made, items[0], name)
    if wanted.keep_original and made.converted and items[0].file.format == "safetensors":
        path = layout.place(items[0].path.name, main_stem=items[0].stem, layout=made.converted, same_content=True)
        _as_it_is(made, items[0], path, "original")
    content = items[0].content() if len(items) > 1 else None
    for item in items[1:]:
        same = content is not None and item.content() == content
        found = item.report.identity.layout
        path = layout.place(item.published_name, main_stem=items[0].stem, layout=found, same_content=same)
        _as_it_is(made, item, path, path.partition("/")[0])
    for number, picture in enumerate(shown):
        made.add(f"images/{number}{picture.suffix}", picture.data, "preview")
    return made


def _about(item: Item, made: Plan | None = None) -> dict[str, Any]:
    found = item.report.identity
    ranks = sorted(set(found.ranks))
    about = {"kind": found.kind, "algorithm": found.algorithm, "family": found.family, "ranks": ranks}
    return {**about, "layout": made.layout if made else found.layout}


def _as_it_is(made: Stage, item: Item, path: str, role: str) -> Upload:
    """The file itself where it may be published as it is, else the same tensors in a safetensors file with cleaned metadata."""
    if item.file.format == "safetensors" and not item.dirty:
        return made.add(path, item.path, role, item, **_about(item))
    plan = ops.plan(item.file, Target(format="safetensors"))
    if plan.losses:
        made.tell("loss", f"{item.path.name}: {plan.losses[0].what}: {plan.losses[0].reason}")
    return made.add(path, made.write(plan, item), role, item, **_about(item, plan))


def _planned(item: Item, target: Target) -> Plan | str:
    """The plan of a conversion without loss, or why there is none."""
    try:
        plan = ops.plan(item.file, target)
    except (ConversionError, RecognitionError, UsageProblem) as error:
        return error.message
    return f"{plan.losses[0].what}: {plan.losses[0].reason}" if plan.losses else plan


def _canonical(made: Stage, item: Item, name: str, loads: str) -> str | None:
    """Publish the item in diffusers' layout under its canonical name; why not, where that cannot be."""
    plan = _planned(item, Target(format="safetensors", layout="diffusers", family=made.wanted.family))
    if isinstance(plan, str):
        return plan
    same = plan.header is not None and item.file.format == "safetensors" and not item.dirty
    source = item.path if same and item.path.is_file() else made.write(plan, item)
    made.main, made.loads = made.add(name, source, "canonical", item, **_about(item, plan)).path, loads
    if not same and plan.header is None:
        made.converted = item.report.identity.layout
    return None


def _lora(made: Stage, item: Item) -> None:
    folder = item.file.format == "peft-folder"
    why = _canonical(made, item, layout.LORA, "lora")
    if folder:
        _peft(made, item)
    elif why:
        made.tell("not-canonical", f"load_lora_weights will not read this file: {why}")
        made.main = _as_it_is(made, item, item.published_name, "canonical").path


def _peft(made: Stage, item: Item) -> None:
    """Weights and configuration at the root: what ``PeftModel.from_pretrained(base, repo)`` reads."""
    folder = item.file.format == "peft-folder"
    family = made.wanted.family
    plan = ops.plan(item.file, Target("peft-folder", None if folder else "peft", family=family))
    if plan.losses:
        raise ConversionError(f"PEFT cannot hold this adapter: {plan.losses[0].reason}", path=item.path)
    config = _peft_config(made, item, plan)
    own = item.path / layout.PEFT_WEIGHTS
    if folder and own.is_file() and item.file.metadata == item.report.file.metadata:
        source = own
    else:
        source = made.write(replace(plan, config=config)) / layout.PEFT_WEIGHTS
    weights = made.add(layout.PEFT_WEIGHTS, source, "peft", item, **_about(item, plan))
    made.add(layout.PEFT_CONFIG, _config_text(config), "peft")
    if not made.main:
        made.main, made.loads = weights.path, "peft"


def _config_text(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def based(uploads: Iterable[Upload], bases: Sequence[str]) -> Iterator[Upload]:
    """``uploads`` with a base in PEFT's configuration, which may only be known from an earlier publication."""
    for one in uploads:
        config = json.loads(one.source) if one.path == layout.PEFT_CONFIG and isinstance(one.source, bytes) else None
        if config is None or config.get("base_model_name_or_path") or not bases:
            yield one
        else:
            config["base_model_name_or_path"] = bases[0]
            yield upload(one.path, _config_text(config), one.role)


def _peft_config(made: Stage, item: Item, plan: Plan) -> dict[str, Any]:
    """PEFT refuses a config without a base; a local path in it says nothing to anybody else."""
    from hubtool.hub.validation import is_model_id

    config = {**(item.file.config.get(layout.PEFT_CONFIG) or {}), **(plan.config or {})}
    base = config.get("base_model_name_or_path")
    usable = isinstance(base, str) and is_model_id(base, owned=False)
    return {
        **config,
        "base_model_name_or_path": base if usable and not made.wanted.base_model else made.wanted.base_model,
    }


def _embedding(made: Stage, item: Item) -> None:
    why = _canonical(made, item, layout.EMBEDDING, "textual-inversion")
    if why is None:
        return
    made.main = _as_it_is(made, item, item.published_name, "canonical").path
    keys = {key.rpartition(".")[2] for key in item.file.tensors}
    if keys == _EMBEDDING_PAIR:
        made.loads = "textual-inversion-two"
        made.tell(
            "needs-arguments", "vectors for two text encoders need two calls of load_textual_inversion, see the card"
        )
    else:
        made.tell("not-canonical", f"load_textual_inversion will not read this file: {why}")


def _checkpoint(made: Stage, item: Item) -> None:
    made.main = _as_it_is(made, item, item.published_name, "canonical").path
    made.loads = "single-file"


def _other(made: Stage, item: Item) -> None:
    if item.path.is_dir():
        _folder(made, item)
        return
    if item.kind == "unknown":
        made.tell("unknown-kind", f"{item.path.name}: nobody can say what this file is for")
    made.main = _as_it_is(made, item, item.published_name, "canonical").path


def _folder(made: Stage, item: Item) -> None:
    """A folder that is one artifact: weights in safetensors, documents, nothing hidden, no link, nothing else."""
    skipped = []
    for path in _files(item.path):
        name = path.relative_to(item.path).as_posix()
        if path.is_symlink() or path.suffix not in (*_WEIGHTS, *_DOCUMENTS):
            skipped.append(name)
        elif name not in _NOT_OURS:
            made.add(name, _folder_file(made, item, path, name), "part", item if name == "model_index.json" else None)
    if skipped:
        made.tell("left-out", f"not published: {', '.join(skipped[:6])}{' ...' if len(skipped) > 6 else ''}")
    names = {one.path for one in made.uploads}
    if not any(name.endswith(_WEIGHTS) for name in names):
        hint = "links are not followed and pickles not published: convert the folder first"
        raise UsageProblem("nothing in this folder can be published", path=item.path, hint=hint)
    made.loads = "pipeline" if "model_index.json" in names else "none"
    made.main = "model_index.json" if made.loads == "pipeline" else min(names, default="")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _folder_file(made: Stage, item: Item, path: Path, name: str) -> Path | bytes:
    """The file, or its bytes without what is private."""
    if path.suffix in _WEIGHTS:
        return _weights(made, path)
    data = path.read_bytes()
    made.cleaner.cleaning.raw(data, name)
    if path.suffix != ".json":
        return path
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return path
    cleaned = made.cleaner.cleaning.document(document, name)
    return path if cleaned == document else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _weights(made: Stage, path: Path) -> Path:
    from hubtool.formats.safetensors import read_header

    file = read_header(path)
    cleaned = made.cleaner.file(file)
    return (
        path
        if cleaned is file
        else made.write(containers.container(replace(cleaned, header_bytes=None), "safetensors", None))
    )


def _layout(made: Stage, item: Item, name: str) -> None:
    """The first item once more, in a layout that was asked for."""
    if name == "peft":
        if not any(one.path == layout.PEFT_WEIGHTS for one in made.uploads):
            _peft(made, item)
        return
    plan = ops.plan(item.file, Target(format="safetensors", layout=name, family=made.wanted.family))
    if plan.losses:
        raise ConversionError(f"{name} cannot hold this adapter: {plan.losses[0].reason}", path=item.path)
    path = layout.place(item.published_name, main_stem=item.stem, layout=plan.layout, same_content=True)
    made.add(path, made.write(plan, item), "layout", item, **_about(item, plan))


_MAIN = {
    "lora": _lora,
    "textual_inversion": _embedding,
    "checkpoint": _checkpoint,
}
