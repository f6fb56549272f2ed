"""Comparison of two files in the numbers they hold. ``compare.compare`` is the way in."""
