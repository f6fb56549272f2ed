"""Tables and detection: how long the compiled tables take to load, and one adapter to be recognised, in milliseconds.

``python -m tests.benchmarks.bench_detect``
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from hubtool.formats import open_file
from hubtool.layouts.outline import outline
from tests.support.adapters import attention, closed, make, write

_TABLES = """
import time
from hubtool.layouts import index, tables, vocabulary
start = time.perf_counter()
tables.suffixes(), tables.algorithms(), index.shortlist(["blocks.0.attn.qkv"])
for family in {families!r}:
    for component in tables.family(family).components:
        vocabulary.spellings(family, component, "_")
print((time.perf_counter() - start) * 1e3)
"""


def tables_ms(*families: str) -> float:
    """Syntaxes, algorithms, the index and the named families, in a fresh process."""
    command = [sys.executable, "-c", _TABLES.format(families=families)]
    return median(float(subprocess.check_output(command)) for _ in range(5))


def detection_ms(family: str, layout: str, folder: Path) -> tuple[int, float]:
    """(tensors, ms) to tell syntax, family and modules of one adapter with every projection of its base, once the tables are there."""
    wanted = [row for row in attention(family) if row[0] != "transformer_2"]
    adapter = make(family, closed(family, wanted), ranks=(4,), alphas=(4.0,), dtype="F16")
    file = open_file(write(adapter, folder / f"{family}.safetensors", layout))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        outline(file.tensors, file.path, metadata=file.metadata)
        times.append((time.perf_counter() - start) * 1e3)
    return len(file.tensors), min(times)


def main() -> None:
    print(f"tables, no family        {tables_ms():6.1f} ms")
    print(f"tables, sdxl             {tables_ms('sdxl'):6.1f} ms")
    print(f"tables, flux1 and chroma {tables_ms('flux1', 'chroma'):6.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        for family, layout in (
            ("sd1", "kohya"),
            ("sdxl", "kohya"),
            ("flux1", "kohya"),
            ("wan", "comfy"),
            ("qwen-image", "diffusers"),
        ):
            tensors, ms = detection_ms(family, layout, Path(folder))
            print(f"detection, {family:10} {tensors:5} tensors {ms:6.1f} ms")


if __name__ == "__main__":
    main()
