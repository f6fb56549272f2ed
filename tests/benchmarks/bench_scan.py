"""Times of the catalogue: first scan, scan with nothing changed, ls. Run: python -m tests.benchmarks.bench_scan [FILES] [KNOWN]"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubtool.actions.scan import scan
from hubtool.registry import scanning
from hubtool.registry.records import ArtifactRecord, FileStat, LocationRecord
from hubtool.registry.store import Store
from hubtool.registry.writing import NewFile, write
from tests.support.files import floats, write_safetensors

_MODULE = "lora_unet_down_blocks_0_attentions_0_proj_in"


def make_files(root: Path, count: int) -> None:
    """Small LoRA files, 200 to a folder."""
    for at in range(count):
        tensors = {
            f"{_MODULE}.lora_down.weight": floats(4, 8, start=at),
            f"{_MODULE}.lora_up.weight": floats(8, 4, start=at),
        }
        write_safetensors(
            root / f"d{at // 200:04}" / f"f{at:06}.safetensors", tensors, {"ss_output_name": f"name {at}"}
        )


def make_known(store: Store, root: Path, count: int) -> None:
    """``count`` empty files and their rows, written straight into the library: only the walk and the comparison are timed."""
    status = root.stat()
    record = scanning.add_root(store, os.fsencode(root), status.st_dev, status.st_ino)
    files = []
    for at in range(count):
        path = root / f"d{at // 500:04}" / f"f{at:06}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        found = path.stat()
        stat = FileStat(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)
        place = LocationRecord(record.id, os.fsencode(path.relative_to(root)), stat)
        files.append(
            NewFile(place, ArtifactRecord(0, "safetensors", quick_id=f"q{at}", kind="lora", search_text=f"word{at}"))
        )
    for at in range(0, count, 500):
        write(store, files[at : at + 500])


@contextmanager
def timed(name: str, count: int) -> Iterator[None]:
    """Print how long the block took."""
    start, cpu = time.perf_counter(), time.process_time()
    yield
    took = time.perf_counter() - start
    print(f"{name}: {took:.2f} s, {time.process_time() - cpu:.2f} s cpu, {count / took:,.0f}/s")


def main(count: int, known: int) -> None:
    """Run every benchmark in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_files(base / "new", count)
        with Store.open(base / "first.sqlite3") as store:
            scan(store, [str(base)], hashes=False)  # the empty run imports what is imported lazily
        with Store.open(base / "new.sqlite3") as store:
            with timed(f"first scan of {count} small files, no hashes", count):
                scan(store, [str(base / "new")], hashes=False)
            with timed(f"hashing of {count} small files", count):
                scan(store, [str(base / "new")])
        (base / "known").mkdir()
        with Store.open(base / "known.sqlite3") as store:
            make_known(store, base / "known", known)
            with timed(f"second scan of {known} known files", known):
                result = scan(store, [str(base / "known")], hashes=False)
            assert result.unchanged == known, result
        with Store.open(base / "ten.sqlite3") as store:
            (base / "ten").mkdir()
            make_known(store, base / "ten", 10_000)
        for form in ("table", "json"):
            command = [sys.executable, "-m", "hubtool", "--library", str(base / "ten.sqlite3"), "ls", "--format", form]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"ls --format {form} of 10000 rows, whole process: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main(*(int(text) for text in (sys.argv[1:] or ["2000", "100000"])))
