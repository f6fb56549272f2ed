"""prepare: make a folder of pictures ready for training. The library is not concerned: it knows adapters, not data sets."""

from __future__ import annotations

from hubtool.training.prepare.options import CAPTIONS, CROPS, DUPLICATES, Options
from hubtool.training.prepare.run import Prepared, prepare

__all__ = ["CAPTIONS", "CROPS", "DUPLICATES", "Options", "Prepared", "prepare"]
