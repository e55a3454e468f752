"""One operation on operands of some shape and density: our form, and the dense forms it competes with.

The operands are built once; every form computes the same thing from them. What torch offers for sparse weights
(torch.sparse CSR), scipy's CSR and, where it is installed, torch-sparse stand beside them if they have the operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.operands import Forms, Run, Table, Weight, by_torch_sparse, random_ids, torch_csr
from sparsecore import ops

__all__ = [
    "explore",
    "gather",
    "gather_dot",
    "score_topk",
    "sddmm",
    "spmm",
    "spmm_t",
]


def gather(
    density: float, rows: int, cols: int, batch: int, skewed: bool = False, encoding: str | None = None
) -> Forms:
    weight = Table(rows, cols, density, skewed, encoding)
    table, huge, out = weight.dense(), weight.dense_on_huge_pages(), torch.empty(batch, cols)
    a, b, c, d = (random_ids(rows, batch) for _ in range(4))
    return Forms(
        ours=lambda: ops.gather(weight.values, *weight.index, a(), cols),
        dense={
            "F.embedding": lambda: F.embedding(b(), table),
            "index_select(out=)": lambda: torch.index_select(table, 0, c(), out=out),
            "index_select(out=) on huge pages": lambda: torch.index_select(huge, 0, d(), out=out),
        },
        nbytes=batch * weight.row_bytes,  # what is written is written in order
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )


def gather_dot(
    density: float,
    rows: int,
    cols: int,
    batch: int,
    each: int = 1,
    skewed: bool = False,
    encoding: str | None = None,
    other: str | None = None,
) -> Forms:
    """Scores of pairs from two tables, the second in an encoding of its own if ``other`` is given.

    With ``each`` > 1 every user has as many items. A dense form may then be a product that is sampled at those places,
    too, which writes no rows of items.
    """
    users, items = (
        Table(rows, cols, density, skewed, encoding),
        Table(rows, cols, density, skewed, other or encoding),
    )
    left, right = users.dense(), items.dense()
    huge, huger = users.dense_on_huge_pages(), items.dense_on_huge_pages()
    shape = (batch, each) if each > 1 else (batch,)
    a, c, e, g = (random_ids(rows, batch) for _ in range(4))
    b, d, f, h = (random_ids(rows, *shape) for _ in range(4))

    def rows_of(table: Tensor, ids: Tensor) -> Tensor:
        found = F.embedding(ids, table)
        return found.unsqueeze(1) if each > 1 else found

    dense: dict[str, Run] = {
        "(E[u] * E[i]).sum(-1)": lambda: (rows_of(left, c()) * F.embedding(d(), right)).sum(-1),
        "vecdot(E[u], E[i])": lambda: torch.linalg.vecdot(rows_of(left, e()), F.embedding(f(), right)),
        "(E[u] * E[i]).sum(-1) on huge pages": lambda: (rows_of(huge, g()) * F.embedding(h(), huger)).sum(-1),
    }
    if each > 1:
        crow, blank = torch.arange(batch + 1) * each, torch.zeros(batch * each)

        def sampled() -> Tensor:
            places = torch_csr(crow, h().view(-1), blank, (batch, rows))
            return torch.sparse.sampled_addmm(places, F.embedding(g(), huge), huger.t(), beta=0.0).values()

        dense["sampled_addmm(E[u], E') on huge pages"] = sampled
    return Forms(
        ours=lambda: ops.gather_dot(users.values, *users.index, a(), items.values, *items.index, b(), cols),
        dense=dense,
        nbytes=batch * (users.row_bytes + each * items.row_bytes),
        resident=users.nbytes + items.nbytes,
        dense_resident=8 * rows * cols,
    )


def spmm(
    density: float,
    rows: int,
    cols: int,
    batch: int,
    skewed: bool = False,
    subnormal: bool = False,
    encoding: str | None = None,
) -> Forms:
    weight = Weight(rows, cols, density, skewed, encoding)
    if subnormal:
        weight.values *= 1e-41
    x = torch.randn(batch, cols)
    table, out, csr, sparse = weight.dense(), torch.empty(batch, rows), weight.csr(), weight.scipy()
    xt, transposed = x.t().contiguous(), x.t().contiguous().numpy()
    return Forms(
        ours=lambda: ops.spmm(weight.values, *weight.index, x),
        dense={
            "mm(out=)": lambda: torch.mm(x, table.t(), out=out),
            "F.linear": lambda: F.linear(x, table),
        },
        others={
            "torch.sparse CSR": lambda: csr @ xt,
            "scipy": lambda: sparse @ transposed,
            **by_torch_sparse(weight.pattern, weight.values, xt),
        },
        flops=2 * batch * weight.nnz,
        nbytes=rows * weight.row_bytes + 4 * batch * (rows + cols),
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )


def spmm_t(
    density: float, rows: int, cols: int, batch: int, skewed: bool = False, encoding: str | None = None
) -> Forms:
    weight = Weight(rows, cols, density, skewed, encoding)
    dy = torch.randn(batch, rows)
    table, out, sparse = weight.dense(), torch.empty(batch, cols), weight.scipy().T
    turned, dyt = weight.turned_csr(), dy.t().contiguous()
    transposed = dyt.numpy()
    return Forms(
        ours=lambda: ops.spmm_t(weight.values, *weight.index, dy, cols),
        dense={"mm(out=)": lambda: torch.mm(dy, table, out=out)},
        others={
            "torch.sparse CSR, a transposed copy kept": lambda: turned @ dyt,
            "scipy": lambda: sparse @ transposed,
            **by_torch_sparse(weight.pattern, weight.values, dyt, transposed=True),
        },
        flops=2 * batch * weight.nnz,
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )


def sddmm(
    density: float, rows: int, cols: int, batch: int, skewed: bool = False, encoding: str | None = None
) -> Forms:
    weight = Weight(rows, cols, density, skewed, encoding)
    dy, x, out = torch.randn(batch, rows), torch.randn(batch, cols), torch.empty(rows, cols)
    csr, dyt = weight.csr(), dy.t().contiguous()
    return Forms(
        ours=lambda: ops.sddmm(*weight.index, dy, x, weight.nnz),
        dense={"mm(out=)": lambda: torch.mm(dy.t(), x, out=out)},
        others={"torch.sparse CSR": lambda: torch.sparse.sampled_addmm(csr, dyt, x, beta=0.0)},
        flops=2 * batch * weight.nnz,
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )


def score_topk(
    density: float,
    rows: int,
    cols: int,
    batch: int,
    k: int,
    seen: int = 0,
    skewed: bool = False,
    encoding: str | None = None,
) -> Forms:
    """With ``seen``, each query has as many items that are left out."""
    weight = Table(rows, cols, density, skewed, encoding)
    queries, table, scores = torch.randn(batch, cols), weight.dense(), torch.empty(batch, rows)
    step = 8192
    who, which = torch.arange(batch).repeat_interleave(seen), torch.randint(rows, (batch, seen)).sort().values
    left_out = (torch.arange(batch + 1) * seen, which.view(-1)) if seen else ()

    def whole() -> object:
        torch.mm(queries, table.t(), out=scores)
        if seen:
            scores[who, which.view(-1)] = -torch.inf
        return torch.topk(scores, k)

    def in_blocks() -> object:
        best = [torch.topk(queries @ part.t(), min(k, len(part))) for part in table.split(step)]
        ids = torch.cat([b.indices + i * step for i, b in enumerate(best)], 1)
        found = torch.topk(torch.cat([b.values for b in best], 1), k)
        return found.values, ids.gather(1, found.indices)

    return Forms(
        ours=lambda: ops.score_topk(queries, weight.values, *weight.index, k, *left_out),
        dense={"mm + topk": whole} if seen else {"mm + topk": whole, "blocks of mm + topk": in_blocks},
        flops=2 * batch * weight.nnz,
        resident=weight.nbytes,
        dense_resident=4 * rows * cols,
    )


class _Gradient:
    """A dense gradient that is there already."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def rows(self) -> None:
        return None

    def block(self, rows: Tensor | slice) -> Tensor:
        return self.gradient[rows]


def explore(density: float, rows: int, cols: int, encoding: str | None = None) -> Forms:
    """Prune 30 % of the weights, grow as many, rewrite index, values and two moments; the gradient is given."""
    weight = Table(rows, cols, density, encoding=encoding)
    shape, k, saved = (rows, cols), round(0.3 * weight.nnz), weight.values.clone()
    first, second = torch.rand(2, weight.nnz)
    gradient, table = torch.randn(rows, cols), weight.dense()
    mask = weight.pattern.to_mask()
    state = torch.rand(rows, cols)

    def run() -> None:
        left = ops.explore.prune(weight.values, weight.index, shape, k)
        new = ops.explore.grow(_Gradient(gradient), left, shape, k)
        ops.explore.realign_([(weight.values, 0.0), (first, 0.0), (second, 0.0)], weight.index, new, shape)
        weight.values.copy_(saved)  # the next call prunes the same weights

    def dense() -> object:
        drop = torch.topk(torch.where(mask, table.abs(), torch.inf).view(-1), k, largest=False, sorted=False)
        grow = torch.topk(torch.where(mask, -1.0, gradient.abs()).view(-1), k, sorted=False)
        chosen = mask.clone().view(-1)
        chosen[drop.indices] = False
        chosen[grow.indices] = True
        new = table.clone().view(-1)
        for tensor in (new, state.view(-1), state.view(-1)):  # value and two moments
            tensor[drop.indices] = 0
            tensor[grow.indices] = 0
        return chosen, new

    return Forms(
        ours=run,
        dense={"topk on masks": dense},
        nbytes=4 * rows * cols + 7 * 4 * weight.nnz,
        resident=weight.nbytes + 2 * 4 * weight.nnz,
        dense_resident=13 * rows * cols,  # weight, two moments, mask
    )
