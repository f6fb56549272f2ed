"""The one loop: batches, loss, gradients, step; checkpoints and pictures on the way; a stop where numbers stop being numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import BadValues
from hubtool.training import checkpoint, loss, optimiser, seeds, validation
from hubtool.training.bases.base import Sizes
from hubtool.training.data.batches import Sample
from hubtool.training.session import Session

LOG = "log.ndjson"


@dataclass(frozen=True, slots=True)
class Step:
    """One update. ``prior``: the class images' part of the loss; ``norm``: of the gradient before clipping; ``rate``: the first group's."""

    step: int
    loss: float
    prior: float | None
    norm: float
    rate: float


Watch = Callable[[Step], None]


def run(session: Session, watch: Watch, *, resume: bool) -> list[Step]:
    """Train to the last step; every step done in this run.

    ``resume``: go on from the newest checkpoint. Raises ``BadValues`` at the first loss or gradient that is no finite number; the
    checkpoints written before it stay.
    """
    start = _resumed(session) if resume else 0
    steps = []
    with _log(session, start) as write:
        for step in range(start, session.config.run.steps):
            done = update(session, step)
            steps.append(done)
            watch(done)
            write(done)
            _keep(session, step + 1)
    return steps


def update(session: Session, step: int) -> Step:
    """One step of the optimiser over ``run.accumulate`` batches."""
    config = session.config
    session.optimiser.zero_grad(set_to_none=True)
    batches = session.team.share(config.run.accumulate)
    found = [_gradients(session, step * config.run.accumulate + at) for at in batches]
    total, prior = _together(session, found)
    share = optimiser.factor(config.optimiser, step, config.run.steps)
    optimiser.set_rates(session.optimiser, session.groups, share, session.method.moving(config, step))
    norm = _clipped(session, step)
    session.scaler.step(session.optimiser)
    session.scaler.update()
    for part in session.parts:
        part.after_step(step)
    session.average.update(step)
    rate = float(session.optimiser.param_groups[0]["lr"])
    return Step(step + 1, total, prior, norm, rate)


def batch_loss(session: Session, number: int) -> tuple[Any, Any | None]:
    """The loss of batch ``number`` as a tensor, and the prior's part of it."""
    own = session.own.batch(number)
    samples = [*own, *(session.prior.alike(own) if session.prior else [])]
    with session.place.precise():
        losses = image_losses(session, samples)
    return loss.with_prior(losses, len(own), session.config.objective.prior_weight)


def image_losses(session: Session, samples: list[Sample]) -> Any:
    """(n,): one loss for each image. Noise and times depend on the sample alone, so batches may be cut as one likes."""
    import torch

    device, config = session.place.device, session.config
    pictures = session.latents.pictures(samples, device)
    noise, uniform, normal = (
        torch.cat(one).to(device) for one in zip(*_drawn(session, samples, pictures.latents.shape[1:]), strict=True)
    )
    task = session.goal.task(pictures.latents, noise, uniform, normal)
    noisy = task.noisy if pictures.more is None else torch.cat([task.noisy, pictures.more], dim=1)
    words = session.texts.words([sample.caption for sample in samples], device)
    sizes = Sizes(
        [sample.item.size for sample in samples], [sample.cut.corner for sample in samples], [sample.cut.bucket for sample in samples]
    )  # fmt: skip
    kind = session.place.dtype
    words = {name: value.to(kind) for name, value in words.items()}
    prediction = session.base.predict(noisy.to(kind), task.times, words, sizes)
    mask = None if pictures.mask is None else loss.mask_for(noise, pictures.mask, config.data.mask_floor)
    return loss.per_image(prediction, task.target, task.weight, mask)


def _drawn(session: Session, samples: list[Sample], shape: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(noise, uniform, normal) of each sample. Class images, which share a sample's index, get numbers of their own."""
    import torch

    offset = session.config.objective.noise_offset
    seen: dict[int, int] = {}
    for sample in samples:
        turn = seen[sample.index] = seen.get(sample.index, -1) + 1
        source = seeds.generator(session.config.run.seed, "noise", sample.index, turn)
        uniform, normal = torch.rand(1, generator=source), torch.randn(1, generator=source)
        noise = torch.randn((1, *shape), generator=source)
        if offset:
            noise = noise + offset * torch.randn((1, shape[0], 1, 1), generator=source)
        yield noise, uniform, normal


def _gradients(session: Session, number: int) -> tuple[float, float | None]:
    import torch

    torch.manual_seed(seeds.number(session.config.run.seed, "dropout", number))
    with _training(session):
        value, prior = batch_loss(session, number)
        told = float(value.detach())
        if not math.isfinite(told):
            raise _stopped(session, f"the loss of batch {number} is {told}")
        session.scaler.scale(value / session.config.run.accumulate).backward()
    return told, None if prior is None else float(prior.detach())


def _together(session: Session, found: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The mean loss and the mean prior over all batches of the update; the gradients are added up on the way."""
    import torch

    session.team.add(p.grad for p in session.parameters.values() if p.grad is not None)
    sums = [sum(value for value, _ in found), sum(value or 0.0 for _, value in found)]
    if session.team.size > 1:
        told = torch.tensor(sums, device=session.place.device)
        session.team.add([told])
        sums = told.tolist()
    count = session.config.run.accumulate
    return sums[0] / count, None if found[0][1] is None else sums[1] / count


@contextmanager
def _training(session: Session) -> Iterator[None]:
    """Dropout and checkpointing act on what is trained, and only inside the block."""
    session.denoiser.train()
    for encoder in session.encoders:
        _awake(encoder)
    try:
        yield
    finally:
        for model in (session.denoiser, *session.encoders):
            model.eval()


def _awake(encoder: Any) -> None:
    """The blocks that compute their activations again, and the trained layers; the dropout that T5 was made with stays off."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for path, module in encoder.named_modules():
        module.training = isinstance(module, GradientCheckpointingLayer) or ".lora_dropout" in path


def _clipped(session: Session, step: int) -> float:
    """The gradient's norm, after which it is at most ``optimiser.clip`` long. fp16 may overflow: its scaler then skips the step."""
    import torch

    session.scaler.unscale_(session.optimiser)
    most = session.config.optimiser.clip or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(list(session.parameters.values()), most))
    if not math.isfinite(norm) and not session.scaler.is_enabled():
        raise _stopped(session, f"the gradient of step {step + 1} is {norm}")
    return norm


def _stopped(session: Session, what: str) -> BadValues:
    kept = checkpoint.newest(session.config)
    left = f"the last good checkpoint is {kept.name}" if kept else "there was no checkpoint yet"
    return BadValues(f"training stopped: {what}; {left}", path=kept, hint="a lower rate, bf16 or fp32 may help")


def _resumed(session: Session) -> int:
    path = checkpoint.newest(session.config)
    if path is None:
        return 0
    step, rest = checkpoint.read(path, session.config, session.parameters, session.optimiser, session.average)
    session.scaler.load_state_dict(rest["scaler"]) if session.scaler.is_enabled() else None
    return step


def _keep(session: Session, step: int) -> None:
    """Checkpoint and pictures, when it is time for them."""
    if not session.team.leads:
        return
    settings, every = session.config.validation, session.config.run.checkpoint_every
    if every and (step % every == 0 or step == session.config.run.steps):
        wrong = [name for name, value in session.parameters.items() if not bool(value.isfinite().all())]
        if wrong:
            raise _stopped(session, f"after step {step}, {wrong[0]} holds NaN or infinity")
        rest = {"scaler": session.scaler.state_dict()}
        checkpoint.write(session.config, step, session.parameters, session.optimiser, session.average, rest)
    if settings.every and settings.prompts and step % settings.every == 0:
        with session.average.applied():
            validation.pictures(session, step)


@contextmanager
def _log(session: Session, start: int) -> Iterator[Watch]:
    """Append steps to ``log.ndjson``; lines of steps that an interruption undid are dropped first."""
    if not session.team.leads:
        yield lambda done: None
        return
    path, every = Path(session.config.output.folder) / LOG, session.config.run.log_every
    kept = [row for row in _lines(path) if row["step"] <= start]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        origin = time.monotonic()

        def write(done: Step) -> None:
            if done.step % every == 0:
                file.write(json.dumps({**asdict(done), "seconds": round(time.monotonic() - origin, 3)}) + "\n")
                file.flush()

        yield write


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the line that a kill cut short
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
