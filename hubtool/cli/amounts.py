"""Numbers as people read them."""

from __future__ import annotations


def human_size(count: int) -> str:
    """Bytes for people, powers of 1000: ``1.5 MB``."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
