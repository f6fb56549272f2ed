"""The version, where every part of hubtool can ask for it."""

__version__ = "0.1.0"
