"""Pictures out of a pipeline: deterministic by seed, in batches, with the scheduler that was asked for."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from hubtool.errors import BadValues, Unsupported, UsageProblem
from hubtool.pipelines.outside import quiet
from hubtool.pipelines.token_tables import prompts

# what people call them -> class of diffusers and what differs from its defaults
SCHEDULERS: MappingProxyType[str, tuple[str, dict[str, Any]]] = MappingProxyType({
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2m-sde-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
})  # fmt: skip
_T5 = ("text_encoder_3", "tokenizer_3")  # SD 3 works without
_MOST_SEED = 1 << 63
# what a picture is asked for by -> the argument of the pipeline's call
_ARGUMENTS = {"negative": "negative_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale",
              "width": "width", "height": "height", "true_cfg": "true_cfg_scale"}  # fmt: skip

Watch = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Request:
    """``seeds``: one picture each. ``width``, ``height``: pixels. None: what the pipeline does by itself. ``batch``: pictures at a time.

    ``true_cfg``: classifier-free guidance of pipelines whose ``guidance`` is distilled (Flux, Qwen-Image).
    """

    prompt: str
    negative: str | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    batch: int = 1

    def check(self) -> None:
        """Raise ``UsageProblem`` for what no pipeline can do."""
        if not self.seeds or any(not 0 <= seed < _MOST_SEED for seed in self.seeds):
            raise UsageProblem("a seed is a whole number from 0 to 2^63 - 1, and there must be one")
        sides = [side for side in (self.width, self.height) if side is not None]
        if any(side < 8 or side % 8 for side in sides):
            raise UsageProblem(f"{' x '.join(map(str, sides))} pixels: both sides must be multiples of 8")
        if self.batch < 1 or (self.steps is not None and self.steps < 1):
            raise UsageProblem("steps and batch are at least 1")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise UsageProblem(f"no scheduler is called {self.scheduler!r}", hint=f"one of {', '.join(SCHEDULERS)}")


def _ignore() -> None:
    """Nobody watches."""


def pictures(
    pipe: Any, request: Request, watch: Watch = _ignore, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[tuple[int, Any]]:
    """Yield (seed, PIL picture) for every seed; ``watch`` is called after every denoising step.

    ``around``: entered once the scheduler is in its place, for what follows that (strengths by step).

    Noise is drawn on the CPU, from a generator of its own for every picture: the seed means the same on every device and in every batch.
    Raises ``UsageProblem`` for what this pipeline does not take, ``Unsupported`` for one that makes no pictures.
    """
    request.check()
    check_whole(pipe)
    with _scheduler(pipe, request.scheduler), _quiet(pipe), around():
        for start in range(0, len(request.seeds), request.batch):
            seeds = request.seeds[start : start + request.batch]
            yield from zip(seeds, _batch(pipe, request, seeds, watch), strict=True)


def check_whole(pipe: Any) -> None:
    """Raise ``Unsupported`` for a pipeline that lacks a part, or that asks for more than a prompt."""
    name = type(pipe).__name__
    if "mask_image" in _taken(pipe):
        raise Unsupported(
            f"a {name} fills a picture in: it needs one and a mask", hint="choose a base that is not for inpainting"
        )
    usual = inspect.signature(type(pipe).__init__).parameters.values()
    wanted = {one.name for one in usual if one.default is one.empty} & {*pipe.components}
    spare = {*getattr(pipe, "_optional_components", ()), *(_T5 if name.startswith("StableDiffusion3") else ())}
    absent = sorted(part for part in wanted - spare if getattr(pipe, part, None) is None)
    if absent:
        raise Unsupported(
            f"this {name} makes no pictures: it has no {', '.join(absent)}", hint="name a base that is whole"
        )


def _batch(pipe: Any, request: Request, seeds: Sequence[int], watch: Watch) -> list[Any]:
    import torch

    given = arguments(pipe, request, len(seeds))
    given["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if "callback_on_step_end" in _taken(pipe):
        given["callback_on_step_end"] = _callback(watch)
    with quiet(), _finite():
        made = pipe(**given)
    images = getattr(made, "images", None)
    if not isinstance(images, list) or len(images) != len(seeds):
        raise Unsupported(f"a {type(pipe).__name__} makes no pictures")
    return images


@contextmanager
def _finite() -> Iterator[None]:
    """A picture of NaN would be black, and numpy's warning the only trace of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            yield
        except RuntimeWarning:
            hint = "fp16 overflows in some models: --dtype bf16 or fp32"
            raise BadValues("the picture came out as NaN", hint=hint) from None


def arguments(pipe: Any, request: Request, count: int) -> dict[str, Any]:
    """What to call ``pipe`` with, for ``count`` pictures. Raises ``UsageProblem`` for what it does not take."""
    taken = _taken(pipe)
    asked = {name: value for name in _ARGUMENTS if (value := getattr(request, name)) is not None}
    refused = [name for name in asked if _ARGUMENTS[name] not in taken]
    if "prompt" not in taken:
        raise Unsupported(f"a {type(pipe).__name__} takes no prompt")
    if refused:
        raise UsageProblem(f"a {type(pipe).__name__} takes no {', '.join(refused)}")
    texts = prompts(pipe, request.prompt)
    texts |= prompts(pipe, asked.pop("negative"), _ARGUMENTS["negative"]) if "negative" in asked else {}
    return {
        **{name: [text] * count for name, text in texts.items()},
        **{_ARGUMENTS[name]: value for name, value in asked.items()},
    }


def settled(pipe: Any, request: Request) -> Request:
    """``request`` with the pipeline's own defaults of steps and guidance, where it has numbers for them."""
    usual = inspect.signature(type(pipe).__call__).parameters
    found = {name: usual[_ARGUMENTS[name]].default for name in ("steps", "guidance") if _ARGUMENTS[name] in usual}
    fill: dict[str, Any] = {
        n: v for n, v in found.items() if getattr(request, n) is None and isinstance(v, int | float)
    }
    return replace(request, **fill)


def scheduler_class(pipe: Any, request: Request) -> str:
    """Class of the scheduler that will run, without the word itself."""
    name = SCHEDULERS[request.scheduler][0] if request.scheduler else type(pipe.scheduler).__name__
    return name.removesuffix("Scheduler")


def _taken(pipe: Any) -> set[str]:
    return set(inspect.signature(type(pipe).__call__).parameters)


def _callback(watch: Watch) -> Callable[..., dict[str, Any]]:
    def told(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        watch()
        return tensors

    return told


@contextmanager
def _scheduler(pipe: Any, name: str | None) -> Iterator[None]:
    """The pipeline with another scheduler, which gives way to its own at the end."""
    if name is None:
        yield
        return
    import diffusers

    cls, config = SCHEDULERS[name]
    if not _fits(pipe, cls):
        own = [known for known, (one, _) in SCHEDULERS.items() if _fits(pipe, one)]
        raise UsageProblem(f"{name} does not fit a {type(pipe).__name__}", hint=f"one of {', '.join(own)}")
    before = pipe.scheduler
    pipe.scheduler = getattr(diffusers, cls).from_config(before.config, **config)
    try:
        yield
    finally:
        pipe.scheduler = before


def _fits(pipe: Any, cls: str) -> bool:
    """Whether the scheduler's class names ``cls`` among the compatible ones. LCM's, which no list has, takes what DDIM takes."""
    own = type(pipe.scheduler)
    stand_in = "DDIMScheduler" if cls == "LCMScheduler" else cls
    return own.__name__ in (cls, stand_in) or stand_in in own._compatibles


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
