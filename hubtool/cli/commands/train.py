"""Train an adapter: LoRA, DreamBooth, textual inversion, pivotal tuning, Custom Diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hubtool.actions.train import Done, plan, train
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.ops.recipes.schema import schema
from hubtool.training import config as configs
from hubtool.training.config import Config
from hubtool.training.estimate import Estimate
from hubtool.training.loop import Step
from hubtool.training.methods import METHODS


@click.command(
    epilog="""\b
Examples:
  hubtool train lora --base sd15/ --data cats/ -o cats-lora --steps 1500
  hubtool train dreambooth --base sd15/ --data rex/ -o rex --set data.class_prompt="a photo of a dog" --set data.class_images=200
  hubtool train dreambooth -c rex.toml --set adapter.full=true --set output.form=extract --layout kohya
  hubtool train textual-inversion --base sd15/ --data cats/ -o cat --token "<cat>" --set tokens.vectors=4
  hubtool train pivotal -c run.toml --set run.seed=7 --dry-run
  hubtool train lora -c cats-lora/train.toml --resume
"""
)
@click.argument("kind", type=click.Choice(sorted(METHODS)))
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), help="Configuration (TOML).")
@click.option("--base", help="diffusers folder, Hub repository, single file, or a reference to the library.")
@click.option("--config-from", help="Folder with configurations for a base that is a single file.")
@click.option("--data", help="Folder of images.")
@click.option("-o", "--output", "out", help="Folder of the result, checkpoints, pictures and log.")
@click.option("--name", help="File name of the result, without suffix.")
@click.option("--steps", type=click.IntRange(1), help="Updates of the parameters.")
@click.option("--token", "tokens", multiple=True, help="A new token; repeatable.")
@click.option("--layout", help="Layout of the adapter file: diffusers, kohya, comfy, peft ...")
@click.option("--set", "pairs", multiple=True, metavar="WORD=VALUE", help="Any word of the configuration: run.seed=7.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the output folder.")
@click.option("--print-config", is_flag=True, help="Print the whole configuration as TOML and stop.")
@click.option("--explain", is_flag=True, help="List every word of the configuration and stop.")
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, kind: str, **asked: Any) -> None:
    """Train KIND on a folder of images. What the options leave open, the configuration says, and else the defaults of --explain.

    An interrupted run goes on with --resume as if nothing had happened. A loss that is no number stops the run; the last good
    checkpoint stays. With --dry-run, steps and memory are estimated and nothing is trained.
    """
    if asked["explain"]:
        output.show("\n".join(_words()))
        return
    config = _config(kind, asked)
    if asked["print_config"]:
        output.raw(configs.to_toml(config))
    elif asked["dry_run"]:
        _tell(plan(config, state.library), asked["as_json"])
    else:
        _run(state, config, asked)


def _config(kind: str, asked: dict[str, Any]) -> Config:
    """File, then --set, then the options of their own; the later one wins."""
    document = configs.read(asked["file"]) if asked["file"] else {}
    named = {
        "base": asked["base"], "config_from": asked["config_from"], "data.folder": asked["data"],
        "output.folder": asked["out"], "output.name": asked["name"], "output.layout": asked["layout"], "run.steps": asked["steps"], "tokens.names": list(asked["tokens"]) or None,
    }  # fmt: skip
    own: dict[str, Any] = {"method": kind}
    for word, value in named.items():
        if value is not None:
            section, _, leaf = word.rpartition(".")
            (own.setdefault(section, {}) if section else own)[leaf] = value
    return configs.from_mapping(configs.merged(document, configs.settings(asked["pairs"]), own))


def _run(state: State, config: Config, asked: dict[str, Any]) -> None:
    for line in _changed(config):
        output.say(line)
    with output.progress(f"training {config.output.name}", config.run.steps) as advance:
        steps = iter(range(config.run.steps))

        def watch(step: Step) -> None:
            while next(steps, step.step) < step.step - 1:  # steps that were done before an interruption
                advance()
            advance()
            if state.verbose:
                output.say(f"step {step.step}: loss {step.loss:.5f}, rate {step.rate:.3g}, gradient {step.norm:.3g}")

        done = train(
            config, resume=asked["resume"], force=asked["force"], library=state.library, watch=watch,
            made=lambda: output.say("a class image was made"),
        )  # fmt: skip
    if not done.trained.leads:
        return
    if done.warning:
        output.complain(done.warning, "warning")
    if asked["as_json"]:
        output.print_json(done.to_json())
    else:
        output.show("\n".join(_described(done)))


def _described(done: Done) -> Iterator[str]:
    trained = done.trained
    yield from (str(path) for path in trained.written.files)
    last = f", last loss {trained.steps[-1].loss:.5f}" if trained.steps else ""
    resumed = f" ({trained.resumed} before the interruption)" if trained.resumed else ""
    yield f"  {trained.config.run.steps} steps{resumed}{last}, {trained.parameters} numbers trained"
    memory = f", at most {human_size(trained.peak_memory)} of GPU memory" if trained.peak_memory else ""
    yield f"  {trained.seconds:.1f} s{memory}"


def _changed(config: Config) -> Iterator[str]:
    """The words that differ from the defaults."""
    usual, now = configs.binding(Config()), configs.binding(config)
    yield from (f"  {word} = {value}" for word, value in now.items() if value != usual[word])


def _tell(found: Estimate, as_json: bool) -> None:
    if as_json:
        output.print_json(found.to_json())
        return
    output.show(f"{found.steps} steps, {found.samples} images seen in {found.epochs:.1f} epochs of {found.images}")
    rows = [[name, f"{count} images"] for name, count in found.buckets.items()]
    rows += [[name, human_size(size)] for name, size in (found.memory or {}).items()]
    rows += (
        [["in all", human_size(found.total)]] if found.total else [["memory", "not known without the base's configs"]]
    )
    output.show(output.table(rows))


def _words() -> Iterator[str]:
    """Every word with its meaning, choices and default."""
    usual = configs.Config().to_json()
    for name, node in schema("train")["properties"].items():
        if "properties" not in node:
            yield f"{name}: {node['description']}"
            continue
        yield f"\n[{name}]  # {node['description']}"
        for word, inner in node["properties"].items():
            choices = f" ({', '.join(inner['enum'])})" if "enum" in inner else ""
            yield f"{word} = {configs.toml(usual[name][word])}  # {inner['description']}{choices}"
