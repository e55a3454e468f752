"""Hypothesis strategies: sparsity patterns, friendly and adversarial."""

from __future__ import annotations

import numpy as np
import torch
from devices import BACKENDS, misaligned, of_numba, values_for
from hypothesis import strategies as st

from sparsecore import Pattern

__all__ = [
    "BACKENDS",
    "DTYPES",
    "NARROW_WIDTHS",
    "WIDE_WIDTHS",
    "backends",
    "dtypes",
    "masks",
    "misaligned",
    "of_numba",
    "patterns",
    "seeds",
    "values_for",
]

DTYPES = (torch.float32, torch.float64)

# Around the vector widths of kernels, and where the column type changes (uint8, int16, int32).
NARROW_WIDTHS = (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256)
WIDE_WIDTHS = (257, 32767, 32768, 32769)

backends = st.sampled_from(BACKENDS)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)

_KINDS = (
    "random",
    "empty rows",
    "full rows",
    "one row",
    "one column",
    "single",
    "one row holds all",
    "full",
    "edges",
)


@st.composite
def masks(draw: st.DrawFn, max_rows: int = 12, widths: tuple[int, ...] = NARROW_WIDTHS) -> torch.Tensor:
    """Boolean matrices with at least one true entry."""
    kind = draw(st.sampled_from(_KINDS))
    rows = 1 if kind == "one row" else draw(st.integers(1, max_rows))
    cols = 1 if kind == "one column" else draw(st.sampled_from(widths) | st.integers(1, min(70, max(widths))))
    rng = np.random.default_rng(draw(seeds))
    mask = np.zeros((rows, cols), dtype=bool)
    if kind in ("random", "one row", "one column"):
        mask = rng.random((rows, cols)) < min(draw(st.sampled_from((0.02, 0.2, 0.5, 0.9))), 2000 / mask.size)
    elif kind == "empty rows":
        mask = (rng.random((rows, cols)) < min(0.5, 2000 / mask.size)) & (rng.random((rows, 1)) < 0.5)
    elif kind == "full rows":
        mask |= rng.random((rows, 1)) < 0.5
    elif kind == "one row holds all":
        mask[rng.integers(rows)] = True
    elif kind == "full":
        mask[:] = True
    elif kind == "edges":
        mask[:, [0, -1]] = True
    if not mask.any():
        mask[rng.integers(rows), rng.integers(cols)] = True
    return torch.from_numpy(mask)


@st.composite
def patterns(draw: st.DrawFn, max_rows: int = 12, widths: tuple[int, ...] = NARROW_WIDTHS) -> Pattern:
    """Valid patterns with at least one nonzero, checked."""
    pattern = Pattern.from_mask(draw(masks(max_rows=max_rows, widths=widths)))
    pattern.check()
    return pattern
