"""Which family a live pipeline belongs to."""

from __future__ import annotations

from typing import Any

# longest matching prefix of the pipeline's class name -> family
_FAMILIES = {
    "StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "StableDiffusion": "sd1", "LatentConsistency": "sd1", "Kolors": "kolors",
    "StableCascade": "cascade", "Flux": "flux1", "Flux2": "flux2", "Flux3": "flux3", "Chroma": "chroma", "BriaFibo": "bria-fibo",
    "BriaFibo2": "bria-fibo2", "QwenImage": "qwen-image", "QwenImage21": "qwen-image-2.1", "ZImage": "z-image", "Lumina2": "lumina2",
    "Krea2": "krea2", "Ideogram4": "ideogram4", "Anima": "anima", "HiDream": "hidream", "AuraFlow": "auraflow", "Sana": "sana",
    "SanaVideo": "sana-video", "PixArt": "pixart", "CogView4": "cogview4", "ErnieImage": "ernie-image", "Amused": "amused",
    "HunyuanVideo": "hunyuan-video", "HunyuanSkyreels": "hunyuan-video", "HunyuanVideo15": "hunyuan-video-1.5",
    "HunyuanVideoFramepack": "framepack", "HunyuanImage": "hunyuan-image", "Wan": "wan", "LucyEdit": "wan", "ChronoEdit": "wan",
    "SkyReelsV2": "skyreels", "Helios": "helios", "LTX": "ltx-video", "LTX2": "ltx2", "Echo": "ltx2", "CogVideoX": "cogvideox",
    "Mochi": "mochi", "Kandinsky3": "kandinsky3", "Cosmos": "cosmos", "Kandinsky5": "kandinsky5", "AceStep": "ace-step", "MiniMaxH3": "minimax-h3",
}  # fmt: skip
_REFINER_LEVELS = 4  # of resolution; the SDXL base has three


def family_of(pipe: Any) -> str | None:
    """Family of ``pipe`` by its class, None for a class unknown here.

    Where families share a class the UNet tells: SD 2 projects linearly, the SDXL refiner has four levels of resolution.
    """
    name = type(pipe).__name__
    prefixes = [prefix for prefix in _FAMILIES if name.startswith(prefix)]
    family = _FAMILIES[max(prefixes, key=len)] if prefixes else None
    unet = getattr(pipe, "unet", None)
    if family == "sd1" and unet is not None and unet.config.get("use_linear_projection"):
        return "sd2"
    if family == "sdxl" and unet is not None and len(unet.config.get("block_out_channels")) == _REFINER_LEVELS:
        return "sdxl-refiner"
    return family
