"""What README.md says of layouts, families and algorithms, found by trying: every cell is an adapter that was written and read again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import MappingProxyType

from hubtool.adapters.ir import Adapter, Patch
from hubtool.adapters.promote import to_lora
from hubtool.errors import HubtoolError, Unsupported
from hubtool.formats import open_file
from hubtool.layouts import Emission, emit, parse_file, tables
from hubtool.layouts.tables import Syntax
from hubtool.layouts.vocabulary import model, models, places
from hubtool.tensors.evaluate import to_bytes
from tests.support.adapters import namings
from tests.support.files import write_safetensors
from tests.support.patches import CASES

EXACT, ROUNDED, PROMOTED, READ, NONE = "=", "~", "L", "r", ""
# the algorithms as people call them -> the case that stands for each
ALGORITHMS = {
    "LoRA": "lora",
    "LoCon": "locon",
    "Tucker": "tucker",
    "DoRA per output": "dora per output",
    "DoRA per input": "dora per input",
    "LoHa": "loha",
    "LoKr": "lokr, w2 decomposed",
    "full": "full",
    "norm": "norm",
    "IA3": "ia3 on outputs",
    "diag-OFT": "oft, constrained",
    "BOFT": "boft",
    "GLoRA": "glora",
    "sparse residual": "sparse",
}


def syntaxes() -> list[Syntax]:
    """Those that name modules in one file."""
    return [one for one in tables.syntaxes().values() if not one.positional and one.container == "safetensors"]


@cache
def families_of(syntax: str) -> frozenset[str]:
    """The families whose adapters the syntax can spell."""
    table = tables.syntaxes()[syntax]
    if table.positional:
        return frozenset(family for walk in table.walks for family in walk.families)
    if table.container == "peft-folder":
        return frozenset(tables.family_ids())
    return frozenset(family for family in tables.family_ids() if namings(table, family))


def algorithm(name: str, syntax: Syntax) -> str:
    """What becomes of one module of an algorithm in a layout."""
    patch, _ = CASES[ALGORITHMS[name]]
    found = _tried(patch, syntax)
    if found != NONE:
        return found
    if set(dict(patch.roles())) & set(syntax.reads):
        return READ
    try:
        return PROMOTED if _tried(to_lora(patch), syntax) in (EXACT, ROUNDED) else NONE
    except Unsupported:
        return NONE


def _tried(patch: Patch, syntax: Syntax) -> str:
    family = "sd1" if "unet" in syntax.prefixes else "flux1"
    adapter = Adapter(family, MappingProxyType({_module(syntax, family): patch}))
    try:
        emission = emit(adapter, f"{syntax.id}/{_naming(syntax)}")
        if emission.losses:
            return NONE
        again = _read(emission, family)
    except HubtoolError:
        return NONE
    if emission.rounded:
        return ROUNDED
    return EXACT if again == _values(adapter.patches.values()) else NONE


def _naming(syntax: Syntax) -> str:
    own = syntax.namings[0]
    return own if own not in ("*", "native", "native-parts") else "diffusers"


def _module(syntax: Syntax, family: str) -> tuple[str, str]:
    component = next(iter(tables.family(family).components))
    known = places(family, _naming(syntax), component, models(family, component)[0]) or model(family)
    ends = ("to_out.0", "proj_out") if family == "flux1" else ("attn1.to_q",)
    return component, next(path for path in known if path.endswith(ends))


def _read(emission: Emission, family: str) -> list[tuple[str, bytes]]:
    """The values that the written file gives back; read while it is there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        tensors = {key: (tensor.dtype, tensor.shape, to_bytes(tensor)) for key, tensor in emission.tensors.items()}
        write_safetensors(path, tensors, emission.metadata)
        return _values(parse_file(open_file(path), family).adapter.patches.values())


def _values(patches: Iterable[Patch]) -> list[tuple[str, bytes]]:
    """Roles and bytes, and the scale, however it was carried."""
    rows = [(role, to_bytes(t)) for p in patches for role, t in p.roles() if role != "alpha"]
    return [*rows, *(("scale", str(p.scale).encode()) for p in patches)]
