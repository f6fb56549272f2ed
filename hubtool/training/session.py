"""Everything a run needs, put together: pipeline, parts, data, objective, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hubtool.errors import Unsupported, UsageProblem
from hubtool.pipelines import live
from hubtool.pipelines.families import family_of
from hubtool.training import bases, objectives, optimiser, prior
from hubtool.training.average import Average
from hubtool.training.bases import Base
from hubtool.training.config import Config
from hubtool.training.data.batches import Batches
from hubtool.training.data.items import collect
from hubtool.training.device import Place, moved, place
from hubtool.training.latents import Latents
from hubtool.training.methods import Method
from hubtool.training.objectives import Goal
from hubtool.training.parts.base import Group, Part
from hubtool.training.parts.low_rank import trained_encoders
from hubtool.training.parts.tokens import learners
from hubtool.training.quantised import quantised
from hubtool.training.team import Team, team
from hubtool.training.texts import Texts


@dataclass(slots=True)
class Session:
    """``own`` and ``prior`` deal out the images to learn and those of the class (None without prior preservation).

    ``encoders``: the text encoders that gradients go through.
    """

    config: Config
    method: Method
    pipe: Any
    base: Base
    encoders: list[Any]
    place: Place
    team: Team
    parts: list[Part]
    groups: list[Group]
    parameters: dict[str, Any]
    optimiser: Any
    scaler: Any
    average: Average
    goal: Goal
    own: Batches
    prior: Batches | None
    texts: Texts
    latents: Latents

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.base.denoiser)


@contextmanager
def session(pipe: Any, config: Config, method: Method, made: Callable[[], None]) -> Iterator[Session]:
    """Put a run together; afterwards the pipeline holds what it held before.

    ``made``: called for each class image that had to be made. Raises ``Unsupported`` for a family that the method does not fit, and
    what reading the data raises.
    """
    import torch

    base, crew = _base(pipe, config, method), team(config.run.accumulate)
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng())
        where = place(config.run)
        _settle(pipe, where)
        own = _own(config, method)
        with crew.leader_first():
            others = prior.items(pipe, config, made)
        undo.callback(_restore, _modes(pipe))
        _freeze(pipe)
        undo.enter_context(quantised(getattr(pipe, base.denoiser), config, where))
        parts: list[Part] = []
        undo.callback(_remove, parts)
        for part in method.parts:
            parts.append(part(base, config))  # noqa: PERF401 - a part that fails leaves those before it to be removed
        groups = [group for part in parts for group in part.groups]
        parameters = {name: value for group in groups for name, value in group.parameters.items()}
        encoders = _encoders(base, config, {group.name for group in groups})
        frozen = not encoders
        for model in _idle(pipe, frozen) if where.offload else ():
            moved(model, "cpu")
        if config.run.checkpointing:
            undo.callback(_keep_activations, _spare_activations([getattr(pipe, base.denoiser), *encoders]))
        yield Session(
            config, method, pipe, base, encoders, where, crew, parts, groups, parameters, optimiser.make(groups, config.optimiser),
            where.scaler(), Average(parameters, config.optimiser.ema), objectives.make(pipe.scheduler, config.objective),
            own, Batches(others, config, (), "class") if others else None, Texts(base, where, frozen=frozen), Latents(base, config, where),
        )  # fmt: skip


def _base(pipe: Any, config: Config, method: Method) -> Base:
    family = family_of(pipe)
    if family not in method.families:
        raise Unsupported(f"{method.name} does not fit {family}", hint=f"families: {', '.join(method.families)}")
    if not config.data.folder:
        raise UsageProblem("no folder of images is named", hint="--set data.folder=DIR")
    return bases.make(pipe, config.objective.guidance, config.objective.clip_skip)


def _own(config: Config, method: Method) -> Batches:
    """The images to learn. A token that no caption holds would learn nothing: that is refused."""
    tokens = config.tokens.names if "tokens" in method.trains else ()
    own = Batches(collect(config.data.folder), config, tokens)
    said = " ".join(sample.caption for number in range(own.per_epoch) for sample in own.batch(number))
    unsaid = [token for token in tokens if token not in said]
    if unsaid:
        hint = (
            "write {token} into the captions, or --set 'data.template=[\"a photo of {token}\"]' data.captions=template"
        )
        raise UsageProblem(f"no caption of the first epoch holds {', '.join(unsaid)}", hint=hint)
    return own


def _settle(pipe: Any, where: Place) -> None:
    """Move everything to the device in the frozen dtype; a VAE overflows in fp16, so it stays in fp32 there."""
    import torch

    for name, model in live.modules(pipe).items():
        precise = name == "vae" and where.dtype == torch.float16
        wanted = torch.float32 if precise else where.dtype
        moved(model, where.device, wanted if (where.mixed or precise) and model.dtype != wanted else None)


def _idle(pipe: Any, frozen: bool) -> list[Any]:
    """The models that are needed only now and then: the VAE, and text encoders that are not trained."""
    encoders = [encoder for encoder, _ in live.encoders(pipe).values()] if frozen else []
    return [pipe.vae, *encoders]


def _freeze(pipe: Any) -> None:
    for model in live.modules(pipe).values():
        model.requires_grad_(False)
        model.eval()


def _modes(pipe: Any) -> list[tuple[Any, bool, list[tuple[Any, bool]]]]:
    """What training changes about the components: their mode and which parameters ask for gradients."""
    return [
        (model, model.training, [(p, p.requires_grad) for p in model.parameters()])
        for model in live.modules(pipe).values()
    ]


def _restore(before: list[tuple[Any, bool, list[tuple[Any, bool]]]]) -> None:
    for model, training, flags in before:
        model.train(training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _remove(parts: list[Part]) -> None:
    while parts:
        parts.pop().remove()


def _encoders(base: Base, config: Config, groups: Collection[str]) -> list[Any]:
    """The text encoders that learn tokens or are trained themselves. An adapter to go on from may be for CLIP without being asked."""
    found = learners(base, config.tokens) if "tokens" in groups else {}
    models = {name: encoder for name, (encoder, _) in found.items()}
    asked = replace(config.adapter, text_encoders=True)
    return list({**models, **(trained_encoders(base, asked) if "text" in groups else {})}.values())


def _spare_activations(models: list[Any]) -> list[Any]:
    """Compute activations again instead of keeping them; the models that do so now."""
    for model in models:
        if hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
        else:
            with live.aside():  # transformers renames this method
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return models


def _keep_activations(models: list[Any]) -> None:
    for model in models:
        if hasattr(model, "disable_gradient_checkpointing"):
            model.disable_gradient_checkpointing()
        else:
            with live.aside():
                model.gradient_checkpointing_disable()
