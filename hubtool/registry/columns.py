"""Records as column values."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from hubtool.registry.records import ArtifactRecord, FileStat, LocationRecord
from hubtool.registry.text import clean, display, fold, signed64

T = TypeVar("T")
BATCH = 500  # rows per transaction: a scan must not keep others waiting
LIVE = ("present", "offline")
_SAME_NAME = (
    "size",
    "format",
    "form",
    "quick_id",
    "health",
    "kind",
    "algorithm",
    "family",
    "layout",
    "tensors",
    "parameters",
)


def batches(items: Sequence[T], size: int = BATCH) -> Iterable[Sequence[T]]:
    """``items`` in slices of ``size``."""
    return (items[at : at + size] for at in range(0, len(items), size))


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def signed(stat: FileStat) -> FileStat:
    """``stat`` with the numbers as the library keeps them."""
    return stat._replace(inode=signed64(stat.inode) or 0, device=signed64(stat.device) or 0)


def stat_values(stat: FileStat) -> dict[str, Any]:
    """The columns of ``location`` that come from the file system."""
    kept = signed(stat)
    numbers = {"size": kept.size, "mtime_ns": kept.mtime_ns, "links": min(kept.links, 2**31 - 1)}
    return {**numbers, "inode": kept.inode, "device": kept.device}


def place_values(place: LocationRecord) -> dict[str, Any]:
    """The columns of ``location`` for a file that is there."""
    text = display(place.relpath)
    key = fold(text)
    names = {"relpath": place.relpath, "path_text": text, "path_key": key, "name_key": key.rpartition("/")[2]}
    return {
        **names,
        **stat_values(place.stat),
        "root_id": place.root_id,
        "link": place.link,
        "state": "present",
        "missing_since": None,
    }


def artifact_values(record: ArtifactRecord) -> dict[str, Any]:
    """The columns of ``artifact`` that a scan determines."""
    values: dict[str, Any] = {name: getattr(record, name) for name in _SAME_NAME}
    values |= {"rank": record.rank, "alpha": record.alpha, "dtypes": fold(",".join(record.dtypes))}
    for name, key, text in (("title", "title_key", record.title), ("base_model", "base_key", record.base_model)):
        values |= {name: clean(text) if text else None, key: fold(text) if text else None}
    return values


def fact_rows(artifact_id: int, record: ArtifactRecord) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables that hang on an artifact, by table name."""
    at, mine = now(), {"artifact_id": artifact_id}
    words = dict.fromkeys(clean(word) for word in record.trigger_words)
    return {
        "artifact_doc": [{**mine, "search_text": fold(record.search_text), "identity": record.identity}],
        "trigger_word": [
            {**mine, "text": word, "text_key": fold(word), "source": "file", "position": position}
            for position, word in enumerate(words)
        ],
        "hash": [
            {**mine, "algo": algo, "value": fold(value), "origin": "embedded", "at": at}
            for algo, value in record.embedded_hashes.items()
        ],
        "finding": [
            {
                **mine,
                "code": found.code,
                "severity": found.severity,
                "message": clean(found.message),
                "source": "scan",
                "at": at,
            }
            for found in record.findings
        ],
    }
