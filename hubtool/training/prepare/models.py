"""Captions and masks from models that the user has as local folders. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileMissing
from hubtool.pipelines import live

_LONGEST = 75  # tokens, as CLIP reads


class Captioner:
    """Any image-to-text model of transformers: BLIP, GIT, Florence ..."""

    def __init__(self, folder: Path) -> None:
        self.model, self.processor = _opened(folder, "AutoModelForImageTextToText")

    def __call__(self, picture: Any) -> str:
        import torch

        with torch.no_grad(), live.aside():
            inputs = self.processor(images=picture, return_tensors="pt")
            ids = self.model.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
        return str(self.processor.batch_decode(ids, skip_special_tokens=True)[0]).strip()


class Masker:
    """CLIPSeg (arXiv 2112.10003): a mask of what ``text`` names."""

    def __init__(self, folder: Path, text: str) -> None:
        self.model, self.processor = _opened(folder, "CLIPSegForImageSegmentation")
        self.text = text or "the main subject"

    def __call__(self, picture: Any) -> Any:
        """A grey picture of the size of ``picture``."""
        import torch
        from PIL import Image

        with torch.no_grad(), live.aside():
            inputs = self.processor(text=[self.text], images=[picture], return_tensors="pt", padding=True)
            shares = self.model(**inputs).logits.sigmoid()
        values = shares.reshape(shares.shape[-2:])
        values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-6)
        small = Image.fromarray((values * 255).round().byte().numpy())
        return small.resize(picture.size, Image.Resampling.BILINEAR)


def _opened(folder: Path, name: str) -> tuple[Any, Any]:
    """Model and processor. Raises ``FileMissing``, ``CorruptFile``."""
    import transformers

    if not folder.is_dir():
        raise FileMissing("there is no model in this folder", path=folder)
    try:
        with live.aside():
            model = getattr(transformers, name).from_pretrained(folder, local_files_only=True).eval()
            return model, transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CorruptFile(f"transformers cannot open this model: {error}", path=folder) from error
