"""A weight's rows, a bounded number of positions at a time.

An exploration has to look at every position of a weight, stored or not. It does so in blocks of rows, so that nothing
as large as the weight, and no 64-bit index of every nonzero, ever exists.
"""

from __future__ import annotations

import torch

__all__ = ["BLOCK", "block_height"]

# Positions of a block: 4 MiB of float32 gradient; a sixteenth of a small weight.
BLOCK = 1 << 20
# On a GPU a quarter of the weight, at least 4 M and at most 16 M positions: each block costs dozens of launches, and
# some waiting, whatever its size.
_GPU_BLOCK, _GPU_LEAST = 1 << 24, 1 << 22


def block_height(shape: tuple[int, int], device: torch.device) -> int:
    """Rows of a block."""
    rows, cols = shape
    if device.type == "cpu":
        return max(1, min(BLOCK, rows * cols // 16) // cols)
    return max(1, min(_GPU_BLOCK, max(_GPU_LEAST, rows * cols // 4)) // cols)
