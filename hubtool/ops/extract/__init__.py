"""Extraction: the difference of two checkpoints as an adapter. ``planning.extract`` is the way in."""
