"""Weighted sums of a table's rows and their gradients: our form, and torch's `embedding_bag`.

Made as the forms of `harness.kernel_forms`, and measured with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.operands import Forms, Table, random_ids
from sparsecore import ops

__all__ = ["bag", "bag_dot", "bag_grad"]


def bag(density: float, rows: int, cols: int, batch: int, length: int, encoding: str | None = None) -> Forms:
    """A bag for each example, all of the same length, as an encoder sums what its users have seen."""
    weight = Table(rows, cols, density, encoding=encoding)
    table, offsets, shares = weight.dense(), _offsets(batch, length), torch.randn(batch * length)
    a, b, c = (random_ids(rows, batch * length) for _ in range(3))

    def by_embedding_bag() -> Tensor:
        return F.embedding_bag(
            b(), table, offsets, mode="sum", per_sample_weights=shares, include_last_offset=True
        )

    return Forms(
        ours=lambda: ops.bag(weight.values, *weight.index, a(), offsets, shares, cols),
        dense={
            "F.embedding_bag": by_embedding_bag,
            "bmm": lambda: torch.bmm(shares.view(batch, 1, length), table[c()].view(batch, length, cols))[
                :, 0
            ],
        },
        nbytes=batch * length * weight.row_bytes,
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )


def bag_grad(
    density: float, rows: int, cols: int, batch: int, length: int, encoding: str | None = None
) -> Forms:
    """The gradient of `bag` in the table."""
    weight = Table(rows, cols, density, encoding=encoding)
    offsets, shares, grad = _offsets(batch, length), torch.randn(batch * length), torch.randn(batch, cols)
    kept, sources = torch.zeros(rows, cols), torch.arange(batch).repeat_interleave(length)
    a, b = (random_ids(rows, batch * length) for _ in range(2))
    return Forms(
        ours=lambda: ops.bag_grad(*weight.index, a(), offsets, shares, grad, weight.nnz),
        dense={
            "zero_ + index_add_": lambda: kept.zero_().index_add_(0, b(), grad[sources] * shares.unsqueeze(1))
        },
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )


def bag_dot(
    density: float, rows: int, cols: int, batch: int, length: int, encoding: str | None = None
) -> Forms:
    """The gradient of `bag` in the shares: each entry's row times the gradient of its bag."""
    weight = Table(rows, cols, density, encoding=encoding)
    table, offsets, grad = weight.dense(), _offsets(batch, length), torch.randn(batch, cols)
    sources = torch.arange(batch).repeat_interleave(length)
    a, b, c = (random_ids(rows, batch * length) for _ in range(3))
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return Forms(
        ours=lambda: ops.bag_dot(weight.values, *weight.index, a(), offsets, grad),
        dense={
            "(E[ids] * grad).sum(1)": lambda: (F.embedding(b(), table) * grad[sources]).sum(1),
            "embedding_bag backward": lambda: backward(grad, table, c(), offsets[:-1], sources, 0),
        },
        nbytes=batch * length * weight.row_bytes,
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )


def _offsets(batch: int, length: int) -> Tensor:
    return torch.arange(batch + 1) * length
