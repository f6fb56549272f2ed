"""Tensors as names, lazy expressions and byte ranges."""
