"""Textual inversion: every encoding ever seen on disk <-> a tuple of ``Embedding``.

One canonical form (token, encoder, vectors (n, dim)); each encoding is a parser here and an emitter below. Nothing is computed:
vectors are ``Read`` or a ``Reshape`` of it, so every conversion keeps the bytes. Facts: spec/artefacts.md B.1-B.4, and the
readers of diffusers (``load_textual_inversion``), A1111 (``textual_inversion.py``), ComfyUI (``load_embed``), sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters.ir import Embedding
from hubtool.errors import CorruptFile, UsageProblem
from hubtool.tensors.expr import Expr, Read, reshape
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

# vector width -> (canonical key, encoder role or None where families differ, families that own such an encoder)
WIDTHS: dict[int, tuple[str, str | None, tuple[str, ...]]] = {
    768: ("clip_l", "text_encoder", ("sd1", "sdxl", "flux1", "sd3")),
    1024: ("clip_h", "text_encoder", ("sd2",)),
    1280: ("clip_g", "text_encoder_2", ("sdxl", "sd3")),
    2304: ("gemma2", "text_encoder", ("lumina2", "sana")),
    2560: ("qwen3", "text_encoder", ("z-image", "flux2")),
    4096: ("t5", None, ("flux1", "sd3", "pixart")),
}
# key of a multi-encoder file -> canonical key
ENCODER_KEYS = {
    **{key: key for key, _, _ in WIDTHS.values()}, "t5xxl": "t5",
    "text_encoders_0": "clip_l", "text_encoders_1": "clip_g", "text_encoders_2": "t5",
}  # fmt: skip
_KEY_WIDTH = {row[0]: width for width, row in WIDTHS.items()}
# which encoders a multi-encoder file holds -> family
_FAMILY_OF = {
    frozenset({"clip_l", "clip_g"}): "sdxl",
    frozenset({"clip_l", "t5"}): "flux1",
    frozenset({"clip_l", "clip_g", "t5"}): "sd3",
    frozenset({"clip_h"}): "sd2",
}
# sd-scripts' per-layer keys of XTI (P+): library/... ``XTI_LAYERS``
XTI_LAYERS = (
    "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09",
    "OUT10", "OUT11",
)  # fmt: skip
_XTI = frozenset(XTI_LAYERS)
_PLACEHOLDER = re.compile(r"<[^<>\s]+>$")
_HISTORY = re.compile(r"(\d+)\.(emb2?)$")
_TERM = re.compile(r"string_to_param\.(?:_parameters\.)?(.+)$", re.DOTALL)
_TOKEN_NOTE, _VARIANT_NOTE, _SOURCE_NOTE = "hubtool.token", "hubtool.variant", "hubtool.source_sha256"
_MOST_KEYS = 512  # a training history is the longest; adapters and checkpoints are not searched
_ONE_KEY_LIMIT = 1 << 20  # more than a MiB under one key is not a textual inversion


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a textual inversion file says. ``encoding`` names the structure found; ``emit_embedding`` accepts most of them."""

    encoding: str
    embeddings: tuple[Embedding, ...]
    family: str | None = None
    family_candidates: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


Tensors = Mapping[str, TensorRef]
Scalars = Mapping[str, Any]


def parse_embedding(tensors: Tensors, scalars: Scalars, stem: str) -> Parsed | None:
    """Parse any of the encodings, or return None when the tensors are no textual inversion.

    ``scalars``: the non-tensor leaves of a pickle's top level (``name``, ``step`` ...). ``stem``: the file's name, the token of
    the encodings that store none. Raises ``CorruptFile`` for a width that no text encoder can have.
    """
    if not 0 < len(tensors) <= _MOST_KEYS:
        return None
    for parser in _PARSERS:
        found = parser(tensors, scalars, stem)
        if found is not None:
            return found
    return None


def parse_bundle(tensors: Tensors) -> tuple[Embedding, ...]:
    """Embeddings that LyCORIS packs into an adapter file as ``bundle_emb.{name}.{key}`` (tools/pack_bundle.py)."""
    groups: dict[str, dict[str, TensorRef]] = {}
    for key, ref in tensors.items():
        parts = key.split(".", 2)
        if len(parts) == 3 and parts[0] == "bundle_emb":
            groups.setdefault(parts[1], {})[parts[2]] = ref
    parsed = (parse_embedding(group, {"name": name}, name) for name, group in groups.items())
    return tuple(embedding for one in parsed if one is not None for embedding in one.embeddings)


def raw_embedding(ref: TensorRef, stem: str) -> Parsed | None:
    """A file that is one bare tensor: ``(d,)`` or ``(n, d)`` of a known width."""
    if not _vector_like(ref) or ref.shape[-1] not in WIDTHS:
        return None
    return _by_width("raw", [(stem, ref)])


def _a1111(tensors: Tensors, scalars: Scalars, stem: str) -> Parsed | None:
    """``{string_to_token, string_to_param, name ...}``: A1111 and rinongal (no ``name``; ParameterDict); 768 wide means SD1."""
    matches = ((_TERM.match(key), ref) for key, ref in tensors.items())
    terms = {match.group(1): ref for match, ref in matches if match}
    if not terms:
        return None
    name = scalars.get("name")
    token = name.strip() if isinstance(name, str) and name.strip() else stem
    pairs = [(token if term == "*" else term, ref) for term, ref in terms.items()]
    found = _by_width("a1111" if "name" in scalars else "rinongal", pairs)
    # SDXL and later embeddings need two encoders, which this structure cannot hold.
    return replace(found, family="sd1", family_candidates=()) if found.family_candidates[:1] == ("sd1",) else found


def _kohya(tensors: Tensors, scalars: Scalars, stem: str) -> Parsed | None:
    """``{emb_params}``: sd-scripts and A1111's export. Both write two keys for SDXL, so 768 wide means SD1."""
    ref = tensors.get("emb_params")
    if ref is None or len(tensors) > 1:
        return None
    found = _by_width("kohya", [(_token(scalars, stem), ref)])
    return replace(found, family="sd1", family_candidates=()) if found.family_candidates[:1] == ("sd1",) else found


def _multi_encoder(tensors: Tensors, scalars: Scalars, stem: str) -> Parsed | None:
    """``clip_l`` / ``clip_g`` / ``clip_h`` / ``t5`` or cog's ``text_encoders_{i}``: one tensor per text encoder."""
    if len(tensors) > 4 or not all(key in ENCODER_KEYS and len(ref.shape) <= 2 for key, ref in tensors.items()):
        return None
    encoding = "cog-sdxl" if "text_encoders_0" in tensors or "text_encoders_1" in tensors else "kohya-sdxl"
    found = _by_encoder(encoding, {ENCODER_KEYS[key]: ref for key, ref in tensors.items()}, _token(scalars, stem))
    # hubtool's own canonical file may well hold a whole embedding under one key.
    return replace(found, encoding="canonical", findings=()) if _VARIANT_NOTE in scalars else found


def _xti(tensors: Tensors, scalars: Scalars, stem: str) -> Parsed | None:
    """P+ / XTI: sixteen keys, one per cross-attention layer; only sd-scripts writes and loads it."""
    if len(tensors) != len(XTI_LAYERS) or tensors.keys() != _XTI:
        return None
    token = _token(scalars, stem)
    found = _by_width("xti", [(token, tensors[layer]) for layer in XTI_LAYERS])
    return replace(found, family="sd1", family_candidates=()) if found.family_candidates[:1] == ("sd1",) else found


def _emb_pair(tensors: Tensors, scalars: Scalars, stem: str) -> Parsed | None:
    """``{emb: (768,), emb2: (1280,)}`` of oss-roettger, or a list of such dicts: a training history, newest last."""
    if tensors.keys() <= {"emb", "emb2"}:
        return _by_encoder("emb-pair", _pair(tensors), _token(scalars, stem))
    steps = [_HISTORY.match(key) for key in tensors]
    if not all(steps):
        return None
    last = max(int(step.group(1)) for step in steps if step)
    newest = {key: tensors[f"{last}.{key}"] for key in ("emb", "emb2") if f"{last}.{key}" in tensors}
    found = _by_encoder("emb-history", _pair(newest), _token(scalars, stem))
    note = Finding(
        "training-history", "info", f"a list of {last + 1} training snapshots; the last one is the embedding"
    )
    return replace(found, findings=(*found.findings, note))


def _pair(tensors: Tensors) -> dict[str, TensorRef]:
    named = (("clip_l", tensors.get("emb")), ("clip_g", tensors.get("emb2")))
    return {key: ref for key, ref in named if ref is not None}


def _diffusers(tensors: Tensors, scalars: Scalars, stem: str) -> Parsed | None:
    """``{token: vectors}``: diffusers' ``learned_embeds``. Several tokens are accepted when all look like ``<token>``."""
    del scalars, stem
    placeholders = all(_PLACEHOLDER.match(key) for key in tensors)
    if len(tensors) != 1 and not placeholders:
        return None
    if not all(_token_like(key, ref, placeholder=placeholders) for key, ref in tensors.items()):
        return None
    return _by_width("diffusers", list(tensors.items()))


def _token_like(key: str, ref: TensorRef, *, placeholder: bool) -> bool:
    if not _vector_like(ref) or ref.shape[-1] % 8 or key.endswith((".weight", ".bias")) or key in ("weight", "bias"):
        return False
    return bool(key) and (placeholder or ref.shape[-1] in WIDTHS)


def _vector_like(ref: TensorRef) -> bool:
    return 1 <= len(ref.shape) <= 2 and 0 not in ref.shape and ref.nbytes <= _ONE_KEY_LIMIT and ref.dtype in _FLOATS


_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_PARSERS: tuple[Callable[[Tensors, Scalars, str], Parsed | None], ...] = (
    _a1111, _kohya, _multi_encoder, _xti, _emb_pair, _diffusers,
)  # fmt: skip


def _token(scalars: Scalars, stem: str) -> str:
    """Token of an encoding without a place for it: hubtool's own note, a bundle's name, else the file's name."""
    for key in (_TOKEN_NOTE, "name"):
        value = scalars.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return stem


def _embedding(token: str | None, encoder: str | None, ref: TensorRef) -> Embedding:
    if len(ref.shape) not in (1, 2) or 0 in ref.shape:
        raise CorruptFile(
            f"an embedding of shape {list(ref.shape)}; (n, width) expected", path=ref.path, offset=ref.start
        )
    width = ref.shape[-1]
    if width % 8:
        reason = f"no text encoder is {width} wide, so these vectors fit no embedding table"
        raise CorruptFile(reason, path=ref.path, offset=ref.start)
    vectors = reshape(Read(ref), (1, width)) if len(ref.shape) == 1 else Read(ref)
    return Embedding(token, encoder, vectors)


def _by_width(encoding: str, pairs: list[tuple[str, TensorRef]]) -> Parsed:
    """One encoder per vector, told by its width alone."""
    unknown: tuple[str, str | None, tuple[str, ...]] = ("", None, ())
    rows = [WIDTHS.get(ref.shape[-1] if ref.shape else 0, unknown) for _, ref in pairs]
    embeddings = tuple(_embedding(token, row[1], ref) for (token, ref), row in zip(pairs, rows, strict=True))
    families = tuple(family for family in rows[0][2] if all(family in row[2] for row in rows))
    findings = () if all(row[0] for row in rows) else (_odd_width(embeddings),)
    single = families[0] if len(families) == 1 else None
    return Parsed(encoding, embeddings, single, () if single else families, findings)


def _by_encoder(encoding: str, refs: Mapping[str, TensorRef], token: str) -> Parsed:
    """One tensor per named encoder; what is there names the family."""
    family = _FAMILY_OF.get(frozenset(refs))
    findings: list[Finding] = []
    embeddings = []
    for key, ref in refs.items():
        embedding = _embedding(token, _role(key, family), ref)
        embeddings.append(embedding)
        if ref.shape[-1] != _KEY_WIDTH[key]:
            findings.append(_odd_width((embedding,)))
    first = next(iter(refs))
    candidates = () if family else WIDTHS[_KEY_WIDTH[first]][2]
    if len(refs) == 1 and first in ("clip_l", "clip_g"):
        findings.append(_half(first))
    if family == "sdxl" and len({embedding.vectors.shape[0] for embedding in embeddings}) > 1:
        findings.append(Finding("uneven-vectors", "warning", "the two SDXL encoders have different numbers of vectors"))
    return Parsed(encoding, tuple(embeddings), family, candidates, tuple(findings))


def _role(key: str, family: str | None) -> str | None:
    if key == "t5":
        return {"flux1": "text_encoder_2", "sd3": "text_encoder_3"}.get(family or "")
    return WIDTHS[_KEY_WIDTH[key]][1]


def _half(key: str) -> Finding:
    message = (
        f"only {key} is here: an SDXL embedding needs clip_l and clip_g, and half of it works poorly or not at all"
    )
    return Finding("half-embedding", "warning", message)


def _odd_width(embeddings: Iterable[Embedding]) -> Finding:
    widths = sorted({embedding.vectors.shape[-1] for embedding in embeddings})
    return Finding("unknown-width", "warning", f"vectors {widths} wide belong to no text encoder known to hubtool")


ENCODINGS = ("canonical", "a1111", "kohya", "kohya-sdxl", "cog-sdxl", "diffusers", "diffusers-bin", "emb-pair", "raw")
_EMITTED_KEYS = {
    "canonical": {}, "kohya-sdxl": {},
    "cog-sdxl": {"clip_l": "text_encoders_0", "clip_g": "text_encoders_1", "t5": "text_encoders_2"},
    "emb-pair": {"clip_l": "emb", "clip_g": "emb2"},
}  # fmt: skip


def emit_embedding(
    embeddings: Iterable[Embedding], encoding: str, *, token: str | None = None, extra: Scalars | None = None
) -> dict[str, Any] | Expr:
    """Write the embeddings in another encoding, bytes unchanged.

    Returns ``{key: Expr}`` for the flat encodings (safetensors or torch), an object tree of dicts, scalars and ``Expr`` leaves for
    ``a1111`` (torch only), the bare ``Expr`` for ``raw``. ``token`` renames; ``extra`` are scalar fields of A1111 (``step``,
    ``sd_checkpoint`` ...). Raises ``UsageProblem`` when the encoding has no place for these embeddings.
    """
    items = [replace(item, token=token) if token else item for item in embeddings]
    if not items:
        raise UsageProblem("no embedding to write")
    if encoding in _EMITTED_KEYS:
        return _emit_by_encoder(items, encoding)
    if encoding in ("diffusers", "diffusers-bin"):
        return _emit_by_token(items, flat=encoding == "diffusers-bin")
    if encoding not in ("a1111", "kohya", "raw"):
        raise UsageProblem(f"no such embedding encoding: {encoding}", hint=f"one of {', '.join(ENCODINGS)}")
    if len(items) != 1:
        raise UsageProblem(
            f"{encoding} holds one encoder's vectors; this embedding has {len(items)}", hint="try kohya-sdxl"
        )
    vectors = items[0].vectors
    if encoding == "a1111":
        return _a1111_tree(items[0], extra or {})
    return {"emb_params": vectors} if encoding == "kohya" else vectors


def canonical_metadata(token: str | None, variant: str, source_sha256: str | None = None) -> dict[str, str]:
    """Metadata of a canonical safetensors file: what the keys cannot say."""
    notes = ((_TOKEN_NOTE, token), (_VARIANT_NOTE, variant), (_SOURCE_NOTE, source_sha256))
    return {key: value for key, value in notes if value}


def canonical_key(embedding: Embedding) -> str:
    """``clip_l``, ``clip_g``, ``t5`` ... by the vectors' width; an unknown width is written as ``emb_{width}``."""
    width = embedding.vectors.shape[-1]
    return WIDTHS[width][0] if width in WIDTHS else f"emb_{width}"


def _emit_by_encoder(items: list[Embedding], encoding: str) -> dict[str, Expr]:
    names = _EMITTED_KEYS[encoding]
    keys = [canonical_key(item) for item in items]
    if len(set(keys)) < len(keys) or len({item.token for item in items}) > 1:
        raise UsageProblem(
            f"{encoding} holds one token; this file has {len(items)} sets of vectors", hint="try diffusers"
        )
    missing = [key for key in keys if names and key not in names]
    if missing:
        raise UsageProblem(f"{encoding} has no place for the encoder {missing[0]}")
    shape_1d = encoding == "emb-pair"
    return {names.get(key, key): _flat(item.vectors, shape_1d) for key, item in zip(keys, items, strict=True)}


def _emit_by_token(items: list[Embedding], *, flat: bool) -> dict[str, Expr]:
    out = {item.token or "*": _flat(item.vectors, flat) for item in items}
    if len(out) < len(items):
        raise UsageProblem(
            "diffusers keeps one encoder per file: the same token twice has no place", hint="try kohya-sdxl"
        )
    return out


def _flat(vectors: Expr, wanted: bool) -> Expr:
    """sd-concepts files keep one vector as ``(dim,)``."""
    return reshape(vectors, vectors.shape[-1:]) if wanted and vectors.shape[0] == 1 else vectors


def _a1111_tree(item: Embedding, extra: Scalars) -> dict[str, Any]:
    """265 is CLIP's id of ``*``; A1111 reads the other fields with ``get``."""
    fields = {"name": item.token or "", "step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    kept = {key: value for key, value in extra.items() if key in fields}
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": item.vectors},
        **fields,
        **kept,
        "name": item.token or "",
    }
