"""Sharing: what was trained goes to a hub (here a local server that speaks its protocol), is looked at from afar, and comes back."""

from __future__ import annotations

import os
from pathlib import Path

from tests.demo.stage import OUT, run, say
from tests.support.hub_server import Hub

_REPO = "tester/disc-lora"


def show(trained: Path) -> None:
    say("Publish it, look at its header without a download, pull it: every byte is hashed")
    with Hub(str(OUT / "hub")) as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_testtoken", "HF_HOME": str(OUT / "hf-home")}
        run(
            "publish",
            trained,
            _REPO,
            "--license",
            "apache-2.0",
            "--base-model",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        )
        run("inspect", f"hf://{_REPO}/pytorch_lora_weights.safetensors")
        run("pull", f"hf://{_REPO}", "-o", OUT / "pulled")
        run("outdated")
