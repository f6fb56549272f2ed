"""Null-text inversion (Mokady et al. 2022, arXiv 2211.09794) in a pipeline: an unconditional embedding of its own for every step.

While it is loaded, a run takes the file's embedding of each step in place of the negative prompt, and begins at the file's latent x_T where
there is one. Nothing is changed between runs. Steps are told by the scheduler's timesteps, so a scheduler may be exchanged.
Facts: spec/artefacts.md F.3.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter
from hubtool.adapters.null_text import NullText, parse
from hubtool.errors import BadValues, ConversionError, LoadMismatch, ShapeMismatch, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.unwrap import unwrapped
from hubtool.pipelines import live
from hubtool.pipelines.kinds import Ask, Content, Strengths, _calls
from hubtool.tensors.expr import Expr, Read
from hubtool.types import Finding

STRENGTH = False
SETTINGS: Mapping[str, Any] = MappingProxyType({})
_METHOD = "__call__"
_MODEL = "unet"
_NEEDED = ("num_inference_steps", "latents", "guidance_scale")  # arguments of a pipeline that samples from a latent
_PROMPT_KEYS = ("prompt", "hubtool.extra.prompt")


def read(file: TensorFile, identity: Identity, ask: Ask) -> Content:
    """The embeddings, and the latent where the file has it. Raises ``BadValues``."""
    found = parse(unwrapped(file)[0])
    if found is None:
        raise ConversionError("these tensors are no null-text inversion", path=file.path)
    latent = None if found.latent is None else _start(_finite(Read(found.others[found.latent]), found.latent))
    effect = Effect(_finite(found.steps, "an embedding"), latent, _prompt(file, found))
    return Content(Adapter(identity.family, {}), identity.kind, effect, token=ask.token)


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """``steps``: (T, 77, width), the first for the noisiest step. ``latent``: (1, 4, h, w). ``prompt``: what the file says it was made with."""

    steps: Any
    latent: Any
    prompt: str | None
    components = (_MODEL,)

    def check(self, pipe: Any, strength: float) -> None:
        """Raises ``UsageProblem`` for a strength or a second inversion, ``LoadMismatch`` for another pipeline, ``ShapeMismatch``."""
        model = live.modules(pipe).get(_MODEL)
        if strength != 1.0:
            raise UsageProblem("null-text embeddings have no strength: they give back one picture, or do not")
        if model is None or not {*_NEEDED} <= {*inspect.signature(type(pipe).__call__).parameters}:
            raise LoadMismatch(f"a {type(pipe).__name__} does not sample with a U-Net from a latent")
        if self.steps.shape[-1] != model.config.cross_attention_dim:
            said = f"the U-Net reads {model.config.cross_attention_dim}"
            raise ShapeMismatch(f"the embeddings are {self.steps.shape[-1]} wide, {said}")
        if self.latent is not None and self.latent.shape[1] != model.config.in_channels:
            raise ShapeMismatch(f"the latent has {self.latent.shape[1]} channels, the U-Net {model.config.in_channels}")
        if _calls.wrapped(pipe, _METHOD):
            raise UsageProblem(
                "another null-text inversion is loaded, and a run has one start", hint="hubtool.unload it first"
            )

    def attach(self, pipe: Any, name: str, strength: float) -> Mapping[str, tuple[str, ...]]:
        _calls.wrap(pipe, name, _METHOD, self._run)
        return {}

    def detach(self, pipe: Any, name: str) -> None:
        _calls.unwrap(pipe, name)

    def findings(self, pipe: Any) -> Iterator[Finding]:
        count, made = len(self.steps), f" with {self.prompt!r}" if self.prompt else ""
        said = (
            f"{count} embeddings take the negative prompt's place: run {count} steps, at the guidance of the inversion"
        )
        yield Finding(
            "null-text", "info", f"{said}; the prompt it was made{made} gives the picture back, another edits it"
        )
        if self.latent is None:
            yield Finding(
                "null-text-latent", "warning", "the start latent x_T is not in this file: pass it as latents="
            )
        if not type(pipe.scheduler).__name__.startswith("DDIM"):
            told = f"inversions are made with DDIM, this pipeline has a {type(pipe.scheduler).__name__}"
            yield Finding("null-text-scheduler", "warning", told)

    def slots(self, pipe: Any, name: str, strengths: Strengths) -> Iterator[Any]:
        raise UsageProblem(f"{name} has no strength that could change")

    def _run(self, pipe: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        signature = inspect.signature(type(pipe).__call__)
        given = signature.bind(pipe, *args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        self._check_run(asked)
        latents = asked["latents"] if self.latent is None or asked["latents"] is not None else self._begin(pipe, asked)
        given = signature.bind(pipe, *args, **kwargs)
        given.arguments["latents"] = latents
        with self._feeding(pipe):
            return inner(*given.args[1:], **given.kwargs)

    def _check_run(self, asked: Mapping[str, Any]) -> None:
        """Raises ``UsageProblem`` for a run that the embeddings are not for."""
        count, steps = len(self.steps), asked["num_inference_steps"]
        if steps != count or any(asked.get(name) is not None for name in ("timesteps", "sigmas")):
            hint = f"num_inference_steps={count} (--steps {count})"
            raise UsageProblem(f"the inversion has embeddings for {count} steps, this run has {steps}", hint=hint)
        if asked["guidance_scale"] <= 1:
            raise UsageProblem("without guidance nothing unconditional is computed", hint="guidance_scale=7.5 is usual")
        negative = asked.get("negative_prompt") or ()
        if asked.get("negative_prompt_embeds") is not None or any(
            [negative] if isinstance(negative, str) else negative
        ):
            raise UsageProblem("null-text embeddings stand in the place of the negative prompt: leave it out")

    def _begin(self, pipe: Any, asked: Mapping[str, Any]) -> Any:
        """The file's latent for every picture of the run."""
        scale = pipe.vae_scale_factor
        size = tuple(side * scale for side in self.latent.shape[-2:])
        wanted = tuple(asked.get(name) or own for name, own in zip(("height", "width"), size, strict=True))
        if wanted != size:
            raise UsageProblem(f"the inverted picture is {size[1]} x {size[0]} pixels, not {wanted[1]} x {wanted[0]}")
        prompt = asked.get("prompt")
        count = len(asked["prompt_embeds"]) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)
        return self.latent.to(pipe.unet.dtype).expand(count * (asked.get("num_images_per_prompt") or 1), -1, -1, -1)

    @contextmanager
    def _feeding(self, pipe: Any) -> Iterator[None]:
        """The U-Net gets the step's embedding for the unconditional half of its batch."""

        def feed(model: Any, args: Any, kwargs: Any) -> Any:
            timestep = args[1] if len(args) > 1 else kwargs["timestep"]
            context = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
            fed = self._fed(pipe.scheduler.timesteps, timestep, context)
            return (
                ((*args[:2], fed, *args[3:]), kwargs)
                if len(args) > 2
                else (args, {**kwargs, "encoder_hidden_states": fed})
            )

        handle = pipe.unet.register_forward_pre_hook(feed, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _fed(self, timesteps: Any, timestep: Any, context: Any) -> Any:
        import torch

        found = (timesteps.to(context.device) == torch.as_tensor(timestep, device=context.device)).nonzero()
        if len(timesteps) != len(self.steps) or len(found) != 1:
            said = f"the inversion has embeddings for {len(self.steps)} steps, this scheduler works in {len(timesteps)}"
            raise UsageProblem(said, hint="DDIM works in as many as it is asked for")
        half, own = len(context) // 2, self.steps[int(found)]
        if len(context) % 2 or context.shape[1:] != own.shape:
            raise UsageProblem(f"the U-Net reads {tuple(context.shape)}, not halves of {tuple(own.shape)}")
        return torch.cat([own.to(context).expand(half, -1, -1), context[half:]])


def _start(latent: Any) -> Any:
    """(1, channels, h, w), also where a trajectory was kept without that dimension."""
    latent = latent[None] if latent.ndim == 3 else latent
    if latent.ndim != 4 or len(latent) != 1:
        raise ShapeMismatch(f"the start latent has shape {tuple(latent.shape)}; (1, 4, height / 8, width / 8) expected")
    return latent


def _prompt(file: TensorFile, found: NullText) -> str | None:
    """What the file says the picture shows; JSON in hubtool's safetensors form."""
    if isinstance(file.structure, Mapping):
        said = file.structure.get("prompt")
        return said if isinstance(said, str) else None
    text = next((file.metadata[key] for key in _PROMPT_KEYS if key in file.metadata), None)
    try:
        said = json.loads(text or "null")
    except (ValueError, RecursionError):
        said = text
    return said if isinstance(said, str) else None


def _finite(expr: Expr, what: str) -> Any:
    from hubtool.tensors.evaluate import compute

    value = compute(expr).float().clone()
    if not bool(value.isfinite().all()):
        raise BadValues(f"{what} holds NaN or infinity")
    return value
