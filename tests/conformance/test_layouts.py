"""What every layout of every family must do. A new table joins by existing: families and syntaxes are read from schemas/."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import pytest

from hubtool.adapters.ir import Adapter
from hubtool.formats import open_file
from hubtool.layouts import emit, parse_file, tables
from hubtool.layouts.content import content_id
from hubtool.layouts.vocabulary import places
from hubtool.ops.convert import plan
from hubtool.ops.execute import execute
from hubtool.ops.target import Target
from hubtool.tensors.evaluate import to_bytes
from tests.support.adapters import attention, closed, layouts, make, write
from tests.support.patches import CASES as PATCHES

CASES = [(family, layout) for family in tables.family_ids() for layout in layouts(family)]
DENOISERS = ("unet", "transformer", "prior", "decoder")


def adapter_for(layout: str, family: str, **options: object) -> object:
    """Enough modules of every component to name the family; only attention where the layout holds nothing else."""
    modules = attention(family)
    if layout.startswith("attn-procs"):
        modules = [
            m
            for m in modules
            if m[1].rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "out_proj")
        ]
    syntax, _, naming = layout.partition("/")
    table = tables.syntaxes()[syntax]
    components = set(table.prefixes) if not _shared_prefix(table) else {modules[0][0]}
    kept = [m for m in modules if m[0] in components and _held(family, naming, m)]
    whole = [m for m in closed(family, _spread(kept)) if _held(family, naming, m)]
    return make(family, whole, **options)  # type: ignore[arg-type]


def _shared_prefix(syntax: tables.Syntax) -> bool:
    """Without a prefix of its own per component, a file holds one component."""
    return syntax.single_component or all("" in texts for texts in syntax.prefixes.values())


def _held(family: str, naming: str, module: tuple[str, str]) -> bool:
    component, path = module
    table = tables.family(family).namings.get(naming)
    return table is None or not table.partial or path in places(family, naming, component)


def _spread(modules: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first and last few of each component: cross-attention widths and depth both show."""
    out = []
    for component in dict.fromkeys(c for c, _ in modules):
        own = [m for m in modules if m[0] == component]
        out += own if len(own) <= 16 else own[:8] + own[-8:]
    return out


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_what_is_emitted_is_parsed_again(family: str, layout: str, tmp_path: Path) -> None:
    adapter = adapter_for(layout, family)
    parsed = parse_file(open_file(write(adapter, tmp_path / "a.safetensors", layout)), family)
    assert str(parsed.layout).partition("/")[0] == layout.partition("/")[0]
    assert not parsed.adapter.findings
    assert set(parsed.adapter.patches) == set(adapter.patches)
    for key, patch in adapter.patches.items():
        again = parsed.adapter.patches[key]
        assert (again.rank, again.scale) == (patch.rank, patch.scale)
        assert to_bytes(again.up) == to_bytes(patch.up)
        assert to_bytes(again.down) == to_bytes(patch.down)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_family_is_found_or_among_the_candidates(family: str, layout: str, tmp_path: Path) -> None:
    parsed = parse_file(open_file(write(adapter_for(layout, family), tmp_path / "a.safetensors", layout)))
    assert parsed.adapter.family in (family, tables.family(family).descends_from, None)
    assert family in parsed.candidates


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_there_and_back_gives_the_same_bytes(family: str, layout: str, tmp_path: Path) -> None:
    source = write(adapter_for(layout, family), tmp_path / "a.safetensors", layout, {"ss_note": "kept", "format": "pt"})
    for other in ("kohya", "diffusers", "comfy"):
        there = plan(open_file(source), Target(layout=other, family=family))
        if there.losses or there.rounded:
            continue
        middle, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
        execute(there, middle, force=True)
        own = str(parse_file(open_file(source), family).layout)
        execute(plan(open_file(middle), Target(layout=own, family=family)), back, force=True)
        assert back.read_bytes() == source.read_bytes(), other


@pytest.mark.parametrize("family", tables.family_ids())
def test_one_adapter_has_one_content_id_in_every_layout(family: str, tmp_path: Path) -> None:
    wanted = [m for m in attention(family) if m[0] in DENOISERS and m[1].rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v")]
    adapter = make(family, closed(family, _spread(wanted or attention(family))))
    files = []
    for i, layout in enumerate(layouts(family)):
        if not emit(adapter, layout).losses:
            files.append(write(adapter, tmp_path / f"{i}.safetensors", layout))
    assert len(files) > 1
    assert len({content_id(open_file(path)) for path in files}) == 1


@pytest.mark.parametrize("family", tables.family_ids())
def test_scales_reach_diffusers_as_patterns_not_as_numbers_folded_in(family: str) -> None:
    modules = [m for m in attention(family) if m[0] in DENOISERS][:6]
    adapter = make(family, modules, ranks=(2, 4, 8), alphas=(1.0, 4.0, 3.0, 2.0))
    emission = emit(adapter, "diffusers")
    config = json.loads(emission.metadata["lora_adapter_metadata"])
    component = modules[0][0]
    for (_, path), patch in adapter.patches.items():
        rank = config[f"{component}.rank_pattern"].get(path, config[f"{component}.r"])
        alpha = config[f"{component}.alpha_pattern"].get(path, config[f"{component}.lora_alpha"])
        assert (rank, alpha / rank) == (patch.rank, patch.scale)
        assert to_bytes(emission.tensors[f"{component}.{path}.lora_B.weight"]) == to_bytes(patch.up)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (patch, _) in PATCHES.items()
        if not name.startswith(("embedding", "ia3 of peft", "oft of", "boft of"))
    ],
)
def test_kohya_holds_every_algorithm_exactly(name: str) -> None:
    patch, _ = PATCHES[name]
    sd1 = Adapter(
        "sd1", MappingProxyType({("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"): patch})
    )
    emission = emit(sd1, "kohya")
    written = {role: to_bytes(emission.tensors[key]) for (_, _, role), key in emission.roles.items()}
    lost = {loss.what.rpartition(".")[2] for loss in emission.losses}
    assert lost <= {"bias"}
    assert {role: to_bytes(tensor) for role, tensor in patch.roles() if role not in lost} == written
