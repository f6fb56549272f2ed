"""Aesthetic gradients (vicgalle): one mean CLIP image embedding, told from a textual inversion vector by its values.

CLIP-L image embeddings have one huge component (index 644) and heavy tails; token vectors do not. Measured on 8 and 21 real files:
kurtosis 7.9-184 against 2.4-6.9 (spec/artefacts.md D.3). In the gap both kinds stay candidates.
"""

from __future__ import annotations

from dataclasses import replace

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Embedding
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds import textual_inversion
from hubtool.layouts.kinds._common import bare
from hubtool.layouts.kinds._companions import CODE
from hubtool.layouts.kinds._values import floats, kurtosis
from hubtool.tensors.expr import Read, reshape
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

ORDER = 20
KEY = "aesthetic_embedding"
_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}  # joint space of CLIP-L, OpenCLIP-H, OpenCLIP-bigG
_FOLDER = "aesthetic_embeddings"  # where A1111's extension looks for them
_SHARED = "CLIP inversion (unCLIP, image variation) keeps vectors of this shape too"
_NEEDS = {
    768: f"it steers through the whole CLIP ViT-L/14, with the text projection that a pipeline lacks; {_SHARED}",
    1024: f"it steers through the whole OpenCLIP ViT-H, with its text projection; {_SHARED}",
    1280: f"it steers through the whole OpenCLIP ViT-bigG, with its text projection; {_SHARED}",
}
_PEAK_INDEX = 644
_IMAGE_SPACE, _CERTAIN, _TOKEN_SPACE = 7.5, 30.0, 4.5  # kurtosis


def recognise(file: TensorFile) -> Identity | None:
    """A single vector that lives in image space; a vector of token space comes back as a textual inversion with its rival named."""
    named = file.tensors.get(KEY) if len(file.tensors) == 1 else None
    if named is not None:
        return _identity(named, f"the key {KEY}", KEY, thin=False) if _joint(named) else None
    ref = bare(file)
    if ref is None or not _joint(ref):
        return None
    if _FOLDER in file.path.parent.name.lower():
        return _identity(ref, f"it lies in the folder {file.path.parent.name}", "raw", thin=False)
    values = floats(ref)
    return None if values is None else _by_values(file, ref, values)


def _joint(ref: TensorRef) -> bool:
    return len(ref.shape) in (1, 2) and ref.shape[-1] in _WIDTHS and ref.shape[:-1] in ((), (1,))


def _by_values(file: TensorFile, ref: TensorRef, values: tuple[float, ...]) -> Identity | None:
    peak = max(range(len(values)), key=lambda index: abs(values[index]))
    tails = kurtosis(values)
    said = f"kurtosis {tails:.1f}, largest component at index {peak}"
    if tails > _IMAGE_SPACE or (peak == _PEAK_INDEX and tails > _TOKEN_SPACE):
        return _identity(ref, said, "raw", thin=tails < _CERTAIN)
    identity = textual_inversion.recognise(file)
    if identity is None or tails < _TOKEN_SPACE:
        return identity
    return _with_rival(identity, said)


def _identity(ref: TensorRef, said: str, layout: str, *, thin: bool) -> Identity:
    vectors = reshape(Read(ref), (1, ref.shape[-1]))
    identity = Identity(
        kind="aesthetic_embedding",
        family=_WIDTHS[ref.shape[-1]],
        variant="image-space",
        layout=layout,
        embeddings=(Embedding(None, None, vectors),),
        findings=(Finding(CODE, "info", _NEEDS[ref.shape[-1]]),),
        evidence=(said,),
    )
    return _with_rival(identity, said) if thin else identity


def _with_rival(identity: Identity, said: str) -> Identity:
    evidence = tuple(dict.fromkeys((*identity.evidence, said)))
    rivals = ("aesthetic_embedding", "textual_inversion")
    note = Finding("thin-evidence", "info", f"{said}: this may be an aesthetic embedding or a textual inversion vector")
    return replace(identity, kind_candidates=rivals, findings=(*identity.findings, note), evidence=evidence)
