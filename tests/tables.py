"""Development command: write the derived data of ``schemas/``, or check it.

python -m tests.tables vocabularies [--check] [NAME...]   what the installed libraries build, one file a model
python -m tests.tables index [--check]                    what is derived from the tables; run it after changing one
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hubtool import resources
from hubtool.layouts import index
from tests.support.folding import fold
from tests.support.models import MODELS, modules


def path(name: str) -> Path:
    """Where a model's vocabulary lies."""
    return resources.schemas() / "vocabularies" / f"{name}.json.gz"


def text(name: str) -> bytes:
    """A vocabulary file's JSON, as the installed libraries build the model."""
    return json.dumps(fold(modules(name)), separators=(",", ":")).encode() + b"\n"


def packed(content: bytes) -> bytes:
    """gzip with no time and no name in it: equal content gives equal bytes."""
    out = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=out, mtime=0) as stream:
        stream.write(content)
    return out.getvalue()


def is_current(name: str) -> bool:
    """Whether the file says what the libraries say. Compares content: zlib's bytes differ between builds."""
    return _says(path(name), text(name))


def write(names: Sequence[str]) -> None:
    for name in names:
        if is_current(name):
            continue
        path(name).write_bytes(packed(text(name)))
        print(f"wrote {path(name).name}")


def check(names: Sequence[str]) -> int:
    stale = [name for name in names if not is_current(name)]
    for name in stale:
        print(f"{path(name).name} is not what the installed libraries build")
    return 1 if stale else 0


def parsed() -> dict[str, tuple[int, str]]:
    """What ``hubtool.resources`` keeps of every table: (checksum of its TOML, its content as JSON), by name."""
    folder = resources.schemas()
    raws = {path: path.read_bytes() for path in sorted(folder.rglob("*.toml"))}
    return {
        path.relative_to(folder).as_posix(): (zlib.crc32(raw), _json(resources.parse(raw, path)))
        for path, raw in raws.items()
    }


def _json(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"))


DERIVED: Mapping[str, Callable[[], Any]] = {"index.json.gz": index.build, "parsed.json.gz": parsed}


def index_main(*, check_only: bool) -> int:
    stale = [name for name, make in DERIVED.items() if not _says(resources.schemas() / name, _derived(make))]
    for name in stale:
        if check_only:
            print(f"{name} is not what the tables say")
        else:
            (resources.schemas() / name).write_bytes(packed(_derived(DERIVED[name])))
            print(f"wrote {name}")
    return 1 if stale and check_only else 0


def _derived(make: Callable[[], Any]) -> bytes:
    return _json(make()).encode() + b"\n"


def _says(path: Path, content: bytes) -> bool:
    return path.is_file() and gzip.decompress(path.read_bytes()) == content


def main(arguments: Sequence[str]) -> int:
    warnings.simplefilter("ignore")  # of libraries, about their own past
    parser = argparse.ArgumentParser(prog="python -m tests.tables", description=__doc__)
    parser.add_argument("what", choices=["vocabularies", "index"])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not current")
    parser.add_argument("names", nargs="*", metavar="NAME", help="models (default: all)")
    asked = parser.parse_intermixed_args(arguments)
    if asked.what == "index":
        return index_main(check_only=asked.check)
    names = asked.names or sorted(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(MODELS))}")
    if asked.check:
        return check(names)
    write(names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
