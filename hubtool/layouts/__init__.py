"""Keys <-> adapters, from the tables of schemas/."""

from __future__ import annotations

from hubtool.layouts.emission import Emission, Loss
from hubtool.layouts.emit import emit
from hubtool.layouts.parse import Parsed, parse, parse_file, recognise

__all__ = ["Emission", "Loss", "Parsed", "emit", "parse", "parse_file", "recognise"]
