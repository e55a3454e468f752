"""The index set that keeps the largest weights of a dense one."""

from __future__ import annotations

from torch import Tensor

from sparsecore.errors import ConversionError
from sparsecore.pattern import Pattern
from sparsecore.sizes import exact_nnz

__all__ = ["magnitude_pattern"]


def magnitude_pattern(
    weight: Tensor, density: float | None, mask: Tensor | None, skip_row: int | None = None
) -> Pattern:
    """Index set for an existing dense weight: a given mask, or the exactly nnz largest magnitudes (ties by position).

    A row to skip (an embedding's padding row) stays empty.
    """
    from sparsecore.topology.select import largest

    if (density is None) == (mask is None):
        raise ConversionError("give either density= (keeps the largest magnitudes) or mask=, and not both")
    rows, cols = weight.shape
    if mask is not None:
        if mask.shape != weight.shape:
            raise ConversionError(
                f"mask must have the weight's shape {(rows, cols)}, got {tuple(mask.shape)}"
            )
        if skip_row is not None:
            mask = mask.clone()
            mask[skip_row] = False
        pattern = Pattern.from_mask(mask)
        if pattern.nnz == 0:
            raise ConversionError(
                "the mask keeps no weight at all; leave this module dense or keep at least one"
            )
        return pattern
    assert density is not None
    nnz = exact_nnz((rows, cols), density)
    magnitude = weight.detach().abs()
    if bool(magnitude.isnan().any()):
        raise ConversionError("the weight holds NaN, which has no magnitude to keep the largest of")
    if skip_row is not None:
        magnitude[skip_row] = -1  # behind every other
        nnz = min(nnz, (rows - 1) * cols)
    keep = largest(magnitude.reshape(-1), nnz)
    row = keep.div(cols, rounding_mode="floor")
    return Pattern.from_coo(row, keep - row * cols, (rows, cols))
