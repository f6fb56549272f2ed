"""Merge methods: one file each, one decorated function, nothing else to register.

A method works on tensors of one shape: the inputs' weights, or their changes when no base is given. ``Method.apply`` runs it on whole
tensors, ``Method.expr`` makes the lazy expression that is computed in tiles. Both are the same code.
"""

from hubtool.ops.methods._registry import Method, Parameter, find, known, method

__all__ = ["Method", "Parameter", "find", "known", "method"]
