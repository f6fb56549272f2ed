"""The spectra of all modules, by several threads of one intra-op thread each: read where ranks depend on the numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from hubtool.ops.extract.spectrum import Spectrum
from hubtool.ops.factor_space.blend import values
from hubtool.ops.factor_space.modules import Job

_MOST = 128  # singular values of a whole matrix, where nobody says how many


def spectra(jobs: Sequence[Job], most: int | None, workers: int | None = None) -> list[Spectrum]:
    """The spectrum of every job's merged change. ``most``: how many values of changes that exist only as whole matrices (128 or the inputs'
    ranks when None)."""
    with _single_threaded(), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda job: _spectrum(job, most), jobs))


def _spectrum(job: Job, most: int | None) -> Spectrum:
    from hubtool.tensors.evaluate import compute, widened

    assert job.blend is not None
    exprs = [tensor for one in job.factors for tensor in (one.up, one.down)]
    tensors = [widened(compute(expr), expr.dtype) for expr in exprs]
    wanted = min(job.natural, most or (job.natural if job.blend.stays_low else max(job.usual, _MOST)))
    found, energy = values(*tensors, blend=job.blend, most=wanted)
    listed = tuple(found[: job.natural])
    rest = max(energy - sum(value * value for value in listed), 0.0)
    return Spectrum(listed, energy, rest, (0.0,) * len(listed))


@contextmanager
def _single_threaded() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
