"""Show the recipe that an output keeps, run one, or check that it still gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubtool.actions import recipe as actions
from hubtool.actions.recipe import RunOptions
from hubtool.actions.refs import locate
from hubtool.cli import output
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.ops import recipe as recipes

_search = click.option(
    "--search", multiple=True, type=click.Path(path_type=Path), help="Folder with inputs known by name and hash."
)
_workers = click.option("--workers", type=click.IntRange(1), help="Threads; default: one a processor.")
_device = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda.")


@click.group(
    epilog="""\b
Examples:
  hubtool recipe show merged.safetensors
  hubtool recipe run recipe.yaml -o merged.safetensors
  hubtool recipe check merged.safetensors --search loras/
"""
)
def command() -> None:
    """Recipes: what was asked of merge, extract, resize or collapse, as JSON or YAML. Every output keeps its own."""


@command.command()
@click.argument("source")
@json_option
@pass_state
def show(state: State, /, source: str, as_json: bool) -> None:
    """Print the recipe in SOURCE: a recipe file, or anything that hubtool made of others."""
    recipe, path = actions.read(source, state.library)
    if as_json:
        output.print_json({"source": str(path), "recipe": recipe.to_json()})
    else:
        output.show(recipes.dump(recipe, indent=2))


@command.command()
@click.argument("source")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output file or folder.")
@_search
@_device
@_workers
@force_option
@dry_run_option
@json_option
@pass_state
def run(state: State, /, source: str, out: Path | None, as_json: bool, **asked: Any) -> None:
    """Carry out the recipe in SOURCE. Its relative paths start in its own folder."""
    recipe, path = actions.read(source, state.library)
    options = RunOptions(**asked, library=state.library, folder=path.resolve().parent)
    if out is not None and not options.dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
    with output.progress(f"running {path.name}") as advance:
        done = actions.run(recipe, out, options, advance)
    if as_json:
        output.print_json(done.to_json())
    else:
        output.show(f"{path} -> {done.output or '(dry run)'}")
        output.show(
            f"  {recipe.operation}, {len(recipe.inputs)} inputs{f', sha256 {done.sha256}' if done.sha256 else ''}"
        )


@command.command()
@click.argument("source")
@_search
@_device
@_workers
@json_option
@pass_state
def check(state: State, /, source: str, as_json: bool, **asked: Any) -> None:
    """Run the recipe that SOURCE keeps and compare the result's SHA-256 with SOURCE's. Exit 1 where they differ."""
    options = RunOptions(**asked, library=state.library)
    path = locate(source, state.library)
    with output.progress(f"checking {path.name}") as advance:
        verdict = actions.check(path, options, advance)
    if as_json:
        output.print_json(verdict.to_json())
    else:
        output.show(f"{verdict.source}: {'the same bytes' if verdict.same else 'OTHER BYTES'}")
        output.show(f"  expected {verdict.expected}")
        output.show(f"  found    {verdict.found}")
    if not verdict.same:
        raise click.exceptions.Exit(1)
