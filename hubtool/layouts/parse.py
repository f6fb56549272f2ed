"""File -> Adapter: a patch for every module; every tensor is consumed, kept as an extra, or the file is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from hubtool.adapters.ir import Adapter, Embedding, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import CorruptFile, RecognitionError, Unsupported
from hubtool.formats.base import TensorFile
from hubtool.layouts import modules, peft_config
from hubtool.layouts.keys import BUNDLE
from hubtool.layouts.outline import Outline, RoleKey, outline
from hubtool.layouts.peft_config import PeftConfig
from hubtool.layouts.tables import Layout, Syntax
from hubtool.layouts.unwrap import unwrapped
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Read, reshape
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

_SMALL = ("F8", "F4", "F6")  # floats too small to do maths in
_LARGEST_ALPHA = 2e10  # ai-toolkit writes 9999999999 into full-matrix LoKr modules


@dataclass(frozen=True, slots=True)
class Parsed:
    """An adapter, and how its file spelled it. ``candidates``: every family that fits; ``keys``: (component, path, role) -> key, a fused module by
    the paths of its parts joined by +."""

    adapter: Adapter
    syntax: Syntax
    layout: Layout
    candidates: tuple[str, ...]
    keys: Mapping[RoleKey, str]
    evidence: tuple[str, ...]


def parse(file: TensorFile, family: str | None = None) -> Adapter:
    """The adapter in ``file``. ``family`` settles an ambiguous one. Raises ``RecognitionError`` when the file holds no adapter."""
    return parse_file(file, family).adapter


def parse_file(file: TensorFile, family: str | None = None) -> Parsed:
    """As ``parse``, with the layout, the candidates and the keys."""
    found = recognise(file, family)
    if found is None:
        raise RecognitionError(
            "no adapter layout explains this file", path=file.path, hint=f"hubtool explain {file.path}"
        )
    return found


def recognise(file: TensorFile, family: str | None = None) -> Parsed | None:
    """As ``parse_file``, None for a file without adapter tensors. Raises ``CorruptFile`` for a broken adapter."""
    tensors, notes = unwrapped(file)
    shape = outline(tensors, file.path, structure=file.structure, family=family, metadata=file.metadata)
    if shape is None:
        return None
    if file.structure is not None:
        modules.pickled_alphas(file, shape.modules.values())
    patches, orphans, kept = _patches(file, shape)
    embeddings, spare = _embeddings(file, tensors, shape)
    spare += orphans
    _refuse_exchanged(file, shape, patches)
    findings = [*notes, *kept, *_findings(file, shape, patches, spare)]
    adapter = Adapter(
        family=shape.family,
        patches=MappingProxyType(patches),
        embeddings=embeddings,
        extras=MappingProxyType({key: tensors[key] for key in spare if key in tensors}),
        metadata=file.metadata,
        findings=tuple(findings),
    )
    lost = set(orphans)
    keys = shape.keys()
    keys = {row: key for row, key in keys.items() if key not in lost} if lost else keys
    return Parsed(adapter, shape.syntax, shape.layout, shape.candidates, MappingProxyType(keys), shape.evidence)


def _patches(file: TensorFile, shape: Outline) -> tuple[dict[ModuleKey, Patch], list[str], list[Finding]]:
    """(patches by canonical path, keys that belong to no complete module, what could not be taken apart)."""
    values = modules.alphas(shape.modules.values(), file.path)
    configs: dict[str, PeftConfig] = {}
    patches: dict[ModuleKey, Patch] = {}
    orphans: list[str] = []
    whole: list[str] = []
    for (component, path), draft in shape.modules.items():
        algorithm = modules.algorithm_of(draft.tensors, draft.stem, file.path)
        if algorithm is None:
            orphans += draft.keys.values()
            continue
        patch = modules.build(draft, algorithm, values.get(draft.keys.get("alpha", "")), file.path)
        if shape.syntax.alpha in ("metadata", "config"):
            config = configs.setdefault(component, _config(file, shape.syntax, component))
            patch = _configured(patch, config, draft.stem)
        for key, part in _canonical((component, path), patch, shape, whole).items():
            if key in patches:
                raise CorruptFile(f"{'.'.join(key)} is changed twice, once by {draft.stem}", path=file.path)
            patches[key] = part
    return patches, orphans, _kept_whole(whole)


def _canonical(key: ModuleKey, patch: Patch, shape: Outline, whole: list[str]) -> dict[ModuleKey, Patch]:
    """The patches of the canonical modules that an outside module stands for; itself where its algorithm cannot be taken apart."""
    place = shape.places.get(key)
    if place is None:
        return {key: patch}
    from hubtool.layouts import placing

    try:
        found = placing.canonical(patch, place, shape.sizes[key[0]])
    except Unsupported as reason:
        whole.append(f"{place.outside} ({reason})")
        return {(key[0], place.outside): patch}
    return {(key[0], path): part for path, part in found.items()}


def _kept_whole(whole: list[str]) -> list[Finding]:
    if not whole:
        return []
    text = f"{len(whole)} fused modules stay whole, since their algorithm cannot be cut there: first {whole[0]}"
    return [Finding("fused-whole", "info", text)]


def _upright(patch: LowRank) -> LowRank:
    """PEFT's magnitude of a convolution, (1, out, 1, 1), as (out, 1, 1, 1): for a square module the shape alone would not tell the axis."""
    magnitude = patch.dora_scale
    if magnitude is None or len(magnitude.shape) != 4 or numel(magnitude.shape) != patch.up.shape[0]:
        return patch
    return replace(patch, dora_scale=reshape(magnitude, (patch.up.shape[0], 1, 1, 1)))


def _config(file: TensorFile, syntax: Syntax, component: str) -> PeftConfig:
    if syntax.alpha == "config":
        return peft_config.from_dict(file.config.get("adapter_config.json", {}))
    return peft_config.of_component(file.metadata, component)


def _configured(patch: Patch, config: PeftConfig, path: str) -> Patch:
    """The patch with what only the configuration says. A tensor's own alpha wins over it."""
    if isinstance(patch, LowRank):
        return _scaled(_upright(patch), config, path)
    from hubtool.adapters.hadamard import Hadamard
    from hubtool.adapters.input_rotation import InputRotation
    from hubtool.adapters.kronecker import Kronecker

    if isinstance(patch, InputRotation):
        return replace(patch, terms=config.neumann_terms)
    if isinstance(patch, Hadamard | Kronecker) and patch.alpha_value is None:
        return replace(patch, alpha_value=config.alpha_of(path))
    return patch


def _scaled(patch: LowRank, config: PeftConfig, path: str) -> LowRank:
    """A tensor's own alpha wins over the configuration."""
    if patch.alpha_value is not None:
        return patch
    alpha = config.alpha_of(path)
    return replace(patch, alpha_value=alpha, rank_stabilised=config.rank_stabilised and alpha is not None)


def _embeddings(
    file: TensorFile, tensors: Mapping[str, TensorRef], shape: Outline
) -> tuple[tuple[Embedding, ...], list[str]]:
    """(token vectors, keys that are neither a module's nor a token's)."""
    tokens = [key for key in shape.spare if shape.syntax.positional and _is_token(key, tensors[key], file.metadata)]
    found = tuple(Embedding(key, "text_encoder", Read(tensors[key])) for key in tokens)
    bundle = {key: ref for key, ref in tensors.items() if key.startswith(BUNDLE)}
    return found + _bundled(bundle), [key for key in shape.spare if key not in tokens]


def _bundled(tensors: Mapping[str, TensorRef]) -> tuple[Embedding, ...]:
    if not tensors:
        return ()
    from hubtool.adapters.token_embeddings import parse_bundle

    return parse_bundle(tensors)


def _is_token(key: str, ref: TensorRef, metadata: Mapping[str, str]) -> bool:
    bracketed = key.startswith("<") and key.endswith(">")
    return (metadata.get(key) == "<embed>" or bracketed) and len(ref.shape) in (1, 2)


def _refuse_exchanged(file: TensorFile, shape: Outline, patches: Mapping[ModuleKey, Patch]) -> None:
    """up and down exchanged: the rank exceeds both sides, and no vocabulary vouches for the weight's shape."""
    if shape.candidates and not shape.contradictions:
        return
    for key, patch in patches.items():
        if isinstance(patch, LowRank):
            out, *inner = patch.weight_shape
            if patch.rank > out and patch.rank > numel(inner):
                text = f"{'.'.join(key)}: the rank exceeds both sides of the weight; up and down look exchanged"
                raise CorruptFile(text, path=file.path)


def _findings(
    file: TensorFile, shape: Outline, patches: Mapping[ModuleKey, Patch], spare: list[str]
) -> Iterable[Finding]:
    yield from _alpha_findings(patches)
    stored = {ref.dtype for ref in file.tensors.values() if ref.dtype.startswith(_SMALL)}
    small = {t.dtype for patch in patches.values() for _, t in patch.roles()} & stored if stored else stored
    if small:
        text = f"factors are stored as {', '.join(sorted(small))}: cast before doing maths"
        yield Finding("small-floats", "warning", text)
    if shape.syntax.alpha in ("metadata", "config"):
        for component in dict.fromkeys(component for component, _ in patches):
            yield from _config(file, shape.syntax, component).findings
    if spare:
        yield Finding(
            "unknown-keys",
            "warning",
            f"{_several(len(spare), 'tensor belongs', 'tensors belong')} to no module, first {spare[0]}",
        )
    if shape.unnamed:
        many = _several(len(shape.unnamed), "module is", "modules are")
        text = f"{many} not in the family's vocabulary, first {shape.unnamed[0]}"
        yield Finding("unknown-module", "warning", text)
    if shape.contradictions:
        text = f"{len(shape.contradictions)} of {shape.checked} weight shapes fit no known base, first {shape.contradictions[0]}"
        yield Finding("shapes-unknown", "warning", text)


def _alpha_findings(patches: Mapping[ModuleKey, Patch]) -> Iterable[Finding]:
    # a rotation's alpha is a constraint, not a factor: kohya's 0 forbids any change, LyCORIS' 0 allows all
    found = (getattr(patch, "constraint", patch.alpha_value) for patch in patches.values())
    values = [value for value in found if value is not None]
    checks = (
        ("alpha-zero", [v for v in values if v == 0], "modules have alpha 0: they change nothing"),
        ("alpha-negative", [v for v in values if v < 0], "modules have a negative alpha: their effect is inverted"),
        ("alpha-absurd", [v for v in values if abs(v) > _LARGEST_ALPHA], "modules have an alpha beyond any sense"),
    )
    for code, hits, text in checks:
        if hits:
            yield Finding(code, "warning", f"{len(hits)} {text}")


def _several(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
