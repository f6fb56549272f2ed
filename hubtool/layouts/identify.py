"""Says what a file is: the first recogniser of ``layouts/kinds`` that knows it, then what its metadata claims, kept apart.

A kind is one module in that package with ``ORDER`` and ``recognise(file) -> Identity | None``; it is found by listing the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from hubtool.adapters.identity import Identity
from hubtool.errors import HubtoolError
from hubtool.formats.base import TensorFile
from hubtool.layouts import kinds
from hubtool.layouts.claims import Claims, read_claims, related
from hubtool.layouts.unwrap import unwrap
from hubtool.types import Finding

_ADAPTER_MODULES = ("networks.", "lycoris.")


def identify(file: TensorFile) -> Identity:
    """What the tensors say, what the metadata claims, and where they disagree.

    Never raises for an unknown file (kind ``unknown``). Raises ``CorruptFile`` where a structure is clear and its shapes impossible.
    """
    view, notes = unwrap(file)
    identity = _recognise(view)
    claims = read_claims(file)
    findings = (*notes, *identity.findings, *claims.findings, *_contradictions(identity, claims))
    return _with_claims(replace(identity, findings=findings), claims)


@cache
def recognisers() -> tuple[Callable[[TensorFile], Identity | None], ...]:
    """Every recogniser of ``layouts/kinds``, by ``ORDER``. Modules that begin with an underscore are helpers."""
    names = [module.name for module in iter_modules(kinds.__path__) if not module.name.startswith("_")]
    modules = [import_module(f"{kinds.__name__}.{name}") for name in names]
    return tuple(module.recognise for module in sorted(modules, key=lambda module: int(module.ORDER)))


def _recognise(file: TensorFile) -> Identity:
    for recognise in recognisers():
        identity = recognise(file)
        if identity is not None:
            return identity
    raise HubtoolError("no recogniser took the file; kinds/unknown.py must", path=file.path)


def _with_claims(identity: Identity, claims: Claims) -> Identity:
    """Fill in what the tensors left open; a claim never overrides a finding."""
    words = tuple(dict.fromkeys((*identity.trigger_words, *claims.trigger_words)))
    base = claims.values.get("base_model")
    base_model = identity.base_model or (base if isinstance(base, str) and base else None)
    values = {**claims.values, **({"family": claims.family} if claims.family else {}), **identity.claims}
    settled = replace(identity, trigger_words=words, base_model=base_model, claims=values)
    if identity.family is None and claims.family in identity.family_candidates:
        said = f"the tensors fit {', '.join(identity.family_candidates)}; the metadata says {claims.family}"
        return replace(settled, family=claims.family, evidence=(*identity.evidence, said))
    return settled


def _contradictions(identity: Identity, claims: Claims) -> Iterator[Finding]:
    """Warnings where metadata and tensors cannot both be right; the tensors win."""
    found = (identity.family,) if identity.family else identity.family_candidates
    if claims.family and found and not any(related(claims.family, family) for family in found):
        yield _contradiction(f"the metadata says the base is {claims.family}, the tensors fit {' or '.join(found)}")
    module = claims.values.get("network_module")
    adapter = isinstance(module, str) and module.startswith(_ADAPTER_MODULES)
    if adapter and identity.kind == "unknown":
        yield _contradiction(f"the metadata says an adapter trained by {str(module)[:60]!a}, no tensor looks like one")


def _contradiction(message: str) -> Finding:
    return Finding("claim-contradicts", "warning", message)
