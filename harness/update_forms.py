"""Gradient of a lookup and an optimizer's step over all values: ours, and torch's fused optimizers.

Made as the forms of `harness.kernel_forms`, and measured with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sparsecore
from harness.operands import Forms, Table, on_huge_pages, random_ids, state_on_huge_pages
from sparsecore import ops

__all__ = ["update"]

# Options of ours and of torch's; numbers beside a value that a step reads and writes.
_OPTIMIZERS: dict[str, tuple[dict[str, Any], int]] = {
    "Adam": ({}, 2),
    "AdamW": ({}, 2),
    "SGD": ({"momentum": 0.9}, 1),
    "Adagrad": ({}, 1),
}


def update(
    density: float,
    rows: int,
    cols: int,
    batch: int,
    optimizer: str = "Adam",
    per_weight_step: bool = False,
    skewed: bool = False,
    encoding: str | None = None,
) -> Forms:
    """``per_weight_step`` is an option of ours: dense Adam counts the steps of the whole table."""
    weight = Table(rows, cols, density, skewed, encoding)
    options, beside = _OPTIMIZERS[optimizer]
    own = {"per_weight_step": True} if per_weight_step else {}
    values = nn.Parameter(weight.values)
    ours = getattr(sparsecore.optim, optimizer)([values], **options, **own)
    table, huge = nn.Parameter(weight.dense()), nn.Parameter(weight.dense_on_huge_pages())
    torchs = getattr(torch.optim, optimizer)
    dense = torchs([table], fused=True, **options)
    on_huge = state_on_huge_pages(torchs([huge], fused=True, **options))
    grad, kept, kept_huge = (
        torch.randn(batch, cols),
        torch.zeros(rows, cols),
        on_huge_pages(torch.zeros(rows, cols)),
    )
    a, b, c, d = (random_ids(rows, batch) for _ in range(4))

    def run() -> None:
        ours.zero_grad()  # as in training: the gradient's memory serves again
        values.grad = ops.scatter_grad(*weight.index, a(), grad, weight.nnz)
        ours.step()

    def fresh() -> None:
        table.grad = torch.ops.aten.embedding_dense_backward(grad, b(), rows, -1, False)
        dense.step()

    def in_place() -> None:
        table.grad = kept.zero_().index_add_(0, c(), grad)
        dense.step()

    def in_place_huge() -> None:
        huge.grad = kept_huge.zero_().index_add_(0, d(), grad)
        on_huge.step()

    beside += per_weight_step
    return Forms(
        ours=run,
        dense={
            f"embedding backward + fused {optimizer}": fresh,
            f"zero_ + index_add_ + fused {optimizer}": in_place,
            f"zero_ + index_add_ + fused {optimizer} on huge pages": in_place_huge,
        },
        nbytes=(3 + 2 * beside) * 4 * weight.nnz + rows * (weight.row_bytes - 4 * weight.nnz / rows),
        resident=weight.nbytes + (1 + beside) * 4 * weight.nnz,
        dense_resident=4 * (2 + _OPTIMIZERS[optimizer][1]) * rows * cols,
    )
