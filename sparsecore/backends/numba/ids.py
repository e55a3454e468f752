"""The range of row ids: kernels read without bounds checks, so every lookup is checked first."""

from __future__ import annotations

from torch import Tensor

from sparsecore.backends.numba.jit import array, kernel
from sparsecore.backends.numba.simd import at

__all__ = ["id_range"]


def id_range(ids: Tensor) -> tuple[int, int]:
    """Smallest and largest of some ids, at least one. Reads them into the cache, where the lookup wants them next."""
    return _range(array(ids).reshape(-1), 1)


@kernel
def _range(ids, n_chunks):
    low = high = at(ids, 0)
    for e in range(1, ids.shape[0]):
        low, high = min(low, at(ids, e)), max(high, at(ids, e))
    return low, high
