"""Runs the snippet of a card before it is published: the files of the publication in a folder, a base pipeline of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hubtool.hub.errors import redact
from hubtool.hub.facts import Facts
from hubtool.hub.snippets import snippet
from hubtool.hub.uploads import Upload
from hubtool.types import Finding

_SECRET_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CIVITAI_API_KEY")
_SECONDS = 1800
_LONGEST = 300


def try_snippet(facts: Facts, files: Sequence[Upload], base: Path) -> Finding:
    """Execute the card's snippet offline, without a token, two steps long; what came of it as a finding.

    The code is ours and the files are safetensors and JSON: nothing of the publication is executed.
    """
    with tempfile.TemporaryDirectory(prefix="hubtool-try-") as folder:
        place = Path(folder) / "repository"
        for one in files:
            _lay(one, place / one.path)
        code = snippet(replace(facts, base_models=(str(base.resolve()),), repo=str(place)))
        if code is None:
            return Finding("snippet", "info", "there is no snippet to run for this kind of file")
        found = _run(_local(code, facts, place), Path(folder))
    if found is None:
        return Finding("snippet", "info", f"the snippet of the card was run with {base.name} and works")
    return Finding("snippet-failed", "error", f"the snippet of the card fails: {found}")


def _lay(one: Upload, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(one.source, bytes):
        path.write_bytes(one.source)
    else:
        path.symlink_to(one.source.resolve())


def _local(code: str, facts: Facts, place: Path) -> str:
    """Two steps are enough to know, and a single file is read where it lies instead of being downloaded."""
    download = f"hf_hub_download({json.dumps(str(place))}, {json.dumps(facts.main, ensure_ascii=False)})"
    local = code.replace(download, json.dumps(str(place / facts.main)))
    return local.replace(").images[0]", ", num_inference_steps=2).images[0]").replace(
        ").frames[0]", ", num_inference_steps=2).frames[0]"
    )


def _run(code: str, folder: Path) -> str | None:
    """None, or the last line of what went wrong."""
    environment = {name: value for name, value in os.environ.items() if name not in _SECRET_NAMES}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {_SECONDS} seconds"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return redact(lines[-1])[:_LONGEST]
