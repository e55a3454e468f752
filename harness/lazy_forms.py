"""Gradient and update of the rows that were looked up, and of no others: ours, and torch's sparse gradients.

Made as the forms of `harness.kernel_forms`, and measured with them.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

import sparsecore
from harness.operands import IDS, Forms, Run, Table, on_huge_pages, random_ids, state_on_huge_pages
from sparsecore import SparseEmbedding, ops

__all__ = ["lazy_adam", "lazy_adam_alone", "touched"]


def _read(table: SparseEmbedding, batch: int) -> float:
    """Bytes at random places: index, values and two moments of each row."""
    index = sum(part.nbytes for part in table.index if part is not None)
    return batch * (index + 3 * table.values.nbytes) / table.num_embeddings


def _resident(table: SparseEmbedding) -> int:
    """Bytes of values and index."""
    return table.values.nbytes + sum(part.nbytes for part in table.index if part is not None)


def lazy_adam(density: float, rows: int, cols: int, batch: int) -> Forms:
    """Gradient of a lookup and Adam over what was looked up, called as in training."""
    table = SparseEmbedding(rows, cols, density=density, sparse=True)
    other = SparseEmbedding(rows, cols, density=density, sparse=True)
    dense = nn.Embedding(rows, cols, sparse=True)
    huge = nn.Embedding.from_pretrained(on_huge_pages(dense.weight.detach()), freeze=False, sparse=True)
    grad, draw = torch.randn(batch, cols), random_ids(rows, batch)

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer) -> Run:
        turn = itertools.cycle([module(draw()) for _ in range(IDS)])

        def step() -> None:
            optimizer.zero_grad()
            next(turn).backward(grad, retain_graph=True)
            optimizer.step()

        return step

    lazy, adam = torch.optim.SparseAdam(dense.parameters()), sparsecore.optim.Adam
    on_huge = state_on_huge_pages(torch.optim.SparseAdam(huge.parameters()))
    return Forms(
        ours=steps(table, adam(table.parameters(), in_backward=True)),
        dense={
            "nn.Embedding(sparse=True) + SparseAdam": steps(dense, lazy),
            "nn.Embedding(sparse=True) + SparseAdam on huge pages": steps(huge, on_huge),
        },
        others={"ours, step() afterwards": steps(other, adam(other.parameters()))},
        nbytes=_read(table, batch),
    )


def lazy_adam_alone(
    density: float,
    rows: int,
    cols: int,
    batch: int,
    per_weight_step: bool = False,
    encoding: str | None = None,
) -> Forms:
    """The same without autograd: the two operators that make the gradient, and the optimizers."""
    table = SparseEmbedding(rows, cols, density=density, sparse=True)
    if encoding is not None:
        table.set_encoding(encoding)
    dense = nn.Parameter(torch.randn(rows, cols))
    huge = nn.Parameter(on_huge_pages(dense.detach()))
    ours = sparsecore.optim.Adam([table.values], in_backward=True, per_weight_step=per_weight_step)
    torchs, on_huge = torch.optim.SparseAdam([dense]), state_on_huge_pages(torch.optim.SparseAdam([huge]))
    grad, a, b, c = torch.randn(batch, cols), *(random_ids(rows, batch) for _ in range(3))

    def step() -> None:
        dense.grad = torch.ops.aten.embedding_sparse_backward(grad, b(), rows, -1, False)
        torchs.step()

    def step_huge() -> None:
        huge.grad = torch.ops.aten.embedding_sparse_backward(grad, c(), rows, -1, False)
        on_huge.step()

    return Forms(
        ours=lambda: ours.update_rows(table.values, *table.index, a(), grad, None, None),
        dense={
            "embedding_sparse_backward + SparseAdam": step,
            "embedding_sparse_backward + SparseAdam on huge pages": step_huge,
        },
        nbytes=_read(table, batch),
        resident=_resident(table) + (2 + per_weight_step) * table.values.nbytes,
        dense_resident=3 * dense.nbytes,
    )


def touched(density: float, rows: int, cols: int, batch: int, encoding: str | None = None) -> Forms:
    """The gradient alone, each row once; torch leaves that to who reads its gradient, so the dense form coalesces."""
    weight = Table(rows, cols, density, encoding=encoding)
    grad, a, b = torch.randn(batch, cols), *(random_ids(rows, batch) for _ in range(2))
    backward = torch.ops.aten.embedding_sparse_backward
    return Forms(
        ours=lambda: ops.touched(*weight.index, a(), grad, weight.nnz),
        dense={
            "embedding_sparse_backward + coalesce": lambda: backward(grad, b(), rows, -1, False).coalesce()
        },
        nbytes=batch * weight.row_bytes,
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )
