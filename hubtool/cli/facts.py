"""A report for people: the document of ``inspect --json`` as a few aligned lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hubtool.cli.amounts import human_size
from hubtool.cli.output import clean

Document = Mapping[str, Any]
_MOST = 8  # of a list; the rest is counted
_LABEL = 11


def facts(doc: Document) -> str:
    """The lines that ``inspect`` and ``show`` print for one artifact: its path, then a fact per line."""
    lines = [line for label, text in _rows(doc) if text for line in _labelled(label, text)]
    return "\n".join([clean(doc["path"]), *lines, *findings(doc["findings"])])


def findings(items: Iterable[Mapping[str, str]]) -> list[str]:
    """A line per finding, the worst first."""
    ordered = sorted(items, key=lambda item: ("error", "warning", "info").index(item["severity"]))
    return [f"  {item['severity']:{_LABEL}} {clean(item['message'])} [{item['code']}]" for item in ordered]


def _labelled(label: str, text: str) -> Iterator[str]:
    for at, line in enumerate(text.split("\n")):
        yield f"  {'' if at else label:{_LABEL}} {clean(line)}"


def _rows(doc: Document) -> Iterator[tuple[str, str]]:
    yield "kind", kind(doc)
    yield "family", family(doc)
    yield "base", doc["base_model"] or ""
    yield "layout", doc["layout"] or ""
    yield "components", joined(f"{name} {count}" for name, count in doc["components"].items())
    yield "ranks", joined(doc["ranks"])
    yield "alphas", joined("none" if alpha is None else f"{alpha:g}" for alpha in doc["alphas"])
    dtypes = joined(doc["dtypes"]) or "no dtype"
    yield "tensors", f"{doc['tensors']} ({human_count(doc['parameters'])} parameters, {dtypes})"
    yield "file", f"{human_size(doc['size'])}, {doc['format']}"
    yield "triggers", joined(doc["trigger_words"])
    yield "embeddings", "\n".join(_embedding(item) for item in doc["embeddings"][:_MOST])
    yield "metadata", _counted(len(doc["metadata"]), "entry", "entries") if doc["metadata"] else ""
    yield "hashes", "\n".join(f"{name} {value}" for name, value in doc["hashes"].items() if value)


def kind(doc: Document) -> str:
    """``lora (locon, dora)``; of an unknown file what it may be."""
    details = [
        text for text in (doc["algorithm"], doc.get("variant"), *doc.get("flags", ())) if text and text != doc["kind"]
    ]
    maybe = f", perhaps {joined(doc['kind_candidates'])}" if doc.get("kind_candidates") else ""
    return f"{doc['kind']} ({', '.join(details)})" if details else doc["kind"] + maybe


def family(doc: Document) -> str:
    """The family, or those that fit where the file cannot tell."""
    if doc["family"]:
        return str(doc["family"])
    return f"not certain, fits {joined(doc['family_candidates'])}" if doc["family_candidates"] else ""


def joined(items: Iterable[Any]) -> str:
    """``a, b, c``, cut where it becomes unreadable."""
    texts = [str(item) for item in items]
    more = len(texts) - _MOST
    return ", ".join(texts[:_MOST]) + (f" and {more} more" if more > 0 else "")


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _embedding(item: Mapping[str, Any]) -> str:
    encoder = f" for {item['encoder']}" if item["encoder"] else ""
    return f"{item['token'] or 'no token'}: {item['vectors']} x {item['dim']}{encoder}"


def human_count(count: int) -> str:
    """``12``, ``3.4 k``, ``859.5 M``."""
    size = float(count)
    for unit in ("", " k", " M", " G"):
        if size < 1000 or unit == " G":
            break
        size /= 1000
    return f"{size:.1f}{unit}" if unit else str(count)
