"""Operations on a device: our form and the dense forms that it competes with, each a function of its input's number.

The operands are built once, float32, on the device. Every form takes the number of one of several drawn inputs, and for
the same number every form computes the same thing: so that one can be checked against the other before it is timed.
"masked" is dense with ``weight * mask`` in the call, as published code simulates sparsity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsecore
from harness.gpu_operands import (
    DENSITIES,
    HIGH_DENSITIES,
    Forms,
    Operation,
    Run,
    bipartite,
    by_torch_sparse,
    ids_of,
    normal,
    relative_error,
    weight_of,
)
from sparsecore import Pattern, ops
from sparsecore.encoding import decode

__all__ = ["OPERATIONS"]


def gather(density: float, device: str, rows: int, cols: int, batch: int) -> Forms:
    weight = weight_of(rows, cols, density, device)
    table, ids, out = weight.dense, ids_of(weight, batch), torch.empty(batch, cols, device=device)
    return Forms(
        ours=lambda i: ops.gather(weight.values, *weight.index, ids(i), cols),
        dense={
            "F.embedding": lambda i: F.embedding(ids(i), table),
            "index_select(out=)": lambda i: torch.index_select(table, 0, ids(i), out=out),
        },
        others={"masked": lambda i: F.embedding(ids(i), table * weight.mask)},
    )


def gather_dot(density: float, device: str, rows: int, cols: int, batch: int) -> Forms:
    """Scores of pairs of rows; both are looked up in one table, at other places."""
    weight = weight_of(rows, cols, density, device)
    table, users, items = weight.dense, ids_of(weight, batch), ids_of(weight, batch)
    operand = (weight.values, *weight.index)
    return Forms(
        ours=lambda i: ops.gather_dot(*operand, users(i), *operand, items(i), cols),
        dense={
            "(E[u] * E[i]).sum(1)": lambda i: (
                F.embedding(users(i), table) * F.embedding(items(i), table)
            ).sum(1),
            "vecdot(E[u], E[i])": lambda i: torch.linalg.vecdot(table[users(i)], table[items(i)]),
        },
    )


def scatter_grad(density: float, device: str, rows: int, cols: int, batch: int) -> Forms:
    weight = weight_of(rows, cols, density, device)
    ids, grad = ids_of(weight, batch), normal(batch, cols, device=device)
    kept = torch.zeros(rows, cols, device=device)
    backward = torch.ops.aten.embedding_dense_backward
    return Forms(
        ours=lambda i: ops.scatter_grad(*weight.index, ids(i), grad(i), weight.nnz),
        dense={
            "embedding backward": lambda i: backward(grad(i), ids(i), rows, -1, False),
            "zero_ + index_add_": lambda i: kept.zero_().index_add_(0, ids(i), grad(i)),
        },
        error=weight.at_nonzeros,
    )


def spmm(density: float, device: str, rows: int, cols: int, batch: int) -> Forms:
    weight = weight_of(rows, cols, density, device)
    table, x, out = weight.dense, normal(batch, cols, device=device), torch.empty(batch, rows, device=device)
    return Forms(
        ours=lambda i: ops.spmm(weight.values, *weight.index, x(i)),
        dense={
            "mm(out=)": lambda i: torch.mm(x(i), table.t(), out=out),
            "F.linear": lambda i: F.linear(x(i), table),
        },
        others={
            "masked": lambda i: F.linear(x(i), table * weight.mask),
            **_transposed(by_torch_sparse(weight.pattern, weight.values, lambda i: x(i).t())),
        },
    )


def _transposed(forms: dict[str, Run]) -> dict[str, Run]:
    def turned(run: Run) -> Run:
        return lambda i: run(i).t()

    return {name: turned(run) for name, run in forms.items()}


def spmm_t(density: float, device: str, rows: int, cols: int, batch: int) -> Forms:
    weight = weight_of(rows, cols, density, device)
    table, dy = weight.dense, normal(batch, rows, device=device)
    out = torch.empty(batch, cols, device=device)
    return Forms(
        ours=lambda i: ops.spmm_t(weight.values, *weight.index, dy(i), cols),
        dense={"mm(out=)": lambda i: torch.mm(dy(i), table, out=out)},
        others={
            "masked": lambda i: torch.mm(dy(i), table * weight.mask),
            **_transposed(
                by_torch_sparse(weight.pattern, weight.values, lambda i: dy(i).t(), transposed=True)
            ),
        },
    )


def sddmm(density: float, device: str, rows: int, cols: int, batch: int) -> Forms:
    weight = weight_of(rows, cols, density, device)
    dy, x = normal(batch, rows, device=device), normal(batch, cols, device=device)
    out = torch.empty(rows, cols, device=device)
    return Forms(
        ours=lambda i: ops.sddmm(*weight.index, dy(i), x(i), weight.nnz),
        dense={"mm(out=)": lambda i: torch.mm(dy(i).t(), x(i), out=out)},
        others={"masked": lambda i: torch.mm(dy(i).t(), x(i)) * weight.mask},
        error=weight.at_nonzeros,
    )


def score_topk(density: float, device: str, rows: int, cols: int, batch: int, k: int) -> Forms:
    weight = weight_of(rows, cols, density, device)
    table, queries = weight.dense, normal(batch, cols, device=device)
    scores, step = torch.empty(batch, rows, device=device), 8192

    def in_blocks(i: int) -> Any:
        best = [torch.topk(queries(i) @ part.t(), min(k, len(part))) for part in table.split(step)]
        ids = torch.cat([b.indices + n * step for n, b in enumerate(best)], 1)
        found = torch.topk(torch.cat([b.values for b in best], 1), k)
        return found.values, ids.gather(1, found.indices)

    return Forms(
        ours=lambda i: ops.score_topk(queries(i), weight.values, *weight.index, k),
        dense={
            "mm + topk": lambda i: torch.topk(torch.mm(queries(i), table.t(), out=scores), k),
            "blocks of mm + topk": in_blocks,
        },
        others={"masked": lambda i: torch.topk(torch.mm(queries(i), (table * weight.mask).t()), k)},
        error=lambda ours, reference: relative_error(
            ours[0], reference[0]
        ),  # ids differ where scores are equal
    )


def propagate(density: None, device: str, users: int, items: int, edges: int, dim: int) -> Forms:
    """One hop over a bipartite graph whose degrees fall like a power; without dense form: torch's own CSR instead."""
    graph, wide = bipartite(users, items, edges, device)
    x = normal(graph.n_nodes, dim, device=device)
    crow, col, weight = graph.arrays()[:3]
    return Forms(
        ours=lambda i: graph(x(i)),
        dense={"torch.sparse CSR int64": lambda i: wide @ x(i)},
        others=by_torch_sparse(Pattern(crow, col, (graph.n_nodes, graph.n_nodes)), weight, x),
    )


class _Gradient:
    """A dense gradient that is there already. Who asks for a block may write into it, so each is a copy."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def rows(self) -> None:
        return None

    def block(self, rows: Tensor | slice) -> Tensor:
        return self.gradient[rows].clone()


def explore(density: float, device: str, rows: int, cols: int) -> Forms:
    """Prune 30 % of the weights, grow as many, move values and two moments along; the gradient is given."""
    weight = weight_of(rows, cols, density, device)
    k, values = round(0.3 * weight.nnz), weight.values.clone()
    mask, table = weight.pattern.to_mask(), weight.dense
    first, second = torch.rand(2, weight.nnz, device=device)
    gradient, state = torch.randn(rows, cols, device=device), torch.rand(rows, cols, device=device)

    def run(i: int) -> Any:
        left = ops.explore.prune(values, weight.index, weight.shape, k)
        new = ops.explore.grow(_Gradient(gradient), left, weight.shape, k)
        ops.explore.realign_([(values, 0.0), (first, 0.0), (second, 0.0)], weight.index, new, weight.shape)
        values.copy_(weight.values)  # the next call prunes the same weights
        return new

    def dense(i: int) -> Tensor:
        drop = torch.topk(torch.where(mask, table.abs(), torch.inf).view(-1), k, largest=False, sorted=False)
        chosen = mask.clone().view(-1)
        chosen[drop.indices] = False  # and may be grown at once
        grow = torch.topk(torch.where(chosen, -1.0, gradient.abs().view(-1)), k, sorted=False)
        chosen[grow.indices] = True
        new = table.clone().view(-1)
        for tensor in (new, state.view(-1), state.view(-1)):  # value and two moments
            tensor[drop.indices] = 0
            tensor[grow.indices] = 0
        return chosen

    def error(ours: tuple[Tensor, Tensor | None], reference: Tensor) -> float:
        crow, col = ours
        crow, columns = decode(crow, cols) if col is None else (crow, col)
        found = Pattern(crow, columns, weight.shape).to_mask().view(-1)
        return float((found != reference).sum()) / max(1, k)

    return Forms(ours=run, dense={"topk on masks": dense}, error=error)


def adam(density: float, device: str, rows: int, cols: int) -> Forms:
    """The update alone, from a gradient that is there."""
    weight = weight_of(rows, cols, density, device)
    gradient = torch.randn(rows, cols, device=device)

    def stepping(begin: Tensor, grad: Tensor, make: Callable[..., torch.optim.Optimizer]) -> Run:
        @functools.cache  # at the first call: one that cannot be made is a form that fails
        def optimizer() -> torch.optim.Optimizer:
            parameter = nn.Parameter(begin.clone())
            parameter.grad = grad
            return make([parameter])

        def run(i: int) -> Tensor:
            optimizer().step()
            return optimizer().param_groups[0]["params"][0].detach()

        return run

    fused = functools.partial(torch.optim.Adam, fused=True)
    foreach = functools.partial(torch.optim.Adam, foreach=True)
    own = gradient.view(-1)[weight.positions]
    return Forms(
        ours=stepping(weight.values, own, fused),
        dense={
            "fused Adam": stepping(weight.dense, gradient, fused),
            "foreach Adam": stepping(weight.dense, gradient, foreach),
        },
        others={
            "foreach Adam over values": stepping(weight.values, own, foreach),
            "sparsecore.optim.Adam": stepping(weight.values, own, sparsecore.optim.Adam),
        },
        error=weight.at_nonzeros,
    )


_TABLE, _SMALL_TABLE = {"rows": 1_000_000, "cols": 64}, {"rows": 300, "cols": 20}
_LAYER, _SMALL_LAYER = {"rows": 20_000, "cols": 600}, {"rows": 60, "cols": 33}
_BATCH, _SMALL_BATCH = {"batch": 65_536}, {"batch": 7}
_lookup = functools.partial(
    Operation,
    size=_TABLE | _BATCH,
    quick=_SMALL_TABLE | _SMALL_BATCH,
    densities=HIGH_DENSITIES,
    rival=True,
)

OPERATIONS: dict[str, Operation] = {
    "gather 1M x 64, 65536 random rows": _lookup(gather),
    "gather_dot 1M x 64, 65536 pairs": _lookup(gather_dot),
    "scatter_grad 1M x 64, B = 65536": _lookup(scatter_grad),
    **{
        f"{build.__name__} 20000 x 600, B = {batch}": Operation(
            build,
            _LAYER | {"batch": batch},
            _SMALL_LAYER | {"batch": 5},
            densities=HIGH_DENSITIES,
            rival=True,
        )
        for build in (spmm, spmm_t, sddmm)
        for batch in (64, 512)
    },
    **{
        f"{build.__name__} 20000 x 600, B = 512, TF32": Operation(
            build, _LAYER | {"batch": 512}, _SMALL_LAYER | {"batch": 5}, densities=(0.9, 0.5, 0.1), tf32=True
        )
        for build in (spmm, spmm_t, sddmm)
    },
    "score_topk 256 users x 100k items x 64": Operation(
        score_topk,
        {"rows": 100_000, "cols": 64, "batch": 256, "k": 20},
        _SMALL_TABLE | {"batch": 9, "k": 5},
        densities=(0.9, *DENSITIES),
        rival=True,
    ),
    "explore 6.4M positions": Operation(
        explore, {"rows": 100_000, "cols": 64}, _SMALL_TABLE, densities=(0.9, *DENSITIES)
    ),
    "Adam 1M x 64, all values": Operation(adam, _TABLE, _SMALL_TABLE, densities=(0.9, *DENSITIES)),
    "propagate 70k nodes, 1.6M edges, d = 64": Operation(
        propagate,
        {"users": 30_000, "items": 40_000, "edges": 800_000, "dim": 64},
        {"users": 30, "items": 40, "edges": 200, "dim": 8},
        densities=(None,),
    ),
}
