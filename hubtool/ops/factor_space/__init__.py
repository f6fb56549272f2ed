"""Adapters merged and truncated without their products: everything happens between the QR bases of stacked factors.

``algebra``: pure torch, bases, cores, truncation and its error. ``budget``: ranks from spectra, for a module or over a whole file.
``terms``: patches as weighted factors. ``patches``: the merged patch of one module, as expressions. Sources: KnOTS (arXiv 2410.19735),
Core Space (arXiv 2509.17786), Eckart and Young 1936 for what is optimal.
"""
