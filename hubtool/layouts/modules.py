"""From a syntax's reading of a file to modules with roles, and from roles to patches."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache

from hubtool.adapters import registry
from hubtool.adapters.ir import Patch
from hubtool.errors import CorruptFile
from hubtool.formats.base import TensorFile
from hubtool.layouts import tables
from hubtool.layouts.detect import Module, Stem
from hubtool.layouts.keys import Spelled
from hubtool.tensors.decode import decode
from hubtool.tensors.dtypes import FLOATS, numel
from hubtool.tensors.expr import Expr, Literal, Read
from hubtool.tensors.reading import Sources, pread_exact
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape

_NOT_FACTORS = frozenset({"alpha", "on_input", "scaled_oft", "bias_indices", "bias_size"})


@dataclass(slots=True, eq=False, repr=False)
class Draft:
    """One module while a file is being read: role -> tensor, role -> key."""

    components: tuple[str, ...]
    stem: str
    tensors: dict[str, Expr] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    @property
    def module_key(self) -> Stem:
        return self.prefix, self.components, self.stem

    def module(self) -> Module:
        """What detection needs: name and sizes."""
        out, inner = _sizes(tuple((role, tensor.shape) for role, tensor in self.tensors.items()))
        return Module(self.components, self.stem, out, inner, self.prefix)


def group(spelled: Iterable[Spelled], tensors: Mapping[str, TensorRef], path: object) -> list[Draft]:
    """Modules in file order. Raises ``CorruptFile`` where two keys give one role (tools disagree about which wins)."""
    drafts: dict[tuple[str, tuple[str, ...], str], Draft] = {}
    for one in spelled:
        name = one.prefix, one.components, one.stem
        draft = drafts.get(name)
        if draft is None:
            draft = drafts[name] = Draft(one.components, one.stem, prefix=one.prefix)
        if one.role in draft.tensors:
            first = draft.keys[one.role]
            raise CorruptFile(f"{one.key} and {first} both give {one.role} of one module", path=str(path))
        draft.tensors[one.role] = Read(tensors[one.key])
        draft.keys[one.role] = one.key
    return list(drafts.values())


@lru_cache(4096)  # a model has few distinct shapes
def _sizes(shapes: tuple[tuple[str, Shape], ...]) -> tuple[int | None, int | None]:
    """(out, in * kh * kw) from the factors' shapes; None where an algorithm's factors do not tell, or do not fit one another."""
    tensors: dict[str, Expr] = {role: Literal(b"", "F32", shape) for role, shape in shapes}
    algorithm = _complete(tensors.keys())
    if algorithm is None:
        return None, None
    try:
        patch = registry.make(algorithm, tensors)
        patch.check("")
    except CorruptFile:  # named in its turn, by ``build``
        return None, None
    return patch.sizes


def _complete(have: Set[str]) -> str | None:
    """The algorithm whose tensors these are."""
    for algorithm in tables.algorithms():
        for complete in algorithm.sets:
            if complete <= have <= complete | algorithm.optional:
                return algorithm.id
    return None


def algorithm_of(roles: Iterable[str], name: str, path: object) -> str | None:
    """The algorithm whose tensors these are; None for a lone alpha. Raises ``CorruptFile`` naming what is missing."""
    have = set(roles)
    found = _complete(have)
    if found is not None:
        return found
    if have <= {"alpha", "dora_scale"}:
        return None
    raise CorruptFile(
        f"{name}: {', '.join(sorted(have))} make no complete adapter module{_missing(have)}", path=str(path)
    )


def _missing(have: set[str]) -> str:
    gaps = [complete - have for algorithm in tables.algorithms() for complete in algorithm.sets if complete & have]
    nearest = min(gaps, key=len, default=frozenset())
    return f"; missing: {', '.join(sorted(nearest))}" if nearest else ""


def build(draft: Draft, algorithm: str, alpha: float | None, path: object) -> Patch:
    """The patch of a complete module, checked."""
    _check_dtypes(draft, path)
    key = next(iter(draft.keys.values()), "")
    try:
        flavour = registry.flavour_of(algorithm, draft.tensors, key)
        patch = registry.make(algorithm, draft.tensors, alpha, flavour=flavour)
        patch.check(draft.stem)
    except CorruptFile as error:
        error.path = str(path)
        raise
    return patch


def _check_dtypes(draft: Draft, path: object) -> None:
    for role, tensor in draft.tensors.items():
        if role not in _NOT_FACTORS and tensor.dtype not in FLOATS:
            raise CorruptFile(
                f"{draft.keys.get(role, draft.stem)} holds {tensor.dtype} numbers, not floats", path=str(path)
            )


def alphas(drafts: Iterable[Draft], path: object) -> dict[str, float]:
    """stem-independent: alpha key -> value, every one read from the file with one open. Raises ``CorruptFile`` for a vector or a NaN."""
    values: dict[str, float] = {}
    with Sources() as sources:
        for draft in drafts:
            tensor = draft.tensors.get("alpha")
            if tensor is not None:
                values[draft.keys["alpha"]] = _alpha(tensor, draft.keys["alpha"], sources, path)
    return values


def _alpha(tensor: Expr, key: str, sources: Sources, path: object) -> float:
    if numel(tensor.shape) != 1:
        raise CorruptFile(f"{key} has shape {tensor.shape}; an alpha is one number", path=str(path))
    value = decode(_bytes(tensor, sources), tensor.dtype)[0]
    if not math.isfinite(value):
        raise CorruptFile(f"{key} is {value}", path=str(path))
    return value


def _bytes(tensor: Expr, sources: Sources) -> bytes:
    if isinstance(tensor, Literal):
        return tensor.data
    assert isinstance(tensor, Read)
    ref = tensor.ref
    if ref.inline is not None:
        return ref.inline
    return pread_exact(sources.fd(ref.path), ref.end - ref.start, ref.start, ref.path)


def pickled_alphas(file: TensorFile, drafts: Iterable[Draft]) -> None:
    """Torch files may keep alpha as a Python number: give it to its module as an F32 scalar."""
    numbers = {key.removesuffix(".alpha"): value for key, value in file.metadata.items() if key.endswith(".alpha")}
    for draft in drafts if numbers else ():
        stem = next(iter(draft.keys.values())).split(".lora_")[0]
        if "alpha" not in draft.tensors and stem in numbers:
            draft.tensors["alpha"] = Literal(struct.pack("<f", float(json.loads(numbers[stem]))), "F32", ())
            draft.keys["alpha"] = f"{stem}.alpha"
