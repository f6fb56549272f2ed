"""Make pictures from a base and adapters, with their recipe inside; compare strengths in a grid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from hubtool.actions.generate import Generated, Options, generate
from hubtool.actions.generate_inputs import named, of_recipe
from hubtool.actions.generate_settings import described
from hubtool.cli import output
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.errors import UsageProblem
from hubtool.pipelines import pictures
from hubtool.pipelines.generating import SCHEDULERS, Request
from hubtool.pipelines.opening import DTYPES
from hubtool.pipelines.pictures import Recipe

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_SIZE = re.compile(r"(\d+)x(\d+)")
_SETTING = re.compile(r"(.+?)\.(\w+)=(.*)", re.DOTALL)
_MOST = 10_000  # pictures of one command


@click.command(
    epilog="""\b
Examples:
  hubtool generate sdxl/ style.safetensors=0.8 detail.safetensors=0.4 -p "a cat" --seed 7 -o cat.png
  hubtool generate model.safetensors --config-from sd15/ -p "a cat" --seed 1-4 --batch 2 -o cats/
  hubtool generate sd15/ cat.safetensors -p "a <cat>" --negative-embedding bad.pt --scheduler dpm++2m-karras -o cat.png
  hubtool generate sdxl/ a.safetensors b.safetensors -p "a cat" --grid strengths=0,0.5,1 -o compared.png
  hubtool generate sdxl/ style.safetensors -p "a cat" --steps 30 --schedule style=phases:0:0,0.4:1 -o late.png
  hubtool generate sd15/ golden-hour.pt=0.7 -p "a cat" --set golden-hour.steps=20 --set golden-hour.slerp=on -o gold.png
  hubtool generate --from cat.png
  hubtool generate --from cat.png --search adapters/ --seed 8 -o other.png
"""
)
@click.argument("base", required=False)
@click.argument("adapters", nargs=-1, metavar="[ADAPTER[=STRENGTH]]...")
@click.option("-p", "--prompt", help="What the picture shall show.")
@click.option("-n", "--negative", help="What it shall not show.")
@click.option("--negative-embedding", "negatives", multiple=True, help="Embedding for the negative prompt; repeatable.")
@click.option(
    "--seed", "seeds", multiple=True, metavar="N|N-M|N,M", help="Seeds, a picture each; default: a random one."
)
@click.option("--count", type=click.IntRange(1, _MOST), help="So many seeds from the first one on.")
@click.option("--batch", type=click.IntRange(1), help="Pictures at a time.  [default: 1]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.")
@click.option("--guidance", type=float, help="Guidance scale (CFG).")
@click.option("--true-cfg", type=float, help="CFG of pipelines whose guidance is distilled (Flux, Qwen-Image).")
@click.option("--size", metavar="WIDTHxHEIGHT", help="Pixels.")
@click.option("--scheduler", type=click.Choice(list(SCHEDULERS)), help="Default: the base's own.")
@click.option("--grid", metavar="adapters|strengths=A,B,...", help="One labelled picture: a column each.")
@click.option(
    "--schedule", "schedules", multiple=True, metavar="ADAPTER=CURVE", help="Strength by step: style=linear:1:0.2."
)
@click.option(
    "--set", "settings", multiple=True, metavar="ADAPTER.WORD=VALUE", help="What a kind has to be set: style.steps=10."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True, help="What to compute in."
)
@click.option("--config-from", type=click.Path(path_type=Path), help="Folder with configurations for a single file.")
@click.option(
    "--hash-inputs", "hashes", is_flag=True, help="Put the SHA-256 of a base above 1 GiB into the recipe, too."
)
@click.option(
    "--from", "picture", type=click.Path(path_type=Path), help="Read the recipe of a picture; with -o, make it again."
)
@click.option(
    "--search",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder with files that the recipe names, besides the picture's own and this one.",
)
@click.option("-o", "--output", "out", help="A PNG, or a folder.")
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, base: str | None, adapters: tuple[str, ...], out: str | None, **asked: Any) -> None:
    """Make pictures from BASE (folder, single file, library REF or Hub repository) and any number of adapters of any kind.

    An adapter of another family is refused before anything is loaded. The recipe (base, adapters by SHA-256 and strength, prompt, seed,
    versions) lies in the picture, as text that other programs show and as JSON; --from reads it, and options change it.
    """
    kept = pictures.read(asked["picture"]) if asked["picture"] else None
    if kept is not None and out is None:
        _show(kept, asked["as_json"])
        return
    if out is None:
        raise UsageProblem("no output is named", hint="-o OUT.png")
    request = _request(kept, asked)
    own, refs, dark, settings = _inputs(kept, base, adapters, asked, state)
    names = ("device", "dtype", "config_from", "hashes", "force", "dry_run")
    schedules = _schedules(asked["schedules"], kept if base is None else None)
    options = Options(
        dark, _grid(asked["grid"], kept), schedules, _settings(asked["settings"], settings), library=state.library,
        **{name: asked[name] for name in names},
    )  # fmt: skip
    total = request.steps and request.steps * -(-len(request.seeds) // request.batch)
    with output.progress("generating", None if options.grid is not None else total) as advance:
        done = generate(own, refs, request, out, options, advance)
    if asked["as_json"]:
        output.print_json(done.to_json())
    else:
        output.show("\n".join(_described(done)))


def _inputs(
    kept: Recipe | None, base: str | None, adapters: tuple[str, ...], asked: dict[str, Any], state: State
) -> tuple[str, list[tuple[str, float]], list[str], dict[str, dict[str, Any]]]:
    """What was named, else what the picture was made of, with its settings."""
    if base is not None:
        return base, [named(text) for text in adapters], list(asked["negatives"]), {}
    if kept is None:
        raise UsageProblem("no base is named", hint="hubtool generate BASE -p PROMPT -o OUT.png")
    places = (*asked["search"], asked["picture"].parent, Path())
    own, refs, dark, settings = of_recipe(kept, places, state.library)
    return own, refs, [*dark, *asked["negatives"]], settings


def _request(kept: Recipe | None, asked: dict[str, Any]) -> Request:
    if kept is None and asked["prompt"] is None:
        raise UsageProblem("no prompt is given", hint='-p "a cat"')
    before = kept.request if kept else Request(asked["prompt"], seeds=())
    words = {one.name: asked[one.name] for one in fields(Request) if one.name not in ("seeds", "width", "height")}
    request = replace(before, **{name: value for name, value in words.items() if value is not None})
    if asked["size"]:
        width, height = _size(asked["size"])
        request = replace(request, width=width, height=height)
    return replace(request, seeds=_seeds(asked["seeds"], asked["count"], before.seeds))


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text.lower())
    if not found:
        raise UsageProblem(f"{text!r} is no size", hint="--size 1024x768")
    return int(found[1]), int(found[2])


def _seeds(texts: tuple[str, ...], count: int | None, before: tuple[int, ...]) -> tuple[int, ...]:
    """The seeds that were asked for, else the recipe's, else a random one."""
    seeds = tuple(seed for text in texts for part in text.split(",") for seed in _range(part)) or before
    if not seeds:
        import secrets

        seeds = (secrets.randbelow(1 << 32),)
    return seeds if count is None else tuple(range(seeds[0], seeds[0] + count))


def _range(text: str) -> range:
    found = _RANGE.fullmatch(text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < first + _MOST:
        raise UsageProblem(f"{text!r} is no seed", hint="--seed 7, --seed 1-4 or --seed 1,5,9")
    return range(first, last + 1)


def _grid(text: str | None, kept: Recipe | None) -> str | tuple[float, ...] | None:
    if text is None:
        before = kept.grid if kept else None
        return None if before is None else tuple(before.get("strengths", ())) or "adapters"
    kind, _, values = text.partition("=")
    try:
        numbers = tuple(float(value) for value in values.split(",")) if values else ()
    except ValueError:
        numbers = ()
    if kind not in ("adapters", "strengths") or (kind == "strengths") != bool(numbers):
        raise UsageProblem(f"{text!r} is nothing to compare", hint="--grid adapters or --grid strengths=0,0.5,1")
    return numbers or "adapters"


def _schedules(texts: tuple[str, ...], kept: Recipe | None) -> dict[str, str]:
    """Name of an adapter -> its schedule: the recipe's, then what was asked."""
    found = {one.name: one.schedule for one in (kept.adapters if kept else ()) if one.schedule}
    for text in texts:
        name, equals, words = text.partition("=")
        if not equals:
            raise UsageProblem(f"{text!r} is no schedule", hint="--schedule style=linear:1:0.2")
        found[name] = words
    return found


def _settings(texts: tuple[str, ...], kept: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name of an adapter -> its settings: the recipe's, then what was asked, as texts."""
    found = {name: dict(own) for name, own in kept.items()}
    for text in texts:
        parts = _SETTING.fullmatch(text)
        if parts is None:
            raise UsageProblem(f"{text!r} sets nothing", hint="--set style.steps=10")
        found.setdefault(parts[1], {})[parts[2]] = parts[3]
    return found


def _show(recipe: Recipe, as_json: bool) -> None:
    if as_json:
        output.print_json(recipe.to_json())
    else:
        output.show(pictures.parameters(recipe))
        output.show("\n".join(_parts(recipe)))


def _parts(recipe: Recipe) -> Iterator[str]:
    yield f"base: {recipe.base.name} ({recipe.base.family or 'family unknown'}, sha256 {recipe.base.sha256 or 'not taken'})"
    for one in recipe.adapters:
        role = (
            "negative embedding"
            if one.negative
            else f"strength {one.strength:g}{f' by {one.schedule}' if one.schedule else ''}"
        )
        more = f", {described(one.settings)}" if one.settings else ""
        yield f"adapter: {one.name} ({role}{more}, sha256 {one.sha256})"
    yield f"computed on {recipe.device} in {recipe.dtype}"


def _described(done: Generated) -> Iterator[str]:
    for path, recipe in done.outputs:
        yield f"{path}{' (dry run)' if done.dry_run else ''}"
        if not done.dry_run:
            yield f"  seed {', '.join(map(str, recipe.request.seeds))}"
    yield from (f"  {line}" for line in _parts(done.recipe))
    for load in done.loads:
        yield from (f"  {load.name}: {finding.message}" for finding in load.findings)
        yield from (f"  {load.name}: token {names[0]} of {len(names)} vectors" for names in load.tokens.values())
    if not done.dry_run:
        yield f"  {done.seconds:.1f} s"
