"""What a stranger does with a publication: a base by its id, the first snippet of the card, a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.checkpoints import saved

if TYPE_CHECKING:
    from tests.support.hub import LocalHub

BASE = "tester/tiny-sd1"


def put_base(hub: LocalHub, folder: Path, repo: str = BASE, family: str = "sd1") -> Path:
    """A tiny pipeline, published as the base under ``repo``; its folder."""
    base = saved(family, folder)
    hub.put(repo, {path.relative_to(base).as_posix(): path for path in base.rglob("*") if path.is_file()})
    return base


def in_another_process(hub: LocalHub, folder: Path, code: str) -> None:
    script = folder / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env=hub.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def snippet(hub: LocalHub, repo: str) -> str:
    """The first snippet of the published card, with fewer steps: nobody looks at the picture."""
    card = hub.files(repo)["README.md"].decode()
    match = re.search(r"```py\n(.*?)```", card, re.DOTALL)
    assert match
    code = match[1]
    assert ").images[0]" in code
    return code.replace(").images[0]", ", num_inference_steps=2).images[0]")
