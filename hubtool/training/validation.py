"""Pictures on the way: the same prompts and seeds at every call, so that only the training differs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.pipelines.token_tables import prompts
from hubtool.training.data import captions, images
from hubtool.training.latents import hole
from hubtool.training.prior import quiet

if TYPE_CHECKING:
    from hubtool.training.session import Session

FOLDER = "samples"


def pictures(session: Session, step: int) -> list[Path]:
    """Make and save the validation pictures of ``step``; their paths. No random number of the training is used."""
    import torch

    settings, config = session.config.validation, session.config
    folder = Path(config.output.folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for at, text in enumerate(settings.prompts):
        prompt = captions.filled(text, "", config.tokens.names)
        for turn in range(settings.images):
            path = folder / f"step-{step:08}-{at:02}-{turn:02}.png"
            idle = (session.pipe.vae, *session.texts.encoders)
            with torch.no_grad(), torch.random.fork_rng(), session.place.precise(), session.place.lent(*idle):
                _picture(session, prompt, settings.seed + turn).save(path, pnginfo=_note(prompt, step))
            made.append(path)
    return made


def _picture(session: Session, prompt: str, seed: int) -> Any:
    import torch

    settings = session.config.validation
    size = settings.size or session.config.data.resolution
    asked: dict[str, Any] = {
        **prompts(session.pipe, prompt), "num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "height": size, "width": size,
        "generator": torch.Generator().manual_seed(seed),
    }  # fmt: skip
    if session.base.denoiser == "unet":
        asked["negative_prompt"] = settings.negative
    if session.base.inpainting:
        asked |= _scene(session, size, seed)
    with quiet(session.pipe):
        return session.pipe(**asked).images[0]


def _scene(session: Session, size: int, seed: int) -> dict[str, Any]:
    """For inpainting: the first image to learn, and a hole in it."""
    from PIL import Image

    picture = images.opened(session.own.items[0].path).resize((size, size))
    mask = (hole(size, size, "validation", seed)[0, 0] * 255).byte().numpy()
    return {"image": picture, "mask_image": Image.fromarray(mask)}


def _note(prompt: str, step: int) -> Any:
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_itxt("parameters", f"{prompt}\nSteps trained: {step}")
    return note
