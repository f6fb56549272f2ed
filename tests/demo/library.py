"""A small library of every layout: scanned, listed, explained, converted there and back."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from hubtool.formats import open_file
from hubtool.ops.convert import plan
from hubtool.ops.execute import execute
from hubtool.ops.target import Target
from tests.demo.stage import OUT, TOOL, run, say
from tests.support.adapters import attention, make, values, write


def show(own: str | None) -> None:
    """``own``: a person's folder, only read, in place of the generated one."""
    folder = Path(own) if own else OUT / "adapters"
    if not own:
        say("A small library of every layout, with real names and shapes")
        build(folder)
    say("Scan it and list it")
    run("scan", folder)
    run("ls", "sort:path")
    run("stats")
    say("Explain one odd file")
    run("explain", odd_file(folder))
    say("Convert kohya -> diffusers -> kohya: the same bytes come back")
    there_and_back(kohya_file(folder))


def build(folder: Path) -> None:
    """LoRAs of SD1, SD2 and SDXL in every layout; embeddings, a hypernetwork, an aesthetic vector, a damaged file."""
    for family in ("sd1", "sd2", "sdxl"):
        adapter = make(family, attention(family), ranks=(2, 4), alphas=(1.0, 2.0), dtype="F16")
        write(
            adapter,
            folder / family / "kohya.safetensors",
            "kohya",
            {"ss_output_name": f"{family} demo", "ss_network_module": "networks.lora"},
        )
        for layout in ("diffusers", "comfy"):
            write(adapter, folder / family / f"{layout}.safetensors", layout)
    write(
        make("sdxl", attention("sdxl"), ranks=(2,), alphas=(1.0,)),
        folder / "sdxl" / "kohya-diffusers-names.safetensors",
        "kohya/diffusers",
    )
    plain = make("sd1", [m for m in attention("sd1") if m[0] == "unet"], ranks=(4,))
    write(plain, folder / "sd1" / "diffusers-legacy.safetensors", "diffusers-legacy")
    projections = [
        m for m in attention("sd1") if m[0] == "unet" and m[1].rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v")
    ]
    write(make("sd1", projections), folder / "sd1" / "attn-procs.safetensors", "attn-procs")
    positional(folder / "sd1")
    others(folder / "others")


def positional(folder: Path) -> None:
    """cloneofsimo's two forms and a PEFT folder, made by converting."""
    from hubtool.layouts import tables

    walk = next(w for w in tables.syntaxes()["cloneofsimo"].walks if w.component == "unet" and len(w.paths) == 144)
    write(
        make("sd1", [("unet", path) for path in walk.paths], ranks=(1,)),
        folder / "cloneofsimo.safetensors",
        "cloneofsimo",
    )
    source = open_file(folder / "cloneofsimo.safetensors")
    execute(plan(source, Target(layout="cloneofsimo-list")), folder / "cloneofsimo.pt")
    execute(plan(source, Target(layout="peft")), folder / "peft-folder")


def others(folder: Path) -> None:
    from hubtool.formats.torch_writer import write_torch_zip
    from hubtool.tensors.writer import write_safetensors

    folder.mkdir(parents=True)
    vectors = values((3, 768), 7)
    write_safetensors(folder / "easy-style.safetensors", {"emb_params": vectors}, {"format": "pt"})
    terms = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "old-style", "step": 499}
    write_torch_zip(folder / "old-style.pt", {**terms, "sd_checkpoint": None, "sd_checkpoint_name": None})
    write_torch_zip(folder / "learned_embeds.bin", {"<my-concept>": values((768,), 8)})
    half = {"linear.0.weight": values((1536, 768), 9), "linear.0.bias": values((1536,), 10)}
    half |= {"linear.1.weight": values((768, 1536), 11), "linear.1.bias": values((768,), 12)}
    write_torch_zip(
        folder / "hypernetwork.pt", {768: (half, half), "name": "demo", "layer_structure": [1, 2, 1], "step": 10}
    )
    whole = (folder / "easy-style.safetensors").read_bytes()
    (folder / "half-downloaded.safetensors").write_bytes(whole[: len(whole) // 2])


def odd_file(folder: Path) -> Path:
    """A file worth explaining: positional if there is one, else the first that holds an adapter."""
    found = folder / "sd1" / "cloneofsimo.safetensors"
    return found if found.exists() else kohya_file(folder)


def kohya_file(folder: Path) -> Path:
    """The first LoRA in a kohya layout."""
    listed = subprocess.run([*TOOL, "ls", "kind:lora", "--json"], check=True, capture_output=True, text=True)
    rows = json.loads(listed.stdout)
    kohya = [
        row
        for row in rows
        if str(row.get("layout", "")).startswith("kohya/") and row.get("algorithm") in ("lora", "locon")
    ]
    if not kohya:
        raise SystemExit(f"no LoRA in a kohya layout below {folder}")
    return Path(kohya[0]["path"])


def there_and_back(source: Path) -> None:
    layout = json.loads(
        subprocess.run([*TOOL, "inspect", str(source), "--json"], check=True, capture_output=True).stdout
    )["layout"]
    run("convert", source, "-o", OUT / "there.safetensors", "--layout", "diffusers", "--verify")
    run("convert", OUT / "there.safetensors", "-o", OUT / "back.safetensors", "--layout", layout)
    for path in (source, OUT / "there.safetensors", OUT / "back.safetensors"):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}", flush=True)
    if source.read_bytes() != (OUT / "back.safetensors").read_bytes():
        raise SystemExit("the file did not come back as it was")
