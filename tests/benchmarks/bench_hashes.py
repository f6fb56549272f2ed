"""Hashing a file against hashlib alone. Run: python -m tests.benchmarks.bench_hashes [MIB]

Prints one JSON line: the rate of hashlib's SHA-256 over memory in GB/s, and ours over it for one hash, for all of them, for the
content hash and for the search for NaN. Targets: 0.9 for SHA-256 alone, 0.6 for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hubtool.formats.safetensors import read_header
from hubtool.tensors.expr import Read
from hubtool.tensors.hashing import content_id, hash_file
from hubtool.tensors.values import scan_values
from tests.support.files import write_safetensors

_BLOCK = 4 << 20


def seconds(work: Callable[[], object]) -> float:
    """The best of five rounds."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def plain(size: int) -> None:
    block, digest = bytes(_BLOCK), hashlib.sha256()
    for _ in range(size // _BLOCK):
        digest.update(block)


def measure(path: Path, size: int) -> dict[str, float]:
    # the top byte of each half float is kept small, so that no value looks like NaN
    body = bytes(byte & 0x3F for byte in os.urandom(1 << 20)) * (size >> 20)
    write_safetensors(path, {"w": ("F16", (size // 2,), body)})
    del body
    ref = read_header(path).tensors["w"]
    alone = seconds(lambda: plain(size))
    works: dict[str, Callable[[], object]] = {
        "sha256": lambda: hash_file(path, ["sha256"]),
        "all": lambda: hash_file(path),
        "content_id": lambda: content_id([("w", "", Read(ref))]),
        "scan_values": lambda: scan_values(ref),
    }
    ratios = {f"{name}_over_hashlib": round(alone / seconds(work), 2) for name, work in works.items()}
    return {"hashlib_gb_per_s": round(size / alone / 1e9, 2), **ratios}


if __name__ == "__main__":
    mebibytes = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(measure(Path(made) / "x.safetensors", mebibytes // 4 * _BLOCK)))
