"""From a syntax's reading of a file to modules with roles, and from roles to patches."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hubtool.adapters.factors import Factors
from hubtool.adapters.ir import Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import CorruptFile
from hubtool.formats.base import TensorFile
from hubtool.layouts import tables
from hubtool.layouts.detect import Module
from hubtool.layouts.keys import Spelled
from hubtool.tensors.decode import decode
from hubtool.tensors.dtypes import FLOATS, numel
from hubtool.tensors.expr import Expr, Literal, Read
from hubtool.tensors.reading import Sources, pread_exact
from hubtool.tensors.ref import TensorRef

_FACTOR_ROLES = ("up", "down", "mid")


@dataclass(slots=True)
class Draft:
    """One module while a file is being read: role -> tensor, role -> key."""

    components: tuple[str, ...]
    stem: str
    tensors: dict[str, Expr] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def module(self) -> Module:
        """What detection needs: name and sizes."""
        out, inner = _sizes(self.tensors)
        return Module(self.components, self.stem, out, inner)


def group(spelled: Iterable[Spelled], tensors: Mapping[str, TensorRef], path: object) -> list[Draft]:
    """Modules in file order. Raises ``CorruptFile`` where two keys give one role (tools disagree about which wins)."""
    drafts: dict[tuple[tuple[str, ...], str], Draft] = {}
    for one in spelled:
        draft = drafts.setdefault((one.components, one.stem), Draft(one.components, one.stem))
        if one.role in draft.tensors:
            first = draft.keys[one.role]
            raise CorruptFile(f"{one.key} and {first} both give {one.role} of one module", path=str(path))
        draft.tensors[one.role] = Read(tensors[one.key])
        draft.keys[one.role] = one.key
    return list(drafts.values())


def _sizes(tensors: Mapping[str, Expr]) -> tuple[int | None, int | None]:
    """(out, in * kh * kw) from the factors; None where an algorithm's factors do not tell."""
    up, down, mid = (tensors.get(role) for role in _FACTOR_ROLES)
    if up is not None and down is not None and len(up.shape) > 1 and len(down.shape) > 1:
        kernel = numel(mid.shape[2:]) if mid is not None else 1
        return up.shape[0], numel(down.shape[1:]) * kernel
    if "hada_w1_a" in tensors and "hada_w1_b" in tensors and "hada_t1" not in tensors:
        return tensors["hada_w1_a"].shape[0], tensors["hada_w1_b"].shape[-1]
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        return _kronecker(tensors)
    if "diff" in tensors and len(tensors["diff"].shape) > 1:
        return tensors["diff"].shape[0], numel(tensors["diff"].shape[1:])
    return None, None


def _kronecker(tensors: Mapping[str, Expr]) -> tuple[int | None, int | None]:
    """Sizes of kron(w1, w2): products of the factors' rows and of their columns."""
    first, second = _outer(tensors, "lokr_w1"), _outer(tensors, "lokr_w2")
    if first is None or second is None or "lokr_t2" in tensors:
        return None, None
    return first[0] * second[0], first[1] * second[1]


def _outer(tensors: Mapping[str, Expr], role: str) -> tuple[int, int] | None:
    whole, a, b = (tensors.get(name) for name in (role, f"{role}_a", f"{role}_b"))
    if whole is not None:
        return whole.shape[0], numel(whole.shape[1:])
    if a is not None and b is not None and a.shape and b.shape:
        return a.shape[0], numel(b.shape[1:])
    return None


def algorithm_of(roles: Iterable[str], name: str, path: object) -> str | None:
    """The algorithm whose tensors these are; None for a lone alpha. Raises ``CorruptFile`` naming what is missing."""
    have = set(roles)
    for algorithm in tables.algorithms():
        for complete in algorithm.sets:
            if complete <= have <= complete | algorithm.optional:
                return algorithm.id
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
    if algorithm != "lora":
        return Factors(algorithm, dict(draft.tensors), alpha)
    patch = LowRank(**draft.tensors, alpha_value=alpha)  # type: ignore[arg-type]
    try:
        patch.check(draft.stem)
    except CorruptFile as error:
        error.path = str(path)
        raise
    return patch


def _check_dtypes(draft: Draft, path: object) -> None:
    for role, tensor in draft.tensors.items():
        if role not in ("alpha", "on_input") and tensor.dtype not in FLOATS:
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
