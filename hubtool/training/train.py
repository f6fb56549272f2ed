"""train: a configuration in, files out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.errors import WouldOverwrite
from hubtool.pipelines.families import family_of
from hubtool.training import checkpoint, loop, metadata, opening, quantised, result, whole
from hubtool.training.config import Config, to_toml
from hubtool.training.device import place
from hubtool.training.loop import Step
from hubtool.training.methods import Method, method
from hubtool.training.parts.base import Part
from hubtool.training.parts.weights import WeightsPart
from hubtool.training.result import Written
from hubtool.training.session import Session, session

CONFIG = "train.toml"


@dataclass(frozen=True, slots=True)
class Trained:
    """``leads``: false in the further processes of a team, which write nothing. ``written``: the files; ``steps``: those done in this run, after ``resumed`` earlier ones; ``parameters``: trained numbers."""

    config: Config
    written: Written
    steps: tuple[Step, ...]
    resumed: int
    parameters: int
    seconds: float
    peak_memory: int | None
    leads: bool = True

    def to_json(self) -> dict[str, Any]:
        last = self.steps[-1] if self.steps else None
        return {
            "method": self.config.method,
            "base": self.config.base,
            "output": str(self.written.main),
            "files": [str(path) for path in self.written.files],
            "steps": self.config.run.steps,
            "resumed_from": self.resumed,
            "loss": None if last is None else last.loss,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 3),
            "peak_memory": self.peak_memory,
            "config": self.config.to_json(),
        }


def _silent(step: Step) -> None:
    """Nobody watches."""


def _nothing() -> None:
    """Nobody counts class images."""


def train(
    config: Config, pipe: Any = None, *, resume: bool = False, force: bool = False,
    watch: Callable[[Step], None] = _silent, made: Callable[[], None] = _nothing,
) -> Trained:  # fmt: skip
    """Train as ``config`` says, on ``pipe`` or the base it names; write the result, its configuration, log, checkpoints and pictures.

    ``resume``: go on from the newest checkpoint in the output folder, if there is one. ``force``: replace a result that is there.
    ``watch`` sees every step, ``made`` is called for every class image that had to be made. The pipeline's weights are unchanged
    afterwards. Raises ``WouldOverwrite``, ``BadValues`` for a loss that is no finite number (the last good checkpoint stays),
    ``LoadMismatch`` for a base of another family, ``MissingExtra``, ``UsageProblem``.
    """
    opening.need_packages()
    chosen = method(config.method)
    chosen.check(config)
    whole.check(config, chosen.full)
    quantised.check(config)
    folder = Path(config.output.folder)
    _check_free(config, chosen, resume, force)
    if pipe is None:
        pipe = opening.opened(config.base, chosen.families, chosen.name, place(config.run).dtype, config.config_from)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(to_toml(config), encoding="utf-8")
    started = datetime.now(UTC)
    _forget_peaks()
    with session(pipe, config, chosen, made) as made_session:
        result.check(joined(pipe, made_session.parts), config.output)
        steps = loop.run(made_session, watch, resume=resume)
        return _finished(made_session, steps, started, force or resume)


def _finished(session: Session, steps: list[Step], started: datetime, force: bool) -> Trained:
    config, finished = session.config, datetime.now(UTC)
    with session.average.applied():
        adapter = joined(session.pipe, session.parts)
    kind = _kind(config, adapter)
    facts = metadata.Facts(str(adapter.family), kind, session.goal.name, config.run.steps, started, finished)
    notes = metadata.make(config, session.own, session.prior, facts)
    leads = session.team.leads
    written = _write(session, adapter, notes, force) if leads else _named(session, adapter)
    count = sum(parameter.numel() for parameter in session.parameters.values())
    resumed = config.run.steps - len(steps)
    seconds = (finished - started).total_seconds()
    return Trained(config, written, tuple(steps), resumed, count, seconds, _peak(session), leads)


def _kind(config: Config, adapter: Adapter) -> str:
    if config.adapter.full:
        return "lora" if config.output.form == "extract" else ""
    return "lora" if adapter.patches else "textual-inversion"


def _write(session: Session, adapter: Adapter, notes: dict[str, str], force: bool) -> Written:
    (part,) = session.parts[:1]
    if not isinstance(part, WeightsPart):
        return result.write(adapter, session.config.output, notes, force=force)
    with session.average.applied():
        return whole.write(session.pipe, part, session.config, notes, force=force)


def _named(session: Session, adapter: Adapter) -> Written:
    """The files that the first process of a team writes."""
    output = session.config.output
    return Written(whole.planned(output)) if session.config.adapter.full else result.named(adapter, output)


def joined(pipe: Any, parts: list[Part]) -> Adapter:
    """What all parts hold, as one adapter."""
    found = [part.adapter() for part in parts]
    patches = {key: patch for one in found for key, patch in one.patches.items()}
    return Adapter(family_of(pipe), patches, tuple(one for each in found for one in each.embeddings))


def _check_free(config: Config, chosen: Method, resume: bool, force: bool) -> None:
    """Raise ``WouldOverwrite`` when a result, or a run that could be resumed, is in the output folder."""
    if resume or force:
        if force and not resume:
            _forget(config)
        return
    tokens = config.tokens.names if "tokens" in chosen.trains else ()
    planned = result.planned(config.output, tokens, only_tokens=set(chosen.trains) == {"tokens"})
    for path in [whole.planned(config.output)] if config.adapter.full else planned:
        if path.exists():
            raise WouldOverwrite("there is a result already", path=path, hint="--force replaces it")
    kept = checkpoint.newest(config)
    if kept is not None:
        raise WouldOverwrite("a run was interrupted here", path=kept, hint="--resume goes on, --force starts again")


def _forget(config: Config) -> None:
    import shutil

    shutil.rmtree(Path(config.output.folder) / checkpoint.FOLDER, ignore_errors=True)
    (Path(config.output.folder) / loop.LOG).unlink(missing_ok=True)


def _forget_peaks() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak(session: Session) -> int | None:
    """Most bytes the run had on a CUDA device."""
    import torch

    device = session.place.device
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
