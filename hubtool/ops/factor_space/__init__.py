"""Adapters merged and truncated without their products: everything happens between the QR bases of stacked factors.

From inputs to output: ``reading`` (one family, strengths that mean something), ``fused`` (parts that the layout keeps in one weight),
``terms`` (patches as addends), ``coefficients`` (methods that are sums), ``blend`` (the computation of one module, by ``algebra``),
``modules`` (copied, summed or blended), ``spectra`` and ``budget`` (ranks), ``output`` and ``report``. Sources: KnOTS (arXiv 2410.19735),
Core Space (arXiv 2509.17786), Eckart and Young 1936 for what is optimal.
"""
