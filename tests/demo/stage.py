"""Where the demo writes, and how it shows what it runs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

OUT = Path("demo-out")
TOOL = [sys.executable, "-m", "hubtool"]


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*arguments: str | Path, ends: tuple[int, ...] = (0,)) -> None:
    """Show a command and run it; it has to end with one of ``ends``."""
    words = [str(a) for a in arguments]
    print(f"$ hubtool {shlex.join(words)}", flush=True)
    if (ended := subprocess.run([*TOOL, *words], check=False).returncode) not in ends:
        raise SystemExit(f"hubtool {words[0]} ended with {ended}")
