"""Aesthetic gradients (Gallego 2022, arXiv 2209.12330): the text encoder learns a few steps towards an image embedding, for every prompt.

    steps times:  weights <- Adam(rate) on -cos(projection(pooled(prompt)), embedding)        prompt embedding <- tuned encoder's

Then the encoder has its own weights again, and z = (1 - strength) z_plain + strength z_tuned, or their slerp (A1111's port). Negative and
empty prompts are left alone, as in the reference. Each prompt is tuned for by itself: a batch gives what its prompts give alone.
Several nest: the one loaded last tunes first, the one before it from the weights that result, each with its own strength.
Facts: spec/artefacts.md D; vicgalle/stable-diffusion-aesthetic-gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, LoadMismatch, ShapeMismatch, Unsupported, UsageProblem
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.layouts.unwrap import unwrapped
from hubtool.pipelines.families import family_of
from hubtool.pipelines.kinds import Ask, Content, Strengths, _calls, setting
from hubtool.tensors.expr import Read
from hubtool.types import Finding

STRENGTH = True
# ``projection``: a file with CLIP's ``text_projection.weight``, for pipelines whose text encoder lacks it; unless set, what lies beside
SETTINGS: Mapping[str, Any] = MappingProxyType({"steps": 5, "rate": 1e-4, "slerp": False, "projection": None})
_METHOD = "encode_prompt"
_FAMILIES = ("sd1", "sd2")  # one CLIP encoder whose hidden states are the prompt
_KEYS = ("text_projection.weight", "text_projection")
_BESIDE = ("text_projection.safetensors", "text_projection.pt", "text_projection.bin")


def read(file: TensorFile, identity: Identity, ask: Ask) -> Content:
    """The vector and the settings. Raises ``BadValues``, ``Unsupported`` for a projection's file without one."""
    [ref] = unwrapped(file)[0].values()
    steps, rate = setting(ask, SETTINGS, "steps"), setting(ask, SETTINGS, "rate")
    if steps < 1 or not 0 < rate < float("inf"):
        raise BadValues(f"{steps} steps at rate {rate}: both must be above 0")
    where = ask.settings["projection"] if "projection" in ask.settings else projection_beside(file.path)
    projection = None if where is None else _projection(Path(where))
    vector = _finite(Read(ref), "the embedding").flatten()
    effect = Effect(vector, steps, float(rate), setting(ask, SETTINGS, "slerp"), projection)
    return Content(Adapter(identity.family, {}, findings=identity.findings), identity.kind, effect, token=ask.token)


def projection_beside(path: Path) -> Path | None:
    """The file with a text projection that lies beside an embedding, where there is one."""
    return next((file for name in _BESIDE if (file := path.with_name(name)).is_file()), None)


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """``vector``: (width,) fp32, as in the file. ``projection``: (width, hidden) fp32, where a file brought it."""

    vector: Any
    steps: int
    rate: float
    slerp: bool
    projection: Any
    components = ("text_encoder",)

    def check(self, pipe: Any, strength: float) -> None:
        """Raises ``LoadMismatch`` for a pipeline without such an encoder, ``Unsupported`` without a text projection, ``ShapeMismatch``."""
        family, encoder = family_of(pipe), getattr(pipe, "text_encoder", None)
        if family not in _FAMILIES or encoder is None or not hasattr(pipe, _METHOD):
            raise LoadMismatch(
                f"aesthetic gradients steer a Stable Diffusion 1 or 2 text encoder, not a {type(pipe).__name__}"
            )
        if not bool(self.vector.any()):
            raise BadValues("the embedding is zero: it has no direction")
        matrix, hidden = self._matrix(encoder), encoder.get_input_embeddings().embedding_dim
        if tuple(matrix.shape) != (len(self.vector), hidden):
            said = f"projects {matrix.shape[-1]} numbers to {len(matrix)}"
            raise ShapeMismatch(
                f"the embedding is {len(self.vector)} wide, the encoder {hidden}; the text projection {said}"
            )
        if any(one.is_meta for one in encoder.parameters()) or hasattr(encoder, "_hf_hook"):
            raise Unsupported(
                "the text encoder is offloaded, and cannot be tuned", hint="load the pipeline onto one device"
            )

    def attach(self, pipe: Any, name: str, strength: float) -> Mapping[str, tuple[str, ...]]:
        def around(pipe: Any, inner: Any, args: Any, kwargs: Any) -> Any:
            return self._encoded(pipe, strength, inner, args, kwargs)

        _calls.wrap(pipe, name, _METHOD, around)
        return {}

    def detach(self, pipe: Any, name: str) -> None:
        _calls.unwrap(pipe, name)

    def findings(self, pipe: Any) -> Iterator[Finding]:
        said = f"the text encoder learns {self.steps} steps at rate {self.rate:g} for every prompt, and has its own bits after it"
        yield Finding("aesthetic-gradient", "info", said)

    def slots(self, pipe: Any, name: str, strengths: Strengths) -> Iterator[Any]:
        raise UsageProblem(f"{name} acts on the prompt, before the first step: its strength cannot change by step")

    def _matrix(self, encoder: Any) -> Any:
        """The projection of the pooled prompt into the space it shares with images, (width, hidden)."""
        own = getattr(encoder, "text_projection", None)
        found = self.projection if self.projection is not None else getattr(own, "weight", own)
        if found is None:
            hint = "settings={'projection': 'clip-vit-large-patch14/model.safetensors'}, or text_projection.safetensors beside the file"
            raise Unsupported(
                "this text encoder has no text_projection (Stable Diffusion leaves it out), and the cosine to an image is taken behind it",
                hint=hint,
            )
        return found.detach()

    def _encoded(self, pipe: Any, strength: float, inner: Any, args: Any, kwargs: Any) -> Any:
        """What ``encode_prompt`` returns, (prompt, negative prompt), with the prompt's half steered."""
        import torch

        bound = inspect.signature(getattr(type(pipe), _METHOD)).bind(pipe, *args, **kwargs).arguments
        bound = {**{n: v for n, v in bound.items() if n not in ("self", "kwargs")}, **bound.get("kwargs", {})}
        plain, *others = inner(**bound)
        prompt = bound.get("prompt")
        if prompt is None:
            raise UsageProblem("aesthetic gradients need the prompt's words: these embeddings are encoded already")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        steered = {text: self._steered(pipe, strength, inner, bound, text) for text in dict.fromkeys(prompts) if text}
        rows = [steered.get(text, plain[i : i + 1]) for i, text in _spread(prompts, len(plain))]
        return (torch.cat([row.to(plain) for row in rows]), *others)

    def _steered(self, pipe: Any, strength: float, inner: Any, bound: Mapping[str, Any], text: str) -> Any:
        """The embedding (1, tokens, hidden) of one prompt."""
        import torch

        alone = {**bound, "prompt": [text], "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        alone["negative_prompt"] = None
        plain = inner(**alone)[0]
        with self._tuned(pipe, text), torch.no_grad():
            tuned = inner(**alone)[0]
        return (_slerp if self.slerp else _lerp)(plain.float(), tuned.float(), strength)

    @contextmanager
    def _tuned(self, pipe: Any, text: str) -> Iterator[None]:
        """The text encoder with tuned weights. Its own tensors are set aside and never written to, so they come back bit for bit."""
        import torch

        own = [(one, one.data, one.requires_grad, one.grad) for one in _learning(pipe.text_encoder)]
        try:
            with torch.inference_mode(False), torch.enable_grad():
                for one, data, _, _ in own:
                    one.data, one.grad = data.float().clone(), None
                    one.requires_grad_(True)
                self._learn(pipe, [one for one, *_ in own], _ids(pipe, text))
            yield
        finally:
            for one, data, flag, gradient in own:
                one.grad, one.data = None, data
                one.requires_grad_(flag)
                one.grad = gradient

    def _learn(self, pipe: Any, parameters: list[Any], ids: Any) -> None:
        import torch

        matrix = self._matrix(pipe.text_encoder).to(ids.device, torch.float32).clone()
        aim = torch.nn.functional.normalize(self.vector.to(ids.device), dim=0)
        adam = torch.optim.Adam(parameters, lr=self.rate)
        for _ in range(self.steps):
            pooled = _pooled(pipe.text_encoder, ids).float() @ matrix.T
            gradients = torch.autograd.grad(-torch.nn.functional.normalize(pooled) @ aim, parameters, allow_unused=True)
            for one, gradient in zip(parameters, gradients, strict=True):
                one.grad = gradient
            adam.step()
        adam.zero_grad()


def _spread(prompts: list[str], count: int) -> list[tuple[int, str]]:
    """(row, prompt) of the result: each prompt's pictures lie together."""
    each = count // len(prompts)
    return [(i, prompts[i // each]) for i in range(count)]


def _learning(encoder: Any) -> list[Any]:
    """The text model's own weights: adapters' factors and the projection stay as they are."""
    named = dict(encoder.named_parameters()).items()
    return [one for name, one in named if "lora_" not in name and not name.startswith("text_projection")]


def _pooled(encoder: Any, ids: Any) -> Any:
    """(1, hidden): the last hidden state where the prompt ends, as the encoder itself pools it."""
    return getattr(encoder, "text_model", encoder)(input_ids=ids).pooler_output


def _ids(pipe: Any, text: str) -> Any:
    """The prompt as the pipeline pads it; tokens of several vectors written out."""
    tokenizer = pipe.tokenizer
    words = pipe.maybe_convert_prompt(text, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else text
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(words, return_tensors="pt", **options).input_ids.to(pipe.text_encoder.device)


def _lerp(one: Any, other: Any, share: float) -> Any:
    return one + share * (other - one) if share != 1 else other


def _slerp(one: Any, other: Any, share: float) -> Any:
    """Along the arc between the two vectors of every token; along the chord where there is no arc to speak of."""
    import torch

    directions = [torch.nn.functional.normalize(value, dim=-1) for value in (one, other)]
    angle = (directions[0] * directions[1]).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (((1 - share) * angle).sin() * one + (share * angle).sin() * other) / sine
    return torch.where(sine > 1e-6, arc, _lerp(one, other, share))


def _projection(path: Path) -> Any:
    """The text projection of a CLIP model, (width, hidden). CLIP's own files keep it transposed, without ``.weight``."""
    tensors = unwrapped(open_file(path))[0]
    key = next((name for name in tensors if name.endswith(_KEYS)), None)
    if key is None or len(tensors[key].shape) != 2:
        raise Unsupported(
            "there is no text_projection in this file", path=path, hint="openai/clip-vit-large-patch14 has it"
        )
    matrix = _finite(Read(tensors[key]), key)
    return matrix if key.endswith(".weight") else matrix.T.contiguous()


def _finite(expr: Read, what: str) -> Any:
    from hubtool.tensors.evaluate import compute

    value = compute(expr).float().clone()
    if not bool(value.isfinite().all()):
        raise BadValues(f"{what} holds NaN or infinity")
    return value
