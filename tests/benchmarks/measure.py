"""Runs commands as whole processes: wall time, and peak anonymous memory polled from /proc."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import hubtool

_SHORT = 0.5  # seconds: what ends sooner is timed to the millisecond


@dataclass(frozen=True, slots=True)
class Run:
    """``anon``: peak bytes of anonymous and shared memory of the process."""

    seconds: float
    anon: int


def run(command: Sequence[str | Path]) -> Run:
    compiled()
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anon(process.pid))
        time.sleep(
            0.001 if time.perf_counter() - start < _SHORT else 0.01
        )  # often asked, it takes a share of the processors
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return Run(time.perf_counter() - start, peak)


def _anon(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def alternate(commands: dict[str, Sequence[str | Path]], outputs: Sequence[Path], rounds: int = 5) -> dict[str, Run]:
    """Each command in turn, ``rounds`` times, outputs removed and disks synced before each; medians of time, peaks of memory."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            for path in outputs:
                path.unlink(missing_ok=True)
            os.sync()
            runs[name].append(run(command))
    return {name: Run(median(r.seconds for r in rs), max(r.anon for r in rs)) for name, rs in runs.items()}


def copy_and_sync(source: Path, output: Path) -> list[str | Path]:
    """``cp`` followed by fsync, as a shell would: the physical limit."""
    return ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "cp", source, output]


@cache
def compiled() -> None:
    """Bytecode for hubtool, as pip makes it for the peers: an editable checkout may never have been allowed to write its own."""
    compileall.compile_dir(Path(hubtool.__file__).parent, quiet=1)


def interpreter() -> float:
    """Seconds that starting Python alone takes."""
    return min(run([sys.executable, "-c", "pass"]).seconds for _ in range(5))
