"""Propagation over a graph A (crow, col, weight) whose transpose (crow_t, col_t, weight_t) serves the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecore.backends import load
from sparsecore.errors import SparsecoreError
from sparsecore.ops.operator import GRAPH, check_ids, keep, kept, nonzeros_of, operator, same_dtype
from sparsecore.ops.recording import watcher_of

__all__ = ["propagate", "propagate_mean", "propagate_mean_grad", "propagate_rows", "propagate_rows_t"]


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise SparsecoreError(f"{name} needs x of shape (nodes, d), got {tuple(x.shape)}")


def _propagate(
    crow: Tensor, col: Tensor, weight: Tensor, crow_t: Tensor, col_t: Tensor, weight_t: Tensor, x: Tensor
) -> Tensor:
    same_dtype("propagate", weight=weight, x=x)
    _check_matrix("propagate", x)
    return load(x.device).propagate(crow, col, weight, x)


def _propagate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])


def _propagate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a = ctx.saved_tensors
    return None, None, None, None, None, None, propagate(*a[3:], *a[:3], grad)


propagate = operator(
    f"propagate({GRAPH}, Tensor x) -> Tensor",
    _propagate,
    fake=lambda crow, col, weight, crow_t, col_t, weight_t, x: x.new_empty((crow.shape[0] - 1, x.shape[1])),
    setup=_propagate_setup,
    backward=_propagate_backward,
    macs=lambda crow, col, weight, crow_t, col_t, weight_t, x: col.shape[0] * x.shape[1],
)


def _propagate_rows(
    crow: Tensor, col: Tensor, weight: Tensor, crow_t: Tensor, col_t: Tensor, weight_t: Tensor, x: Tensor, ids: Tensor
) -> Tensor:  # fmt: skip
    same_dtype("propagate_rows", weight=weight, x=x)
    _check_matrix("propagate_rows", x)
    check_ids(ids, crow.shape[0] - 1)
    return load(x.device).propagate_rows(crow, col, weight, x, ids)


def _propagate_rows_t(
    crow: Tensor, col: Tensor, weight: Tensor, crow_t: Tensor, col_t: Tensor, weight_t: Tensor, x: Tensor, ids: Tensor
) -> Tensor:  # fmt: skip
    same_dtype("propagate_rows_t", weight=weight, x=x)
    check_ids(ids, crow.shape[0] - 1)
    return load(x.device).propagate_from(crow_t, col_t, weight_t, x, ids, crow.shape[0] - 1)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6], inputs[7])


def _propagate_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *a, ids = ctx.saved_tensors
    return *[None] * 6, propagate_rows_t(*a, grad, ids), None


def _propagate_rows_t_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *a, ids = ctx.saved_tensors
    return *[None] * 6, propagate_rows(*a, grad, ids), None


def _rows_macs(crow: Tensor, *rest: Any) -> int:
    x, ids = rest[5:]
    return nonzeros_of(crow, ids) * x.shape[1]


propagate_rows = operator(
    f"propagate_rows({GRAPH}, Tensor x, Tensor ids) -> Tensor",
    _propagate_rows,
    fake=lambda *args: args[6].new_empty((args[7].shape[0], args[6].shape[1])),
    setup=_rows_setup,
    backward=_propagate_rows_backward,
    macs=_rows_macs,
)
propagate_rows_t = operator(
    f"propagate_rows_t({GRAPH}, Tensor x, Tensor ids) -> Tensor",
    _propagate_rows_t,
    fake=lambda *args: args[6].new_empty((args[3].shape[0] - 1, args[6].shape[1])),
    setup=_rows_setup,
    backward=_propagate_rows_t_backward,
    macs=_rows_macs,
)


def _propagate_mean(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    crow_t: Tensor,
    col_t: Tensor,
    weight_t: Tensor,
    values: Tensor,
    table_crow: Tensor,
    table_col: Tensor | None,
    n_cols: int,
    hops: int,
) -> Tensor:
    """Horner's rule: E + A(E + A(E + ..)). One hop is live at a time; E itself is never dense, it is read in strips."""
    if weight.dtype is not values.dtype:
        same_dtype("propagate_mean", weight=weight, values=values)
    kernels = load(values.device)
    graph, table, mean = (crow, col, weight), (values, table_crow, table_col), 1 / (hops + 1)
    out = kernels.propagate_table(*graph, *table, n_cols, add=True, scale=mean if hops == 1 else 1.0)
    for hop in range(2, hops + 1):
        out = kernels.propagate(*graph, out, table=table, scale=mean if hop == hops else 1.0)
    return out


def _mean_macs(crow: Tensor, col: Tensor, *rest: Any) -> int:
    """First hop: the table's nonzeros that the graph reads; every further hop: nnz(A) d."""
    table_crow, n_cols, hops = rest[5], rest[7], rest[8]
    return nonzeros_of(table_crow, col.to(torch.int64)) + (hops - 1) * col.shape[0] * n_cols


def _propagate_mean_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    keep(ctx, *inputs[7:9])
    ctx.hops, ctx.nnz = inputs[10], inputs[6].shape[0]


def _propagate_mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (
        *[None] * 6,
        propagate_mean_grad(*ctx.saved_tensors, *kept(ctx), grad, ctx.hops, ctx.nnz),
        *[None] * 4,
    )


propagate_mean = operator(
    f"propagate_mean({GRAPH}, Tensor values, Tensor table_crow, Tensor? table_col, int n_cols, int hops) -> Tensor",
    _propagate_mean,
    fake=lambda *args: args[6].new_empty((args[0].shape[0] - 1, args[9])),
    setup=_propagate_mean_setup,
    backward=_propagate_mean_backward,
    macs=_mean_macs,
)


def _propagate_mean_grad(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    crow_t: Tensor,
    col_t: Tensor,
    weight_t: Tensor,
    table_crow: Tensor,
    table_col: Tensor | None,
    grad: Tensor,
    hops: int,
    nnz: int,
) -> Tensor:
    watcher = watcher_of(table_crow)
    if watcher is not None:
        watcher.saw_propagation(grad, (crow, col, weight, crow_t, col_t, weight_t), hops)
    kernels = load(grad.device)
    transpose, out = (crow_t, col_t, weight_t), grad
    for _ in range(hops - 1):
        out = kernels.propagate(*transpose, out, base=grad)
    return kernels.propagate_sample(*transpose, out, grad, table_crow, table_col, nnz, 1 / (hops + 1))


def _propagate_mean_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    keep(ctx, *inputs[6:8])
    ctx.n_cols, ctx.hops = inputs[8].shape[1], inputs[9]


def _propagate_mean_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    graph, (table_crow, table_col) = ctx.saved_tensors, kept(ctx)
    inner = propagate_mean(*graph, grad, table_crow, table_col, ctx.n_cols, ctx.hops)
    return (*[None] * 8, inner, None, None)


propagate_mean_grad = operator(
    f"propagate_mean_grad({GRAPH}, Tensor table_crow, Tensor? table_col, Tensor grad, int hops, int nnz) -> Tensor",
    _propagate_mean_grad,
    fake=lambda *args: args[8].new_empty((args[10],)),
    setup=_propagate_mean_grad_setup,
    backward=_propagate_mean_grad_backward,
    macs=lambda *args: args[9] * args[1].shape[0] * args[8].shape[1],
)
